"""The interpreter and the referee: on plain integers, and on numpy arrays with a transpose written by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from revolve_cases import Chain, Scripted, chain, finds_ends, members

from revolve import (
    GIVEN,
    Action,
    Advance,
    Binomial,
    Drop,
    Load,
    Memory,
    Periodic,
    Record,
    Report,
    Reverse,
    Run,
    Save,
    Saved,
    Schedule,
    StoreAll,
    StoreNothing,
    TierReport,
    VerificationError,
    both_sweeps,
    verify,
)
from revolve.sweeps import CACHED_STEPS

every_schedule = pytest.mark.parametrize("schedule", members(), ids=str)


# -- the referee


MIDDLE = (Load(0), Advance(0, 1), Record(1, 2), Reverse(1, 2))
BOTTOM = (Load(0), Record(0, 1), Reverse(0, 1), Drop(0))
SOUND = (
    (Save(0), Advance(0, 2), Save(2), Record(2, 3)),
    (Reverse(2, 3), Drop(2), *MIDDLE, *BOTTOM),
)

BROKEN: dict[str, tuple[tuple[Action, ...], tuple[Action, ...], str]] = {
    "loads what is not there": (SOUND[0], (Reverse(2, 3), Load(1)), r"Load\(1, tier=0\): nothing is kept there"),
    "loads what was dropped": (SOUND[0], (Drop(2), Load(2)), r"Load\(2, tier=0\): nothing is kept there"),
    "loads from the wrong tier": (SOUND[0], (Load(2, 1),), r"Load\(2, tier=1\): nothing is kept there"),
    "loads a given state that nobody gave": (SOUND[0], (Load(0, GIVEN),), r"Load\(0, tier=-1\): nothing is kept there"),
    "saves twice": ((Save(0), Save(0)), (), r"Save\(0, tier=0\): that state is already there"),
    "saves what it does not hold": ((Save(0), Advance(0, 2), Save(1)), (), r"Save\(1\): the working state is at 2"),
    "drops what is not there": ((Save(0), Drop(1)), (), r"Drop\(1, tier=0\): nothing to drop there"),
    "drops twice": ((Save(0), Drop(0), Drop(0)), (), r"Drop\(0, tier=0\): nothing to drop there"),
    "drops a given state": ((Drop(0, GIVEN),), (), "nothing to drop there"),
    "runs from another step": ((Save(0), Advance(1, 3)), (), "a run from step 1 was asked for, but the working state"),
    "runs after a reverse without a load": (SOUND[0], (Reverse(2, 3), Record(2, 3)), "the working state is at -1"),
    "runs backwards": ((Save(0), Advance(0, 2), Advance(2, 1)), (), "a run of 2 .. 1 from the state of step 2"),
    "runs past the end": ((Save(0), Advance(0, 4)), (), r"a run of 0 .. 4 from the state of step 0"),
    "runs no step": ((Advance(0, 0),), (), "a run of 0 .. 0"),
    "stops early": ((Save(0), Advance(0, 2)), (), "the first sweep ended at 2 of 3"),
    "ends on a loaded state": ((*SOUND[0], Load(0)), (), "the first sweep ended at 0 of 3"),
    "reverses in the first sweep": ((*SOUND[0], Reverse(2, 3)), (), r"Reverse\(2, 3\) has no cotangent"),
    "reverses what was not recorded": (SOUND[0], (Reverse(1, 2),), r"Reverse\(1, 2\): no tape of exactly these steps"),
    "reverses half a tape": ((Record(0, 3),), (Reverse(2, 3),), r"Reverse\(2, 3\): no tape of exactly these steps"),
    "reverses twice": (SOUND[0], (Reverse(2, 3), Reverse(2, 3)), r"Reverse\(2, 3\): no tape of exactly these steps"),
    "reverses out of order": (
        (Record(0, 1), Record(1, 2), Record(2, 3)),
        (Reverse(1, 2),),
        r"Reverse\(1, 2\) when the steps from 3 on are reversed",
    ),
    "reverses nothing": (SOUND[0], (Drop(0), Drop(2)), "the reverse sweep did not reach step 0"),
    "leaves out the first step": (SOUND[0], SOUND[1][:6], "the reverse sweep did not reach step 0"),
    "leaves a slot full": (SOUND[0], SOUND[1][:-1], "something is left in a slot or on a tape"),
    "leaves a slot of another tier full": (
        (Save(0, 1), *SOUND[0]),
        SOUND[1],
        "something is left in a slot or on a tape",
    ),
    "leaves a tape": (
        (Save(0), Record(0, 1), Load(0), Record(0, 3)),
        (Reverse(0, 3), Drop(0)),
        "something is left in a slot or on a tape",
    ),
    "records twice": (
        (Save(0), Advance(0, 2), Save(2), Record(2, 3), Load(2), Record(2, 3)),
        SOUND[1],
        "something is left in a slot or on a tape",
    ),
}


def test_a_sound_script_passes() -> None:
    tier = TierReport(saves=2, loads=2, peak_slots=2)
    assert verify(Scripted(*SOUND), 3, slots=2, tapes=1) == Report(3, 3, 3, 3, 1, {0: tier})


@pytest.mark.parametrize("fault", BROKEN)
def test_the_referee_rejects_a_schedule_that(fault: str) -> None:
    first, second, sentence = BROKEN[fault]
    with pytest.raises(VerificationError, match=sentence):
        verify(Scripted(first, second), 3)


@pytest.mark.parametrize("missing", range(len(SOUND[0]) + len(SOUND[1])))
def test_no_action_of_a_sound_script_can_be_left_out(missing: int) -> None:
    actions = [*SOUND[0], *SOUND[1]]
    cut = len(SOUND[0]) - (missing < len(SOUND[0]))
    del actions[missing]
    with pytest.raises(VerificationError):
        verify(Scripted(tuple(actions[:cut]), tuple(actions[cut:])), 3)


@given(st.integers(2, 30), st.integers(1, 6), st.data())
def test_no_action_of_a_binomial_plan_can_be_left_out(steps: int, slots: int, data: st.DataObject) -> None:
    first = tuple(Binomial(slots).forward(steps))
    actions = list(both_sweeps(Binomial(slots), steps))
    missing = data.draw(st.integers(0, len(actions) - 1))
    cut = len(first) - (missing < len(first))
    del actions[missing]
    with pytest.raises(VerificationError):
        verify(Scripted(tuple(actions[:cut]), tuple(actions[cut:])), steps)


def test_a_budget_that_is_exceeded_is_reported() -> None:
    with pytest.raises(VerificationError, match="3 slots used in tier 0, 2 allowed"):
        verify(Binomial(3), 20, slots=2)
    with pytest.raises(VerificationError, match="3 slots used in tier 0, 2 allowed"):
        verify(Binomial(3), 20, slots={0: np.int64(2)})  # type: ignore[dict-item]
    with pytest.raises(VerificationError, match="3 slots used in tier 0, 2 allowed"):
        verify(Binomial(3), 20, slots=np.int64(2))  # type: ignore[arg-type]
    with pytest.raises(VerificationError, match="20 recorded steps held at once, 19 allowed"):
        verify(StoreAll(), 20, tapes=19)


def test_tiers_are_counted_apart() -> None:
    promoted = (Load(0, 2), Drop(0, 2), Save(0, 0), Record(0, 1), Reverse(0, 1), Drop(0))
    script = Scripted(
        (Save(0, 2), Advance(0, 1), Save(1), Advance(1, 2), Record(2, 3)),
        (Reverse(2, 3), Load(1), Record(1, 2), Reverse(1, 2), Drop(1), *promoted),
    )
    report = verify(script, 3, slots={0: 1, 2: 1})
    assert report.tiers == {0: TierReport(2, 1, 1), 2: TierReport(1, 1, 1)}
    assert (report.saves, report.loads, report.peak_slots) == (3, 2, 2)


def test_a_plan_longer_than_the_cache_is_streamed_to_the_same_end() -> None:
    steps = CACHED_STEPS + 1
    assert verify(Binomial(20), steps) == Binomial(20).price(steps)


# -- numbers


@every_schedule
def test_the_gradient_does_not_depend_on_the_schedule(schedule: Schedule) -> None:
    for steps in (1, 2, 9, 30):
        reference, state, cotangent = chain(steps)
        run = Run(StoreAll(), reference)
        end, wanted = run.forward(state, steps), run.backward(cotangent)
        stepper, _, _ = chain(steps)
        run = Run(schedule, stepper)
        assert np.array_equal(run.forward(state, steps), end)
        assert np.array_equal(run.backward(cotangent), wanted)
        assert np.array_equal(stepper.gradient, reference.gradient)
        assert stepper.runs == schedule.price(steps).runs


@every_schedule
def test_the_gradient_is_the_dense_product_of_the_jacobians(schedule: Schedule) -> None:
    stepper, state, cotangent = chain(25)
    run = Run(schedule, stepper)
    run.forward(state, 25)
    dense = cotangent @ stepper.jacobian(state)
    # 25 products of 3 by 3 matrices near the identity round to a few hundred units in the last place
    assert np.allclose(run.backward(cotangent), dense, rtol=0, atol=1e-13 * np.abs(dense).max())


@every_schedule
def test_the_gradient_does_not_depend_on_knowing_the_end(schedule: Schedule) -> None:
    if not finds_ends(schedule):
        return
    for steps in (1, 2, 9, 30):
        stepper, state, cotangent = chain(steps)
        known = Run(schedule, stepper)
        end, wanted = known.forward(state, steps), known.backward(cotangent)
        found = Run(schedule, stepper)
        assert np.array_equal(found.forward(state), end)
        assert found.steps == steps
        assert np.array_equal(found.backward(cotangent), wanted)


@every_schedule
def test_a_given_first_state_is_never_stored_and_serves_again(schedule: Schedule) -> None:
    stepper, state, cotangent = chain(12)
    plain = Run(schedule, stepper)
    end, wanted = plain.forward(state, 12), plain.backward(cotangent)
    stores: defaultdict[int, Watched] = defaultdict(Watched)
    run = Run(schedule, stepper, stores, given=True)
    assert np.array_equal(run.forward(state, 12), end)
    first = state.copy()
    for _ in range(3):
        assert np.array_equal(run.backward(cotangent), wanted)
        assert not any(len(store) for store in stores.values())
    adopted = Run(schedule, stepper, stores, given=True)
    adopted.adopt(state, 12)
    assert np.array_equal(adopted.backward(cotangent), wanted)
    assert not any(0 in store.seen for store in stores.values())
    assert np.array_equal(state, first)


class Watched(Memory[np.ndarray]):
    """A store that remembers which steps it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def save(self, step: int, state: np.ndarray) -> None:
        self.seen.add(step)
        super().save(step, state)


@every_schedule
def test_every_store_is_empty_after_the_reverse_sweep(schedule: Schedule) -> None:
    stepper, state, cotangent = chain(20)
    stores: defaultdict[int, Memory[np.ndarray]] = defaultdict(Memory)
    run = Run(schedule, stepper, stores)
    run.forward(state, 20)
    run.backward(cotangent)
    assert not any(len(store) for store in stores.values())
    assert run.saved == Saved(frozenset())


class Slots:
    """A tier that hands out its own memory and poisons what it is told to drop, as a real pool of buffers would."""

    def __init__(self) -> None:
        self.states: dict[int, np.ndarray] = {}

    def save(self, step: int, state: np.ndarray) -> None:
        self.states[step] = state.copy()

    def load(self, step: int) -> np.ndarray:
        return self.states[step]

    def drop(self, step: int) -> None:
        self.states.pop(step).fill(np.nan)


@every_schedule
def test_a_store_may_lend_its_memory_until_the_slot_is_dropped(schedule: Schedule) -> None:
    stepper, state, cotangent = chain(20)
    copied, lent = Run(schedule, stepper), Run(schedule, stepper, defaultdict(Slots))
    copied.forward(state, 20)
    lent.forward(state, 20)
    assert np.array_equal(lent.backward(cotangent), copied.backward(cotangent))


@pytest.mark.parametrize("tier", [0, 1])
def test_a_slot_dropped_under_the_working_state_is_given_back_when_that_has_moved_on(tier: int) -> None:
    stepper, state, cotangent = chain(3)
    wanted = Run(StoreAll(), stepper)
    wanted.forward(state, 3)
    tiers = {0: Slots(), 1: Slots()}
    first = (Save(0), Advance(0, 2), Record(2, 3))
    promoted = (Reverse(2, 3), Load(0), Drop(0), Save(0, tier), Advance(0, 1), Record(1, 2), Reverse(1, 2))
    run = Run(Scripted(first, (*promoted, Load(0, tier), Record(0, 1), Reverse(0, 1), Drop(0, tier))), stepper, tiers)
    run.forward(state, 3)
    assert np.array_equal(run.backward(cotangent), wanted.backward(cotangent))
    assert not tiers[0].states and not tiers[1].states


def test_a_dropped_slot_stays_while_a_tape_recorded_from_it_is_held() -> None:
    stepper, state, cotangent = chain(3)
    wanted = Run(StoreAll(), stepper)
    wanted.forward(state, 3)
    store = Slots()
    first = (Save(0), Advance(0, 2), Record(2, 3))
    second = (Reverse(2, 3), Load(0), Drop(0), Record(0, 1), Save(1), Record(1, 2), Reverse(1, 2), Drop(1))
    run = Run(Scripted(first, (*second, Reverse(0, 1))), stepper, {0: store})
    run.forward(state, 3)
    assert np.array_equal(run.backward(cotangent), wanted.backward(cotangent))
    assert not store.states


def test_a_slot_that_is_still_on_its_way_out_is_given_back_when_a_run_is_cleared() -> None:
    stepper, state, _ = chain(3)
    store = Slots()
    run = Run(Scripted((Save(0), Load(0), Drop(0), Record(0, 3))), stepper, {0: store})
    run.forward(state, 3)
    assert store.states
    run.clear()
    assert not store.states


# -- unknown ends


@dataclass(frozen=True)
class Delayed:
    """Keeps x_0 and every state whose step proved not to be the last, once the next step has been run."""

    def forward(self, steps: int | None) -> Iterator[Action]:
        assert steps is None
        step = 0
        while True:
            yield Advance(step, step + 1)
            yield Save(step)
            step += 1

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return StoreNothing().backward(steps, saved)

    def price(self, steps: int) -> Report:
        raise NotImplementedError


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_store_delayed_until_a_step_proved_not_to_be_the_last(steps: int) -> None:
    report = verify(Delayed(), steps, known=False)
    assert report.plain_runs == steps
    assert report.saves == report.peak_slots == steps - 1
    assert report.loads == steps - 1


def test_a_delayed_store_keeps_the_state_before_the_step() -> None:
    stepper, state, cotangent = chain(10)
    wanted = Run(StoreAll(), stepper)
    wanted.forward(state, 10)
    run = Run(Delayed(), stepper)
    run.forward(state)
    assert run.saved.at == 9
    assert np.array_equal(run.backward(cotangent), wanted.backward(cotangent))


def test_an_unknown_end_is_approached_one_step_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"Advance\(0, 2\) with an unknown end: one step at a time"):
        Run(Scripted((Save(0), Advance(0, 2))), chain(5)[0]).forward(np.zeros(3))
    with pytest.raises(ValueError, match="stopped before the end was found"):
        Run(Scripted((Save(0), Advance(0, 1))), chain(5)[0]).forward(np.zeros(3))


# -- how a run may be used


def test_a_second_reverse_sweep_needs_a_given_first_state() -> None:
    stepper, state, cotangent = chain(5)
    run = Run(Binomial(2), stepper)
    with pytest.raises(RuntimeError, match=r"there is nothing to reverse: run forward\(\) first"):
        run.backward(cotangent)
    run.forward(state, 5)
    run.backward(cotangent)
    with pytest.raises(RuntimeError, match="given=True it may be repeated"):
        run.backward(cotangent)


def test_only_a_given_first_state_can_be_adopted() -> None:
    with pytest.raises(ValueError, match=r"adopt\(\) needs a Run made with given=True"):
        Run(Binomial(2), chain(5)[0]).adopt(np.zeros(3), 5)


@pytest.mark.parametrize("begin", [Run.forward, Run.adopt])
def test_a_run_of_no_steps_is_refused(begin: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="steps=0 is too small; give at least 1"):
        begin(Run(Binomial(2), chain(5)[0], given=True), np.zeros(3), 0)


def test_a_second_first_sweep_and_clear_give_the_slots_back() -> None:
    stepper, state, cotangent = chain(20)
    store: Memory[np.ndarray] = Memory()
    run = Run(Periodic(5), stepper, {0: store})
    run.forward(state, 20)
    held = len(store)
    run.forward(2 * state, 20)
    assert len(store) == held > 0
    fresh = Run(Periodic(5), stepper)
    fresh.forward(2 * state, 20)
    assert np.array_equal(run.backward(cotangent), fresh.backward(cotangent))
    run.forward(state, 20)
    run.clear()
    assert len(store) == 0
    with pytest.raises(RuntimeError, match="nothing to reverse"):
        run.backward(cotangent)


def test_a_stepper_may_work_in_place_when_the_store_copies() -> None:
    class InPlace(Chain):
        def advance(self, state: np.ndarray, start: int, stop: int) -> np.ndarray:
            state[:] = super().advance(state, start, stop)
            return state

        def record(self, state: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
            return Chain(self.matrices).record(state, start, stop)

    pure, state, cotangent = chain(15)
    for schedule in (Binomial(1), Binomial(3), Periodic(4), StoreNothing()):
        wanted, run = Run(schedule, pure), Run(schedule, InPlace(pure.matrices))
        assert np.array_equal(run.forward(state.copy(), 15), wanted.forward(state, 15))
        assert np.array_equal(run.backward(cotangent), wanted.backward(cotangent))


def test_memory_refuses_what_it_does_not_hold() -> None:
    with pytest.raises(KeyError):
        Memory[int]().load(3)
    with pytest.raises(KeyError):
        Memory[int]().drop(3)
