"""Schedules for more than one kind of memory: tiers with prices, tier 0 the fastest.

With l = n - 1, a price w_k for a write to tier k, r_k for a read and c_k slots in it, the least cost of a chain is

    first_k(l, m) = min( cost_{k-1}(l, c_{k-1}), min_j  j uf + cost_k(l-j, m-1) + r_k + first_k(j-1, m) )
    cost_k(l, m)  = min( cost_{k-1}(l, c_{k-1}), w_k + first_k(l, m) )

where first_k is the cost once the first state lies in tier k. The transpose of a step costs the same in every plan and
appears nowhere.

Source: Herrmann & Pallez (2020), ACM TOMS 46(2), H-Revolve.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import inf
from typing import NamedTuple, Protocol

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
    tally,
)
from revolve.pieces import Piece, as_array, walk
from revolve.schedules import Segment, close_gaps

LONGEST = 20_000
"""The tables of the exact optimum grow with slots times steps, and their making with slots times steps squared."""


class Tier(NamedTuple):
    """One kind of memory: so many slots, and what a write and a read cost in the unit of ``step_cost``."""

    slots: int
    write: float = 0.0
    read: float = 0.0


@dataclass(frozen=True)
class HRevolve:
    """The least cost in several kinds of memory, exactly: runs, writes and reads at their prices.

    ``tiers``: the fastest first; x_0 takes a slot like any other state.
    """

    tiers: tuple[Tier, ...]
    step_cost: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(_checked(k, Tier(*tier)) for k, tier in enumerate(self.tiers)))
        if not self.tiers:
            raise ValueError("tiers=() holds nothing; give at least one, for instance (Tier(3), Tier(7, 10.0, 10.0))")
        if not 0 <= self.step_cost < inf:
            raise ValueError(f"step_cost={self.step_cost} is not a price; give 0 or more, and finite")

    @property
    def slots(self) -> int:
        return sum(tier.slots for tier in self.tiers)

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("HRevolve places its slots by the number of steps; give steps, or use Online(slots)")
        steps = self._checked(steps)
        top = len(self.tiers) - 1
        whole = _Whole(_tables(self.tiers, self.step_cost, steps), 0, steps, top, self.tiers[top].slots)
        return takewhile(lambda action: not isinstance(action, Reverse), walk((whole,)))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return backward_in_pieces(self, steps, saved, len(self.tiers) - 1)

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        def reverse(segment: Segment) -> tuple[Piece, ...] | None:
            return self._on(segment, [tier for step, tier in saved.states if step < segment.start])

        return close_gaps(steps, saved, reverse)

    def _on(self, segment: Segment, below: Sequence[int]) -> tuple[Piece, ...] | None:
        """The best way on from a state, in the slots that the states below it leave in each tier."""
        start, stop, home, _ = segment
        room = [tier.slots - below.count(k) for k, tier in enumerate(self.tiers)]
        if stop - start == 1:
            return (_Step(start),)
        if home is not None:
            if room[home] >= 1:
                return (_First(self._tables(room, home, stop - start), start, stop, home, room[home]),)
            room[home] -= 1
        for k in reversed(range(0 if home is None else home + 1, len(self.tiers))):
            if room[k] >= 1:
                return (_Whole(self._tables(room, k, stop - start), start, stop, k, room[k]),)
        if home is None:
            return None
        raise ValueError(f"{self} has no slot left for the steps {start} .. {stop}; more states are kept than it keeps")

    def _tables(self, room: Sequence[int], top: int, steps: int) -> _Tables:
        """Those of the whole schedule, unless a tier below ``top`` holds a state already."""
        tiers = tuple(tier._replace(slots=max(0, room[k])) if k < top else tier for k, tier in enumerate(self.tiers))
        return _tables(tiers, self.step_cost, steps)

    def _checked(self, steps: int) -> int:
        steps = binomial.whole("steps", steps, least=1)
        binomial.check(steps, self.slots)
        if steps > LONGEST:
            raise ValueError(f"steps={steps} is too long for exact tables; give at most {LONGEST}, or use PeriodicDisk")
        return steps

    def cost(self, steps: int) -> float:
        """The least cost of runs, writes and reads that reverses the chain; the recorded runs are not in it."""
        steps = self._checked(steps)
        return float(_tables(self.tiers, self.step_cost, steps).least[steps - 1])

    def price(self, steps: int) -> Report:
        steps = self._checked(steps)
        return tally(as_array(self, steps), steps)


def _checked(number: int, tier: Tier) -> Tier:
    for name, price in (("write", tier.write), ("read", tier.read)):
        if not 0 <= price < inf:
            raise ValueError(f"{name}={price} of tier {number} is not a price; give 0 or more, and finite")
    return Tier(binomial.whole("slots", tier.slots), float(tier.write), float(tier.read))


class Tiered(Protocol):
    """A schedule in pieces that keeps x_0 in a tier of its own choice."""

    def forward(self, steps: int | None) -> Iterator[Action]: ...

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]: ...


def backward_in_pieces(schedule: Tiered, steps: int, saved: Saved, slowest: int) -> Iterator[Action]:
    """The reverse sweep; an x_0 that the caller holds takes the slot that the first sweep would have saved it in."""
    states = saved.states
    if (0, GIVEN) not in states:
        return walk(schedule.pieces(steps, saved))
    home = next((a.tier for a in schedule.forward(steps) if isinstance(a, Save) and a.step == 0), slowest)
    return with_given(walk(schedule.pieces(steps, saved._replace(states=states - {(0, GIVEN)} | {(0, home)}))))


def with_given(actions: Iterable[Action]) -> Iterator[Action]:
    """The same plan when the caller holds x_0: loaded from him, never saved and never dropped."""
    for action in actions:
        if isinstance(action, Load) and action.step == 0:
            yield Load(0, GIVEN)
        elif not (isinstance(action, (Save, Drop)) and action.step == 0):
            yield action


class _Step(NamedTuple):
    """One step, from the working state."""

    start: int

    @property
    def kind(self) -> Hashable:
        return None

    def parts(self) -> tuple[Action, ...]:
        return Record(self.start, self.start + 1), Reverse(self.start, self.start + 1)


class _Whole(NamedTuple):
    """Steps to be reversed from their first state, which is the working state, in tiers up to ``tier``."""

    tables: _Tables
    start: int
    stop: int
    tier: int
    slots: int

    @property
    def kind(self) -> Hashable:
        return _Whole, self.tables, self.stop - self.start, self.tier, self.slots

    def parts(self) -> tuple[Action | Piece, ...]:
        tables, start, stop, tier, slots = self
        if stop - start == 1:
            return (_Step(start),)
        if tables.below(tier, slots, stop - start):
            return (_Whole(tables, start, stop, tier - 1, tables.slots[tier - 1]),)
        return Save(start, tier), _First(tables, start, stop, tier, slots), Drop(start, tier)


class _First(NamedTuple):
    """The same when that state lies in ``tier``, and takes one of its ``slots``."""

    tables: _Tables
    start: int
    stop: int
    tier: int
    slots: int

    @property
    def kind(self) -> Hashable:
        return _First, self.tables, self.stop - self.start, self.tier, self.slots

    def parts(self) -> tuple[Action | Piece, ...]:
        tables, start, stop, tier, slots = self
        if stop - start == 1:
            return (_Step(start),)
        ahead = tables.ahead(tier, slots, stop - start)
        if ahead == 0:
            return (_Whole(tables, start, stop, tier - 1, tables.slots[tier - 1]),)
        middle = start + ahead
        return (
            Advance(start, middle),
            _Whole(tables, middle, stop, tier, slots - 1),
            Load(start, tier),
            _First(tables, start, middle, tier, slots),
        )


class _Tables:
    """cost_k(l, m) and the choices that lead to it, for l < steps."""

    def __init__(self, tiers: Sequence[Tier], step_cost: float, steps: int) -> None:
        self.steps = steps
        self.slots = [tier.slots for tier in tiers]
        self._lower: list[np.ndarray | None] = []
        self._split: list[np.ndarray | None] = []
        self.least = np.full(steps, np.inf)
        """cost_K(l, c_K)"""
        self.least[0] = 0.0
        for k, tier in enumerate(tiers):
            if k == 0 and tier.write == tier.read == 0 and step_cost > 0:
                self._add_free(tier.slots, step_cost, steps)
            else:
                self._add(tier, step_cost, steps, self.least)

    def below(self, tier: int, slots: int, steps: int) -> bool:
        """Whether so many steps are reversed in lower tiers alone."""
        lower = self._lower[tier]
        return slots == 0 if lower is None else bool(lower[slots, steps - 1])

    def ahead(self, tier: int, slots: int, steps: int) -> int:
        """How far to run from a state in this tier; 0: go on in lower tiers."""
        split = self._split[tier]
        return binomial.first_split(steps, slots) if split is None else int(split[slots, steps - 1])

    def _add_free(self, slots: int, step_cost: float, steps: int) -> None:
        """A first tier that costs nothing is Binomial."""
        if slots:
            numbers = np.arange(1, steps + 1)
            betas = [1]
            while betas[-1] < steps:
                betas.append(binomial.beta(slots=slots, repetitions=len(betas)))
            r = np.searchsorted(betas, numbers)
            less = np.array([binomial.beta(slots=slots + 1, repetitions=k) for k in range(len(betas))])
            self.least = step_cost * np.where(r > 0, r * numbers - less[np.maximum(r, 1) - 1], 0).astype(float)
        self._lower.append(None)
        self._split.append(None)

    def _add(self, tier: Tier, step_cost: float, steps: int, below: np.ndarray) -> None:
        """One more tier; a row of m = 1 .. c at a time, all j at once."""
        slots, write, read = tier
        first = np.full((slots, steps), np.inf)
        cost = np.tile(below, (slots + 1, 1))
        split = np.zeros((slots + 1, steps), dtype=np.int32)
        first[:, 0] = 0.0
        ahead = np.empty((slots, steps))  # j uf + r + first(j-1, m), by j
        rest = np.empty((slots, steps))  # cost(l, m-1), l falling
        if slots:
            ahead[:, 0], rest[:, -1] = step_cost + read, 0.0
        for last in range(1, steps if slots else 0):
            best, least = least_sums(ahead[:, :last], rest[:, steps - last :])
            split[1:, last] = np.where(below[last] <= least, 0, best + 1)
            first[:, last] = np.minimum(below[last], least)
            cost[1:, last] = np.minimum(below[last], write + first[:, last])
            ahead[:, last] = (last + 1) * step_cost + read + first[:, last]
            rest[:, steps - 1 - last] = cost[:-1, last]
        self.least = cost[-1]
        self._split.append(split)
        self._lower.append(np.vstack([np.ones((1, steps), bool), below <= write + first]))


def least_sums(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In each row the place and the value of the least sum; a few rows at a time, so that they stay in the cache."""
    rows, columns = first.shape
    best, least = np.empty(rows, dtype=np.int64), np.empty(rows)
    height = max(1, 8192 // columns)
    sums = np.empty((height, columns))
    for low in range(0, rows, height):
        high = min(rows, low + height)
        total = np.add(first[low:high], second[low:high], out=sums[: high - low])
        chosen = total.argmin(axis=1)
        best[low:high], least[low:high] = chosen, total[np.arange(high - low), chosen]
    return best, least


_KNOWN: OrderedDict[tuple[tuple[Tier, ...], float], _Tables] = OrderedDict()


def _tables(tiers: tuple[Tier, ...], step_cost: float, steps: int) -> _Tables:
    """Tables for chains of up to so many steps; the last few are kept, and serve every shorter chain."""
    known = _KNOWN.pop((tiers, step_cost), None)
    if known is None or known.steps < steps:
        known = _Tables(tiers, step_cost, steps)
    _KNOWN[tiers, step_cost] = known
    while len(_KNOWN) > 8:
        _KNOWN.popitem(last=False)
    return known
