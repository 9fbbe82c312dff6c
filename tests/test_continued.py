"""A run that can be continued: whatever lies in the folder when the process dies, another one ends with the same bits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from revolve_cases import Chain, chain, finds_ends, members

from revolve import Binomial, Disk, HRevolve, Journal, Memory, Online, Run, Schedule, StoreAll

STEPS = 11


@dataclass
class Steps(Chain):
    """A chain whose progress can be kept, and which tells before each of its calls."""

    before: Callable[[], None] = field(default=lambda: None)

    def advance(self, state: np.ndarray, start: int, stop: int) -> np.ndarray:
        self.before()
        return super().advance(state, start, stop)

    def reverse(self, tape: Any, cotangent: np.ndarray) -> np.ndarray:
        self.before()
        return super().reverse(tape, cotangent)

    def snapshot(self) -> np.ndarray:
        return self.gradient

    def restore(self, snapshot: np.ndarray) -> None:
        self.gradient = snapshot.copy()


class Outcome:
    """What a run gave: x_n, the cotangent of x_0, the gradient of the matrices."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.bytes = [x.tobytes() for x in arrays]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and self.bytes == other.bytes


def outcome(
    folder: Path, schedule: Schedule, on_disk: tuple[int, ...], known: bool = True, before: Any = lambda: None
) -> tuple[Outcome, Steps]:
    plain, state, cotangent = chain(STEPS)
    stepper = Steps(plain.matrices, before=before)
    journal = Journal(folder, about=plain.matrices, every=0)
    try:
        stores: dict[int, Any] = {tier: Memory() for tier in range(4)}
        stores |= {tier: Disk(journal=journal) for tier in on_disk}
        run = Run(schedule, stepper, stores, journal=journal)
        end = run.forward(state, STEPS if known else None)
        first = run.backward(cotangent)
    finally:
        journal.close()
    return Outcome(end, first, stepper.gradient), stepper


def expected() -> Outcome:
    stepper, state, cotangent = chain(STEPS)
    run = Run(StoreAll(), stepper)
    return Outcome(run.forward(state, STEPS), run.backward(cotangent), stepper.gradient)


def moments(folder: Path, schedule: Schedule, on_disk: tuple[int, ...], known: bool = True) -> list[Path]:
    """Copies of the folder as it was before every call of the stepper: what a process killed then leaves."""
    copies: list[Path] = []

    def before() -> None:
        copies.append(folder.with_name(f"killed-{len(copies)}"))
        shutil.copytree(folder, copies[-1])

    found, _ = outcome(folder, schedule, on_disk, known, before)
    assert found == expected()
    assert not folder.exists()
    return copies


@pytest.mark.parametrize("on_disk", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "schedule", [Binomial(3), HRevolve(((1,), (1, 0.5, 0.25), (2, 5.0, 9.0))), StoreAll()], ids=str
)
def test_a_run_killed_anywhere_is_continued_with_the_same_bits(
    schedule: Schedule, on_disk: tuple[int, ...], folder: Path
) -> None:
    copies = moments(folder / "run", schedule, on_disk)
    assert len(copies) >= 2 * STEPS
    work = []
    for copy in copies:
        found, stepper = outcome(copy, schedule, on_disk)
        assert found == expected()
        assert not copy.exists()
        work.append(stepper.runs)
    assert work[-1] <= STEPS  # what was done is not done again


@pytest.mark.parametrize("schedule", members(), ids=str)
def test_every_schedule_can_be_continued(schedule: Schedule, folder: Path) -> None:
    copies = moments(folder / "run", schedule, (1,))
    for copy in copies[:: len(copies) // 4]:
        assert outcome(copy, schedule, (1,))[0] == expected()


@pytest.mark.parametrize("schedule", [s for s in members() if finds_ends(s)], ids=str)
def test_a_chain_whose_end_is_found_can_be_continued(schedule: Schedule, folder: Path) -> None:
    copies = moments(folder / "run", schedule, (0,), known=False)
    for copy in copies[:: len(copies) // 6]:
        assert outcome(copy, schedule, (0,), known=False)[0] == expected()


def test_another_schedule_may_take_over(folder: Path) -> None:
    for copy in moments(folder / "run", Binomial(4), (0,))[::3]:
        assert outcome(copy, Online(4), (0,))[0] == expected()


def test_points_take_a_small_part_of_the_time_and_long_runs_stay_long(folder: Path) -> None:
    plain, state, cotangent = chain(3000)
    lengths: list[int] = []

    class Long(Steps):
        def advance(self, state: np.ndarray, start: int, stop: int) -> np.ndarray:
            lengths.append(stop - start)
            return Chain.advance(self, state, start, stop)

    stepper = Long(plain.matrices)
    journal = Journal(folder / "run", every=1e6)
    run = Run(Binomial(2), stepper, journal=journal)
    run.forward(state, 3000)
    assert not (folder / "run" / "forward").exists()
    assert max(lengths) > 500 and len(lengths) < 40
    written: list[str] = []
    seal = journal._seal
    journal._seal = lambda path, *rest: (written.append(path.name), time.sleep(0.01), seal(path, *rest))  # type: ignore[method-assign, assignment, func-returns-value]
    journal.every = 1e-9
    began = time.perf_counter()
    run.backward(cotangent)
    assert 1 <= len(written) <= 1 + (time.perf_counter() - began) / (0.01 * 20)


def test_one_folder_serves_one_run_after_another(folder: Path) -> None:
    results = [outcome(folder / "run", schedule, (0,))[0] for schedule in (Binomial(3), Binomial(5), StoreAll())]
    assert all(result == expected() for result in results)


def test_a_stepper_without_a_snapshot_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"Chain has no snapshot\(\); a run that can be continued needs snapshot"):
        Run(Binomial(3), chain(STEPS)[0], journal=Journal(folder / "run"))
