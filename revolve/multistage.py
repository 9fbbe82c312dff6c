"""Multistage: least recomputation in memory and on disk together, with few writes and reads on disk."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from revolve import binomial
from revolve.actions import Action, Advance, Drop, Load, Record, Report, Reverse, Save, Saved, tally
from revolve.hierarchy import LONGEST, HRevolve, Tier, backward_in_pieces
from revolve.pieces import Piece, as_array, walk
from revolve.schedules import Segment, close_gaps

DISK = 1
LONGEST_RANKED = 5_000_000
"""The use of each place in the stack is counted action by action."""


@dataclass(frozen=True)
class Multistage:
    """Least recomputation in ``memory`` + ``disk`` slots, and with it the fewest writes and reads on disk.

    Memory is tier 0 and disk is tier 1. That is HRevolve with a step dearer than all writes and reads together: what
    lies on disk may be promoted to memory once there is room.

    ``promotes=False``, for chains of any length: the places of one stack are ranked by their writes and reads, and the
    busiest lie in memory. As little recomputation, and somewhat more use of the disk, because nothing moves.

    Source: Stumm & Walther (2009), SIAM J. Sci. Comput. 31(3), for the ranking.
    """

    memory: int
    disk: int
    promotes: bool = True

    def __post_init__(self) -> None:
        for name in ("memory", "disk"):
            object.__setattr__(self, name, binomial.whole(name, getattr(self, name)))

    @property
    def slots(self) -> int:
        return self.memory + self.disk

    @property
    def priced(self) -> HRevolve:
        return HRevolve((Tier(self.memory), Tier(self.disk, 1.0, 1.0)), step_cost=4.0 * LONGEST)

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Multistage places its slots by the number of steps; give steps, or use Online(slots)")
        steps = self._checked(steps)
        if self.promotes:
            return self.priced.forward(steps)
        whole = _Whole(0, steps, _places(steps, self.slots, self.memory))
        return takewhile(lambda action: not isinstance(action, Reverse), walk((whole,)))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return backward_in_pieces(self, steps, saved, DISK)

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        if self.promotes:
            return self.priced.pieces(steps, saved)

        def reverse(segment: Segment) -> tuple[Piece, ...] | None:
            start, stop, home, below = segment
            slots = self.slots - below
            if home is None and slots == 0:
                return None
            binomial.check(stop - start, slots)
            memory = self.memory - sum(tier == 0 for step, tier in saved.states if step < start)
            places = _places(stop - start, slots, max(0, memory), home)
            return (_Whole(start, stop, places) if home is None else _Kept(start, stop, places),)

        return close_gaps(steps, saved, reverse)

    def _checked(self, steps: int) -> int:
        steps, _ = binomial.check(steps, self.slots)
        longest, way_out = (LONGEST, "or promotes=False") if self.promotes else (LONGEST_RANKED, "or use PeriodicDisk")
        if steps > longest:
            raise ValueError(f"steps={steps} is too long for Multistage; give at most {longest}, {way_out}")
        return steps

    def price(self, steps: int) -> Report:
        steps = self._checked(steps)
        return tally(as_array(self, steps), steps)


@lru_cache(maxsize=64)
def _places(steps: int, slots: int, memory: int, home: int | None = None) -> tuple[int, ...]:
    """The tier of each place in Binomial's stack, the lowest first: memory for those that are used most.

    ``home``: the tier of the lowest, if that lies somewhere already.
    """
    used, places = _used(steps, slots).copy(), np.full(slots, DISK)
    if home is not None and slots:
        used[0] = np.iinfo(np.int64).max if home == 0 else -1
    places[np.argsort(-used, kind="stable")[:memory]] = 0
    if home is not None and slots:
        places[0] = home
    return tuple(places.tolist())


def _used(steps: int, slots: int) -> np.ndarray:
    """Loads and saves at each place in Binomial's stack, without the save of the lowest; equal parts are counted once."""
    known: dict[tuple[int, int], np.ndarray] = {}
    stack = [(steps, slots)]
    while stack:
        length, free = part = stack.pop()
        if part in known:
            continue
        if length == 1 or free == 1:
            known[part] = np.array([length - 1] + [0] * (free - 1), dtype=np.int64)[:free]
            continue
        middle = binomial.first_split(length, free)
        lower, upper = (middle, free), (length - middle, free - 1)
        if lower in known and upper in known:
            used = known[lower].copy()
            used[0] += 1
            used[1:] += known[upper]
            used[1] += length - middle > 1
            known[part] = used
        else:
            stack += [part, lower, upper]
    return known[steps, slots]


class _Whole(NamedTuple):
    """Steps to be reversed from the working state, which is kept nowhere yet."""

    start: int
    stop: int
    places: tuple[int, ...]

    @property
    def kind(self) -> Hashable:
        return _Whole, self.stop - self.start, self.places

    def parts(self) -> tuple[Action | Piece, ...]:
        start, stop, places = self
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop)
        return Save(start, places[0]), _Kept(start, stop, places), Drop(start, places[0])


class _Kept(NamedTuple):
    """Steps to be reversed from the working state, which is kept in the first of the places."""

    start: int
    stop: int
    places: tuple[int, ...]

    @property
    def kind(self) -> Hashable:
        return _Kept, self.stop - self.start, self.places

    def parts(self) -> tuple[Action | Piece, ...]:
        start, stop, places = self
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop)
        middle = start + binomial.first_split(stop - start, len(places))
        upper, lower = _Whole(middle, stop, places[1:]), _Kept(start, middle, places)
        return Advance(start, middle), upper, Load(start, places[0]), lower
