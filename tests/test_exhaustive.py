"""Every schedule that claims to be the cheapest is, of all sequences of moves, for every chain of up to seven steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from exhaustive import Rules, least
from hypothesis import given, settings
from hypothesis import strategies as st
from revolve_cases import members

from revolve import (
    SCHEDULES,
    Binomial,
    Differing,
    DiskRevolve,
    HRevolve,
    Mixed,
    Multistage,
    Online,
    Report,
    Schedule,
    Stages,
    StoreAll,
    Tier,
    beta,
    verify,
)

LONGEST = 7
DEAR = 1000.0
"""A run that is dearer than all moves together."""


class Claim(NamedTuple):
    """A schedule, and the machine on which nothing costs less."""

    schedule: Schedule
    rules: Rules


def spent(report: Report, rules: Rules) -> float:
    """What a plan costs, as the referee counts it, at the rules' prices."""
    assert isinstance(rules.step, float)
    moved = sum(
        rules.tiers[k][1] * t.saves + rules.tiers[k][2] * t.loads
        for k, t in report.tiers.items()
        if k < len(rules.tiers)
    )
    return report.plain_runs * rules.step + moved


TIERS: tuple[tuple[tuple[int, float, float], ...], ...] = (
    ((2, 0.0, 0.0),),
    ((2, 1.0, 2.0),),
    ((1, 0.0, 0.0), (1, 3.0, 1.0)),
    ((1, 0.0, 0.0), (2, 1.0, 1.0)),
    ((2, 1.0, 0.5), (2, 2.0, 4.0)),
    ((0, 0.0, 0.0), (2, 2.0, 1.0)),
    ((1, 0.0, 0.5), (1, 1.0, 0.5), (1, 2.0, 5.0)),
)
DISK = ((0, 2.0, 1.0, 1.0), (1, 1.0, 1.0, 1.0), (2, 9.0, 1.0, 1.0), (1, 0.5, 2.0, 3.0))
SIZES = ((1, 1), (1, 2), (2, 1), (2, 3))


def claims() -> dict[str, list[Claim]]:
    """By the name in SCHEDULES; a schedule that is not here claims nothing."""
    slots = range(1, 5)
    disks = [(DiskRevolve(c, w, r, uf, once), Rules(((c, 0.0, 0.0), (LONGEST, w, r)), uf, read_once=not once))
             for c, w, r, uf in DISK for once in (True, False)]  # fmt: skip
    return {
        "all": [Claim(StoreAll(), Rules(memory=100))],
        "nothing": [Claim(SCHEDULES["nothing"](), Rules(((1, 0.0, 0.0),)))],
        "binomial": [Claim(Binomial(c), Rules(((c, 0.0, 0.0),))) for c in slots]
        + [Claim(Binomial(c), Rules(((c, 1.0, 0.0),), DEAR)) for c in slots],
        "online": [Claim(Online(c), Rules(((c, 0.0, 0.0),))) for c in slots],
        "multistage": [
            Claim(Multistage(m, d), Rules(((m, 0.0, 0.0), (d, 1.0, 1.0)), DEAR))
            for m, d in ((1, 1), (1, 2), (2, 1), (0, 2), (2, 2))
        ],
        "hrevolve": [
            Claim(HRevolve(tuple(Tier(*tier) for tier in tiers), uf), Rules(tiers, uf))
            for tiers in TIERS
            for uf in (1.0, 3.0)
        ],
        "disk": [Claim(*disk) for disk in disks],
        "mixed": [
            Claim(Mixed(s, a, b, end), Rules(memory=s, state=a, tape=b, holds_end=end))
            for a, b in SIZES
            for s in range(a, 6)
            for end in (False, True)
        ],
        "stages": [
            Claim(Stages(s, stages, last), Rules(memory=s, tape=stages, holds_end=last))
            for stages in (1, 2, 3)
            for s in range(1, 6)
            for last in (False, True)
        ],
    }


CLAIMS = [(name, claim) for name, made in claims().items() for claim in made]


@pytest.mark.parametrize(("name", "claim"), CLAIMS, ids=lambda x: x if isinstance(x, str) else str(x.schedule))
def test_no_sequence_of_moves_costs_less(name: str, claim: Claim) -> None:
    assert isinstance(claim.schedule, SCHEDULES[name])
    for steps in range(1, LONGEST + 1):
        if isinstance(claim.schedule, Online) and steps > beta(slots=claim.schedule.slots, repetitions=2) + 1:
            break
        assert spent(verify(claim.schedule, steps), claim.rules) == least(steps, claim.rules), steps


@pytest.mark.parametrize("schedule", members(), ids=str)
def test_no_schedule_is_cheaper_than_the_cheapest_in_as_much_memory(schedule: Schedule) -> None:
    """Whatever it claims: below the least, the referee would be wrong."""
    for steps in range(1, LONGEST):
        report = verify(schedule, steps)
        tapes = report.peak_tapes - 1
        states = report.peak_slots
        memory = None if tapes == 0 else states + tapes
        assert report.plain_runs >= least(steps, Rules(((states, 0.0, 0.0),), memory=memory, holds_end=tapes > 0))


def sizes(steps: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * steps)


@st.composite
def chains(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.integers(1, 5))
    return {
        "costs": draw(sizes(steps, 0, 9)),
        "states": draw(sizes(steps, 1, 6)),
        "tapes": draw(sizes(steps, 1, 9)),
        "running": draw(sizes(steps, 0, 4)),
        "recording": draw(sizes(steps, 0, 6)),
    }


@settings(max_examples=25, deadline=None)
@given(chains(), st.integers(0, 12))
def test_steps_that_differ_cost_the_least_when_searched_and_seldom_more_when_not(
    chain: dict[str, Any], more: int
) -> None:
    steps, once = len(chain["costs"]), sum(chain["costs"])
    budget = Differing(budget=0, **chain).smallest(steps) + more
    rules = Rules(
        ((0, 0.0, 0.0),), chain["costs"], budget, *(chain[name] for name in ("states", "tapes", "running", "recording"))
    )
    exact, persistent = (Differing(budget=budget, exact=exact, **chain).cost(steps) - once for exact in (True, False))
    assert exact == least(steps, rules) <= persistent
