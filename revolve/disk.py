"""Schedules for a few slots in memory, tier 0, and as many files as one likes, tier 1.

Source: Aupy, Herrmann, Hovland & Robert (2016), SIAM J. Sci. Comput. 38(4), Disk-Revolve and Periodic-Disk-Revolve.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from math import inf
from typing import NamedTuple

import numpy as np

from revolve import binomial
from revolve.actions import (
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
    tally,
)
from revolve.hierarchy import LONGEST, backward_in_pieces
from revolve.online import cost
from revolve.pieces import Piece, as_array, walk
from revolve.schedules import Binomial, Segment, Span, close_gaps, sweep

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
        return backward_in_pieces(self, steps, saved, DISK)

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        def from_disk(segment: Segment, slots: int) -> Piece:
            tables = self._tables(steps, slots)
            if segment.tier is None:
                return _Whole(tables, segment.start, segment.stop, kept=False)
            last = segment.stop - segment.start - 1
            if tables.anew[last] < tables.one[last] * (1 - 1e-12):
                return _Whole(tables, segment.start, segment.stop, kept=True)
            return _Kept(tables, segment.start, segment.stop)

        return _pieces(self.slots, from_disk, steps, saved)

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
        return tally(as_array(self, steps), steps)


@dataclass(frozen=True)
class PeriodicDisk:
    """A file every so many steps, read once; what lies between two files is reversed in ``slots`` states in memory.

    The period follows from the prices: beta(c, t), t the smallest with beta(c+1, t) > (w + r) / uf; or it is ``every``.
    """

    slots: int
    write: float
    read: float
    step_cost: float = 1.0
    every: int | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.every is not None:
            object.__setattr__(self, "every", binomial.whole("every", self.every, least=1))
            if self.slots == 0 and self.every > 1:
                raise ValueError(f"slots=0 cannot reverse the {self.every} steps from file to file; give at least 1")
        elif self.step_cost == 0:
            raise ValueError("step_cost=0 would never write a file; give a positive price")

    @property
    def period(self) -> int:
        if self.every is not None:
            return self.every
        t = 0
        while binomial.beta(slots=self.slots + 1, repetitions=t) * self.step_cost <= self.write + self.read:
            t += 1
        return binomial.beta(slots=self.slots, repetitions=t)

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            return sweep(None, lambda step: step % self.period == 0, DISK)
        steps = binomial.whole("steps", steps, least=1)
        return _first_sweep(_Periods(0, steps, self.period, self.slots, kept=False))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return backward_in_pieces(self, steps, saved, DISK)

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        def from_disk(segment: Segment, slots: int) -> Piece:
            if segment.tier is None and 0 < slots < self.slots:
                return _InMemory(segment.start, segment.stop, slots)
            period = self.period if slots == self.slots else 1
            return _Periods(segment.start, segment.stop, period, slots, kept=segment.tier is not None)

        return _pieces(self.slots, from_disk, steps, saved)

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
        if not 0 <= getattr(schedule, name) < inf:
            raise ValueError(f"{name}={getattr(schedule, name)} is not a price; give 0 or more, and finite")


def _first_sweep(piece: Piece) -> Iterator[Action]:
    return takewhile(lambda action: not isinstance(action, Reverse), walk((piece,)))


def _pieces(
    slots: int, from_disk: Callable[[Segment, int], Piece], steps: int, saved: Saved
) -> Iterator[Action | Piece]:
    """Gaps above a state in memory are closed in memory, gaps above a file as ``from_disk`` says."""

    in_memory = sorted(step for step, kept_in in saved.states if kept_in == 0)

    def reverse(segment: Segment) -> Iterator[Piece]:
        start, stop, tier, _ = segment
        free = max(0, slots - bisect_left(in_memory, start))
        if tier == 0 and (free >= 1 or stop - start == 1):
            yield Span(start, stop, 0, free)
        else:
            yield from_disk(segment, max(0, free - (tier == 0)))

    return close_gaps(steps, saved, reverse)


class _InMemory(NamedTuple):
    """Steps to be reversed in memory from the working state, which is kept there."""

    start: int
    stop: int
    slots: int

    @property
    def kind(self) -> Hashable:
        return _InMemory, self.stop - self.start, self.slots

    def parts(self) -> tuple[Action | Piece, ...]:
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

    @property
    def kind(self) -> Hashable:
        return _Whole, self.tables, self.stop - self.start, self.kept

    def parts(self) -> tuple[Action | Piece, ...]:
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

    @property
    def kind(self) -> Hashable:
        return _Kept, self.tables, self.stop - self.start

    def parts(self) -> tuple[Action | Piece, ...]:
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

    @property
    def kind(self) -> Hashable:
        return None

    def parts(self) -> tuple[Action | Piece, ...]:
        starts = range(self.start, self.stop, self.period)
        parts: list[Action | Piece] = []
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
