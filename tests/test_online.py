"""The online schedule: optimal as far as any can be, and never worse than the known rules beyond."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from runpy import run_path

import pytest

from revolve import Binomial, Online, Record, VerificationError, beta, extra_steps, verify

BENCHMARK = run_path(str(Path(__file__).parent.parent / "benchmarks" / "online.py"))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 10, 25])
def test_every_chain_up_to_two_repetitions_costs_the_offline_optimum(slots: int) -> None:
    for steps in range(1, beta(slots=slots, repetitions=2) + 2):
        assert Online(slots).price(steps).plain_runs == extra_steps(steps=steps, slots=slots)


@pytest.mark.parametrize("slots", [3, 4, 5, 8, 13])
def test_worst_and_mean_are_never_above_the_known_rules(slots: int) -> None:
    ratios = BENCHMARK["measured"](slots, 3000)
    for rule in ("greedy", "levels"):
        assert ratios["revolve"][0] <= ratios[rule][0]
        assert ratios["revolve"][1] <= ratios[rule][1]
    assert 1 < ratios["revolve"][0] < 1.07
    assert ratios["revolve"][1] < 1.016


def test_the_benchmark_prices_what_the_schedule_does() -> None:
    for slots in (1, 2, 5):
        runs = BENCHMARK["delayed"](slots)
        for steps in range(2, 200):
            assert next(runs)[0] == Online(slots).price(steps).plain_runs


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_finding_the_end_takes_one_plain_run_more(slots: int) -> None:
    for steps in (*range(1, 40), 150):
        told, found = verify(Online(slots), steps), verify(Online(slots), steps, known=False, slots=slots)
        assert found.plain_runs == told.plain_runs + 1
        assert (found.saves, found.loads, found.peak_slots) == (told.saves, told.loads, told.peak_slots)


def test_the_state_that_goes_is_the_one_whose_loss_costs_least() -> None:
    """Against a search of all subsets, from the same kept set, at the cost of section 3."""

    def cost(kept: tuple[int, ...], steps: int, slots: int) -> int:
        ends = (*kept[1:], steps - 1)
        gaps = [stop - start for start, stop in zip(kept, ends, strict=True)]
        return sum(extra_steps(steps=gap, slots=slots - i) for i, gap in enumerate(gaps))

    for slots in (2, 3, 5):
        for steps in range(slots + 3, 120):
            before, now = Online(slots).kept(steps - 1), Online(slots).kept(steps)
            candidates = combinations((*before, steps - 2), slots)
            assert cost(now, steps, slots) == min(cost(s, steps, slots) for s in candidates if s[0] == 0)


def test_the_reverse_sweep_is_the_offline_optimum_inside_each_gap() -> None:
    assert Online(4).kept(40)[0] == 0
    assert list(Online(1).forward(9))[-1] == Record(8, 9)
    assert Online(3).price(4) == Binomial(3).price(4)


def test_no_slot_cannot_reverse_an_unknown_chain() -> None:
    with pytest.raises(VerificationError, match="slots=0 cannot reverse a chain of unknown length; give at least 1"):
        verify(Online(0), 3, known=False)
    assert verify(Online(0), 1).runs == 1
    with pytest.raises(ValueError, match="is too long for an online schedule; give at most"):
        Online(3).price(10**9)
