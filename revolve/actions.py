"""What a schedule says: six verbs, and what a reverse sweep may know.

Step k maps state x_k to x_{k+1}; the n steps of a chain are numbered 0 .. n-1, and every range is half-open. Three
verbs move time (Advance, Record, Reverse) and three move states (Save, Load, Drop). An action *is* a triple of
integers ``(verb, a, b)``, so a list of actions and a plan's array of rows are read alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

ADVANCE, RECORD, REVERSE, SAVE, LOAD, DROP = range(6)

GIVEN = -1
"""The tier of a state that the caller holds: loaded like any other, never saved and never dropped."""


class Action(tuple[int, int, int]):
    """One row ``(verb, a, b)`` of a plan; construct one of its six subclasses."""

    __slots__ = ()
    verb: ClassVar[int]

    def __getnewargs__(self) -> tuple[int, int]:
        return self[1], self[2]


class _Moment(Action):
    """A verb that moves time over the steps start .. stop-1."""

    __slots__ = ()
    __match_args__ = ("start", "stop")

    def __new__(cls, start: int, stop: int) -> _Moment:
        return tuple.__new__(cls, (cls.verb, start, stop))

    @property
    def start(self) -> int:
        return self[1]

    @property
    def stop(self) -> int:
        return self[2]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self[1]}, {self[2]})"


class _Movement(Action):
    """A verb that moves the state at the start of a step into, out of, or off a tier."""

    __slots__ = ()
    __match_args__ = ("step", "tier")

    def __new__(cls, step: int, tier: int = 0) -> _Movement:
        return tuple.__new__(cls, (cls.verb, step, tier))

    @property
    def step(self) -> int:
        return self[1]

    @property
    def tier(self) -> int:
        return self[2]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self[1]}, tier={self[2]})"


class Advance(_Moment):
    """Plain runs of the steps start .. stop-1: nothing is kept."""

    __slots__ = ()
    verb = ADVANCE


class Record(_Moment):
    """Recorded runs of the steps start .. stop-1: their tape stays until Reverse names exactly this range."""

    __slots__ = ()
    verb = RECORD


class Reverse(_Moment):
    """The transposes of the steps stop-1 .. start, consuming the tape recorded for this range."""

    __slots__ = ()
    verb = REVERSE


class Save(_Movement):
    """Keep the working state, or the state that the last Advance started from (a delayed store)."""

    __slots__ = ()
    verb = SAVE


class Load(_Movement):
    """Make a kept state the working state."""

    __slots__ = ()
    verb = LOAD


class Drop(_Movement):
    """Give a slot back."""

    __slots__ = ()
    verb = DROP


VERBS: tuple[type[Action], ...] = (Advance, Record, Reverse, Save, Load, Drop)


def encode(actions: Iterable[Action]) -> np.ndarray:
    """Actions as one int64 array of rows (verb, a, b), shape (actions, 3)."""
    flat = np.fromiter((number for action in actions for number in action), dtype=np.int64)
    return flat.reshape(-1, 3)


def decode(rows: np.ndarray) -> Iterator[Action]:
    """The actions of an array made by :func:`encode`."""
    for verb, a, b in rows.tolist():
        yield VERBS[verb](a, b)


class Saved(NamedTuple):
    """All that a reverse sweep may know of what the forward sweep left behind."""

    states: frozenset[tuple[int, int]]
    """(step, tier) of every state at hand."""
    tapes: tuple[tuple[int, int], ...] = ()
    """(start, stop) of every tape, as recorded."""
    at: int = -1
    """The step of the working state, -1 if there is none."""


class Schedule(Protocol):
    """What to keep and what to redo: an immutable value without counters, so it pickles and can be run again."""

    def forward(self, steps: int | None) -> Iterator[Action]:
        """The first sweep over steps 0 .. steps-1; None when the end is found on the way."""
        ...

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        """The reverse sweep from whatever is at hand, leaving every slot empty."""
        ...

    def price(self, steps: int) -> Report:
        """What both sweeps together will cost, before they run."""
        ...

    def __hash__(self) -> int: ...


def both_sweeps(schedule: Schedule, steps: int) -> Iterator[Action]:
    """A whole plan: the first sweep, then the reverse sweep from what the first one left behind."""
    states: set[tuple[int, int]] = set()
    tapes: set[tuple[int, int]] = set()
    at = 0
    for action in schedule.forward(steps):
        yield action
        at = _follow(action, states, tapes, at)
    assert at == steps, f"the first sweep of {schedule} ended at {at} of {steps}"
    yield from schedule.backward(steps, Saved(frozenset(states), tuple(sorted(tapes))))


def left_behind(actions: Iterable[Action], saved: Saved | None = None) -> Saved:
    """What is at hand after these actions: from x_0 as the working state, or from what was ``saved`` before them."""
    before = Saved(frozenset(), (), 0) if saved is None else saved
    states, tapes, at = set(before.states), set(before.tapes), before.at
    for action in actions:
        at = _follow(action, states, tapes, at)
    return Saved(frozenset(states), tuple(sorted(tapes)), at)


def _follow(action: Action, states: set[tuple[int, int]], tapes: set[tuple[int, int]], at: int) -> int:
    """Note what an action keeps or gives back; the step of the working state after it, -1 if there is none."""
    match action:
        case Advance(_, stop):
            return stop
        case Record(start, stop):
            tapes.add((start, stop))
            return stop
        case Reverse(start, stop):
            tapes.remove((start, stop))
            return -1
        case Load(step):
            return step
        case Save(step, tier):
            states.add((step, tier))
        case Drop(step, tier):
            states.remove((step, tier))
    return at


@dataclass(frozen=True)
class TierReport:
    """What one tier was asked to do."""

    saves: int = 0
    loads: int = 0
    peak_slots: int = 0


@dataclass(frozen=True)
class Report:
    """The price of reversing a chain: predicted by ``schedule.price`` and counted by ``verify``.

    Source of the conventions: Griewank & Walther (2000), ACM TOMS 26(1), Algorithm 799.
    """

    steps: int
    plain_runs: int
    """Runs that keep nothing; the first sweep counts."""
    recorded_runs: int
    most_runs: int
    """Runs of the step that ran most often, its recorded run included."""
    peak_tapes: int
    """Recorded steps whose tapes were held at one moment."""
    tiers: dict[int, TierReport] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """All forward runs, plain and recorded."""
        return self.plain_runs + self.recorded_runs

    @property
    def peak_slots(self) -> int:
        """Slots held at one moment, summed over the tiers' own peaks."""
        return sum(tier.peak_slots for tier in self.tiers.values())

    @property
    def saves(self) -> int:
        return sum(tier.saves for tier in self.tiers.values())

    @property
    def loads(self) -> int:
        return sum(tier.loads for tier in self.tiers.values())


def tally(rows: np.ndarray, steps: int) -> Report:
    """What a whole plan costs, counted from its rows (verb, a, b)."""
    verb, a, b = rows.T
    lengths = b - a
    advanced, recorded, reversed_ = (verb == kind for kind in (ADVANCE, RECORD, REVERSE))
    changes = np.zeros(steps + 1, dtype=np.int64)
    ran = advanced | recorded
    np.add.at(changes, a[ran], 1)
    np.subtract.at(changes, b[ran], 1)
    tapes = np.cumsum(np.where(recorded, lengths, 0) - np.where(reversed_, lengths, 0))
    tiers = {}
    for tier in sorted(set(b[verb == SAVE].tolist())):
        saves, loads, drops = ((verb == kind) & (b == tier) for kind in (SAVE, LOAD, DROP))
        held = np.cumsum(saves.astype(np.int64) - drops)
        tiers[tier] = TierReport(int(saves.sum()), int(loads.sum()), int(held.max()))
    return Report(
        steps,
        int(lengths[advanced].sum()),
        int(lengths[recorded].sum()),
        int(np.cumsum(changes[:-1]).max()),
        int(tapes.max()),
        tiers,
    )
