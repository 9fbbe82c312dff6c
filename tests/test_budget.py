"""From slots or bytes to a plan, and what memory buys."""

from __future__ import annotations

import pickle
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from revolve_cases import chain, members

from revolve import (
    GIVEN,
    Binomial,
    Drop,
    Load,
    Memory,
    Periodic,
    Plan,
    Record,
    Reverse,
    Run,
    Save,
    Saved,
    Schedule,
    StoreAll,
    StoreNothing,
    both_sweeps,
    decode,
    encode,
    format_bytes,
    parse_bytes,
    plan,
    sweep,
    uniform_sweep,
)

every_schedule = pytest.mark.parametrize("schedule", members(), ids=str)


# -- sizes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("64kb", 64_000),
        ("64 KiB", 65536),
        (".5 gib", 2**29),
        ("2TiB", 2**41),
        ("3 TB", 3 * 10**12),
        ("4096", 4096),
        (" 17 B ", 17),
        ("0.1 GB", 100_000_000),
        (4096, 4096),
        (np.int64(7), 7),
    ],
)
def test_a_size_is_read_exactly(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number
    assert type(parse_bytes(text)) is int


@pytest.mark.parametrize("text", ["", "MiB", "12 parsecs", "1..5 GB", "-1 MB", "1,5 GB", "1e9 B", "12 K iB", "٣ MB"])
def test_what_is_no_size_is_named_with_a_way_out(text: str) -> None:
    with pytest.raises(ValueError, match=r"budget=.* is not a size; give bytes, or text like '512 MiB' or '1.5 GB'"):
        parse_bytes(text, "budget")


def test_a_size_is_a_whole_number_of_bytes_or_text() -> None:
    with pytest.raises(TypeError, match=r"size=1.5 is not an integer"):
        parse_bytes(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size=-1 is too small"):
        parse_bytes(-1)


@given(st.integers(0, 2**50), st.booleans())
def test_a_printed_size_is_never_too_small_and_close(number: int, decimal: bool) -> None:
    text = format_bytes(number, decimal=decimal)
    assert number <= parse_bytes(text) <= number * 1.01
    assert len(text) <= len("1023.9 GiB")


@pytest.mark.parametrize(
    ("number", "decimal", "text"),
    [
        (0, False, "0 B"),
        (1023, False, "1023 B"),
        (1024, False, "1 KiB"),
        (1_000_000, True, "1 MB"),
        (512 * 2**20, False, "512 MiB"),
        (1_234_567, True, "1.24 MB"),
    ],
)
def test_a_size_is_printed_in_three_digits(number: int, decimal: bool, text: str) -> None:
    assert format_bytes(number, decimal=decimal) == text


# -- plans


def test_slots_say_exactly_what_is_kept() -> None:
    assert plan(steps=100, slots=3).schedule == Binomial(3)
    assert plan(steps=100, slots=3).report.plain_runs == 490
    assert plan(steps=100, slots="all").schedule == StoreAll()
    assert plan(steps=1, slots=0).bytes == 0
    assert plan(steps=np.int64(100), slots=np.int64(3)) == plan(steps=100, slots=3)  # type: ignore[call-overload]


def test_the_predicted_bytes_are_states_tapes_and_the_rest() -> None:
    bounded = plan(steps=100, slots=3, state_bytes=1000, tape_bytes=70, working_bytes=9)
    assert (bounded.slots, bounded.bytes) == (3, 3 * 1000 + 70 + 9)
    given = plan(steps=100, slots=3, state_bytes=1000, tape_bytes=70, working_bytes=9, given=True)
    assert (given.slots, given.bytes) == (3, 2 * 1000 + 70 + 9)
    stored = plan(steps=100, slots="all", state_bytes=1000, tape_bytes=70, working_bytes=9, given=True)
    assert (stored.slots, stored.bytes) == (0, 100 * 70 + 9)


amounts = st.tuples(st.integers(1, 300), st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.booleans())


@given(amounts, st.integers(0, 200_000))
def test_a_budget_buys_the_cheapest_plan_that_fits(amounts: tuple[int, int, int, int, bool], budget: int) -> None:
    steps, state, tape, working, given = amounts
    sizes: dict[str, Any] = {"state_bytes": state, "tape_bytes": tape, "working_bytes": working, "given": given}
    schedules: list[Schedule] = [StoreAll(), *(Binomial(c) for c in range(1, max(steps, 2)))]
    fitting = [made for made in (Plan(steps, schedule, **sizes) for schedule in schedules) if made.bytes <= budget]
    if fitting:
        made = plan(steps=steps, budget=budget, **sizes)
        assert made.bytes <= budget
        assert made.report.plain_runs == min(candidate.report.plain_runs for candidate in fitting)
    else:
        with pytest.raises(ValueError, match="give at least"):
            plan(steps=steps, budget=budget, **sizes)


@given(amounts)
def test_a_budget_that_is_too_small_is_told_the_smallest_that_works(amounts: tuple[int, int, int, int, bool]) -> None:
    steps, state, tape, working, given = amounts
    sizes: dict[str, Any] = {"state_bytes": state, "tape_bytes": tape, "working_bytes": working, "given": given}
    try:
        plan(steps=steps, budget=0, **sizes)
    except ValueError as error:
        number, human = str(error).split("give at least ")[1].rstrip(")").split(" bytes (")
        assert plan(steps=steps, budget=int(number), **sizes).bytes <= int(number)
        assert plan(steps=steps, budget=human, **sizes).bytes <= parse_bytes(human)
        with pytest.raises(ValueError, match="give at least"):
            plan(steps=steps, budget=int(number) - 1, **sizes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0, "slots": 1}, "steps=0 is too small; give at least 1"),
        ({"steps": 5, "slots": 0}, "slots=0 cannot reverse 5 steps; give at least 1"),
        ({"steps": 5, "slots": -1}, "slots=-1 is too small; give at least 0"),
        ({"steps": 5, "slots": "al"}, "slots='al' is unknown; give a number of at least 1, or 'all'"),
        ({"steps": 5}, "slots=None and budget=None: give exactly one of them"),
        ({"steps": 5, "slots": 2, "budget": "1 MB"}, "slots=2 and budget='1 MB': give exactly one of them"),
        ({"steps": 5, "budget": "1 MB"}, "budget='1 MB' needs state_bytes= and tape_bytes=: the size of a state"),
        ({"steps": 5, "budget": "1 MB", "tape_bytes": 3}, "budget='1 MB' needs state_bytes= and tape_bytes="),
        ({"steps": 5, "budget": "big", "tape_bytes": 3, "state_bytes": 3}, "budget='big' is not a size; give bytes"),
        ({"steps": 5, "slots": 1, "state_bytes": -1}, "state_bytes=-1 is too small; give at least 0"),
        ({"steps": 5, "slots": 1, "tape_bytes": -1}, "tape_bytes=-1 is too small; give at least 0"),
        ({"steps": 5, "slots": 1, "working_bytes": -1}, "working_bytes=-1 is too small; give at least 0"),
        (
            {"steps": 9, "budget": 10, "state_bytes": 2048, "tape_bytes": 4096},
            r"budget=10 cannot reverse 9 steps with states of 2048 bytes and tapes of 4096 bytes; "
            r"give at least 6144 bytes \(6 KiB\)",
        ),
    ],
)
def test_a_wrong_plan_is_named_with_a_way_out(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(**arguments)


def test_a_plan_is_a_value() -> None:
    made = plan(steps=100, slots=3, state_bytes=8)
    rows = made.array()
    assert pickle.loads(pickle.dumps(made)) == made == plan(steps=100, slots=3, state_bytes=8)
    assert len(pickle.dumps(made)) < 1000 < rows.nbytes
    assert len({made, plan(steps=100, slots=3, state_bytes=8)}) == 1
    assert made != plan(steps=100, slots=4, state_bytes=8)


def test_the_array_of_a_plan_is_made_once_and_cannot_be_changed() -> None:
    made = plan(steps=100, slots=3)
    assert made.array() is made.array()
    with pytest.raises(ValueError, match="read-only"):
        made.array()[0, 0] = 1


@every_schedule
@pytest.mark.parametrize("given", [False, True])
def test_the_array_of_a_plan_is_what_a_run_carries_out(schedule: Schedule, given: bool) -> None:
    for steps in (1, 2, 13):
        stepper, state, cotangent = chain(steps)
        spy = Spy(schedule)
        run = Run(spy, stepper, given=given)
        run.forward(state, steps)
        run.backward(cotangent)
        carried_out = [a for a in spy.seen if not (given and isinstance(a, Save) and a.step == 0)]
        assert list(decode(Plan(steps, schedule, given=given).array())) == carried_out


class Spy:
    """A schedule that remembers the actions it gave."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.seen: list[object] = []

    def forward(self, steps):
        for action in self._schedule.forward(steps):
            self.seen.append(action)
            yield action

    def backward(self, steps, saved):
        for action in self._schedule.backward(steps, saved):
            self.seen.append(action)
            yield action

    def price(self, steps):
        return self._schedule.price(steps)


def test_a_plan_with_a_given_first_state_neither_saves_nor_drops_it() -> None:
    actions = list(decode(plan(steps=30, slots=3, given=True).array()))
    assert all(action.step > 0 for action in actions if isinstance(action, (Save, Drop)))
    assert Load(0, GIVEN) in actions and Load(0, 0) not in actions
    assert len(actions) == len(plan(steps=30, slots=3).array()) - 2


def test_both_sweeps_are_the_two_sweeps() -> None:
    steps = 30
    for schedule in members():
        first = list(schedule.forward(steps))
        saved = Saved(
            frozenset((a.step, a.tier) for a in first if isinstance(a, Save))
            - frozenset((a.step, a.tier) for a in first if isinstance(a, Drop)),
            tuple((a.start, a.stop) for a in first if isinstance(a, Record)),
        )
        assert list(both_sweeps(schedule, steps)) == [*first, *schedule.backward(steps, saved)]


def test_an_array_drives_a_run_of_ones_own() -> None:
    """A few lines of one's own over the rows, as an engine in another language would have them."""
    stepper, state, cotangent = chain(40)
    reference = Run(StoreAll(), stepper)
    reference.forward(state, 40)
    wanted = reference.backward(cotangent)
    store: Memory[np.ndarray] = Memory()
    tapes, working = {}, state
    for action in decode(plan(steps=40, slots=4).array()):
        match action:
            case Save(step):
                store.save(step, working)
            case Load(step):
                working = store.load(step)
            case Drop(step):
                store.drop(step)
            case Record(start, stop):
                working, tapes[start, stop] = stepper.record(working, start, stop)
            case Reverse(start, stop):
                cotangent = stepper.reverse(tapes.pop((start, stop)), cotangent)
            case _:
                working = stepper.advance(working, *action[1:])
    assert np.array_equal(cotangent, wanted)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            plan(steps=100, slots=3, state_bytes=2**20, tape_bytes=2**21),
            "Binomial(slots=3) reverses 100 steps with 490 plain runs and 100 recorded (5.9 a step, at most 8 of one "
            "step). It holds 3 states and 1 tape at once: 5 MiB. No schedule that keeps so few states runs less.",
        ),
        (
            plan(steps=100, slots="all"),
            "StoreAll() reverses 100 steps with 0 plain runs and 100 recorded (1 a step, nothing twice). "
            "It holds 100 tapes at once. Every tape is kept, so nothing runs twice.",
        ),
    ],
)
def test_a_plan_explains_itself(made: Plan, text: str) -> None:
    assert str(made) == made.explain() == text


# -- sweeps


def test_a_sweep_ends_with_the_plan_that_recomputes_nothing() -> None:
    plans = sweep(1000, range(1, 51), 8, 80, working_bytes=5)
    assert [made.schedule for made in plans] == [*(Binomial(c) for c in range(1, 51)), StoreAll()]
    runs = [made.report.plain_runs for made in plans]
    assert runs == sorted(runs, reverse=True)
    assert runs[9] == 3636 and runs[-1] == 0
    assert [made.bytes for made in plans[:-1]] == [8 * c + 80 + 5 for c in range(1, 51)]
    assert plans[2] == plan(steps=1000, slots=3, state_bytes=8, tape_bytes=80, working_bytes=5)


def test_a_sweep_names_the_slots_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="slots=0 cannot reverse 9 steps; give at least 1"):
        sweep(9, [1, 0])


@given(st.integers(1, 2000))
def test_uniform_checkpoints_never_need_fewer_than_two_square_roots(steps: int) -> None:
    swept = uniform_sweep(steps, 8)
    assert len(swept.rows) == steps
    assert all(row.states == row.checkpoints + ceil(steps / row.checkpoints) for row in swept.rows)
    assert swept.bound == 2 * sqrt(steps)
    assert swept.bound - 1e-9 <= swept.least.states < swept.bound + 1
    assert swept.store_all.bytes == 8 * steps


@pytest.mark.parametrize(("steps", "saved"), [(16, 50), (64, 75), (144, 83.3), (256, 87.5), (1024, 93.75)])
def test_square_chains_save_what_the_literature_says(steps: int, saved: float) -> None:
    swept = uniform_sweep(steps)
    assert swept.least.checkpoints == isqrt(steps)
    assert swept.least.states == 2 * isqrt(steps) == swept.bound
    assert 100 * (1 - swept.least.states / steps) == pytest.approx(saved, abs=0.05)


def test_the_uniform_price_bounds_what_periodic_holds() -> None:
    """Two of the k + L/k states never take a slot: the working state, and the last one of a segment."""
    for root in (4, 10, 12, 30):
        swept = uniform_sweep(root * root, checkpoints=[root])
        assert Periodic(root).price(root * root).peak_slots == swept.least.states - 2


def test_a_wrong_uniform_sweep_is_named_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="steps=0 is too small; give at least 1"):
        uniform_sweep(0)
    with pytest.raises(ValueError, match="checkpoints=0 is too small; give at least 1"):
        uniform_sweep(9, checkpoints=[0])


def test_a_plan_of_a_schedule_of_ones_own_has_an_array() -> None:
    assert np.array_equal(Plan(9, StoreNothing()).array(), encode(both_sweeps(StoreNothing(), 9)))
    assert Reverse(0, 1) in list(decode(Plan(9, StoreNothing()).array()))
