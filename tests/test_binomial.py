"""The arithmetic of binomial checkpointing against a search, a recursion, and itself at large sizes."""

from __future__ import annotations

import heapq
import re
from functools import cache
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revolve import beta, extra_steps, fewest_slots, fewest_writes, longest_chain, optimal_splits, repetitions
from revolve.binomial import first_split

LONGEST = 120
MOST_SLOTS = 14


@cache
def cheapest(steps: int, slots: int) -> tuple[int, int]:
    """The least (plain runs, saves) over every legal sequence of machine moves, found by Dijkstra's search.

    A machine state is the step that is to be reversed next, the kept states, and the working state. The moves: run a
    step plainly, keep the working state, drop a kept state, load one, record the topmost step and reverse it.
    """
    start = (steps, frozenset[int](), 0)
    best = {start: (0, 0)}
    queue = [(0, 0, 0, start)]
    pushed = 0
    while queue:
        runs, saves, _, machine = heapq.heappop(queue)
        stop, kept, at = machine
        if stop == 0:
            return runs, saves
        if (runs, saves) > best[machine]:
            continue
        moves = [(runs, saves, (stop, kept - {step}, at)) for step in kept]
        moves += [(runs, saves, (stop, kept, step)) for step in kept]
        if at >= 0 and at not in kept and len(kept) < slots:
            moves.append((runs, saves + 1, (stop, kept | {at}, at)))
        if 0 <= at < stop:
            moves.append((runs + 1, saves, (stop, kept, at + 1)))
        if at == stop - 1:
            moves.append((runs, saves, (stop - 1, kept, -1)))
        for more_runs, more_saves, reached in moves:
            if (more_runs, more_saves) < best.get(reached, (10**9, 0)):
                best[reached] = (more_runs, more_saves)
                pushed += 1
                heapq.heappush(queue, (more_runs, more_saves, pushed, reached))
    raise AssertionError("no legal schedule")


@cache
def recursion() -> tuple[np.ndarray, np.ndarray, dict[tuple[int, int], list[int]], dict[tuple[int, int], list[int]]]:
    """t(n, c) = min over m of m + t(n-m, c-1) + t(m, c), its every minimiser, and the fewest writes among them."""
    never = 10**9
    cost = np.full((LONGEST + 1, MOST_SLOTS + 1), never)
    inner = np.full((LONGEST + 1, MOST_SLOTS + 1), never)
    cost[1], inner[1] = 0, 0
    splits, frugal = {}, {}
    for n in range(2, LONGEST + 1):
        for c in range(1, MOST_SLOTS + 1):
            m = np.arange(1, n)
            costs = m + cost[n - m, c - 1] + cost[m, c]
            cost[n, c] = costs.min()
            optimal = m[costs == cost[n, c]]
            writes = (n - optimal > 1) + inner[n - optimal, c - 1] + inner[optimal, c]
            inner[n, c] = writes.min()
            splits[n, c] = optimal.tolist()
            frugal[n, c] = optimal[writes == inner[n, c]].tolist()
    return cost, inner, splits, frugal


SMALL = [(n, c) for n in range(1, 8) for c in range(1, 8)]
GRID = [(n, c) for n in range(2, LONGEST + 1) for c in range(1, MOST_SLOTS + 1)]
sizes = st.tuples(st.integers(2, 2**70), st.integers(1, 200))


@pytest.mark.parametrize(("steps", "slots"), SMALL)
def test_no_legal_schedule_runs_or_writes_less(steps: int, slots: int) -> None:
    assert cheapest(steps, slots) == (extra_steps(steps=steps, slots=slots), fewest_writes(steps=steps, slots=slots))


def test_cost_equals_the_recursion() -> None:
    cost, _, _, _ = recursion()
    assert all(extra_steps(steps=n, slots=c) == cost[n, c] for n, c in GRID)


def test_writes_equal_the_recursion() -> None:
    _, inner, _, _ = recursion()
    assert all(fewest_writes(steps=n, slots=c) == inner[n, c] + 1 for n, c in GRID)


def test_every_optimal_split_is_found_and_no_other() -> None:
    _, _, splits, _ = recursion()
    assert all(list(optimal_splits(steps=n, slots=c)) == splits[n, c] for n, c in GRID)


def test_the_chosen_split_is_the_largest_that_also_writes_least() -> None:
    _, _, _, frugal = recursion()
    assert all(first_split(n, c) == frugal[n, c][-1] for n, c in GRID)


def test_repetitions_is_the_least_r_that_reaches_the_chain() -> None:
    for n, c in GRID:
        r = repetitions(steps=n, slots=c)
        assert comb(c + r - 1, c) < n <= comb(c + r, c)


@given(sizes)
def test_cost_and_writes_of_a_long_chain_are_those_of_its_two_parts(size: tuple[int, int]) -> None:
    steps, slots = size
    left = first_split(steps, slots)
    right = steps - left

    def inner(n: int, c: int) -> int:
        return 0 if n == 1 else fewest_writes(steps=n, slots=c) - 1

    if right > 1:
        assert extra_steps(steps=steps, slots=slots) == (
            left + extra_steps(steps=left, slots=slots) + extra_steps(steps=right, slots=slots - 1)
        )
        assert inner(steps, slots) == 1 + inner(right, slots - 1) + inner(left, slots)
    else:
        assert extra_steps(steps=steps, slots=slots) == left + extra_steps(steps=left, slots=slots)
        assert inner(steps, slots) == inner(left, slots)


@given(sizes, st.integers(0, 10**6))
def test_every_optimal_split_of_a_long_chain_costs_the_same(size: tuple[int, int], choice: int) -> None:
    steps, slots = size
    splits = optimal_splits(steps=steps, slots=slots)
    count = splits[-1] - splits[0] + 1
    for left in {splits[0], splits[-1], splits[0] + choice % count}:
        right = steps - left
        upper = extra_steps(steps=right, slots=slots - 1) if right > 1 else 0
        assert left + upper + extra_steps(steps=left, slots=slots) == extra_steps(steps=steps, slots=slots)


@given(sizes)
def test_another_slot_never_costs_more(size: tuple[int, int]) -> None:
    steps, slots = size
    assert extra_steps(steps=steps, slots=slots + 1) <= extra_steps(steps=steps, slots=slots)
    assert repetitions(steps=steps, slots=slots + 1) <= repetitions(steps=steps, slots=slots)


@given(sizes)
def test_the_inverses_undo_repetitions(size: tuple[int, int]) -> None:
    steps, slots = size
    r = repetitions(steps=steps, slots=slots)
    assert longest_chain(slots=slots, repetitions=r - 1) < steps <= longest_chain(slots=slots, repetitions=r)
    fewest = fewest_slots(steps=steps, repetitions=r)
    assert fewest <= slots
    assert repetitions(steps=steps, slots=fewest) <= r
    assert fewest == 1 or repetitions(steps=steps, slots=fewest - 1) > r


@given(sizes)
def test_the_inverses_undo_the_cost(size: tuple[int, int]) -> None:
    steps, slots = size
    cost = extra_steps(steps=steps, slots=slots)
    longest = longest_chain(slots=slots, extra_steps=cost)
    assert extra_steps(steps=longest, slots=slots) <= cost < extra_steps(steps=longest + 1, slots=slots)
    fewest = fewest_slots(steps=steps, extra_steps=cost)
    assert extra_steps(steps=steps, slots=fewest) <= cost
    assert fewest == 1 or extra_steps(steps=steps, slots=fewest - 1) > cost


@pytest.mark.parametrize(
    ("steps", "slots", "r", "extra"), [(100, 3, 7, 490), (64, 4, 4, 200), (1000, 10, 4, 3636), (1, 0, 0, 0)]
)
def test_published_numbers(steps: int, slots: int, r: int, extra: int) -> None:
    assert repetitions(steps=steps, slots=slots) == r
    assert extra_steps(steps=steps, slots=slots) == extra


def test_five_steps_in_two_slots_need_two_writes() -> None:
    assert fewest_writes(steps=5, slots=2) == 2


def test_capacity_is_a_binomial_coefficient() -> None:
    assert beta(slots=3, repetitions=6) == 84
    assert beta(slots=3, repetitions=7) == 120
    assert all(beta(slots=c, repetitions=r) == comb(c + r, c) for c in range(20) for r in range(20))


@pytest.mark.parametrize("slots", [1, 2, 3, 10, 64, 1000, 2**62])
def test_two_to_the_63_steps_are_exact(slots: int) -> None:
    steps = 2**63
    r = repetitions(steps=steps, slots=slots)
    assert r == (steps - 1 if slots == 1 else r)
    assert extra_steps(steps=steps, slots=slots) == r * steps - beta(slots=slots + 1, repetitions=r - 1)
    if slots == 1:
        assert extra_steps(steps=steps, slots=1) == steps * (steps - 1) // 2
    if slots == 2**62:
        assert (r, extra_steps(steps=steps, slots=slots)) == (2, 2 * steps - slots - 2)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint64])
def test_numpy_integers_count_like_integers(kind: type) -> None:
    assert extra_steps(steps=kind(100), slots=kind(3)) == 490
    assert type(extra_steps(steps=kind(100), slots=kind(3))) is int
    assert type(beta(slots=kind(100), repetitions=kind(100))) is int
    assert beta(slots=kind(100), repetitions=kind(100)) == comb(200, 100)
    assert fewest_slots(steps=kind(100), repetitions=kind(7)) == 3
    assert longest_chain(slots=kind(3), repetitions=kind(7)) == 120


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: extra_steps(steps=100, slots=0), "slots=0 cannot reverse 100 steps; give at least 1"),
        (lambda: extra_steps(steps=0, slots=3), "steps=0 is too small; give at least 1"),
        (lambda: repetitions(steps=5, slots=-1), "slots=-1 is too small; give at least 0"),
        (lambda: beta(slots=3, repetitions=-1), "repetitions=-1 is too small; give at least 0"),
        (lambda: fewest_slots(steps=5), "give exactly one of repetitions= and extra_steps="),
        (lambda: longest_chain(slots=5, repetitions=1, extra_steps=1), "give exactly one of"),
        (lambda: fewest_slots(steps=5, extra_steps=3), "extra_steps=3 cannot reverse 5 steps: .*; give at least 4"),
        (lambda: fewest_slots(steps=5, repetitions=0), "repetitions=0 is too small; give at least 1"),
    ],
)
def test_a_wrong_number_is_named_with_a_way_out(call, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("value", [3.0, "3", None, [3]])
def test_what_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=re.escape(f"slots={value!r} is not an integer")):
        extra_steps(steps=10, slots=value)  # type: ignore[arg-type]


def test_arguments_are_given_by_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        beta(3, 7)  # type: ignore[call-arg]
