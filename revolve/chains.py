"""Chains whose steps differ, in cost and in the sizes of states and tapes, under a budget in bytes.

With f_i the cost of step i, a_i the size of x_i, t_i that of its tape, and m the memory that is free, the steps i .. j
are reversed from x_i as the working state at the least cost of all runs

    B(i, j, m) = min( C(i, j, m - a_i), T(i, j, m) )                                     keep x_i, or do not
    C(i, j, m) = min( min_k  f_i + .. + f_{k-1} + B(k, j, m) + C(i, k-1, m), T(i, j, m + a_i) )       x_i is kept
    T(i, j, m) = f_i + B(i+1, j, m - t_i)                                                keep the tape of step i
    B(i, i, m) = C(i, i, m - a_i) = f_i.

Each line has its peak test: a run needs ``running`` bytes besides what is kept, a step that is recorded and reversed
``recording``. What is kept stays until the part above it is reversed ("persistent"): exact for equal sizes, but not
always where sizes differ. Costs (1, 5, 20, 20, 1, 5), states (3, 1, 5, 8, 1, 5), budget 8: 74 plain against 73, which
``exact=True`` finds by a search.

Where states have parts in common (the live values at the cuts of a graph), a part is kept once: a_k becomes what x_k
has and the state kept below it has not, a(k | i), and a run needs what it works on besides x_i.

Source: Beaumont, Eyraud-Dubois, Herrmann, Joly & Shilova (2019), arXiv:1911.13214 (rotor); there x_i stays while the
tape of step i is held.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from math import inf
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
    both_sweeps,
    encode,
    tally,
)
from revolve.hierarchy import with_given
from revolve.pieces import Piece, walk
from revolve.schedules import Segment, close_gaps, regenerate
from revolve.search import cheapest
from revolve.sizes import ALONE, Other, Parts, Sizes, in_units, least_memory, unit_for
from revolve.weigh import weigh

LONGEST_SEARCH = 10
NEVER = 2**60
"""The size of a tape that is not to be kept."""
SMALL = 20_000_000
"""Tables of up to so many numbers are in double precision; larger ones in single, where ties may break otherwise."""


@dataclass(frozen=True)
class Differing:
    """The least cost of all runs under a budget for kept states (x_0 among them), kept tapes and what a run needs.

    ``costs``, ``states``, ``tapes``: one number a step; x_n is never kept. ``tapes=None``: no tape is kept. ``running``
    and ``recording``: bytes needed besides what is kept while a step runs plainly, and while it is recorded and
    reversed; nothing by default. Sizes are rounded up to ``units`` parts of the budget, unless they share a unit that
    large. ``exact``: search every sequence of moves, for chains of at most 10 steps.

    ``parts``, in place of ``states``: of which parts each state is made, and the size of each part. What two kept states
    have in common is kept once, and what a run works on counts beside ``running``.
    """

    costs: tuple[float, ...]
    states: tuple[int, ...]
    budget: int
    tapes: tuple[int, ...] | None = None
    running: tuple[int, ...] | None = None
    recording: tuple[int, ...] | None = None
    units: int = 500
    exact: bool = False
    parts: Parts | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", tuple(map(float, self.costs)))
        if self.parts is not None:
            self.parts.check()
            if self.exact:
                raise ValueError("exact=True searches states that have nothing in common; leave it out, or parts=")
            object.__setattr__(self, "states", tuple(map(self.parts.size, range(len(self.parts.states)))))
        object.__setattr__(self, "budget", binomial.whole("budget", self.budget))
        object.__setattr__(self, "units", binomial.whole("units", self.units, least=1))
        if not self.costs or not all(0 <= cost < inf for cost in self.costs):
            raise ValueError(
                f"costs={self.costs} are no costs of steps; give a finite number of at least 0 for each step"
            )
        for name in ("states", "tapes", "running", "recording"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if len(sizes) != len(self.costs):
                raise ValueError(f"{name} has {len(sizes)} sizes for {len(self.costs)} steps; give one for each step")
            object.__setattr__(self, name, tuple(binomial.whole(name, size) for size in sizes))

    def __str__(self) -> str:
        tapes = "states" if self.tapes is None else "states or tapes"
        exact = ", exact" if self.exact else ""
        return f"Differing({len(self.costs)} steps, {tapes} in a budget of {self.budget}{exact})"

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Differing plans steps that it knows; give steps, or use Online(slots)")
        steps = self._checked(steps)
        self.cost(steps)
        if self.exact:
            actions: Iterator[Action] = iter(_search(self, steps))
        else:
            actions = walk((_Part(_tables(self), 0, steps, _sizes(self).budget, None, ALONE),))
        return takewhile(lambda action: not isinstance(action, Reverse), actions)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        given = (0, GIVEN) in saved.states
        if self.exact and steps <= len(self.costs):
            found = _search(self, steps)
            left, rest = _after_forward(found)
            if given and (0, 0) in left.states:
                left = left._replace(states=left.states - {(0, 0)} | {(0, GIVEN)})
            if left.states == saved.states and left.tapes == saved.tapes:
                return with_given(rest) if given else iter(rest)
        return self._backward(steps, saved)

    def _backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        sizes, tables = _sizes(self), _tables(self)
        needed = saved.states - {(begin, GIVEN) for begin, _ in saved.tapes}  # x_0 counts until its step is on tape

        def reverse(segment: Segment) -> Iterable[Action | Piece] | None:
            start, stop, tier, _ = segment
            steps_below = sorted(step for step, _ in needed if step < start)
            nearest = steps_below[-1] if steps_below else ALONE
            below = sum(map(sizes.state, steps_below, [ALONE, *steps_below]))
            below += sum(sum(sizes.tapes[begin : min(end, start)]) for begin, end in saved.tapes if begin < start)
            room = sizes.budget - below
            if tier is None:
                found = room >= 0 and np.isfinite(tables.begun(start, stop - 1, nearest)[room])
                return (_Part(tables, start, stop, room, None, nearest),) if found else None
            room -= sizes.state(start, nearest)
            if room >= 0 and np.isfinite(tables.kept[start][stop - 1 - start, room]):
                return (_Part(tables, start, stop, room, tier, nearest),)
            return *regenerate(segment), *((Drop(start, tier),) if tier != GIVEN else ())

        return walk(close_gaps(steps, saved, reverse, drops=True))

    def _checked(self, steps: int) -> int:
        steps = binomial.whole("steps", steps, least=1)
        if steps > len(self.costs):
            raise ValueError(f"steps={steps} is too long for a chain of {len(self.costs)}; give at most that many")
        if self.exact and steps > LONGEST_SEARCH:
            raise ValueError(f"steps={steps} is too long for a search; give at most {LONGEST_SEARCH}, or exact=False")
        return steps

    def cost(self, steps: int) -> float:
        """The cost of all runs, plain and recorded; raises with the smallest budget that works."""
        steps = self._checked(steps)
        if self.exact:
            return weigh(_search(self, steps), self.costs, self.states)[0]
        least = float(_tables(self).open[steps - 1][0, _sizes(self).budget])
        if not np.isfinite(least):
            raise ValueError(
                f"budget={self.budget} cannot reverse these {steps} steps; give at least {self.smallest(steps)}"
            )
        return least

    def smallest(self, steps: int) -> int:
        """The least budget that works, in the units that it is counted in."""
        steps = self._checked(steps)
        budget, least = 0, least_memory(_in_units(self, 1), steps)
        while least > budget:
            budget = least
            chain = replace(self, budget=budget)
            unit = _unit(chain)
            least = least_memory(_in_units(chain, unit), steps) * unit
        return budget

    def peak(self, steps: int) -> int:
        """The most bytes at one moment."""
        sizes = self.tapes, self.running, self.recording
        return weigh(both_sweeps(self, self._checked(steps)), self.costs, self.states, *sizes, self.parts)[1]

    def price(self, steps: int) -> Report:
        steps = self._checked(steps)
        return tally(encode(both_sweeps(self, steps)), steps)


@lru_cache(maxsize=8)
def _sizes(chain: Differing) -> Sizes:
    return _in_units(chain, _unit(chain))


def _unit(chain: Differing) -> int:
    columns = (chain.states, chain.tapes or (), chain.running or (), chain.recording or ())
    parts = chain.parts.sizes if chain.parts is not None else ()
    return unit_for(chain.budget, chain.units, (*columns, parts))


def _in_units(chain: Differing, unit: int) -> Sizes:
    zeros, never = (0,) * len(chain.costs), (NEVER,) * len(chain.costs)
    columns = (chain.states, chain.tapes or never, chain.running or zeros, chain.recording or zeros)
    return in_units(unit, chain.budget, columns, chain.parts)


class _Part(NamedTuple):
    """The steps start .. stop-1, to be reversed from the working state in ``room`` units besides x_start's own.

    ``tier``: where x_start is kept, to be dropped here; None if it is not kept, and the room is all there is.
    ``below``: the kept state with which x_start has most in common.
    """

    tables: _Tables
    start: int
    stop: int
    room: int
    tier: int | None
    below: int

    @property
    def kind(self) -> Hashable:
        return None

    def parts(self) -> tuple[Action | Piece, ...]:
        tables, start, stop, room, tier, below = self
        drop = (Drop(start, tier),) if tier is not None and tier != GIVEN else ()
        if stop - start == 1:
            return *drop, Record(start, stop), Reverse(start, stop)
        all_room = room + (0 if tier is None else tables.sizes.least(start))
        if tier is None:
            own = tables.sizes.state(start, below)
            kept = tables.kept[start][stop - 1 - start, room - own] if room >= own else np.inf
            if tables.taped(start, stop - 1, room) > kept:
                return Save(start), _Part(tables, start, stop, room - own, 0, below)
        else:
            middle = tables.split(start, stop - 1, room)
            if middle:
                upper = _Part(tables, middle, stop, room, None, start)
                lower = _Part(tables, start, middle, room, tier, below)
                return Advance(start, middle), upper, Load(start, tier), lower
        way = tables.way(start, stop - 1, min(all_room, tables.width - 1))
        tables.chosen[start] = way
        upper = _Part(tables, start + 1, stop, all_room - tables.sizes.kept(start)[way].size, None, ALONE)
        return *drop, Record(start, start + 1), upper, Reverse(start, start + 1)


class _Tables:
    """B as open[j][i, m], C as kept[i][j-i, m]; T as tapes[i][j-i, m] where states have parts in common."""

    def __init__(self, costs: Sequence[float], sizes: Sizes) -> None:
        steps, width = len(costs), sizes.budget + 1
        kind = np.float64 if steps * steps * width <= SMALL else np.float32
        self.costs, self.sizes, self.width = np.array(costs), sizes, width
        self.chosen = [0] * steps
        """How the tape of each step is kept in the plan that was walked last."""
        self.below = np.concatenate([[0.0], np.cumsum(costs)])
        self.open = [np.full((j + 1, width), np.inf, dtype=kind) for j in range(steps)]
        self.kept = [np.full((steps - i, width), np.inf, dtype=kind) for i in range(steps)]
        shared = sizes.apart is not None
        self.tapes = [np.full((steps - i, width), np.inf, dtype=kind) for i in range(steps)] if shared else []
        self._sums = np.empty((max(1, 65536 // width), width), dtype=kind)
        for i in reversed(range(steps)):
            self._row(i)

    def _row(self, i: int) -> None:
        """B(i, j, .) and C(i, j, .) for every j."""
        steps, sizes, kept = len(self.costs), self.sizes, self.kept[i]
        lower = np.full_like(kept, np.inf)  # f_i + .. + f_{k-1} + C(i, k-1, m), by k - i - 1
        running = np.maximum.accumulate([sizes.run(s, i) for s in range(i, steps)]).tolist()
        rest = (self.below[i + 1 :] - self.below[i]).tolist()
        recording, freed = sizes.recording[i], sizes.least(i)
        begun = self._begun_above(i) if self.tapes else None
        kept[0, max(0, recording - freed) :] = self.costs[i]
        self.open[i][i, recording:] = self.costs[i]
        for j in range(i, steps):
            here = kept[j - i]
            if j > i:
                starts = self.open[j][i + 1 : j + 1] if begun is None else begun[: j - i, j]
                self._least_pair(lower[: j - i], starts, here)
                taped = self._taped(i, j, self.open[j][i])
                if self.tapes:
                    self.tapes[i][j - i] = taped
                if freed < self.width:
                    np.minimum(here[: self.width - freed], taped[freed:], out=here[: self.width - freed])
                own = sizes.states[i]
                if own < self.width:
                    np.minimum(taped[own:], here[: self.width - own], out=taped[own:])
            np.add(here[running[j - i] :], rest[j - i], out=lower[j - i, running[j - i] :])

    def _begun_above(self, i: int) -> np.ndarray:
        """B(k, j, .) as [k-i-1, j] for all k from i+1 on, while x_i is kept."""
        steps = len(self.costs)
        found = np.full((steps - i - 1, steps, self.width), np.inf, dtype=self.kept[i].dtype)
        for k in range(i + 1, steps):
            row, own = found[k - i - 1, k:], self.sizes.state(k, i)
            row[:] = self.tapes[k]
            if own < self.width:
                np.minimum(row[:, own:], self.kept[k][:, : self.width - own], out=row[:, own:])
            row[0] = self.open[k][k]
        return found

    def begun(self, k: int, j: int, below: int) -> np.ndarray:
        """B(k, j, .) while the state at ``below`` is kept."""
        if not self.tapes or below == ALONE or k == j:
            return self.open[j][k]
        found, own = self.tapes[k][j - k].copy(), self.sizes.state(k, below)
        if own < self.width:
            np.minimum(found[own:], self.kept[k][j - k, : self.width - own], out=found[own:])
        return found

    def _least_pair(self, first: np.ndarray, second: np.ndarray, out: np.ndarray) -> None:
        """The least sum in each column; a few rows at a time, so that they stay in the cache."""
        height = len(self._sums)
        for low in range(0, len(first), height):
            high = min(len(first), low + height)
            sums = np.add(first[low:high], second[low:high], out=self._sums[: high - low])
            np.minimum(out, sums.min(axis=0), out=out)

    def _taped(self, i: int, j: int, out: np.ndarray) -> np.ndarray:
        """T(i, j, .)"""
        tape = self.sizes.tapes[i]
        first = max(self.sizes.recording[i], self.sizes.run(i), tape)
        if first < self.width:
            np.add(self.open[j][i + 1, first - tape : self.width - tape], self.costs[i], out=out[first:])
        for size, needs, cost in self.sizes.kept(i)[1:] if self.sizes.ways else ():
            if needs < self.width:
                found = self.open[j][i + 1, needs - size : self.width - size] + (self.costs[i] + cost)
                np.minimum(out[needs:], found, out=out[needs:], casting="same_kind")
        return out

    def way(self, i: int, j: int, room: int) -> int:
        """Which of the ways to keep the tape of step i is the cheapest."""
        kept = enumerate(self.sizes.kept(i))
        costs = {k: self.open[j][i + 1, room - size] + cost for k, (size, needs, cost) in kept if needs <= room}
        return min(costs, key=lambda k: (costs[k], k), default=0)

    def taped(self, i: int, j: int, room: int) -> float:
        return float(self._taped(i, j, np.full(self.width, np.inf))[room])

    def split(self, i: int, j: int, room: int) -> int:
        """The k up to which to run before the next state may be kept; 0: keep the tape of step i."""
        k = np.arange(i + 1, j + 1)
        starts = np.array([self.begun(step, j, i)[room] for step in range(i + 1, j + 1)])
        costs = self.below[k] - self.below[i] + self.kept[i][: j - i, room] + starts
        costs[np.maximum.accumulate([self.sizes.run(s, i) for s in range(i, j)]) > room] = np.inf
        best = int(costs.argmin())
        taped = self.taped(i, j, min(room + self.sizes.least(i), self.width - 1))
        return 0 if taped < costs[best] else i + 1 + best


@lru_cache(maxsize=4)
def _tables(chain: Differing) -> _Tables:
    return _Tables(chain.costs, _sizes(chain))


def written(chain: Differing, ways: Sequence[Sequence[Other]]) -> tuple[tuple[Action, ...], list[int]] | None:
    """Both sweeps where each tape may be kept in several ways, and which is chosen for each step, 0 as it is; or None."""
    steps, unit = len(chain.costs), _unit(chain)
    others = tuple(tuple(Other(-(-w.size // unit), -(-w.needs // unit), w.cost) for w in row) for row in ways)
    tables = _Tables(chain.costs, _in_units(chain, unit)._replace(ways=others))
    budget = tables.sizes.budget
    if not np.isfinite(tables.open[steps - 1][0, budget]):
        return None
    return tuple(walk((_Part(tables, 0, steps, budget, None, ALONE),))), tables.chosen


def least_with(chain: Differing, ways: Sequence[Sequence[Other]]) -> int:
    """The least budget that works where each tape may be kept in several ways."""
    return least_memory(_in_units(chain, 1)._replace(ways=tuple(map(tuple, ways))), len(chain.costs))


@lru_cache(maxsize=8)
def _search(chain: Differing, steps: int) -> tuple[Action, ...]:
    zeros, never = (0,) * len(chain.costs), (chain.budget + 1,) * len(chain.costs)
    columns = (chain.states, chain.tapes or never, chain.running or zeros, chain.recording or zeros)
    found = cheapest(steps, chain.budget, chain.costs, *columns)
    if found is None:
        raise ValueError(
            f"budget={chain.budget} cannot reverse these {steps} steps; give at least {chain.smallest(steps)}"
        )
    return found


def _after_forward(actions: Sequence[Action]) -> tuple[Saved, list[Action]]:
    """What the first sweep of a whole plan leaves, and the rest of it."""
    first = list(takewhile(lambda action: not isinstance(action, Reverse), actions))
    states = {a.step for a in first if isinstance(a, Save)} - {a.step for a in first if isinstance(a, Drop)}
    tapes = tuple(sorted((a.start, a.stop) for a in first if isinstance(a, Record)))
    return Saved(frozenset((step, 0) for step in states), tapes), list(actions[len(first) :])
