"""Schedules for a few slots in memory, tier 0, and as many files as one likes, tier 1.

Source: Aupy, Herrmann, Hovland & Robert (2016), SIAM J. Sci. Comput. 38(4), Disk-Revolve and Periodic-Disk-Revolve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from revolve import binomial
from revolve.actions import (
    GIVEN,
    Action,
    Advance,
    Drop,
    Load,
    Record,
    Report,
    Reverse,
    Save,
    Saved,
    TierReport,
    both_sweeps,
    encode,
    tally,
)
from revolve.hierarchy import LONGEST, with_given
from revolve.online import cost
from revolve.schedules import Binomial, Nested, Segment, Span, close_gaps, walk

DISK = 1


@dataclass(frozen=True)
class DiskRevolve:
    """The least cost with ``slots`` states in memory, free to use, and an unlimited disk at a price, exactly.

    With Opt_0(l) the cost in memory alone, l = n - 1:

        Opt(l)   = min( Opt_0(l), min_j  w + j uf + Opt(l-j) + r + Opt_1(j-1) )
        Opt_1(l) = min( Opt_0(l), min_j  j uf + Opt_0(l-j) + r + Opt_1(j-1) )

    ``rereads=False``: every file is read once, Opt_0(j-1) stands in place of Opt_1(j-1).
    """

    slots: int
    write: float
    read: float
    step_cost: float = 1.0
    rereads: bool = True

    def __post_init__(self) -> None:
        _check(self)

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("DiskRevolve places its files by the number of steps; give steps, or use Online(slots)")
        steps = self._checked(steps)
        return _first_sweep(_Whole(self._tables(steps, self.slots), 0, steps, kept=False))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        def from_disk(segment: Segment, slots: int) -> Nested:
            tables = self._tables(steps, slots)
            last = segment.stop - segment.start - 1
            if tables.anew[last] < tables.one[last] * (1 - 1e-12):
                return _Whole(tables, segment.start, segment.stop, kept=True)
            return _Kept(tables, segment.start, segment.stop)

        return _backward(self, from_disk, steps, saved)

    def _checked(self, steps: int) -> int:
        steps = binomial.whole("steps", steps, least=1)
        if steps > LONGEST:
            raise ValueError(f"steps={steps} is too long for exact tables; give at most {LONGEST}, or use PeriodicDisk")
        return steps

    def _tables(self, steps: int, slots: int) -> _Tables:
        return _tables(slots, self.write, self.read, self.step_cost, self.rereads, 1 << (steps - 1).bit_length())

    def cost(self, steps: int) -> float:
        """The least cost of runs, writes and reads that reverses the chain; the recorded runs are not in it."""
        steps = self._checked(steps)
        return float(self._tables(steps, self.slots).whole[steps - 1])

    def price(self, steps: int) -> Report:
        steps = self._checked(steps)
        return tally(encode(both_sweeps(self, steps)), steps)


@dataclass(frozen=True)
class PeriodicDisk:
    """A file every ``period`` steps, read once; each period is reversed in ``slots`` states in memory.

    The period follows from the prices: beta(c, t), t the smallest with beta(c+1, t) > (w + r) / uf.
    """

    slots: int
    write: float
    read: float
    step_cost: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if self.step_cost == 0:
            raise ValueError("step_cost=0 would never write a file; give a positive price")

    @property
    def period(self) -> int:
        t = 0
        while binomial.beta(slots=self.slots + 1, repetitions=t) * self.step_cost <= self.write + self.read:
            t += 1
        return binomial.beta(slots=self.slots, repetitions=t)

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("PeriodicDisk ends in memory by the number of steps; give steps, or use Periodic(every=)")
        steps = binomial.whole("steps", steps, least=1)
        return _first_sweep(_Periods(0, steps, self.period, self.slots, kept=False))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        def from_disk(segment: Segment, slots: int) -> Nested:
            period = self.period if slots == self.slots else 1
            return _Periods(segment.start, segment.stop, period, slots, kept=True)

        return _backward(self, from_disk, steps, saved)

    def price(self, steps: int) -> Report:
        steps, period = binomial.whole("steps", steps, least=1), self.period
        files = (steps - 1) // period
        top = Binomial(self.slots).price(steps - files * period)
        if not files:
            return top
        inside = Binomial(self.slots).price(period)
        tiers = {DISK: TierReport(files, files, files)}
        if saves := files * inside.saves + top.saves:
            peak = max(inside.peak_slots, top.peak_slots)
            tiers = {0: TierReport(saves, files * inside.loads + top.loads, peak)} | tiers
        plain = files * (period + inside.plain_runs) + top.plain_runs
        return Report(steps, plain, steps, max(inside.most_runs + 1, top.most_runs), 1, tiers)


def _check(schedule: DiskRevolve | PeriodicDisk) -> None:
    object.__setattr__(schedule, "slots", binomial.whole("slots", schedule.slots))
    for name in ("write", "read", "step_cost"):
        if not getattr(schedule, name) >= 0:
            raise ValueError(f"{name}={getattr(schedule, name)} is not a price; give 0 or more")


def _first_sweep(piece: Nested) -> Iterator[Action]:
    return takewhile(lambda action: not isinstance(action, Reverse), walk((piece,)))


def _backward(
    schedule: DiskRevolve | PeriodicDisk, from_disk: Callable[[Segment, int], Nested], steps: int, saved: Saved
) -> Iterator[Action]:
    """Gaps above a state in memory are closed in memory, gaps above a file as ``from_disk`` says."""
    states = saved.states
    if given := (0, GIVEN) in states:
        home = next((a.tier for a in schedule.forward(steps) if isinstance(a, Save) and a.step == 0), DISK)
        states = states - {(0, GIVEN)} | {(0, home)}

    def reverse(segment: Segment) -> Iterator[Nested]:
        start, stop, tier, _ = segment
        slots = schedule.slots - sum(step < start for step, kept_in in states if kept_in == 0)
        if tier == 0 and (slots >= 1 or stop - start == 1):
            yield Span(start, stop, 0, slots)
        else:
            yield from_disk(segment, max(0, slots - (tier == 0)))

    actions = walk(close_gaps(steps, saved._replace(states=states), reverse))
    return with_given(actions) if given else actions


class _InMemory(NamedTuple):
    """Steps to be reversed in memory from the working state, which is kept there."""

    start: int
    stop: int
    slots: int

    def parts(self) -> tuple[Action | Nested, ...]:
        start, stop, slots = self
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop)
        return Save(start), Span(start, stop, 0, slots), Drop(start)


class _Whole(NamedTuple):
    """Steps to be reversed from the working state, which is not in a slot, or ``kept`` on disk by somebody else."""

    tables: _Tables
    start: int
    stop: int
    kept: bool

    def parts(self) -> tuple[Action | Nested, ...]:
        tables, start, stop, kept = self
        ahead = int(tables.files[stop - start - 1]) or (kept and int(tables.again[stop - start - 1]))
        if ahead == 0:
            return (_InMemory(start, stop, tables.slots),)
        middle = start + ahead
        before, after = ((), ()) if kept else ((Save(start, DISK),), (Drop(start, DISK),))
        upper = _Whole(tables, middle, stop, kept=False)
        return *before, Advance(start, middle), upper, Load(start, DISK), _Kept(tables, start, middle), *after


class _Kept(NamedTuple):
    """Steps to be reversed from the working state, which was read from disk and may be read again."""

    tables: _Tables
    start: int
    stop: int

    def parts(self) -> tuple[Action | Nested, ...]:
        tables, start, stop = self
        ahead = int(tables.memory[stop - start - 1])
        if ahead == 0:
            return (_InMemory(start, stop, tables.slots),)
        middle = start + ahead
        upper = _InMemory(middle, stop, tables.slots)
        return Advance(start, middle), upper, Load(start, DISK), _Kept(tables, start, middle)


class _Periods(NamedTuple):
    """Steps to be reversed from the working state, a file at each period's start but the last one's."""

    start: int
    stop: int
    period: int
    slots: int
    kept: bool

    def parts(self) -> tuple[Action | Nested, ...]:
        starts = range(self.start, self.stop, self.period)
        parts: list[Action | Nested] = []
        for start in starts[:-1]:
            parts += [Save(start, DISK), Advance(start, start + self.period)]
        parts.append(_InMemory(starts[-1], self.stop, self.slots))
        for start in reversed(starts[:-1]):
            parts += [Load(start, DISK), _InMemory(start, start + self.period, self.slots), Drop(start, DISK)]
        return tuple(parts[1:-1] if self.kept and len(starts) > 1 else parts)


class _Tables:
    """Opt, Opt_1 and the choices that lead to them, by l."""

    def __init__(self, slots: int, write: float, read: float, step_cost: float, rereads: bool, steps: int) -> None:
        self.slots = slots
        memory = [step_cost * cost(n, slots) if slots or n == 1 else np.inf for n in range(1, steps + 1)]
        fast = np.array(memory)
        self.one, self.whole, self.anew = fast.copy(), fast.copy(), fast.copy()
        self.memory, self.files, self.again = np.zeros((3, steps), dtype=np.int32)
        """The split of Opt_1, that of Opt, and that of Opt when a first file is there; 0: all in memory."""
        slow = self.whole[::-1]
        ahead = np.empty(steps)
        for last in range(1, steps):
            ahead[last - 1] = last * step_cost + read + self.one[last - 1]
            if rereads:
                in_memory = ahead[:last] + fast[last - 1 :: -1]
                j = int(in_memory.argmin())
                if in_memory[j] < fast[last]:
                    self.one[last], self.memory[last] = in_memory[j], j + 1
            on_disk = ahead[:last] + slow[steps - last :]
            j = int(on_disk.argmin())
            if on_disk[j] < fast[last]:
                self.anew[last], self.again[last] = on_disk[j], j + 1
            if write + on_disk[j] < fast[last]:
                self.whole[last], self.files[last] = write + on_disk[j], j + 1


@lru_cache(maxsize=8)
def _tables(slots: int, write: float, read: float, step_cost: float, rereads: bool, steps: int) -> _Tables:
    return _Tables(slots, write, read, step_cost, rereads, steps)
