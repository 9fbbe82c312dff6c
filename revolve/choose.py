"""From words on the command line to a schedule: ``--schedule hrevolve --tiers 3,7:10:10``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from revolve import binomial
from revolve.actions import Schedule
from revolve.catalogue import SCHEDULES
from revolve.hierarchy import Tier


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def tier_list(text: str) -> tuple[Tier, ...]:
    tiers = []
    for part in text.split(","):
        slots, *prices = part.split(":")
        tiers.append(Tier(int(slots), *map(float, prices)))
    return tuple(tiers)


OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "slots": ("-c/--slots", int, "slots, that of x_0 included"),
    "every": ("--every", int, "spacing of the periodic schedule (default: the square root of n)"),
    "inside": ("--inside", str, "'keep' a piece's states while it is reversed, or 'rerun' to each"),
    "kept": ("--kept", numbers, "steps whose states are kept, as 4,8,12"),
    "memory": ("--memory", int, "slots in memory"),
    "disk": ("--disk", int, "slots on disk"),
    "tiers": ("--tiers", tier_list, "slots:write:read of each tier, the fastest first, as 3,7:10:10"),
    "write": ("--write-cost", float, "price of a write to disk"),
    "read": ("--read-cost", float, "price of a read from disk"),
    "step_cost": ("--step-cost", float, "price of a run (default: 1)"),
    "state": ("--state-slots", int, "slots that a state takes (default: 1)"),
    "tape": ("--tape-slots", int, "slots that a tape takes (default: 1)"),
    "stages": ("--stages", int, "stages of a Runge-Kutta step"),
    "costs": ("--costs", numbers, "cost of each step, as 1,5,20"),
    "states": ("--states", numbers, "size of each state"),
    "tapes": ("--tapes", numbers, "size of each tape"),
    "budget": ("--budget", int, "what kept states and tapes may take"),
}
"""The field of a schedule, its option, how the text is read, and what it says."""

EXAMPLE = {"slots": "-c 3", "tiers": "--tiers 3,7:10:10", "memory": "--memory 2", "disk": "--disk 3"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--schedule`` and an option for each field of any schedule."""
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="binomial", help="default: %(default)s")
    for name, (option, kind, text) in OPTIONS.items():
        parser.add_argument(*option.split("/"), dest=f"field_{name}", type=kind, help=text)


def schedule_of(options: argparse.Namespace) -> Schedule:
    """The schedule that the options name; raises on an option that it has no use for, or one that it misses."""
    name = options.schedule
    kind = SCHEDULES[name]
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = {field: getattr(options, f"field_{field}") for field in OPTIONS}
    values = {}
    for field, value in given.items():
        if value is not None and field not in known:
            option = OPTIONS[field][0].split("/")[0]
            uses = [other for other, made in SCHEDULES.items() if field in {f.name for f in fields(made)}]  # type: ignore[arg-type]
            raise ValueError(
                f"{option} {value} says nothing to the {name} schedule; leave it out, or take {' or '.join(uses)}"
            )
        if value is not None:
            values[field] = value
        elif field in known and known[field].default is MISSING:
            if field == "slots":
                raise ValueError("how many slots? give -c, for instance -c 3")
            option = OPTIONS[field][0]
            raise ValueError(f"the {name} schedule needs {option}: {OPTIONS[field][2]}")
    if "slots" in values and name in ("binomial", "online"):
        binomial.check(options.steps, values["slots"])
    return kind(**values)
