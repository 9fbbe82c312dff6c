"""Plans as checkpoint_schedules has them: driven by its rules, and back again through our referee."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import checkpoint_schedules as theirs
import numpy as np
import pytest
from revolve_cases import chain, members

from revolve import (
    Binomial,
    HRevolve,
    Mixed,
    Online,
    Run,
    Schedule,
    Segments,
    Stages,
    StoreAll,
    Tier,
    extra_steps,
    verify,
)
from revolve.interop import Exported, Imported, imported

RAM, DISK = theirs.StorageType.RAM, theirs.StorageType.DISK


def expressible(schedule: Schedule) -> bool:
    """Two tiers at most, and no start from a tape."""
    mixed = schedule.mixed if isinstance(schedule, Stages) else schedule
    return len(getattr(schedule, "tiers", ())) < 3 and not getattr(mixed, "holds_end", False)


every_schedule = pytest.mark.parametrize("schedule", [s for s in members() if expressible(s)], ids=str)


@every_schedule
def test_a_plan_that_goes_there_and_back_is_the_same_plan(schedule: Schedule) -> None:
    for steps in (1, 2, 9, 30):
        report, price = verify(imported(Exported(schedule, steps), steps), steps), schedule.price(steps)
        assert (report.runs, report.most_runs, report.saves) == (price.runs, price.most_runs, price.saves)
        assert all(report.tiers[tier].peak_slots <= price.tiers[tier].peak_slots for tier in report.tiers)


def driven(actions: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A gradient by the rules of checkpoint_schedules: data move only through working memory, and Move empties."""
    stepper, state, cotangent = chain(steps)
    stored: dict[Any, dict[int, tuple[str, Any]]] = {RAM: {}, DISK: {}}
    work: tuple[str, Any] | None = ("state", state)
    tapes: dict[int, Any] = {}
    for action in actions:
        match action:
            case theirs.Forward():
                assert work is not None and work[0] == "state"
                if action.write_ics:
                    stored[action.storage][action.n0] = work
                if action.write_adj_deps:
                    end, tape = stepper.record(work[1], action.n0, action.n1)
                    if action.storage in stored:
                        stored[action.storage][action.n0] = ("tape", tape)
                    else:
                        tapes[action.n1] = tape
                else:
                    end = stepper.advance(work[1], action.n0, action.n1)
                work = ("state", end)
            case theirs.Reverse():
                cotangent = stepper.reverse(tapes.pop(action.n1), cotangent)
                work = None
            case theirs.Copy() | theirs.Move():
                kept = stored[action.from_storage][action.n]
                if isinstance(action, theirs.Move):
                    del stored[action.from_storage][action.n]
                if action.to_storage in stored:
                    stored[action.to_storage][action.n] = kept
                elif action.to_storage == theirs.StorageType.WORK and kept[0] == "tape":
                    tapes[action.n + 1] = kept[1]
                elif action.to_storage == theirs.StorageType.WORK:
                    work = kept
            case theirs.EndReverse():
                break
    assert not any(stored.values()) and not tapes
    return cotangent, stepper.gradient


@every_schedule
def test_its_actions_make_the_same_gradient(schedule: Schedule) -> None:
    for steps in (1, 2, 13):
        stepper, state, cotangent = chain(steps)
        run = Run(StoreAll(), stepper)
        run.forward(state, steps)
        wanted = run.backward(cotangent)
        made = Exported(schedule, steps)
        cotangent, gradient = driven(made, steps)
        assert np.array_equal(cotangent, wanted) and np.array_equal(gradient, stepper.gradient)
        assert made.is_exhausted and made.r == steps


@pytest.mark.filterwarnings("ignore:Numba not available")
def test_its_schedules_pass_our_referee_at_our_price() -> None:
    for steps, slots in ((2, 1), (10, 3), (50, 4), (100, 3)):
        report = verify(imported(theirs.MultistageCheckpointSchedule(steps, slots, 0), steps), steps, slots=slots)
        assert report == Binomial(slots).price(steps)
        report = verify(imported(theirs.MixedCheckpointSchedule(steps, slots, storage=RAM), steps), steps)
        assert report.runs == Mixed(slots).cost(steps)
    everything = imported(theirs.SingleMemoryStorageSchedule(), 12)
    assert isinstance(everything, Imported) and verify(everything, 12) == StoreAll().price(12)
    assert verify(imported(theirs.TwoLevelCheckpointSchedule(10, 3), 30), 30).plain_runs >= extra_steps(
        steps=30, slots=6
    )


def gradient_by_pyadjoint(schedule: Any, steps: int) -> list[float]:
    """d(x_n^2) / d(x_0, a) for n logistic steps on pyadjoint's tape."""
    pyadjoint = pytest.importorskip("pyadjoint")
    with pyadjoint.set_working_tape() as tape:
        pyadjoint.continue_annotation()
        tape._package_data["none"] = Idle()
        if schedule is not None:
            tape.enable_checkpointing(schedule)
        start, rate = pyadjoint.AdjFloat(0.7), pyadjoint.AdjFloat(0.3)
        x = start
        for _ in tape.timestepper(iter(range(steps))):
            x = x + rate * x * (1 - x)
        reduced = pyadjoint.ReducedFunctional(x * x, [pyadjoint.Control(start), pyadjoint.Control(rate)])
        gradient = [float(derivative) for derivative in reduced.derivative()]
        pyadjoint.pause_annotation()
    return gradient


class Idle:
    """What pyadjoint asks of a package that keeps data on disk; floats keep none."""

    def continue_checkpointing(self) -> None:
        pass

    pause_checkpointing = continue_checkpointing


def taped(schedule: Schedule) -> bool:
    """Whether pyadjoint can follow it: kept states stay in the first sweep, which ends with a recorded step."""
    return not isinstance(schedule, Online) and not (isinstance(schedule, Segments) and schedule.last)


@pytest.mark.parametrize("schedule", [s for s in members() if expressible(s) and taped(s)], ids=str)
def test_pyadjoint_makes_the_same_gradient(schedule: Schedule) -> None:
    for steps in (1, 2, 9):
        assert gradient_by_pyadjoint(Exported(schedule, steps), steps) == gradient_by_pyadjoint(None, steps)


def test_a_promoted_state_is_moved_and_stored_anew() -> None:
    schedule = HRevolve((Tier(1), Tier(2, 3.0, 3.0)))
    actions = list(Exported(schedule, 14))
    promoted = [
        (a, b)
        for a, b in pairwise(actions)
        if isinstance(a, theirs.Move) and isinstance(b, theirs.Forward) and b.write_ics
    ]
    assert promoted
    assert all(a.from_storage == DISK and a.to_storage == theirs.StorageType.WORK and b.n0 == a.n for a, b in promoted)


def test_what_it_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only 0 \(RAM\) and 1 \(DISK\) exist"):
        Exported(next(s for s in members() if len(getattr(s, "tiers", ())) == 3), 100)
    with pytest.raises(ValueError, match="starts again from tapes, .*; take the same schedule without holds_end=True"):
        Exported(Mixed(3, holds_end=True), 20)
    with pytest.raises(ValueError, match="this plan was made for 9 steps; give steps=9"):
        imported(Exported(Online(3), 9), 9).price(10)
