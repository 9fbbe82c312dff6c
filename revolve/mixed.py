"""A slot holds a state to start again from, or the tape of one step: Mixed, Stages.

With m units of memory, a for a state and b for a tape, the least number of plain runs beyond one recorded run a step is

    A(n, m) = min( min_i  i + A(i, m) + A(n-i, m-a)      keep the state, come back to it, and give it back,
                   A(n-1, m-b) )                         record the first step and keep its tape.

The tape of the last step is consumed at once and takes no memory. If the tape of a step holds its end (the last stage
of the Runge-Kutta method is the solution), that state is free above it: X(n-1, m-b) in the second line, with

    X(n, m) = min( min_i  i + X(i, m) + A(n-i, m), X(n-1, m-b) ).

The transpose evaluates the right-hand side once more where it linearises it; those evaluations are not in the plan.

Source: Maddison (2024), SIAM J. Sci. Comput. 46(1); Zhang & Constantinescu (2023), J. Comput. Sci. 66 (CAMS). Here the
memory of a state is free again for tapes when it has been loaded for the last time, which theirs is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from math import gcd, isqrt
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
from revolve.hierarchy import least_sums
from revolve.schedules import Nested, Segment, close_gaps, regenerate, walk

WORK = 4e9
"""The most that tables may take: units of memory times steps squared."""
ON_TAPE = 1
"""The tier of states that a kept tape holds anyway: its store only remembers them."""


@dataclass(frozen=True)
class Mixed:
    """Least recomputation when a slot may hold a state or a tape; with ``state`` and ``tape`` their sizes in slots.

    The memory that is counted is that of kept states and kept tapes, not the tape that is consumed at once.
    """

    slots: int
    state: int = 1
    tape: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", binomial.whole("slots", self.slots))
        for name in ("state", "tape"):
            object.__setattr__(self, name, binomial.whole(name, getattr(self, name), least=1))

    @classmethod
    def in_bytes(cls, budget: int, state_bytes: int, tape_bytes: int, *, units: int = 200) -> Mixed:
        """The same for sizes in bytes: exact if they share a large enough unit, else rounded up to budget / units."""
        budget = binomial.whole("budget", budget)
        sizes = [binomial.whole("state_bytes", state_bytes, least=1), binomial.whole("tape_bytes", tape_bytes, least=1)]
        unit = gcd(*sizes)
        if budget // unit > units:
            unit = max(unit, -(-budget // units))
        return cls(budget // unit, *(-(-size // unit) for size in sizes))

    def forward(self, steps: int | None) -> Iterator[Action]:
        return _forward(self, _Tables.of(self, steps), steps)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return _backward(self, _Tables.of(self, steps), steps, saved)

    def cost(self, steps: int) -> int:
        """The least number of runs, plain and recorded."""
        return _Tables.of(self, steps).runs(self.slots, int(steps))

    def price(self, steps: int) -> Report:
        return _price(self, steps)


@dataclass(frozen=True)
class Stages:
    """Least recomputation of Runge-Kutta steps when a slot holds a state or one of the ``stages`` stages of a step.

    ``last_is_solution``: the end of a step is its last stage, so that a kept step can be left from again for nothing;
    such states are saved in tier 1, whose store only remembers what the tape holds.
    """

    slots: int
    stages: int
    last_is_solution: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", binomial.whole("slots", self.slots))
        object.__setattr__(self, "stages", binomial.whole("stages", self.stages, least=1))

    @property
    def state(self) -> int:
        return 1

    @property
    def tape(self) -> int:
        return self.stages

    def forward(self, steps: int | None) -> Iterator[Action]:
        return _forward(self, _Tables.of(self, steps), steps)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return _backward(self, _Tables.of(self, steps), steps, saved)

    def cost(self, steps: int) -> int:
        """The least number of runs, plain and recorded."""
        return _Tables.of(self, steps).runs(self.slots, int(steps))

    def price(self, steps: int) -> Report:
        return _price(self, steps)


def _forward(schedule: Mixed | Stages, tables: _Tables, steps: int | None) -> Iterator[Action]:
    assert steps is not None
    steps, _ = binomial.check(steps, schedule.slots)
    if not np.isfinite(tables.cost[0][schedule.slots, steps]):
        raise ValueError(f"slots={schedule.slots} cannot reverse {steps} steps; give at least {schedule.state}")
    whole = _Part(tables, 0, steps, schedule.slots, None, False)
    return takewhile(lambda action: not isinstance(action, Reverse), walk((whole,)))


def _backward(schedule: Mixed | Stages, tables: _Tables, steps: int, saved: Saved) -> Iterator[Action]:
    needed = saved.states - {(begin, GIVEN) for begin, _ in saved.tapes}  # x_0 counts until its step is on tape

    def reverse(segment: Segment) -> Iterator[Action | Nested]:
        start, stop, tier, _ = segment
        states = sum(step < start and kept_in != ON_TAPE for step, kept_in in needed)
        taped = sum(min(end, start) - min(begin, start) for begin, end in saved.tapes)
        room = schedule.slots - states * schedule.state - taped * schedule.tape
        held = tier == ON_TAPE
        if room >= (0 if held else schedule.state) and np.isfinite(tables.cost[held][room, stop - start]):
            yield _Part(tables, start, stop, room, tier, held)
        else:
            yield from regenerate(segment)
            if tier >= 0:
                yield Drop(start, tier)

    return walk(close_gaps(steps, saved, reverse, drops=True))


def _price(schedule: Mixed | Stages, steps: int) -> Report:
    steps = binomial.whole("steps", steps, least=1)
    return tally(encode(both_sweeps(schedule, steps)), steps)


class _Part(NamedTuple):
    """Steps to be reversed from the working state in ``room`` units of memory.

    ``tier``: where x_start is kept; it is dropped here, and its memory is part of the room. ``held``: a tape below
    holds x_start, so that keeping it takes nothing.
    """

    tables: _Tables
    start: int
    stop: int
    room: int
    tier: int | None
    held: bool

    def parts(self) -> tuple[Action | Nested, ...]:
        tables, start, stop, room, tier, held = self
        drop = (Drop(start, tier),) if tier is not None and tier >= 0 else ()
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop), *drop
        ahead = int(tables.split[held][room, stop - start])
        if ahead == 0:
            upper = _Part(tables, start + 1, stop, room - tables.tape, None, tables.shares)
            return *drop, Record(start, start + 1), upper, Reverse(start, start + 1)
        middle, here = start + ahead, (ON_TAPE if held else 0) if tier is None else tier
        save = (Save(start, here),) if tier is None else ()
        upper = _Part(tables, middle, stop, room - (0 if held else tables.state), None, False)
        return *save, Advance(start, middle), upper, Load(start, here), _Part(tables, start, middle, room, here, held)


class _Tables:
    """A and, where tapes hold the end of their step, X: cost[0] and cost[1], by room and steps; 0: keep the tape."""

    def __init__(self, room: int, state: int, tape: int, shares: bool, steps: int) -> None:
        self.state, self.tape, self.shares = state, tape, shares
        shape = room + 1, steps + 1
        kinds = 1 + shares
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

    def runs(self, room: int, steps: int) -> int:
        extra = self.cost[0][room, steps]
        if not np.isfinite(extra):
            raise ValueError(f"slots={room} cannot reverse {steps} steps; give at least {self.state}")
        return steps + int(extra)

    @classmethod
    def of(cls, schedule: Mixed | Stages, steps: int | None) -> _Tables:
        if steps is None:
            raise ValueError("Mixed and Stages place by the number of steps; give steps, or use Online(slots)")
        steps = binomial.whole("steps", steps, least=1)
        room = min(schedule.slots, steps * max(schedule.state, schedule.tape))
        longest = isqrt(int(WORK) // (room + 1))
        if steps > longest:
            raise ValueError(f"steps={steps} is too long for exact tables; give at most {longest}, or use Binomial")
        shares = isinstance(schedule, Stages) and schedule.last_is_solution
        return _tables(schedule.slots, schedule.state, schedule.tape, shares, 1 << (steps - 1).bit_length())


@lru_cache(maxsize=8)
def _tables(room: int, state: int, tape: int, shares: bool, steps: int) -> _Tables:
    return _Tables(room, state, tape, shares, steps)
