"""What the states, tapes and runs of a chain take, in units of memory; what states have in common is counted once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import NamedTuple

import numpy as np

ALONE = -1
"""In place of a step below: no state is kept there."""


class Other(NamedTuple):
    """A way to keep the tape of a step."""

    size: int
    needs: int
    """At most, when it is made and when it is used."""
    cost: float
    """Of having the tape back."""


class Sizes(NamedTuple):
    """All sizes of a chain. ``common[k][i]``: what the states at k and at i < k share; None if they share nothing."""

    budget: int
    states: tuple[int, ...]
    tapes: tuple[int, ...]
    running: tuple[int, ...]
    recording: tuple[int, ...]
    apart: tuple[tuple[int, ...], ...] | None = None
    """apart[k][i]: what the state at k takes beside the one kept at i < k."""
    working: tuple[tuple[int, ...], ...] | None = None
    """working[s][i]: what a plain run of step s needs while x_i is kept, i <= s; None: ``running``, whatever is kept."""
    ways: tuple[tuple[Other, ...], ...] = ()
    """For each step, other ways to keep its tape."""

    def kept(self, step: int) -> tuple[Other, ...]:
        """The ways to keep the tape of this step, as it is first."""
        as_it_is = Other(self.tapes[step], max(self.recording[step], self.run(step), self.tapes[step]), 0.0)
        others = self.ways[step] if self.ways else ()
        return as_it_is, *(w._replace(needs=max(w.needs, self.run(step), w.size)) for w in others)

    def state(self, step: int, below: int = ALONE) -> int:
        """What it takes to keep this state while the one at ``below`` is kept."""
        return self.states[step] if below == ALONE or self.apart is None else self.apart[step][below]

    def least(self, step: int) -> int:
        """What dropping this state gives back at least: the more is shared, the nearer the state below is."""
        return self.state(step, step - 1) if step else self.states[0]

    def run(self, step: int, below: int = ALONE) -> int:
        """What a plain run of this step needs besides what is kept."""
        if self.working is None:
            return self.running[step]
        return self.running[step] + (self.states[step] if below == ALONE else self.working[step][below])


def in_units(unit: int, budget: int, columns: Sequence[Sequence[int]], parts: Parts | None) -> Sizes:
    """Sizes in bytes (states, tapes, running, recording), each rounded up to whole units."""
    states, tapes, running, recording = (tuple(-(-size // unit) for size in sizes) for sizes in columns)
    made = Sizes(budget // unit, states, tapes, running, recording)
    if parts is None:
        return made
    apart = tuple(tuple(-(-parts.apart(k, i) // unit) for i in range(k)) for k in range(len(states)))
    working = tuple((*row, 0) for row in apart)
    return made._replace(apart=apart, working=working)


class Parts(NamedTuple):
    """Of which parts each state is made, and the size of each part."""

    states: tuple[frozenset[int], ...]
    sizes: tuple[int, ...]

    def check(self) -> None:
        """Raise unless each part has a size, and is in all states from its first to its last."""
        for part in sorted(frozenset[int]().union(*self.states)):
            held = [k for k, state in enumerate(self.states) if part in state]
            if not 0 <= part < len(self.sizes):
                raise ValueError(f"parts names the part {part}, and sizes= has {len(self.sizes)}; give each its size")
            if held[-1] - held[0] + 1 != len(held):
                raise ValueError(f"part {part} is in the states {held}; a part stays from its first state to its last")

    def size(self, step: int) -> int:
        return sum(self.sizes[part] for part in self.states[step])

    def apart(self, step: int, below: int) -> int:
        """Bytes of the state at ``step`` that the one at ``below`` has not."""
        return sum(self.sizes[part] for part in self.states[step] - self.states[below])


def unit_for(budget: int, units: int, columns: Sequence[Sequence[int]]) -> int:
    """The largest unit that all sizes share; if the budget has too many of those, one that it has few enough of."""
    unit = reduce(gcd, (size for column in columns for size in column), 0) or max(1, budget)
    return unit if budget // unit <= units else -(-budget // units)


def least_memory(sizes: Sizes, steps: int) -> int:
    """The recursions of the least cost (revolve/chains.py), for the peak instead."""
    open_, kept, taped = np.zeros((3, steps, steps), dtype=np.int64)
    for i in reversed(range(steps)):
        freed, recording, ways = sizes.least(i), sizes.recording[i], sizes.kept(i)
        busy = np.maximum.accumulate([sizes.run(s, i) for s in range(i, steps)])
        open_[i, i], kept[i, i] = recording, max(0, recording - freed)
        for j in range(i + 1, steps):
            starts = _starts(sizes, i, j, open_, kept, taped)
            above = np.maximum(starts, np.maximum(kept[i, i:j], busy[: j - i]))
            taped[i, j] = min(max(way.needs, way.size + int(open_[i + 1, j])) for way in ways)
            kept[i, j] = min(int(above.min()), max(0, int(taped[i, j]) - freed))
            open_[i, j] = min(sizes.states[i] + int(kept[i, j]), int(taped[i, j]))
    return int(open_[0, steps - 1])


def _starts(sizes: Sizes, i: int, j: int, open_: np.ndarray, kept: np.ndarray, taped: np.ndarray) -> np.ndarray:
    """What the steps k .. j need, for each k from i+1 to j, while x_i is kept."""
    if sizes.apart is None:
        return open_[i + 1 : j + 1, j]
    own = np.array([sizes.apart[k][i] for k in range(i + 1, j)], dtype=np.int64)
    return np.append(np.minimum(own + kept[i + 1 : j, j], taped[i + 1 : j, j]), open_[j, j])
