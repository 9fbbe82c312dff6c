"""Plans as ``checkpoint_schedules`` action objects, for pyadjoint and Firedrake, and the other way round.

Needs the package ``checkpoint_schedules``. Tier 0 is its RAM and tier 1 its DISK; it counts slots without that of x_0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from checkpoint_schedules import CheckpointSchedule, Copy, EndForward, EndReverse, Forward, Move, StorageType
from checkpoint_schedules import Reverse as Transpose

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
    Schedule,
    both_sweeps,
    encode,
    tally,
)
from revolve.mixed import ON_TAPE, Mixed, Stages

STORAGE = (StorageType.RAM, StorageType.DISK)
WORK, NOWHERE = StorageType.WORK, StorageType.NONE


class Exported(CheckpointSchedule):
    """One of our schedules for a chain of known length, as ``checkpoint_schedules`` has them.

    A kept tape is stored in RAM under its first step. A state's last load is a Move; one that is promoted is moved to
    working memory, and stored anew by the Forward that follows. pyadjoint takes such a plan as it is, unless it gives up a
    kept state in the first sweep, as :class:`Online` does, or records nothing there, as ``Segments(.., last=True)`` does.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        super().__init__(binomial.whole("steps", steps, least=1))
        self.schedule = schedule
        self._exhausted = False
        self._tiers = {a[2] for a in both_sweeps(schedule, steps) if isinstance(a, Save)}
        if self._tiers - {0, 1}:
            raise ValueError(f"{schedule} keeps states in tiers {sorted(self._tiers)}; only 0 (RAM) and 1 (DISK) exist")
        if isinstance(schedule, (Mixed, Stages)) and ON_TAPE in self._tiers:
            raise ValueError(
                f"{schedule} starts again from tapes, which checkpoint_schedules cannot say; take the same schedule "
                f"without {'holds_end' if isinstance(schedule, Mixed) else 'last_is_solution'}=True"
            )

    @property
    def is_exhausted(self) -> bool:
        return self._exhausted

    def uses_storage_type(self, storage_type: StorageType) -> bool:
        return storage_type in [STORAGE[tier] for tier in self._tiers]

    def _iterator(self) -> Iterator[object]:
        for action in exported(self.schedule, self.max_n):
            if isinstance(action, Forward):
                self._n = action.n1
            elif isinstance(action, Transpose):
                self._r += len(action)
            elif isinstance(action, EndReverse):
                self._exhausted = True
            yield action


def exported(schedule: Schedule, steps: int) -> Iterator[object]:
    """Both sweeps of a schedule as action objects of ``checkpoint_schedules``."""
    actions = list(both_sweeps(schedule, steps))
    moves = _last_loads(actions)
    taped: set[int] = set()
    pending: Save | None = None
    ended = False
    for place, action in enumerate(actions):
        following = actions[place + 1] if place + 1 < len(actions) else None
        match action:
            case Save():
                if pending is not None or not isinstance(following, Advance):
                    raise ValueError(f"{action} is not followed by a plain run; checkpoint_schedules cannot say that")
                pending = action
            case Advance(start, stop):
                kept = WORK if pending is None else STORAGE[pending.tier]
                yield Forward(start, stop, pending is not None, False, kept)
                pending = None
            case Record(start, stop):
                at_once = following == Reverse(start, stop) or stop == steps
                yield Forward(start, stop, False, True, WORK if at_once else StorageType.RAM)
                if not at_once:
                    taped.add(start)
                if stop == steps and not ended:
                    ended = True
                    yield EndForward()
            case Reverse(start, stop):
                if start in taped:
                    taped.remove(start)
                    yield Move(start, StorageType.RAM, WORK)
                yield Transpose(stop, start, True)
            case Load(step, tier):
                yield (Move if place in moves else Copy)(step, STORAGE[tier], WORK)
            case Drop(step, tier) if place not in moves.values():
                yield Move(step, STORAGE[tier], NOWHERE)
    yield EndReverse()


def _last_loads(actions: Sequence[Action]) -> dict[int, int]:
    """Where the last load of a state stands, and its drop."""
    last: dict[tuple[int, int], int] = {}
    found: dict[int, int] = {}
    for place, action in enumerate(actions):
        match action:
            case Load(step, tier):
                last[step, tier] = place
            case Drop(step, tier) if (step, tier) in last:
                found[last.pop((step, tier))] = place
    return found


@dataclass(frozen=True)
class Imported:
    """A plan of ``checkpoint_schedules`` for a chain of one length, to be run and verified like any other."""

    steps: int
    first: tuple[Action, ...]
    second: tuple[Action, ...]

    def forward(self, steps: int | None) -> Iterator[Action]:
        self._check(steps)
        return iter(self.first)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        self._check(steps)
        return iter(self.second)

    def price(self, steps: int) -> Report:
        self._check(steps)
        return tally(encode((*self.first, *self.second)), self.steps)

    def _check(self, steps: int | None) -> None:
        if steps != self.steps:
            raise ValueError(f"steps={steps}: this plan was made for {self.steps} steps; give steps={self.steps}")


def imported(schedule: CheckpointSchedule, steps: int) -> Imported:
    """The actions of one forward and one adjoint calculation; the schedule is used up."""
    first: list[Action] = []
    second: list[Action] = []
    now, held, taped = first, set[tuple[int, int]](), set[int]()
    for action in schedule:
        if isinstance(action, EndForward):
            now = second
        elif isinstance(action, EndReverse):
            break
        else:
            now += _translated(action, steps, held, taped)
            if isinstance(action, Forward) and action.n1 >= steps and schedule.max_n is None:
                schedule.finalize(steps)
    now += [Drop(*kept) for kept in sorted(held)]
    return Imported(steps, tuple(first), tuple(second))


def _translated(action: object, steps: int, held: set[tuple[int, int]], taped: set[int]) -> Iterator[Action]:
    match action:
        case Forward():
            start, stop = action.n0, min(action.n1, steps)
            tier = STORAGE.index(action.storage) if action.storage in STORAGE else 0
            if action.write_ics and action.storage in STORAGE:
                held.add((start, tier))
                yield Save(start, tier)
            if action.write_adj_deps:
                taped.add(start)
                yield Record(start, stop)
            else:
                yield Advance(start, stop)
        case Transpose():
            taped.discard(action.n0)
            yield Reverse(action.n0, min(action.n1, steps))
        case Copy() | Move():
            if (action.n, STORAGE.index(action.from_storage)) not in held:
                if action.n not in taped:
                    raise ValueError(f"{action}: nothing is kept there")
                return
            tier = STORAGE.index(action.from_storage)
            if action.to_storage != NOWHERE:
                yield Load(action.n, tier)
            if action.to_storage in STORAGE:
                held.add((action.n, STORAGE.index(action.to_storage)))
                yield Save(action.n, STORAGE.index(action.to_storage))
            if isinstance(action, Move):
                held.remove((action.n, tier))
                yield Drop(action.n, tier)
        case _:
            raise ValueError(f"{action!r} is unknown; expected an action of checkpoint_schedules, up to {sys.maxsize}")
