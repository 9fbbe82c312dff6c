"""Tapes in the slots: against the published recursion, published numbers, and the referee."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest

from revolve import Drop, Mixed, Record, Reverse, Save, Schedule, Stages, VerificationError, both_sweeps, verify


@cache
def published(n: int, s: int) -> int:
    """p(n, s) of section 5, as Maddison (2024) gives it."""
    if n <= s + 1:
        return n
    if s == 0:
        return 10**9
    if s == 1:
        return n * (n + 1) // 2 - 1
    kept = min(i + published(i, s) + published(n - i, s - 1) for i in range(2, n))
    return min(1 + published(n - 1, s - 1), kept)


def test_equal_sizes_are_the_published_recursion() -> None:
    for steps in range(1, 60):
        for slots in range(1, 9):
            assert Mixed(slots).cost(steps) == published(steps, slots)


@pytest.mark.parametrize(
    ("slots", "last_is_solution", "extra"), [(6, False, 92), (6, True, 92), (5, False, 110), (5, True, 109)]
)
def test_two_stages_need_fewer_runs_than_published(slots: int, last_is_solution: bool, extra: int) -> None:
    """50 steps in 6 units: 101 in the published recursion."""
    schedule = Stages(slots, 2, last_is_solution)
    assert schedule.cost(50) - 50 == extra
    assert verify(schedule, 50).plain_runs == extra


CASES: tuple[Mixed | Stages, ...] = (
    *(Mixed(1), Mixed(4), Mixed(9, 2, 3), Mixed(5, 3, 1), Mixed(8, 2, 2), Mixed(4, 1, 1, True), Mixed(9, 2, 3, True)),
    *(Stages(6, 2), Stages(7, 3, True), Stages(20, 4, True)),
)


@pytest.mark.parametrize("schedule", CASES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 64])
def test_states_and_tapes_together_never_take_more_than_the_slots(schedule: Mixed | Stages, steps: int) -> None:
    assert verify(schedule, steps).runs == schedule.cost(steps)
    mixed = schedule.mixed if isinstance(schedule, Stages) else schedule
    assert most_units(schedule, steps, mixed.state, mixed.tape) <= schedule.slots


def most_units(schedule: Schedule, steps: int, state: int, tape: int) -> int:
    """The most that kept states and kept tapes take; a tape that is consumed at once takes nothing."""
    units = most = 0
    at_once: set[int] = set()
    for action, following in pairwise([*both_sweeps(schedule, steps), None]):
        match action:
            case Save(_, 0):
                units += state
            case Drop(_, 0):
                units -= state
            case Record(start, stop) if following is None or following == Reverse(start, stop) or stop == steps:
                at_once.add(start)
            case Record(start, stop):
                units += tape * (stop - start)
            case Reverse(start, stop) if start not in at_once:
                units -= tape * (stop - start)
        most = max(most, units)
    return most


def test_a_state_on_tape_is_saved_where_it_takes_nothing() -> None:
    report = verify(Stages(5, 2, True), 50, slots={0: 5})
    assert report.tiers[1].saves > 0
    assert 1 not in verify(Stages(5, 2), 50).tiers


def test_sizes_in_bytes_become_units() -> None:
    assert Mixed.in_bytes(1000, 100, 300) == Mixed(10, 1, 3)
    rounded = Mixed.in_bytes(10**9, 8_000_001, 39_999_999)
    assert rounded == Mixed(200, 2, 8)
    assert Mixed.in_bytes(10**9, 5_000_000, 25_000_000) == Mixed(200, 1, 5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Mixed(1, 2).cost(5), "slots=1 cannot reverse 5 steps; give at least 2"),
        (lambda: Mixed(0).price(2), "slots=0 cannot reverse 2 steps; give at least 1"),
        (lambda: Mixed(3, 0), "state=0 is too small; give at least 1"),
        (lambda: Stages(3, 0), "stages=0 is too small; give at least 1"),
        (lambda: Mixed(3, 1, 2).cost(10**6), "steps=1000000 is too long for exact tables; give at most"),
        (lambda: Mixed(3).price(10**7), "steps=10000000 is too long for a plan to be counted; give at most"),
    ],
)
def test_a_wrong_argument_is_named_with_a_way_out(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_unknown_end_is_refused() -> None:
    with pytest.raises(VerificationError, match=r"give steps, or use Online\(slots\)"):
        verify(Mixed(3), 5, known=False)
