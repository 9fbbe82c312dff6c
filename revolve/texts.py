"""What the command ``revolve`` says of plans and sweeps, as text and as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import isqrt
from textwrap import wrap
from typing import Any

from revolve import binomial
from revolve.actions import Report, Schedule, TierReport
from revolve.budget import Plan, UniformSweep, counted, format_bytes, prices_of
from revolve.compare import aligned
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.hierarchy import HRevolve
from revolve.mixed import Mixed, Stages
from revolve.multistage import Multistage
from revolve.referee import verify
from revolve.schedules import Binomial

COUNTED = 20_000
"""Longer chains are priced, and not counted as well."""


def facts(made: Plan) -> dict[str, Any]:
    """What ``--json`` says of one plan."""
    report = made.report
    found = {
        "steps": made.steps,
        "schedule": str(made.schedule),
        "slots": made.slots,
        "repetitions": report.most_runs - 1,
        "extra_steps": report.plain_runs,
        "runs": report.runs,
        "most_runs": report.most_runs,
        "saves": report.saves,
        "loads": report.loads,
        "peak_tapes": report.peak_tapes,
        "bytes": made.bytes,
        "tiers": {number: asdict(tier) for number, tier in report.tiers.items()},
        "explained": made.explain(),
    }
    if made.prices:
        found["seconds"] = made.seconds
    if isinstance(made.schedule, Binomial):
        found |= _binomial_facts(made.steps, made.schedule.slots, report)
    return found


def _binomial_facts(steps: int, slots: int, report: Report) -> dict[str, Any]:
    splits = binomial.optimal_splits(steps=steps, slots=slots)
    return {
        "slots": slots,
        "longest_chain": binomial.beta(slots=slots, repetitions=report.most_runs - 1),
        "first_splits": [splits[0], splits[-1]] if splits else [],
        "neighbours": [
            {
                "slots": c,
                "repetitions": binomial.repetitions(steps=steps, slots=c),
                "extra_steps": binomial.extra_steps(steps=steps, slots=c),
            }
            for c in _neighbours(steps, slots)
        ],
    }


def _neighbours(steps: int, slots: int) -> list[int]:
    """Slot counts around the asked one, as far as they change anything."""
    most = max(steps - 1, slots)
    return [c for c in range(max(slots - 2, min(slots, 1)), slots + 3) if c <= most]


def explained(made: Plan, decimal: bool) -> str:
    """A plan as text that reads well."""
    report, steps = made.report, made.steps
    r = report.most_runs - 1
    lines = [f"{made.schedule} for {counted(steps, 'step')}", ""]
    told = [
        ("repetitions", f"r = {r}", _repetitions_note(r)),
        ("extra steps", f"{report.plain_runs}", f"plain runs, {report.plain_runs / steps:.3g} a step"),
        ("all runs", f"{report.runs}", f"with the recorded run of every step, {report.runs / steps:.3g} a step"),
    ]
    if report.saves:
        told.append(("saves", f"{report.saves}", "states written to a slot"))
        told.append(("loads", f"{report.loads}", "states read back"))
    told.append(("kept at once", counted(made.slots, "state"), f"and {counted(report.peak_tapes, 'tape')}"))
    if made.bytes:
        told.append(("memory", format_bytes(made.bytes, decimal=decimal), f"{made.bytes} bytes predicted"))
    width = max(len(value) for _, value, _ in told)
    lines += [f"  {name:<14}{value:<{width}}  {note}".rstrip() for name, value, note in told]
    if isinstance(made.schedule, Binomial) and steps > 1:
        lines += ["", *_surroundings(steps, made.schedule.slots, r)]
    return "\n".join(lines)


def _repetitions_note(r: int) -> str:
    if r == 0:
        return "nothing is recomputed"
    return f"no step runs plainly more than {'once' if r == 1 else f'{r} times'}"


def _surroundings(steps: int, slots: int, r: int) -> list[str]:
    """What the slots could do besides, and what one or two slots more or fewer would."""
    reach, short = binomial.beta(slots=slots, repetitions=r), binomial.beta(slots=slots, repetitions=r - 1)
    splits = binomial.optimal_splits(steps=steps, slots=slots)
    where = f"at x_{splits[0]}" if len(splits) == 1 else f"anywhere from x_{splits[0]} to x_{splits[-1]}"
    lines = [
        f"  Longest chain in {counted(slots, 'slot')}: beta({slots}, {r}) = {reach}; with r = {r - 1}, {short}.",
        f"  The first checkpoint after x_0 may lie {where}.",
    ]
    if r > 1:
        fewest = binomial.fewest_slots(steps=steps, repetitions=r - 1)
        lines.append(f"  r = {r - 1} takes {counted(fewest, 'slot')}.")
    rows = [("slots", "r", "extra steps", "a step")]
    for c in _neighbours(steps, slots):
        extra = binomial.extra_steps(steps=steps, slots=c)
        repetitions = binomial.repetitions(steps=steps, slots=c)
        rows.append((f"{'> ' if c == slots else ''}{c}", str(repetitions), str(extra), f"{extra / steps:.3g}"))
    return [*lines, "", *aligned(rows)]


def beside_others(made: Plan) -> str:
    """Any schedule as a table: as it is priced, as the referee counts it, and beside it what is simpler."""
    schedule, steps, report = made.schedule, made.steps, made.report
    columns = {"priced": report}
    if steps <= COUNTED:
        columns["counted"] = verify(schedule, steps)
    for other in _others(schedule, report):
        name = str(other) if isinstance(other, Binomial) else type(other).__name__
        columns[name] = other.price(steps)
    rows: list[tuple[str, ...]] = [("", *columns)]
    for name, value in _lines(schedule, report).items():
        rows.append((name, *(value(column) for column in columns.values())))
    lines = [f"{schedule} for {counted(steps, 'step')}", "", *aligned(rows), "", *wrap(f"{made.explain()}", 116)]
    return "\n".join(lines)


def _others(schedule: Schedule, report: Report) -> Iterator[Schedule]:
    """Simpler ways to use the same memory: Multistage knows no prices, and Binomial no disk."""
    slots = report.peak_slots
    match schedule:
        case Binomial():
            return
        case HRevolve(tiers=(fast, slow)):
            yield Multistage(fast.slots, slow.slots)
            slots = fast.slots
        case HRevolve(tiers=(fast, _, *_)):
            slots = fast.slots
        case DiskRevolve():
            yield PeriodicDisk(schedule.slots, schedule.write, schedule.read, schedule.step_cost)
            slots = schedule.slots
        case PeriodicDisk():
            slots = schedule.slots
        case Multistage():
            slots = schedule.memory
        case Mixed() | Stages():
            slots = report.tiers[0].peak_slots if 0 in report.tiers else 0
    if slots:
        yield Binomial(slots)


def _lines(schedule: Schedule, report: Report) -> dict[str, Callable[[Report], str]]:
    """What is said of each column."""
    lines: dict[str, Callable[[Report], str]] = {
        "plain runs": lambda r: str(r.plain_runs),
        "all runs": lambda r: str(r.runs),
        "a step": lambda r: f"{r.runs / r.steps:.3f}",
        "most of one step": lambda r: str(r.most_runs),
        "tapes at once": lambda r: str(r.peak_tapes),
    }
    for number in report.tiers:
        where = f" in tier {number}" if len(report.tiers) > 1 or number else ""
        lines[f"states at once{where}"] = _of_tier(number, "peak_slots")
        lines[f"writes{where}"] = _of_tier(number, "saves")
        lines[f"reads{where}"] = _of_tier(number, "loads")
    prices = prices_of(schedule)
    if prices.write:
        lines["cost"] = lambda r: f"{prices.seconds(r):g}"
    return lines


def _of_tier(number: int, name: str) -> Callable[[Report], str]:
    return lambda report: str(getattr(report.tiers.get(number, TierReport()), name))


def row(made: Plan) -> dict[str, Any]:
    """One line of a sweep: slots as asked, 'all' for the plan that keeps every tape."""
    found = facts(made)
    if not isinstance(made.schedule, Binomial):
        found["slots"] = "all"
    for name in ("neighbours", "first_splits"):
        found.pop(name, None)
    return found


def uniform_lines(made: UniformSweep, decimal: bool, sized: bool) -> list[str]:
    least, steps = made.least, made.steps
    rows = [("checkpoints", "states", "of store-all") + (("memory",) if sized else ())]
    for row in [row for row in made.rows if row.checkpoints in _round_numbers(steps) or row == least]:
        mark = "> " if row == least else ""
        memory = (format_bytes(row.bytes, decimal=decimal),) if sized else ()
        rows.append((f"{mark}{row.checkpoints}", str(row.states), f"{100 * row.states / steps:.1f} %", *memory))
    stored = (format_bytes(made.store_all.bytes, decimal=decimal),) if sized else ()
    rows.append(("store all", str(steps), "100.0 %", *stored))
    return [
        f"{counted(steps, 'step')}, checkpoints at equal distances: k checkpoints and a segment of {steps}/k states",
        "",
        *aligned(rows),
        "",
        f"  Least: k = {least.checkpoints} with {counted(least.states, 'state')}; 2 sqrt({steps}) = {made.bound:.4g}.",
        f"  Every step then runs plainly at most twice; Binomial does that with "
        f"{counted(binomial.fewest_slots(steps=steps, repetitions=2), 'slot')}.",
    ]


def checkpoints(steps: int) -> list[int]:
    """All of 1 .. n for a short chain; for a long one a few hundred, dense around sqrt(n)."""
    if steps <= 2000:
        return list(range(1, steps + 1))
    root = isqrt(steps)
    spread = (round(steps ** (k / 200)) for k in range(201))
    return sorted({min(steps, k) for k in spread} | {root, root + 1})


def _round_numbers(steps: int) -> set[int]:
    return {m * 10**e for e in range(len(str(steps))) for m in (1, 2, 3, 5, 7)} | {steps}
