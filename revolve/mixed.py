"""A slot holds a state to start again from, or the tape of one step: Mixed, Stages.

With m units of memory, a for a state and b for a tape, the least number of plain runs beyond one recorded run a step is

    A(n, m) = min( min_i  i + A(i, m) + A(n-i, m-a)      keep the state, come back to it, and give it back,
                   A(n-1, m-b) )                         record the first step and keep its tape.

The tape of the last step is consumed at once and takes no memory. If the tape of a step holds its end (the graph of a
recorded step does; so do the stages of a Runge-Kutta method whose last stage is the solution), that state is free above
it: X(n-1, m-b) in the second line, with

    X(n, m) = min( min_i  i + X(i, m) + A(n-i, m), X(n-1, m-b) ).

The transpose evaluates the right-hand side once more where it linearises it; those evaluations are not in the plan.

Source: Maddison (2024), SIAM J. Sci. Comput. 46(1); Zhang & Constantinescu (2023), J. Comput. Sci. 66 (CAMS). Here the
memory of a state is free again for tapes when it has been loaded for the last time, which theirs is not. Where a state
is as large as a tape there is a closed form (taped.py), for chains of any length.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from math import gcd, isqrt
from typing import NamedTuple, Protocol

import numpy as np

from revolve import binomial, taped
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
from revolve.hierarchy import least_sums
from revolve.pieces import Piece, as_array, walk
from revolve.schedules import Segment, close_gaps, regenerate

WORK = 4e9
"""The most that tables may take: units of memory times steps squared."""
ON_TAPE = 1
"""The tier of states that a kept tape holds anyway: its store only remembers them."""
LONGEST = 2_000_000
"""Plans are counted action by action up to this length."""


@dataclass(frozen=True)
class Mixed:
    """Least recomputation when a slot may hold a state or a tape; with ``state`` and ``tape`` their sizes in slots.

    The memory that is counted is that of kept states and kept tapes, not the tape that is consumed at once.
    ``holds_end``: a tape holds the state at the end of its step, so that a kept step can be left from again for nothing;
    such states are saved in tier 1, whose store only remembers what the tape holds.
    """

    slots: int
    state: int = 1
    tape: int = 1
    holds_end: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", binomial.whole("slots", self.slots))
        for name in ("state", "tape"):
            object.__setattr__(self, name, binomial.whole(name, getattr(self, name), least=1))

    @classmethod
    def in_bytes(
        cls, budget: int, state_bytes: int, tape_bytes: int, *, holds_end: bool = False, units: int = 200
    ) -> Mixed:
        """The same for sizes in bytes: exact if they are equal or share a large enough unit, else rounded up to
        budget / units."""
        budget = binomial.whole("budget", budget)
        sizes = [binomial.whole("state_bytes", state_bytes, least=1), binomial.whole("tape_bytes", tape_bytes, least=1)]
        unit = gcd(*sizes)
        if sizes[0] == sizes[1] and not holds_end:
            return cls(budget // unit)
        if budget // unit > units:
            unit = max(unit, -(-budget // units))
        state, tape = (-(-size // unit) for size in sizes)
        return cls(budget // unit, state, tape, holds_end)

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Mixed and Stages place by the number of steps; give steps, or use Online(slots)")
        steps, _ = binomial.check(steps, self.slots)
        table = self._table(steps)
        self._runs(table, steps)
        whole = _Part(table, 0, steps, self.slots, None, False)
        return takewhile(lambda action: not isinstance(action, Reverse), walk((whole,)))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return walk(self.pieces(steps, saved))

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        table = self._table(steps)
        needed = saved.states - {(begin, GIVEN) for begin, _ in saved.tapes}  # x_0 counts until its step is on tape

        def reverse(segment: Segment) -> Iterable[Action | Piece] | None:
            start, stop, tier, _ = segment
            states = sum(step < start and kept_in != ON_TAPE for step, kept_in in needed)
            tapes = sum(min(end, start) - min(begin, start) for begin, end in saved.tapes)
            room = self.slots - states * self.state - tapes * self.tape
            held = tier == ON_TAPE or (tier is None and self.holds_end and any(end == start for _, end in saved.tapes))
            if (
                room >= (0 if held or tier is None else self.state)
                and table.extra(room, stop - start, held) is not None
            ):
                return (_Part(table, start, stop, room, tier, held),)
            if tier is None:
                return None
            return *regenerate(segment), *((Drop(start, tier),) if tier >= 0 else ())

        return close_gaps(steps, saved, reverse, drops=True)

    def cost(self, steps: int) -> int:
        """The least number of runs, plain and recorded."""
        steps, _ = binomial.check(steps, self.slots)
        return self._runs(self._table(steps), steps)

    @property
    def longest(self) -> int:
        """The longest chain for which the least number of runs is known."""
        if self.state == self.tape and not self.holds_end:
            return sys.maxsize
        largest = max(self.state, self.tape)  # a chain of n steps has no use for more than n times that
        return max(isqrt(int(WORK) // (self.slots + 1)), int((WORK / (largest + 1)) ** (1 / 3)))

    def _runs(self, table: _Table, steps: int) -> int:
        extra = table.extra(self.slots, steps, False)
        if extra is None:
            raise ValueError(f"slots={self.slots} cannot reverse {steps} steps; give at least {self.state}")
        return steps + extra

    def _table(self, steps: int) -> _Table:
        steps = binomial.whole("steps", steps, least=1)
        if self.state == self.tape and not self.holds_end:
            return _Equal(self.state)
        if steps > self.longest:
            raise ValueError(
                f"steps={steps} is too long for exact tables; give at most {self.longest}, or use Binomial"
            )
        most = 1 << (steps - 1).bit_length()
        room = min(self.slots, most * max(self.state, self.tape))
        return _tables(room, self.state, self.tape, self.holds_end, most)

    def price(self, steps: int) -> Report:
        steps = binomial.whole("steps", steps, least=1)
        if steps > LONGEST:
            raise ValueError(f"steps={steps} is too long for a plan to be counted; give at most {LONGEST}, or ask cost")
        return tally(as_array(self, steps), steps)


@dataclass(frozen=True)
class Stages:
    """Least recomputation of Runge-Kutta steps when a slot holds a state or one of the ``stages`` stages of a step.

    ``last_is_solution``: the end of a step is its last stage, as ``holds_end`` of :class:`Mixed`.
    """

    slots: int
    stages: int
    last_is_solution: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", binomial.whole("slots", self.slots))
        object.__setattr__(self, "stages", binomial.whole("stages", self.stages, least=1))

    @property
    def mixed(self) -> Mixed:
        return Mixed(self.slots, 1, self.stages, self.last_is_solution)

    def forward(self, steps: int | None) -> Iterator[Action]:
        return self.mixed.forward(steps)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return self.mixed.backward(steps, saved)

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        return self.mixed.pieces(steps, saved)

    def cost(self, steps: int) -> int:
        """The least number of runs, plain and recorded."""
        return self.mixed.cost(steps)

    def price(self, steps: int) -> Report:
        return self.mixed.price(steps)


class _Table(Protocol):
    """A and X, in units of memory, with ``held``: whether a tape below holds the first state."""

    @property
    def state(self) -> int: ...

    @property
    def tape(self) -> int: ...

    @property
    def holds_end(self) -> bool: ...

    def extra(self, room: int, steps: int, held: bool) -> int | None:
        """The least number of plain runs; None if there is no plan in so much memory."""
        ...

    def ahead(self, room: int, steps: int, held: bool) -> int:
        """How far to run from the state that is kept; 0: keep the tape of the first step."""
        ...


class _Equal(NamedTuple):
    """The table of states and tapes of one size."""

    state: int

    @property
    def tape(self) -> int:
        return self.state

    @property
    def holds_end(self) -> bool:
        return False

    def extra(self, room: int, steps: int, held: bool) -> int | None:
        slots = room // self.state
        return None if slots == 0 and steps > 1 else taped.extra_steps(steps, slots)

    def ahead(self, room: int, steps: int, held: bool) -> int:
        return taped.split(steps, room // self.state)


class _Part(NamedTuple):
    """Steps to be reversed from the working state in ``room`` units of memory.

    ``tier``: where x_start is kept; it is dropped here, and its memory is part of the room. ``held``: a tape below
    holds x_start, so that keeping it takes nothing.
    """

    table: _Table
    start: int
    stop: int
    room: int
    tier: int | None
    held: bool

    @property
    def kind(self) -> Hashable:
        return self.table, self.stop - self.start, self.room, self.tier, self.held

    def parts(self) -> tuple[Action | Piece, ...]:
        table, start, stop, room, tier, held = self
        drop = (Drop(start, tier),) if tier is not None and tier >= 0 else ()
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop), *drop
        ahead = table.ahead(room, stop - start, held)
        if ahead == 0:
            upper = _Part(table, start + 1, stop, room - table.tape, None, table.holds_end)
            return *drop, Record(start, start + 1), upper, Reverse(start, start + 1)
        middle, here = start + ahead, (ON_TAPE if held else 0) if tier is None else tier
        save = (Save(start, here),) if tier is None else ()
        upper = _Part(table, middle, stop, room - (0 if held else table.state), None, False)
        return *save, Advance(start, middle), upper, Load(start, here), _Part(table, start, middle, room, here, held)


class _Tables:
    """A and, where tapes hold the end of their step, X: cost[0] and cost[1], by room and steps; 0: keep the tape."""

    def __init__(self, room: int, state: int, tape: int, holds_end: bool, steps: int) -> None:
        self.room, self.state, self.tape, self.holds_end = room, state, tape, holds_end
        shape = room + 1, steps + 1
        kinds = 1 + holds_end
        self.cost = [np.full(shape, np.inf) for _ in range(kinds)]
        self.split = [np.zeros(shape, dtype=np.int32) for _ in range(kinds)]
        ahead = [np.empty((room + 1, steps)) for _ in range(kinds)]  # i + A(i, m), by i
        rest = [np.full((room + 1, steps), np.inf) for _ in range(kinds)]  # A(n - i, m - a) and A(n - i, m), n falling
        for n in range(1, steps + 1):
            for kind in range(kinds):
                if n == 1:
                    least = np.zeros(room + 1)
                else:
                    best, least = least_sums(ahead[kind][:, : n - 1], rest[kind][:, steps + 1 - n :])
                    taped = np.full(room + 1, np.inf)
                    if room >= tape:
                        taped[tape:] = self.cost[-1][: room + 1 - tape, n - 1]
                    self.split[kind][:, n] = np.where(taped <= least, 0, best + 1)
                    least = np.minimum(taped, least)
                self.cost[kind][:, n] = least
            for kind in range(kinds):
                if n < steps:
                    ahead[kind][:, n - 1] = n + self.cost[kind][:, n]
                    needed = 0 if kind else state
                    rest[kind][needed:, steps - n] = self.cost[0][: max(0, room + 1 - needed), n]

    def extra(self, room: int, steps: int, held: bool) -> int | None:
        extra = self.cost[held][min(room, self.room), steps]
        return int(extra) if np.isfinite(extra) else None

    def ahead(self, room: int, steps: int, held: bool) -> int:
        return int(self.split[held][min(room, self.room), steps])


@lru_cache(maxsize=8)
def _tables(room: int, state: int, tape: int, holds_end: bool, steps: int) -> _Tables:
    return _Tables(room, state, tape, holds_end, steps)
