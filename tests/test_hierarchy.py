"""Schedules for several kinds of memory: against published numbers, each other, and the referee."""

from __future__ import annotations

import time
from dataclasses import fields
from math import inf

import pytest

from revolve import (
    Binomial,
    Bisection,
    DiskRevolve,
    Drop,
    HRevolve,
    Load,
    Multistage,
    PeriodicDisk,
    Report,
    Save,
    Selected,
    Tier,
    both_sweeps,
    extra_steps,
    verify,
)
from revolve.multistage import _used

Prices = tuple[tuple[int, float, float], ...]


def spent(report: Report, tiers: Prices, step_cost: float) -> float:
    prices = {k: (write, read) for k, (_, write, read) in enumerate(tiers)}
    moved = sum(prices[k][0] * tier.saves + prices[k][1] * tier.loads for k, tier in report.tiers.items())
    return report.plain_runs * step_cost + moved


TIERS: tuple[Prices, ...] = (
    ((2, 0.0, 0.0),),
    ((2, 1.0, 2.0),),
    ((1, 0.0, 0.0), (1, 3.0, 1.0)),
    ((1, 0.0, 0.0), (2, 1.0, 1.0)),
    ((2, 1.0, 0.5), (2, 2.0, 4.0)),
    ((0, 0.0, 0.0), (2, 2.0, 1.0)),
    ((1, 0.0, 0.5), (1, 1.0, 0.5), (1, 2.0, 5.0)),
)


@pytest.mark.parametrize("tiers", TIERS)
def test_the_cost_of_a_longer_chain_is_what_the_referee_counts(tiers: Prices) -> None:
    schedule = HRevolve(tiers)  # type: ignore[arg-type]
    for steps in (8, 20, 61):
        report = verify(schedule, steps, slots={k: slots for k, (slots, _, _) in enumerate(tiers)})
        assert spent(report, tiers, 1.0) == schedule.cost(steps)


def test_one_free_tier_is_binomial() -> None:
    for slots in (1, 2, 5):
        for steps in (1, 2, 10, 77):
            assert HRevolve((Tier(slots),)).cost(steps) == extra_steps(steps=steps, slots=slots)


def test_the_published_optimum() -> None:
    """250 steps, the transpose of each at price 1: 1290; Binomial in as many slots, disk below, pays far more."""
    schedule = HRevolve((Tier(3), Tier(7, 10.0, 10.0)))
    assert schedule.cost(250) + 250 == 1290
    verify(schedule, 250, slots={0: 3, 1: 7})
    assert Multistage(3, 7).price(250).tiers[1].loads * 10 > 700


def test_the_plan_knows_no_price_of_the_transpose() -> None:
    assert {field.name for field in fields(HRevolve)} == {"tiers", "step_cost"}


@pytest.mark.slow
def test_ten_thousand_steps_in_ten_and_ten_slots_plan_in_five_seconds() -> None:
    before = time.process_time()
    cost = HRevolve((Tier(10), Tier(10, 5.0, 5.0))).cost(10_000)
    assert time.process_time() - before < 5
    assert cost >= extra_steps(steps=10_000, slots=20)


def test_multistage_moves_less_than_ranking_the_places_of_one_stack() -> None:
    for steps, memory, disk in ((60, 3, 3), (250, 3, 7), (1000, 5, 5)):
        use = [0] * (memory + disk)
        held: list[int] = []
        for action in both_sweeps(Binomial(memory + disk), steps):
            if isinstance(action, Save):
                held.append(action.step)
                use[len(held) - 1] += 1
            elif isinstance(action, Drop):
                held.pop()
            elif action.verb == 4:
                use[len(held) - 1] += 1
        ranked = sum(sorted(use)[:disk])
        report, placed = Multistage(memory, disk).price(steps), Multistage(memory, disk, promotes=False).price(steps)
        assert report.plain_runs == placed.plain_runs == extra_steps(steps=steps, slots=memory + disk)
        assert report.tiers[1].saves + report.tiers[1].loads <= placed.tiers[1].saves + placed.tiers[1].loads <= ranked


def test_the_use_of_each_place_is_what_the_plan_does() -> None:
    for steps, slots in ((1, 2), (2, 2), (9, 1), (60, 3), (333, 7)):
        used, depth = [0] * slots, 0
        for action in both_sweeps(Binomial(slots), steps):
            depth += isinstance(action, Save) - isinstance(action, Drop)
            if isinstance(action, (Save, Load)):
                used[depth - 1] += 1
        assert _used(steps, slots).tolist() == [used[0] - (steps > 1), *used[1:]]


def test_a_long_chain_is_placed_by_rank() -> None:
    report = Multistage(50, 50, promotes=False).price(200_000)
    assert report.plain_runs == extra_steps(steps=200_000, slots=100)
    assert report.tiers[0].saves > report.tiers[1].saves and report.tiers[0].loads > report.tiers[1].loads
    assert all(tier.peak_slots <= 50 for tier in report.tiers.values())


@pytest.mark.parametrize(("rereads", "cost"), [(True, 265), (False, 280)])
def test_the_published_optimum_with_an_unlimited_disk(rereads: bool, cost: int) -> None:
    schedule = DiskRevolve(2, 9.0, 1.0, rereads=rereads)
    assert schedule.cost(60) + 60 == cost
    report = verify(schedule, 60, slots=2)
    assert spent(report, ((2, 0.0, 0.0), (0, 9.0, 1.0)), 1.0) + 60 == cost
    if not rereads:
        assert report.tiers[1].loads == report.tiers[1].saves


@pytest.mark.parametrize(
    ("slots", "write", "read", "step_cost"), [(0, 2, 1, 1), (1, 1, 1, 1), (2, 9, 1, 1), (3, 4, 2, 0.5)]
)
def test_an_unlimited_disk_is_as_many_slots_as_steps(slots: int, write: float, read: float, step_cost: float) -> None:
    schedule = DiskRevolve(slots, write, read, step_cost)
    for steps in (*range(1, 25), 60):
        bounded = HRevolve((Tier(slots), Tier(steps, write, read)), step_cost)
        assert schedule.cost(steps) == pytest.approx(bounded.cost(steps), rel=1e-12)
        report = verify(schedule, steps, slots=slots)
        assert spent(report, ((slots, 0, 0), (0, write, read)), step_cost) == pytest.approx(schedule.cost(steps))


def test_one_read_and_a_period_cost_a_little_more() -> None:
    prices = ((3, 0.0, 0.0), (0, 20.0, 10.0))
    for steps in (10, 100, 700):
        exact, once = (DiskRevolve(3, 20.0, 10.0, rereads=rereads).cost(steps) for rereads in (True, False))
        periodic = spent(verify(PeriodicDisk(3, 20.0, 10.0), steps, slots=3), prices, 1.0)
        assert exact <= once <= periodic <= 1.2 * exact


def test_the_period_is_a_binomial_coefficient() -> None:
    """beta(3, 2) = 10: beta(4, 1) = 5 <= 10 < beta(4, 2) = 15 with slots = 3."""
    assert PeriodicDisk(3, 9.0, 1.0).period == 10


def test_files_are_dropped_one_by_one() -> None:
    for schedule in (DiskRevolve(2, 9.0, 1.0), PeriodicDisk(2, 9.0, 1.0), HRevolve((Tier(2), Tier(3, 1.0, 1.0)))):
        actions = list(both_sweeps(schedule, 60))
        saves = [a for a in actions if isinstance(a, Save) and a.tier == 1]
        drops = [a for a in actions if isinstance(a, Drop) and a.tier == 1]
        assert sorted(a.step for a in saves) == sorted(a.step for a in drops) and saves


# -- chosen by hand, or by halving


def test_bisection_takes_the_logarithm_of_slots_and_more_runs_than_binomial() -> None:
    for steps in (2, 3, 10, 64, 100, 1000, 1025):
        report = Bisection().price(steps)
        assert report.peak_slots <= (steps - 1).bit_length()
        assert report.plain_runs >= extra_steps(steps=steps, slots=report.peak_slots)
    assert Bisection().price(1024).plain_runs == 1024 * 10 // 2


def test_what_is_selected_is_what_is_kept() -> None:
    kept = {a.step for a in Selected((4, 8, 12), "rerun").forward(16) if isinstance(a, Save)}
    assert kept == {0, 4, 8, 12}
    assert Selected((8, 4, 12, 0)) == Selected((4, 8, 12))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: HRevolve(()), r"tiers=\(\) holds nothing; give at least one"),
        (lambda: HRevolve((Tier(-1),)), "slots=-1 is too small; give at least 0"),
        (lambda: HRevolve((Tier(1), Tier(2, -1.0))), "write=-1.0 of tier 1 is not a price; give 0 or more"),
        (lambda: HRevolve((Tier(1),), -1.0), "step_cost=-1.0 is not a price"),
        (lambda: HRevolve((Tier(0), Tier(0))).cost(2), "slots=0 cannot reverse 2 steps; give at least 1"),
        (lambda: HRevolve((Tier(3),)).cost(10**6), "steps=1000000 is too long for exact tables; give at most 20000"),
        (lambda: DiskRevolve(-1, 1.0, 1.0), "slots=-1 is too small"),
        (lambda: HRevolve((Tier(1),), inf), "step_cost=inf is not a price; give 0 or more, and finite"),
        (lambda: DiskRevolve(1, inf, 1.0), "write=inf is not a price; give 0 or more, and finite"),
        (lambda: DiskRevolve(1, 1.0, -1.0), "read=-1.0 is not a price; give 0 or more"),
        (lambda: PeriodicDisk(1, 1.0, 1.0, 0.0), "step_cost=0 would never write a file"),
        (lambda: Selected((-1,)), "kept=-1 is too small"),
        (lambda: Multistage(1, -2), "disk=-2 is too small"),
    ],
)
def test_a_wrong_argument_is_named_with_a_way_out(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
