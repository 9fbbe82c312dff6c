"""From slots or bytes to a schedule, priced before it runs; and what memory buys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from functools import cached_property
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from revolve import binomial
from revolve.actions import (
    DROP,
    GIVEN,
    LOAD,
    RECORD,
    REVERSE,
    SAVE,
    Report,
    Schedule,
    TierReport,
    tally,
)
from revolve.chains import Differing
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.hierarchy import HRevolve
from revolve.mixed import Mixed, Stages
from revolve.pieces import as_array
from revolve.reasons import promise
from revolve.schedules import Binomial, StoreAll

DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS = {unit.upper(): factor for unit, factor in (DECIMAL | BINARY).items()}
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(size: int | str, name: str = "size") -> int:
    """A number of bytes from a number or from text: "512 MiB" (powers of 1024), "1.5GB" (powers of 1000), "4096"."""
    if not isinstance(size, str):
        return binomial.whole(name, size)
    match = _SIZE.fullmatch(size)
    factor = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{name}={size!r} is not a size; give bytes, or text like '512 MiB' or '1.5 GB'")
    return int(Decimal(match[1]) * factor)


def format_bytes(number: int, *, decimal: bool = False) -> str:
    """Three digits and a unit, never less than the number itself: 1000000 is "977 KiB", or "1 MB" if ``decimal``."""
    units = DECIMAL if decimal else BINARY
    text = f"{number} B"
    for unit, factor in units.items():
        if number < factor or factor == 1:
            continue
        digits = 2 if number <= 9.99 * factor else 1 if number <= 99.9 * factor else 0
        rounded = Decimal(-(-number * 10**digits // factor)).scaleb(-digits)
        text = f"{rounded:f}".rstrip("0").rstrip(".") if digits else f"{rounded:f}"
        text = f"{text} {unit}"
    return text


class BudgetError(ValueError):
    """A budget that is too small for any plan; ``smallest`` bytes are enough for one."""

    def __init__(self, sentence: str, smallest: int) -> None:
        super().__init__(f"{sentence}; give at least {smallest} bytes ({format_bytes(smallest)})")
        self.sentence = sentence
        self.smallest = smallest

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, int]]:
        return type(self), (self.sentence, self.smallest)


@dataclass(frozen=True)
class Prices:
    """Measured seconds: of a step run plainly, recorded (as long as plainly if not given) and reversed, and for each
    tier those of a write and of a read."""

    step: float = 0.0
    record: float | None = None
    reverse: float = 0.0
    write: tuple[float, ...] = ()
    read: tuple[float, ...] = ()
    unit: str = "s"
    """What they are in, where a run's time is the measure and no second was measured."""

    def seconds(self, report: Report) -> float:
        """What a plan takes."""
        recorded = self.step if self.record is None else self.record
        time = report.plain_runs * self.step + report.recorded_runs * recorded + report.steps * self.reverse
        for number, tier in report.tiers.items():
            time += tier.saves * dict(enumerate(self.write)).get(number, 0.0)
            time += tier.loads * dict(enumerate(self.read)).get(number, 0.0)
        return time


def prices_of(schedule: Schedule) -> Prices:
    """The prices that a schedule was made with; a run costs 1, and nothing else anything, if it knows none."""
    match schedule:
        case HRevolve():
            tiers = schedule.tiers
            return Prices(schedule.step_cost, write=tuple(t.write for t in tiers), read=tuple(t.read for t in tiers))
        case DiskRevolve() | PeriodicDisk():
            return Prices(schedule.step_cost, write=(0.0, schedule.write), read=(0.0, schedule.read))
    return Prices(1.0)


@dataclass(frozen=True)
class Plan:
    """A schedule for a chain of known length, and its price before it runs. Sizes are in bytes."""

    steps: int
    schedule: Schedule
    state_bytes: int = 0
    """One kept state."""
    tape_bytes: int = 0
    """The tape of one recorded step."""
    working_bytes: int = 0
    """What is held besides: the working state, outputs, cotangents."""
    given: bool = False
    """Whether the caller holds x_0, so that it takes a slot but no memory of its own."""
    prices: Prices | None = None
    """Measured seconds, for the predicted time."""
    tier_states: tuple[int, ...] = ()
    """What a state takes in each tier, where that is not ``state_bytes``."""
    why: str = ""
    """What the memory left to choose from, in a sentence."""
    peak_bytes: int | None = None
    """The predicted peak, where it was weighed action by action."""
    ways: tuple[str | None, ...] = ()
    """By step, how its tape is kept, where that is not as it is."""

    @cached_property
    def report(self) -> Report:
        return self.schedule.price(self.steps)

    @property
    def slots(self) -> int:
        """States kept at one moment, that of x_0 included."""
        return self.report.peak_slots

    @property
    def bytes(self) -> int:
        """The predicted peak in the first tier: kept states (x_0 only if it is not given), tapes held at one moment,
        and the rest."""
        if self.peak_bytes is not None:
            return self.peak_bytes
        if isinstance(self.schedule, Differing):
            return self.schedule.peak(self.steps) + self.working_bytes
        if isinstance(self.schedule, (Mixed, Stages)):
            return _most_kept(self.array(), self._size(0), self.tape_bytes) + self.working_bytes
        kept = self.tiers.get(0, TierReport()).peak_slots * self._size(0)
        return kept + self.report.peak_tapes * self.tape_bytes + self.working_bytes

    @cached_property
    def tiers(self) -> dict[int, TierReport]:
        """What each tier is asked to do: x_0 is written and kept there only if it is not given."""
        tiers = self.report.tiers
        if self.given and set(tiers) - {0}:
            return tally(self.array(), self.steps).tiers
        return {tier: replace(t, peak_slots=max(0, t.peak_slots - self.given)) for tier, t in tiers.items()}

    @property
    def tier_bytes(self) -> dict[int, int]:
        """The predicted peak in each tier."""
        below = {tier: report.peak_slots * self._size(tier) for tier, report in self._below.items()}
        return {0: self.bytes} | below

    def _size(self, tier: int) -> int:
        return self.tier_states[tier] if tier < len(self.tier_states) else self.state_bytes

    @property
    def traffic(self) -> dict[int, tuple[int, int]]:
        """The bytes that are written to each tier, and read from it. An x_0 that is given is never written."""
        verb, a, b = self.array().T

        def moved(kind: int, tier: int) -> int:
            there = (verb == kind) & ((b == tier) | ((b == GIVEN) & (tier == 0)))
            if isinstance(self.schedule, Differing):
                return int(np.array(self.schedule.states)[a[there]].sum())
            return int(there.sum()) * self._size(tier)

        return {tier: (moved(SAVE, tier), moved(LOAD, tier)) for tier in (0, *self._below)}

    @property
    def _below(self) -> dict[int, TierReport]:
        """The tiers below the first, without states that kept tapes hold anyway."""
        if isinstance(self.schedule, (Mixed, Stages)):
            return {}
        return {number: tier for number, tier in self.tiers.items() if number}

    @property
    def seconds(self) -> float:
        """The predicted time; 0 without prices. An x_0 that is given is neither written nor read."""
        if self.prices is None:
            return 0.0
        moving = any(self.prices.write) or any(self.prices.read)
        tiers = tally(self.array(), self.steps).tiers if self.given and moving else self.report.tiers
        return self.prices.seconds(replace(self.report, tiers=tiers))

    @property
    def time(self) -> str:
        """The predicted time in words."""
        return f"{self.seconds:.3g} {self.prices.unit}" if self.prices else ""

    def array(self) -> np.ndarray:
        """Both sweeps as one int64 array of rows (verb, a, b), made once and read-only.

        When x_0 is given, it is loaded from tier GIVEN, and neither saved nor dropped.
        """
        return self._array

    @cached_property
    def _array(self) -> np.ndarray:
        rows = as_array(self.schedule, self.steps)
        if self.given:
            first = np.flatnonzero(rows[:, 1] == 0)
            verb = rows[first, 0]
            rows[first[verb == LOAD], 2] = GIVEN
            rows = np.delete(rows, first[(verb == SAVE) | (verb == DROP)], axis=0)
        rows.flags.writeable = False
        return rows

    def explain(self) -> str:
        """Schedule, runs and bytes, and why this schedule, in a few sentences."""
        report = self.report
        most = f", at most {report.most_runs} of one step" if report.plain_runs else ", nothing twice"
        text = (
            f"{self.schedule} reverses {counted(self.steps, 'step')} with {counted(report.plain_runs, 'plain run')} "
            f"and {report.recorded_runs} recorded ({report.runs / self.steps:.3g} a step{most})."
        )
        states = self.slots if self._below else self.report.tiers.get(0, TierReport()).peak_slots
        kept = [counted(states, "state")] if states else []
        kept.append(counted(report.peak_tapes, "tape"))
        text += f" It holds {' and '.join(kept)} at once"
        where = " in the first tier" if self._below else ""
        text += f": {format_bytes(self.bytes)}{where}." if self.bytes else "."
        for number, tier in self._below.items():
            size = f", {format_bytes(self.tier_bytes[number])}" if self.state_bytes else ""
            text += f" Tier {number} holds {tier.peak_slots} of the states{size}: {counted(tier.saves, 'write')}, "
            text += f"{counted(tier.loads, 'read')}."
        for way, count in Counter(filter(None, self.ways)).items():
            text += f" {counted(count, 'tape')} {'is' if count == 1 else 'are'} kept otherwise: {way}."
        if self.prices:
            text += f" Predicted time: {self.time}."
        return " ".join(filter(None, (text, self.why, promise(self.schedule, report))))

    __str__ = explain

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: an array is made again where it is wanted."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _most_kept(rows: np.ndarray, state_bytes: int, tape_bytes: int) -> int:
    """The peak of states in the first tier and tapes together."""
    verb, a, b = rows.T
    states = np.where(b == 0, (verb == SAVE).astype(np.int64) - (verb == DROP), 0)
    tapes = np.where(verb == RECORD, b - a, 0) - np.where(verb == REVERSE, b - a, 0)
    return int(np.cumsum(states * state_bytes + tapes * tape_bytes).max())


def equal_plan(
    *,
    steps: int,
    slots: int | str | None = None,
    budget: int | str | None = None,
    state_bytes: int | None = None,
    tape_bytes: int | None = None,
    working_bytes: int = 0,
    given: bool = False,
) -> Plan:
    """The plan of least recomputation for equal steps in one kind of memory; as :func:`revolve.plan` says."""
    steps = binomial.whole("steps", steps, least=1)
    if (slots is None) == (budget is None):
        raise ValueError(f"slots={slots!r} and budget={budget!r}: give exactly one of them")
    if budget is not None and (state_bytes is None or tape_bytes is None):
        raise ValueError(f"budget={budget!r} needs state_bytes= and tape_bytes=: the size of a state, and of one tape")
    state = binomial.whole("state_bytes", state_bytes or 0)
    tape = binomial.whole("tape_bytes", tape_bytes or 0)
    working = binomial.whole("working_bytes", working_bytes)

    def made(schedule: Schedule) -> Plan:
        return Plan(steps, schedule, state, tape, working, given)

    if budget is None:
        return made(StoreAll() if slots == "all" else Binomial(_slots(slots, steps)))
    limit = parse_bytes(budget, "budget")
    smallest = min(made(StoreAll()), made(Binomial(1)), key=lambda plan: plan.bytes)
    if smallest.bytes > limit:
        raise BudgetError(
            f"budget={budget!r} cannot reverse {counted(steps, 'step')} with states of {state} bytes and tapes of "
            f"{tape} bytes",
            smallest.bytes,
        )
    everything = made(StoreAll())
    if everything.bytes <= limit:
        return replace(everything, why=f"{fitting(steps)} the budget.")
    room = (limit - tape - working) // state + given if state else steps - 1
    return replace(
        made(Binomial(min(room, steps - 1))),
        why=f"All tapes at once would take {format_bytes(everything.bytes)}; the budget leaves room for "
        f"{counted(room, 'state')} beside one tape.",
    )


def _slots(slots: int | str | None, steps: int) -> int:
    if isinstance(slots, str):
        raise ValueError(f"slots={slots!r} is unknown; give a number of at least 1, or 'all'")
    return binomial.check(steps, slots)[1]  # type: ignore[arg-type]


def counted(number: int, noun: str) -> str:
    """ "1 step", "3 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def fitting(tapes: int) -> str:
    return "1 tape fits" if tapes == 1 else f"{tapes} tapes fit"


def sweep(
    steps: int,
    slots: Iterable[int],
    state_bytes: int = 0,
    tape_bytes: int = 0,
    *,
    working_bytes: int = 0,
    given: bool = False,
) -> list[Plan]:
    """A plan for each number of slots, and last the one that keeps every tape and recomputes nothing."""
    everything = equal_plan(
        steps=steps,
        slots="all",
        state_bytes=state_bytes,
        tape_bytes=tape_bytes,
        working_bytes=working_bytes,
        given=given,
    )
    return [*(replace(everything, schedule=Binomial(_slots(number, everything.steps))) for number in slots), everything]


class Uniform(NamedTuple):
    """Checkpoints at equal distances."""

    checkpoints: int
    states: int
    """k checkpoints and the L/k states of the segment between two of them, rounded up."""
    bytes: int


@dataclass(frozen=True)
class UniformSweep:
    """Memory against the number of uniform checkpoints; the literature's k + L/k, least at k = sqrt(L)."""

    steps: int
    state_bytes: int
    rows: tuple[Uniform, ...]

    @property
    def least(self) -> Uniform:
        root = sqrt(self.steps)
        return min(self.rows, key=lambda row: (row.states, abs(row.checkpoints - root)))

    @property
    def bound(self) -> float:
        """2 sqrt(L) states: no number of checkpoints needs fewer."""
        return 2 * sqrt(self.steps)

    @property
    def store_all(self) -> Uniform:
        """Every state kept: L states."""
        return Uniform(self.steps, self.steps, self.steps * self.state_bytes)


def uniform_sweep(steps: int, state_bytes: int = 1, checkpoints: Iterable[int] | None = None) -> UniformSweep:
    """The states and bytes of uniform checkpointing, for each number of checkpoints (1 .. L by default)."""
    steps = binomial.whole("steps", steps, least=1)
    size = binomial.whole("state_bytes", state_bytes)
    numbers = range(1, steps + 1) if checkpoints is None else checkpoints
    rows = []
    for number in numbers:
        kept = binomial.whole("checkpoints", number, least=1)
        states = kept - (-steps // kept)
        rows.append(Uniform(kept, states, states * size))
    return UniformSweep(steps, size, tuple(rows))
