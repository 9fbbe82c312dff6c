"""Every schedule of the table meets every law."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import FrozenInstanceError
from itertools import islice
from math import isqrt, sqrt
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from revolve_cases import BY_TABLES, Leaving, Scripted, finds_ends, fits, members

from revolve import (
    GIVEN,
    Advance,
    Binomial,
    Drop,
    Load,
    Periodic,
    Plan,
    Record,
    Reverse,
    Save,
    Saved,
    Schedule,
    StoreAll,
    StoreNothing,
    VerificationError,
    both_sweeps,
    decode,
    encode,
    extra_steps,
    left_behind,
    verify,
)

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 50, 64, 101)

every_schedule = pytest.mark.parametrize("schedule", members(), ids=str)


@every_schedule
def test_the_price_is_what_the_referee_counts(schedule: Schedule) -> None:
    for steps in LENGTHS:
        assert verify(schedule, steps) == schedule.price(steps)


@every_schedule
def test_slots_and_tapes_stay_within_the_price(schedule: Schedule) -> None:
    for steps in LENGTHS:
        price = schedule.price(steps)
        verify(schedule, steps, slots=price.peak_slots, tapes=price.peak_tapes)


@every_schedule
def test_an_unknown_end_is_found_or_refused_with_a_way_out(schedule: Schedule) -> None:
    if finds_ends(schedule):
        for steps in LENGTHS:
            report = verify(schedule, steps, known=False)
            assert report.recorded_runs == steps
            assert report.runs >= schedule.price(steps).runs
    else:
        with pytest.raises(VerificationError, match="give "):
            verify(schedule, 5, known=False)


@every_schedule
def test_the_reverse_sweep_needs_nothing_but_the_given_first_state(schedule: Schedule) -> None:
    for steps in LENGTHS:
        assert reversed_steps(schedule.backward(steps, Saved(frozenset({(0, GIVEN)})))) == list(reversed(range(steps)))


def reversed_steps(actions) -> list[int]:
    return [step for action in actions if isinstance(action, Reverse) for step in reversed(range(*action[1:]))]


@st.composite
def leftovers(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """A length, kept states (x_0 among them, three at most), and tapes that end at one of these or at the end."""
    steps = draw(st.integers(1, 40))
    states = {0} | draw(st.sets(st.integers(0, steps - 1), max_size=2))
    tapes = []
    for start, stop in zip(sorted(states), [*sorted(states)[1:], steps], strict=True):
        first = draw(st.integers(start, stop))
        if first < stop:
            tapes.append((first, stop))
    return steps, tuple(sorted(states)), tuple(tapes)


@every_schedule
@settings(max_examples=15)
@given(left=leftovers())
def test_the_reverse_sweep_starts_from_whatever_is_left(schedule: Schedule, left) -> None:
    steps, states, tapes = left
    if fits(schedule, len(states)):
        verify(Leaving(schedule, states, tapes), steps, slots=getattr(schedule, "slots", None))


@given(left=leftovers(), slots=st.integers(3, 8))
def test_binomial_closes_every_gap_at_least_cost(left, slots: int) -> None:
    steps, states, tapes = left
    starts = {stop: start for start, stop in tapes}
    gaps = 0
    for taken, (start, stop) in enumerate(zip(states, [*states[1:], steps], strict=True)):
        top = starts.get(stop, stop)
        gaps += extra_steps(steps=top - start, slots=slots - taken) if top > start else 0
    swept = steps - sum(stop - start for start, stop in tapes)
    assert verify(Leaving(Binomial(slots), states, tapes), steps).plain_runs == swept + gaps


@every_schedule
def test_a_tape_that_nothing_leads_to_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"the tape \(2, 3\) lies inside the gap 0 .. 9"):
        list(schedule.backward(9, Saved(frozenset({(0, 0)}), ((2, 3),))))


@every_schedule
def test_nothing_comes_from_nothing(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="nothing at hand from which the steps before 9 can be reversed"):
        list(schedule.backward(9, Saved(frozenset())))


@every_schedule
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule and hash(twin) == hash(schedule)
    assert list(both_sweeps(twin, 17)) == list(both_sweeps(schedule, 17)) == list(both_sweeps(schedule, 17))
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        schedule.extra = 1  # type: ignore[attr-defined]


@every_schedule
def test_a_chain_without_steps_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="steps=0 is too small; give at least 1"):
        list(schedule.forward(0))
    with pytest.raises(ValueError, match="steps=0 is too small; give at least 1"):
        schedule.price(0)


@every_schedule
def test_prices_are_exact_integers_at_any_length(schedule: Schedule) -> None:
    steps = 2**63
    if isinstance(schedule, BY_TABLES):
        with pytest.raises(ValueError, match=r"is too long for .*; give at most"):
            schedule.price(steps)
        return
    price = schedule.price(steps)
    numbers = (price.plain_runs, price.recorded_runs, price.most_runs, price.peak_tapes, price.saves, price.loads)
    assert all(type(number) is int for number in numbers)
    assert price.recorded_runs == steps
    assert price == schedule.price(np.uint64(steps))  # type: ignore[arg-type]


@every_schedule
def test_numpy_integers_give_the_same_plan(schedule: Schedule) -> None:
    assert list(schedule.forward(np.int8(100))) == list(schedule.forward(100))  # type: ignore[arg-type]
    assert verify(schedule, np.int64(17)) == verify(schedule, 17)  # type: ignore[arg-type]


@every_schedule
def test_the_array_of_copied_pieces_is_the_walked_plan(schedule: Schedule) -> None:
    for steps in (*LENGTHS, 110):
        assert np.array_equal(Plan(steps, schedule).array(), encode(both_sweeps(schedule, steps)))


@given(st.integers(1, 600), st.integers(1, 40))
def test_the_array_of_binomial_is_the_walked_plan(steps: int, slots: int) -> None:
    assert np.array_equal(Binomial(slots).array(steps), encode(both_sweeps(Binomial(slots), steps)))


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 5, 13, 24])
def test_a_pickled_schedule_continues_from_any_moment_of_the_reverse_sweep(schedule: Schedule, steps: int) -> None:
    """From what is at hand there, the working state included: no dearer than the plan that was left."""
    actions = list(both_sweeps(schedule, steps))
    first = next(place for place, action in enumerate(actions) if isinstance(action, Reverse))
    price = schedule.price(steps)
    for cut in range(first, len(actions)):
        left = steps - len(reversed_steps(actions[:cut]))
        twin, saved = pickle.loads(pickle.dumps((schedule, left_behind(actions[:cut]))))
        rest = twin.backward(left, saved) if left else map(Drop, *zip(*saved.states, strict=True))
        report = verify(Scripted(tuple(actions[:first]), (*actions[first:cut], *rest)), steps)
        if schedule != Periodic():  # its spacing is the root of what is left
            assert report.plain_runs <= price.plain_runs
        assert all(report.tiers[k].peak_slots <= price.tiers[k].peak_slots for k in report.tiers)


def test_actions_survive_an_array_a_pickle_and_their_own_repr() -> None:
    actions = list(both_sweeps(Binomial(2), 9))
    assert list(decode(encode(actions))) == actions
    assert [type(action) for action in decode(encode(actions))] == [type(action) for action in actions]
    assert [type(action) for action in pickle.loads(pickle.dumps(actions))] == [type(action) for action in actions]
    assert eval(repr(actions)) == actions
    assert {action.verb for action in actions} == {v.verb for v in (Advance, Record, Reverse, Save, Load, Drop)}


def test_a_million_steps_fit_160_megabytes_as_an_array() -> None:
    rows = Binomial(100).array(1_000_000)
    assert rows.dtype == np.int64
    assert rows.nbytes < 160e6
    runs = rows[rows[:, 0] == Advance.verb]
    assert int((runs[:, 2] - runs[:, 1]).sum()) == extra_steps(steps=1_000_000, slots=100)


def test_a_million_steps_are_planned_in_less_than_a_third_of_a_second() -> None:
    """Of the processor, in memory that the process has already: the first time it has to be got from the system."""
    seconds = []
    for _ in range(3):
        before = process_time()
        rows = Plan(10**6, Binomial(100)).array()
        seconds.append(process_time() - before)
    assert len(rows) == 5_646_296 and min(seconds) < 0.3


def test_a_million_steps_are_walked_in_5_megabytes() -> None:
    schedule = Binomial(100)
    tracemalloc.start()
    saved = Saved(frozenset((a.step, a.tier) for a in schedule.forward(1_000_000) if isinstance(a, Save)))
    walked = sum(1 for _ in islice(schedule.backward(1_000_000, saved), 300_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert walked == 300_000
    assert peak < 5e6


def test_binomial_takes_the_slots_that_a_chain_can_use() -> None:
    assert Binomial(1000).price(10) == Binomial(9).price(10)
    assert Binomial(0).price(1).runs == 1
    with pytest.raises(VerificationError, match="slots=0 cannot reverse 2 steps; give at least 1"):
        verify(Binomial(0), 2)


def test_store_all_recomputes_nothing_and_store_nothing_everything() -> None:
    assert (StoreAll().price(100).plain_runs, StoreAll().price(100).peak_tapes) == (0, 100)
    assert (StoreNothing().price(100).plain_runs, StoreNothing().price(100).peak_slots) == (100 * 99 // 2, 1)


@given(st.integers(1, 10**6))
def test_a_segment_of_the_square_root_needs_two_square_roots_of_states(steps: int) -> None:
    price = Periodic().price(steps)
    assert price.peak_slots <= 2 * sqrt(steps)
    assert price.most_runs <= 3
    assert Periodic().spacing(steps) in (isqrt(steps), isqrt(steps) + 1)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1, 1e6))
def test_the_priced_spacing_is_the_cheapest(memory_price: float, step_price: float, state_bytes: float) -> None:
    chosen = Periodic.priced(memory_price=memory_price, step_price=step_price, state_bytes=state_bytes)
    assert chosen.inside == "rerun" and chosen.every is not None

    def cost(k: int) -> float:
        return memory_price * state_bytes / k + step_price * (k - 1) / 2

    assert all(cost(chosen.every) <= cost(k) for k in (chosen.every - 1, chosen.every + 1) if k >= 1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Binomial(-1), "slots=-1 is too small; give at least 0"),
        (lambda: Periodic(0), "every=0 is too small; give at least 1"),
        (lambda: Periodic(3, "drop"), "inside='drop' is unknown; give 'keep' or 'rerun'"),  # type: ignore[arg-type]
        (
            lambda: Periodic.priced(memory_price=0, step_price=1, state_bytes=1),
            "memory_price=0 is not a price; give a positive number",
        ),
        (lambda: next(Periodic().forward(None)), "with an unknown number of steps give every="),
        (lambda: next(Binomial(3).forward(None)), "Binomial places its slots by the number of steps; give steps"),
    ],
)
def test_a_wrong_argument_is_named_with_a_way_out(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_slot_count_that_is_no_integer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"slots=2.5 is not an integer"):
        Binomial(2.5)  # type: ignore[arg-type]


def test_a_plan_can_be_continued_from_the_middle() -> None:
    """The reverse sweep is interrupted after every Reverse; another schedule takes over from what is left."""
    steps = 12
    saved = Saved(frozenset({(0, GIVEN)}))
    done: list[int] = []
    states = set(saved.states)
    for action in Binomial(3).backward(steps, saved):
        if isinstance(action, Save):
            states.add((action.step, action.tier))
        elif isinstance(action, Drop):
            states.remove((action.step, action.tier))
        elif isinstance(action, Reverse):
            done += reversed(range(action.start, action.stop))
            rest = Periodic(2).backward(action.start, Saved(frozenset(states)))
            if action.start:
                assert done + reversed_steps(rest) == list(reversed(range(steps)))
