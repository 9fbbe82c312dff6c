"""From words on the command line to a schedule: ``--schedule hrevolve --tiers 3,7:10:10``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any, Protocol

from revolve import binomial
from revolve.actions import Schedule
from revolve.budget import Prices, parse_bytes
from revolve.catalogue import SCHEDULES
from revolve.hierarchy import Tier
from revolve.planner import Storage


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; give for instance 4,8,12") from None


def tier_list(text: str) -> tuple[Tier, ...]:
    tiers = []
    try:
        for part in text.split(","):
            slots, *prices = part.split(":")
            tiers.append(Tier(int(slots), *map(float, prices)))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of tiers; give slots:write:read of each, for instance 3,7:10:10"
        ) from None
    return tuple(tiers)


def flag(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither; give yes or no")
    return text == "yes"


def storages(text: str) -> list[Storage]:
    """ "128MB,2GB:0.004:0.004": bytes, and the seconds of a write and a read."""
    made = []
    for part in text.split(","):
        size, *seconds = part.split(":")
        try:
            write, read = map(float, seconds or (0.0, 0.0))
        except ValueError:
            raise ValueError(
                f"--memories {part} is no memory; give a size, a write's seconds and a read's, for instance 2GB:0.004:0.004"
            ) from None
        made.append(Storage(None if size == "any" else parse_bytes(size, "--memories"), write, read))
    return made


MOST_TIERS = 8


class Options(Protocol):
    """A parser, or a group of one."""

    def add_argument(self, *names: str, **settings: Any) -> Any: ...


OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "slots": ("-c/--slots", int, "slots, that of x_0 included"),
    "every": (
        "--every",
        int,
        "spacing of checkpoints (default: the square root of n), or of files (default: from prices)",
    ),
    "inside": ("--inside", str, "'keep' a piece's states while it is reversed, or 'rerun' to each"),
    "kept": ("--kept", numbers, "steps whose states are kept, as 4,8,12"),
    "starts": ("--starts", numbers, "first step of each segment, as 0,8,16"),
    "last": ("--last", flag, "'yes' to run the last segment again too"),
    "memory": ("--memory", int, "slots in memory"),
    "disk": ("--disk", int, "slots on disk"),
    "tiers": ("--tiers", tier_list, "slots:write:read of each tier, the fastest first, as 3,7:10:10"),
    "write": ("--write-cost", float, "price of a write to disk"),
    "read": ("--read-cost", float, "price of a read from disk"),
    "step_cost": ("--step-cost", float, "price of a run (default: 1)"),
    "state": ("--state-slots", int, "slots that a state takes (default: 1)"),
    "tape": ("--tape-slots", int, "slots that a tape takes (default: 1)"),
    "holds_end": ("--holds-end", flag, "'yes' if a tape holds the state at the end of its step"),
    "promotes": ("--promotes", flag, "'no' to leave every state of multistage where it was saved"),
    "rereads": ("--rereads", flag, "'no' to read every file once"),
    "last_is_solution": ("--last-is-solution", flag, "'yes' if the last stage of a step is its end"),
    "stages": ("--stages", int, "stages of a Runge-Kutta step"),
    "costs": ("--costs", numbers, "cost of each step, as 1,5,20"),
    "states": ("--states", numbers, "size of each state"),
    "tapes": ("--tapes", numbers, "size of each tape"),
    "budget": ("--budget", int, "what kept states and tapes may take"),
}
"""The field of a schedule, its option, how the text is read, and what it says."""

METAVARS: dict[Callable[[str], Any], str] = {
    numbers: "N,N,...",
    tier_list: "C:W:R,...",
    float: "PRICE",
    str: "WAY",
    flag: "yes|no",
}

EXAMPLE = {"slots": "-c 3", "tiers": "--tiers 3,7:10:10", "memory": "--memory 2", "disk": "--disk 3"}


def add_options(parser: Options, *, schedule: str | None = None, but: Collection[str] = ()) -> None:
    """``--schedule``, by default as given, and an option for each field of any schedule ``but`` these."""
    default = f" (default: {schedule})" if schedule else ""
    names = ", ".join(SCHEDULES)
    parser.add_argument("--schedule", choices=list(SCHEDULES), default=schedule, metavar="NAME", help=names + default)
    for name, (option, kind, text) in OPTIONS.items():
        if name not in but:
            parser.add_argument(
                *option.split("/"), dest=f"field_{name}", type=kind, metavar=METAVARS.get(kind, "N"), help=text
            )


def prices_given(options: argparse.Namespace) -> Prices | None:
    """What --write-cost, --read-cost and --step-cost say of time, taken from a schedule that has no use for them."""
    known = {field.name for field in fields(SCHEDULES[options.schedule])}  # type: ignore[arg-type]
    found = {}
    for name in ("write", "read", "step_cost"):
        if name not in known and (price := getattr(options, f"field_{name}")) is not None:
            found[name] = price
            setattr(options, f"field_{name}", None)
    if not found:
        return None
    write, read = ((0.0, *([found.get(name, 0.0)] * MOST_TIERS)) for name in ("write", "read"))
    return Prices(found.get("step_cost", 1.0), write=write, read=read)


def unused(options: argparse.Namespace) -> None:
    """Raises on a field of a schedule when none was named."""
    for field, (option, _, _) in OPTIONS.items():
        if getattr(options, f"field_{field}", None) is not None:
            raise ValueError(f"{option} says nothing without --schedule; leave it out, or name a schedule")


def schedule_of(options: argparse.Namespace) -> Schedule:
    """The schedule that the options name; raises on an option that it has no use for, or one that it misses."""
    name = options.schedule
    kind = SCHEDULES[name]
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = {field: getattr(options, f"field_{field}", None) for field in OPTIONS}
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
