"""The one door: the cheapest plan for what is known of a chain and of the memory."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from revolve_cases import chain, members

from revolve import (
    Binomial,
    BudgetError,
    Differing,
    DiskRevolve,
    HRevolve,
    Load,
    Memory,
    Mixed,
    Multistage,
    Online,
    PeriodicDisk,
    Plan,
    Prices,
    Run,
    Save,
    Schedule,
    Storage,
    StoreAll,
    Tier,
    beta,
    both_sweeps,
    calibrate,
    extra_steps,
    plan,
    verify,
)


def test_an_unknown_length_is_planned_online() -> None:
    made = plan(steps=None, slots=5)
    assert made.schedule == Online(5)
    assert made.at(20).report.plain_runs == extra_steps(steps=20, slots=5)
    assert f"Up to {beta(slots=5, repetitions=2) + 1} steps" in made.explain()
    bytes_made = plan(steps=None, budget=1000, state_bytes=100, tape_bytes=250, working_bytes=40, given=True)
    assert bytes_made.schedule == Online(8)
    assert bytes_made.at(100).bytes <= 1000
    assert plan(steps=None, slots="all").schedule == StoreAll()
    with pytest.raises(ValueError, match=r"budget=100 cannot reverse .*; give at least 350 bytes"):
        plan(steps=None, budget=100, state_bytes=100, tape_bytes=250)


def test_steps_that_differ_are_planned_by_their_bytes() -> None:
    costs, states, tapes = (1, 5, 20, 20, 1, 5, 3, 9), (3, 1, 5, 8, 1, 5, 2, 2), (9, 9, 9, 9, 9, 9, 9, 9)
    made = plan(costs=costs, budget=30, state_bytes=states, tape_bytes=tapes, working_bytes=4)
    assert isinstance(made.schedule, Differing)
    assert made.steps == 8 and made.bytes <= 30
    assert "the least cost while what is kept stays" in made.explain()
    with pytest.raises(ValueError, match="give at least ") as caught:
        plan(costs=costs, budget=10, state_bytes=states, tape_bytes=tapes, working_bytes=4)
    least = int(str(caught.value).split("give at least ")[1].split(" bytes")[0])
    assert plan(costs=costs, budget=least, state_bytes=states, tape_bytes=tapes, working_bytes=4).bytes <= least
    short = plan(costs=(1, 5, 20, 20, 1, 5), budget=8, state_bytes=(3, 1, 5, 8, 1, 5))
    assert short.schedule.exact and "no sequence of moves" in short.explain()  # type: ignore[attr-defined]


def test_tapes_share_the_budget_when_asked() -> None:
    sizes: dict[str, Any] = {"state_bytes": 10, "tape_bytes": 20}
    plain, mixed = (plan(steps=50, budget=100, **sizes, mixed=mixed) for mixed in (False, True))
    assert plain.schedule == Binomial(8) and isinstance(mixed.schedule, Mixed)
    assert mixed.report.runs < plain.report.runs
    assert mixed.bytes <= 100
    assert "Keeping tapes in place of some states" in mixed.explain()


def test_tiers_are_weighed_by_their_prices() -> None:
    sizes: dict[str, Any] = {"state_bytes": 10, "tape_bytes": 20}
    bounded = plan(steps=250, tiers=[Storage(50), Storage(70, 10.0, 10.0)], **sizes)
    assert isinstance(bounded.schedule, HRevolve)
    assert [tier.slots for tier in bounded.schedule.tiers] == [3, 7]
    assert bounded.seconds == 1040 + 250 and "Predicted time: 1.29e+03 runs" in bounded.explain()
    timed = plan(steps=250, tiers=[Storage(50), Storage(70, 5.0, 5.0)], prices=Prices(0.5, reverse=2.0), **sizes)
    assert timed.report == bounded.report and timed.seconds == bounded.seconds / 2 + 250 * 2.0
    assert "Predicted time: 1.14e+03 s" in timed.explain()
    assert bounded.bytes <= 50 and bounded.tier_bytes[1] <= 70
    assert "Tier 1 holds 7 of the states" in bounded.explain()
    unlimited = plan(steps=60, tiers=[Storage(40), Storage(None, 9.0, 1.0)], **sizes)
    assert isinstance(unlimited.schedule, DiskRevolve) and unlimited.seconds == 265
    dear = plan(steps=60, tiers=[Storage(40), Storage(None, 1e6, 1e6)], **sizes)
    assert dear.schedule == Binomial(2)
    long = plan(steps=10**6, tiers=[Storage("1 KB"), Storage(None, 9.0, 1.0)], **sizes)
    assert isinstance(long.schedule, PeriodicDisk)
    assert plan(steps=60, tiers=[Storage("1 MB"), Storage(None, 9.0, 1.0)], **sizes).schedule == StoreAll()
    for made in (bounded, unlimited):
        assert verify(made.schedule, made.steps) == made.report


def test_measured_seconds_predict_the_time() -> None:
    stepper, state, cotangent = chain(20)
    prices = calibrate(stepper, state, cotangent, {0: Memory(), 1: Memory()})
    assert prices.step > 0 and prices.reverse > 0 and len(prices.write) == len(prices.read) == 2
    made = plan(steps=20, slots=3, prices=Prices(2.0, 3.0, 5.0, (7.0,), (11.0,)))
    report = made.report
    assert made.seconds == 2 * report.plain_runs + 20 * 8 + 7 * report.saves + 11 * report.loads
    assert "Predicted time:" in made.explain()


def test_measuring_a_stepper_leaves_its_sums_alone_and_tiers_that_were_left_out_free() -> None:
    stepper, state, cotangent = chain(20)
    before = stepper.gradient.copy(), stepper.runs
    prices = calibrate(stepper, state, cotangent, {2: Memory()}, repeats=1)
    assert np.array_equal(stepper.gradient, before[0]) and stepper.runs == before[1]
    assert prices.write[:2] == prices.read[:2] == (0.0, 0.0) and prices.write[2] > 0
    with pytest.raises(ValueError, match="repeats=0 is too small"):
        calibrate(stepper, state, cotangent, repeats=0)


def test_a_first_state_that_is_given_is_neither_written_nor_read() -> None:
    tiers = [Storage(40), Storage(None, 9.0, 1.0)]
    mine, yours = (plan(steps=60, tiers=tiers, state_bytes=10, tape_bytes=20, given=given) for given in (False, True))
    assert mine.report == yours.report  # the same schedule: x_0 lies in the second tier
    reads = list(both_sweeps(mine.schedule, 60)).count(Load(0, tier=1))
    assert mine.seconds - yours.seconds == 9.0 + reads * 1.0


@pytest.mark.parametrize("given", [False, True])
def test_one_memory_is_a_budget(given: bool) -> None:
    sizes: dict[str, Any] = {"steps": 60, "state_bytes": 10, "tape_bytes": 20, "working_bytes": 3, "given": given}
    for budget in range(60):
        made, wanted = [], []
        for found, how in ((made, {"tiers": [Storage(budget)]}), (wanted, {"budget": budget})):
            try:
                planned = plan(**sizes, **how)
                found += [planned.schedule, planned.bytes]
            except BudgetError as error:
                found.append(error.smallest)
        assert made == wanted


def test_a_plan_over_tiers_runs() -> None:
    made = plan(steps=30, tiers=[Storage(30), Storage(None, 2.0, 1.0)], state_bytes=10, tape_bytes=10)
    stepper, state, cotangent = chain(30)
    wanted = Run(StoreAll(), stepper)
    wanted.forward(state, 30)
    run = Run(made.schedule, stepper, {0: Memory(), 1: Memory()})
    run.forward(state, 30)
    assert np.array_equal(run.backward(cotangent), wanted.backward(cotangent))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"costs": (1, 2), "slots": 3}, "costs= of steps that differ need budget="),
        ({"costs": (1, 2), "budget": 9, "state_bytes": 3}, "need state_bytes= and tape_bytes= as sequences"),
        ({"costs": (1, 2), "budget": 9, "state_bytes": (3, 3), "steps": 3}, "steps=3, but there are 2 costs"),
        ({"tiers": [Storage(9)], "steps": 3}, "tiers= take the place of slots= and budget=, and need steps= and state"),
        ({"tiers": [Storage(9)], "steps": 3, "state_bytes": 5, "tape_bytes": 8}, "give at least 13 bytes"),
        ({"tiers": [Storage(5)], "steps": 3, "state_bytes": 5, "tape_bytes": 8}, "cannot hold one tape"),
        ({"steps": None, "budget": 9, "state_bytes": 0, "tape_bytes": 1}, "state_bytes=0 lets every state be kept"),
        ({"steps": None, "budget": 9, "state_bytes": 8, "tape_bytes": 8}, "cannot reverse a chain of unknown length"),
        ({"tiers": [], "steps": 3, "state_bytes": 5}, r"tiers=\[\] hold nothing; give at least one"),
        ({"tiers": "9 GB", "steps": 3, "state_bytes": 5}, "tiers='9 GB' hold nothing"),
        ({"tiers": ["9 GB"], "steps": 3, "state_bytes": 5}, r"tiers\[0\]='9 GB' is no Storage"),
        ({"tiers": [Storage(9), Tier(3)], "steps": 3, "state_bytes": 5}, r"tiers\[1\]=Tier.* give all of them so"),
        ({"tiers": [Storage(9, -1.0)], "steps": 3, "state_bytes": 5}, "take seconds, 0 or more"),
        ({"steps": 9, "slots": 3, "mixed": True}, "mixed=True shares a budget= of equal steps"),
        ({"steps": 9, "budget": 30, "holds_end": True, "state_bytes": 5, "tape_bytes": 8}, "give mixed=True as well"),
        ({"steps": 2, "budget": 30, "state_bytes": (5, 5), "tape_bytes": (8, 8)}, "give costs= as well, or one size"),
    ],
)
def test_a_wrong_plan_is_named_with_a_way_out(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(**arguments)


@pytest.mark.parametrize("schedule", members(), ids=str)
def test_every_schedule_says_why(schedule: Schedule) -> None:
    text = Plan(17, schedule, 10, 20).explain()
    assert text.startswith(f"{schedule} reverses 17 steps")
    assert re.search(r"\. (No |Only|Every|The |Binomial|A file)", text), text


def test_a_plan_says_what_the_memory_left_to_choose_from() -> None:
    sizes: dict[str, Any] = {"steps": 100, "state_bytes": 10, "tape_bytes": 50}
    assert "100 tapes fit the budget." in plan(**sizes, budget=5000).explain()
    assert "All tapes at once would take 4.89 KiB; the budget leaves room for 5 states beside one tape." in (
        plan(**sizes, budget=100).explain()
    )
    tiers = [Storage(100), Storage(1000, 1.0, 1.0)]
    assert (
        "It is the cheapest here: Binomial(slots=5) 416 runs would be predicted."
        in plan(**sizes, tiers=tiers).explain()
    )


def test_a_budget_that_is_too_small_knows_the_smallest_that_works() -> None:
    wrong: list[dict[str, Any]] = [
        {"steps": 9, "budget": 100, "state_bytes": 60, "tape_bytes": 70},
        {"steps": None, "budget": 100, "state_bytes": 60, "tape_bytes": 70},
        {"costs": (1, 2, 1), "budget": 100, "state_bytes": (90, 60, 60), "tape_bytes": (80, 80, 80)},
        {"steps": 9, "tiers": [Storage(100)], "state_bytes": 60, "tape_bytes": 70},
    ]
    for arguments in wrong:
        with pytest.raises(BudgetError) as caught:
            plan(**arguments)
        smallest = caught.value.smallest
        assert f"give at least {smallest} bytes" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        enough = {"tiers": [Storage(smallest)]} if "tiers" in arguments else {"budget": smallest}
        plan(**arguments | enough)


def test_traffic_is_counted_in_bytes() -> None:
    made = plan(steps=250, tiers=[Storage(50), Storage(70, 10.0, 10.0)], state_bytes=10, tape_bytes=20)
    tiers = made.report.tiers
    assert made.traffic == {k: (10 * tier.saves, 10 * tier.loads) for k, tier in tiers.items()}
    costs, states = (1, 5, 20, 20, 1, 5), (3, 1, 5, 8, 1, 5)
    differing = plan(costs=costs, budget=8, state_bytes=states)
    actions = list(both_sweeps(differing.schedule, 6))
    written, read = (sum(states[a[1]] for a in actions if isinstance(a, verb)) for verb in (Save, Load))
    assert differing.traffic == {0: (written, read)}
    given = plan(steps=30, slots=4, state_bytes=10, given=True)
    assert given.traffic == {0: (10 * (given.report.saves - 1), 10 * given.report.loads)}


def test_states_on_kept_tapes_take_no_bytes() -> None:
    made = plan(steps=60, budget=100, state_bytes=10, tape_bytes=20, mixed=True, holds_end=True)
    assert made.schedule == Mixed(8, 1, 2, True) and 1 in made.report.tiers
    assert list(made.tier_bytes) == [0] and made.bytes <= 100
    assert "Tier 1" not in made.explain()
    without = plan(steps=60, budget=100, state_bytes=10, tape_bytes=20, mixed=True)
    assert made.report.plain_runs < without.report.plain_runs


def test_a_chain_too_long_for_mixed_tables_keeps_states_alone() -> None:
    made = plan(steps=10**6, budget=10**6, state_bytes=1000, tape_bytes=30_000, mixed=True)
    assert isinstance(made.schedule, Binomial)
    tight = plan(steps=100, budget=408, state_bytes=400, tape_bytes=7, mixed=True)  # in units of 3 bytes no state fits
    assert tight.schedule == Binomial(1)
    equal = plan(steps=10**5, budget=10**6, state_bytes=1000, tape_bytes=1000, mixed=True)
    assert equal.schedule == Mixed(999) and equal.bytes <= 10**6


@given(
    st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.integers(0, 400), st.integers(0, 20), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_no_plan_with_tapes_takes_more_than_the_budget(
    steps: int, state: int, tape: int, more: int, working: int, given: bool, holds_end: bool
) -> None:
    budget = state * (not given) + tape + working + more
    sizes: dict[str, Any] = {"state_bytes": state, "tape_bytes": tape, "working_bytes": working, "given": given}
    made = plan(steps=steps, budget=budget, **sizes, mixed=True, holds_end=holds_end)
    assert made.bytes <= budget
    assert made.report.runs <= plan(steps=steps, budget=budget, **sizes).report.runs
    assert verify(made.schedule, steps) == made.report


def test_states_without_bytes_are_all_kept_and_long_chains_use_the_second_tier() -> None:
    tiers = [Storage(50), Storage(100, 1.0, 1.0)]
    assert plan(steps=100, tiers=tiers, state_bytes=0, tape_bytes=20).schedule == Binomial(99)
    long = plan(steps=30_000, tiers=[*tiers, Storage(1000, 2.0, 2.0)], state_bytes=10, tape_bytes=20)
    assert long.schedule == Multistage(3, 10, promotes=False)
