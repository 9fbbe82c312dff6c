"""Plans as trees of pieces: walked in little memory, or written as one array in which equal pieces are copied."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from revolve.actions import REVERSE, Action, Saved, Schedule, both_sweeps, encode, left_behind


class Piece(Protocol):
    """A part of a plan that opens into actions and further pieces."""

    @property
    def start(self) -> int:
        """The step at which it begins."""
        ...

    @property
    def kind(self) -> Hashable:
        """What its actions depend on besides ``start``: pieces of one kind are the same, shifted. None: no twin."""
        ...

    def parts(self) -> Sequence[Action | Piece]: ...


@runtime_checkable
class InPieces(Protocol):
    """A schedule whose reverse sweep is made of pieces."""

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]: ...


def walk(parts: Iterable[Action | Piece]) -> Iterator[Action]:
    """The actions of nested pieces, one after another, in memory that grows with the depth alone."""
    for part in parts:
        stack = [part]
        while stack:
            top = stack.pop()
            if isinstance(top, Action):
                yield top
            else:
                stack.extend(reversed(top.parts()))


def as_array(schedule: Schedule, steps: int) -> np.ndarray:
    """Both sweeps as int64 rows (verb, a, b); of a schedule in pieces fast, also for millions of steps."""
    if not isinstance(schedule, InPieces):
        return encode(both_sweeps(schedule, steps))
    forward = list(schedule.forward(steps))
    return written(chain(forward, schedule.pieces(steps, left_behind(forward))), 6 * int(steps) + len(forward))


def written(parts: Iterable[Action | Piece], rows: int = 1024) -> np.ndarray:
    """The rows of nested pieces, ``rows`` of them or so; a piece that has a twin is copied from it and shifted."""
    sheet = _Sheet(rows)
    known: dict[Hashable, _Block] = {}
    for part in parts:
        stack: list[Action | Piece | _Block] = [part]
        while stack:
            top = stack.pop()
            if isinstance(top, Action):
                sheet.add(top)
            elif isinstance(top, _Block):
                known[top.kind] = top._replace(stop=sheet.rows)
            elif twin := known.get(top.kind):
                sheet.copy(twin, top.start)
            else:
                if top.kind is not None:
                    stack.append(_Block(top.kind, top.start, sheet.rows, sheet.rows))
                stack.extend(reversed(top.parts()))
    return sheet.array


class _Block(NamedTuple):
    """The rows of a piece."""

    kind: Hashable
    start: int
    first: int
    stop: int


class _Sheet:
    """Rows that grow. Single ones wait in a list until there are many, or some are to be copied."""

    def __init__(self, rows: int) -> None:
        self._array = np.empty((rows, 3), dtype=np.int64)
        self._waiting: list[Action] = []
        self.rows = 0

    @property
    def array(self) -> np.ndarray:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.rows -= len(waiting)
            self._room(len(waiting))[:] = waiting
        return self._array[: self.rows]

    def add(self, action: Action) -> None:
        self._waiting.append(action)
        self.rows += 1

    def copy(self, block: _Block, start: int) -> None:
        before = self.array
        rows, shift = self._room(block.stop - block.first), start - block.start
        rows[:] = before[block.first : block.stop]
        rows[:, 1] += shift
        np.add(rows[:, 2], shift, out=rows[:, 2], where=rows[:, 0] <= REVERSE)

    def _room(self, rows: int) -> np.ndarray:
        if self.rows + rows > len(self._array):
            more = max(rows, len(self._array) // 2)
            self._array = np.concatenate([self._array, np.empty((more, 3), dtype=np.int64)])
        self.rows += rows
        return self._array[self.rows - rows : self.rows]
