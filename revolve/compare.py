"""Uniform checkpoints beside better ones: the literature's table, and the ways to fit one chain into so many slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from revolve import binomial
from revolve.actions import Report, Schedule, TierReport
from revolve.budget import Prices, uniform_sweep
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.hierarchy import HRevolve, Tier
from revolve.mixed import Mixed
from revolve.multistage import Multistage
from revolve.schedules import Binomial, Periodic
from revolve.selected import Selected

LENGTHS = (16, 64, 144, 256, 1024)


@dataclass(frozen=True)
class UniformRow:
    """Uniform checkpoints at their best, and Binomial in the same slots."""

    steps: int
    checkpoints: int
    states: int
    """k checkpoints and the n/k states of one segment."""
    saved: float
    """The part of store-all's states that is saved, in per cent."""
    slots: int
    """The same without the working state and the last state of a segment, which never take a slot."""
    uniform_runs: int
    """Plain runs."""
    binomial_runs: int
    """Plain runs of Binomial in as many slots."""
    binomial_slots: int
    """The slots in which Binomial runs no step more often than uniform checkpoints do."""


def uniform_table(lengths: Iterable[int] = LENGTHS) -> list[UniformRow]:
    """What uniform checkpoints save and cost, with Binomial at equal memory and at equal runs beside it."""
    rows = []
    for steps in lengths:
        least = uniform_sweep(steps).least
        price = Periodic(-(-steps // least.checkpoints)).price(steps)
        rows.append(
            UniformRow(
                steps,
                least.checkpoints,
                least.states,
                100 * (1 - least.states / steps),
                price.peak_slots,
                price.plain_runs,
                binomial.extra_steps(steps=steps, slots=price.peak_slots),
                binomial.fewest_slots(steps=steps, repetitions=max(1, price.most_runs - 1)),
            )
        )
    return rows


@dataclass(frozen=True)
class Priced:
    """A schedule in so many slots in memory, and what it costs: runs, writes and reads at their prices."""

    slots: int
    schedule: Schedule
    cost: float
    report: Report


def priced_sweep(
    steps: int,
    slots: Iterable[int],
    *,
    write: float,
    read: float,
    step_cost: float = 1.0,
    disk: int | None = None,
) -> dict[str, list[Priced]]:
    """Time against memory, with a disk at a price: ``disk`` slots on it, or as many as one likes.

    The ways: in memory alone; the optimum; and what knows no prices (Multistage) or only a period (PeriodicDisk).
    """
    numbers = [binomial.whole("slots", number, least=1) for number in slots]
    prices = Prices(step_cost, write=(0.0, write), read=(0.0, read))

    def row(number: int, schedule: Schedule) -> Priced:
        report = schedule.price(steps)
        return Priced(number, schedule, prices.seconds(report), report)

    made = {"memory alone": [row(c, Binomial(c)) for c in numbers]}
    if disk is None:
        made["with a disk"] = [row(c, DiskRevolve(c, write, read, step_cost)) for c in numbers]
        made["files at a period"] = [row(c, PeriodicDisk(c, write, read, step_cost)) for c in numbers]
    else:
        tier = Tier(disk, write, read)
        made["with a disk"] = [row(c, HRevolve((Tier(c), tier), step_cost)) for c in numbers]
        made["prices ignored"] = [row(c, Multistage(c, disk)) for c in numbers]
    return made


@dataclass(frozen=True)
class Way:
    """One way to place checkpoints: what it keeps at once, and what it runs again."""

    name: str
    schedule: Schedule
    states: int
    """What is kept at once; where whole segments are kept, all of their states, as the literature counts."""
    plain_runs: int
    most_runs: int
    fits: bool


def ways(steps: int, slots: int, block: int) -> list[Way]:
    """Uniform, block boundaries, a selection of these, states or tapes within the slots, and Binomial."""
    steps, slots = binomial.check(steps, slots)
    block = binomial.whole("block", block, least=1)
    least = uniform_sweep(steps).least
    made = [
        _way("uniform", Periodic(-(-steps // least.checkpoints)), least.states, steps, slots),
        _way("block boundaries", _every(block, steps), -(-steps // block) + min(block, steps), steps, slots),
    ]
    spacing = [block * k for k in range(1, -(-steps // block) + 1) if _slots(block * k, steps) <= slots]
    if spacing:
        made.append(_way("selective", _every(spacing[0], steps), _slots(spacing[0], steps), steps, slots))
    made.append(_way("budget", Mixed(slots), slots, steps, slots))
    made.append(_way("binomial", Binomial(slots), Binomial(slots).price(steps).peak_slots, steps, slots))
    return made


def _every(spacing: int, steps: int) -> Selected:
    return Selected(tuple(range(0, steps, spacing)))


def _slots(spacing: int, steps: int) -> int:
    return _every(spacing, steps).price(steps).peak_slots


def _way(name: str, schedule: Schedule, states: int, steps: int, slots: int) -> Way:
    price = schedule.price(steps)
    return Way(name, schedule, states, price.plain_runs, price.most_runs, states <= slots)


def uniform_text(made: Iterable[UniformRow]) -> str:
    """The table of uniform checkpoints as text."""
    rows: list[tuple[str, ...]] = [
        ("steps", "checkpoints", "states", "saved", "slots", "uniform", "binomial", "binomial's slots")
    ]
    for row in made:
        runs = (f"{number / row.steps:.3f}" for number in (row.uniform_runs, row.binomial_runs))
        numbers = row.steps, row.checkpoints, row.states
        rows.append((*map(str, numbers), f"{row.saved:.4g} %", str(row.slots), *runs, str(row.binomial_slots)))
    lines = [
        "Checkpoints at equal distances, k of them: k + n/k states, and what is saved of store-all's n",
        "",
        *aligned(rows),
        "",
        "  uniform, binomial: plain runs a step in equal slots (the states less the working state and a segment's",
        "  last one, which take no slot). binomial's slots: those in which it runs no step more often than uniform.",
    ]
    return "\n".join(lines)


def ways_text(made: Iterable[Way], steps: int) -> str:
    """The ways to fit a chain into its slots as text."""
    rows = [("", "kept at once", "plain runs", "a step", "most of one", "")]
    for way in made:
        verdict = "fits" if way.fits else f"needs {way.states}"
        runs = str(way.plain_runs), f"{way.plain_runs / steps:.3f}", str(way.most_runs)
        rows.append((way.name, str(way.states), *runs, verdict))
    lines = [
        *aligned(rows),
        "",
        "  uniform, block boundaries: k checkpoints and all n/k states of a segment, as the literature counts.",
        "  selective: every so many block boundaries that the slots hold; budget: states or tapes in the slots.",
    ]
    return "\n".join(lines)


def priced_text(made: Mapping[str, Sequence[Priced]]) -> str:
    """Time against memory as text: what the optimum saves, and what it moves."""
    least = made["with a disk"]
    rows = [("slots", *made, "plain runs", "files", "writes", "reads", "saved")]
    for place, (alone, best) in enumerate(zip(made["memory alone"], least, strict=True)):
        disk = best.report.tiers.get(1, TierReport())
        moved = best.report.plain_runs, disk.peak_slots, disk.saves, disk.loads
        saved = f"{100 * (1 - best.cost / alone.cost):.1f} %"
        rows.append((str(best.slots), *(f"{way[place].cost:g}" for way in made.values()), *map(str, moved), saved))
    return "\n".join(aligned(rows))


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns aligned to the right."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
