"""A schedule as rows for the compiled sweep: which slot, which place of the tape, and what need not be run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native.cells import Refused
from revolve import Saved, Schedule
from revolve.actions import ADVANCE, DROP, GIVEN, LOAD, RECORD, REVERSE, SAVE

Rows = np.ndarray
SKIPPED = (REVERSE, LOAD)
"""Verbs after which nobody looks at the working state that was there before."""


@dataclass(frozen=True)
class Rowed:
    """Both sweeps of one chain: rows (verb, a, b, place, last), and the places they need."""

    forward: Tensor
    backward: Tensor
    slots: int
    tape: int
    runs: tuple[tuple[int, int], tuple[int, int]]
    """Plain and recorded, of the forward and of the backward sweep."""


@lru_cache(maxsize=32)
def rows_of(schedule: Schedule, steps: int, again: bool) -> Rowed:
    """The sweeps of a schedule; x_0 is held by the caller. ``again``: the reverse sweep starts from x_0 alone."""
    places = _Places()
    ahead = np.zeros((0, 5), dtype=np.int64)
    if not again:
        ahead = places.rows(schedule.forward(steps))
    saved = Saved(frozenset({*places.slots, (0, GIVEN)}), tuple(sorted(places.tapes)), -1)
    back = places.rows(schedule.backward(steps, saved))
    return Rowed(
        torch.from_numpy(ahead),
        torch.from_numpy(back),
        places.slots_made,
        places.tape_made,
        (_runs(ahead), _runs(back)),
    )


def _runs(rows: Rows) -> tuple[int, int]:
    lengths = rows[:, 2] - rows[:, 1]
    return int(lengths[rows[:, 0] == ADVANCE].sum()), int(lengths[rows[:, 0] == RECORD].sum())


@lru_cache(maxsize=32)
def plain_rows(steps: int) -> Tensor:
    """The whole chain, and nothing kept."""
    return torch.tensor([(ADVANCE, 0, steps, 0, 1)])


@dataclass
class _Places:
    """Slots by number, and the tape as one long strip on which the last recorded part lies at the end."""

    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    tapes: dict[tuple[int, int], int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    slots_made: int = 0
    tape_made: int = 0

    def rows(self, actions: Iterable[tuple[int, int, int]]) -> Rows:
        found = [row for action in actions for row in self._row(*action)]
        table = np.array(found, dtype=np.int64).reshape(-1, 5)
        for i in np.flatnonzero(table[:, 0] == RECORD):  # is the state after it looked at?
            table[i, 4] = i + 1 == len(table) or table[i + 1, 0] not in SKIPPED
        return table

    def _row(self, verb: int, a: int, b: int) -> list[tuple[int, int, int, int, int]]:
        place = 0
        if verb in (SAVE, LOAD, DROP) and b not in (0, GIVEN):
            raise Refused("a schedule that keeps states in several kinds of memory")
        if verb == RECORD:
            place = self.tapes[a, b] = max((p + y - x for (x, y), p in self.tapes.items()), default=0)
            self.tape_made = max(self.tape_made, place + b - a)
        elif verb == REVERSE:
            place = self.tapes.pop((a, b))
        elif verb == ADVANCE:
            pass
        elif a == 0:  # x_0 is the caller's
            if verb == LOAD:
                return [(LOAD, 0, 0, -1, 0)]
            self.slots.pop((0, 0), None)
            return []
        elif verb == SAVE:
            if not self.free:
                self.free.append(self.slots_made)
                self.slots_made += 1
            place = self.slots[a, b] = self.free.pop()
        elif verb == LOAD:
            place = self.slots[a, b]
        elif verb == DROP:
            self.free.append(self.slots.pop((a, b)))
            return []
        return [(verb, a, b, place, 1)]
