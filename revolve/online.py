"""A chain whose end is not known: one sweep that keeps states so that, wherever it ends, the reverse sweep is cheap."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, pairwise

from revolve import binomial
from revolve.actions import Action, Advance, Drop, Record, Report, Save, Saved, TierReport
from revolve.schedules import Binomial

LONGEST = 10_000_000
"""A policy is followed step by step; a price further on than this is refused."""


@dataclass(frozen=True)
class Online:
    """The end is found on the way: ``slots`` states (that of x_0 included), placed again and again as the chain grows.

    Whether to keep x_k is decided after step k proved not to be the last. While there is room it is kept. Then that
    state goes, x_k among the candidates, whose loss makes the reverse sweep least dear if the next step is the last;
    the oldest of equals. That is the offline optimum for every n <= beta(c, 2) + 1, and within a few per cent of it
    beyond (benchmarks/online.py: n to 1e5, c = 3 .. 50).

    A run that is not told the length takes one plain run more than :meth:`price` says: the last step was run plainly to
    find that it is the last.

    Source of the problem: Wang, Moin & Iaccarino (2009), SIAM J. Sci. Comput. 31(4); Stumm & Walther (2010), SIAM J.
    Sci. Comput. 32(2). They decide before the step, and lose the optimum at n = c + 2.
    """

    slots: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", binomial.whole("slots", self.slots))

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            yield from self._unknown()
            return
        steps, _ = binomial.check(steps, self.slots)
        start = 0
        for step, loser in enumerate(_policy(self.slots).losers(steps - 1)):
            if loser == step:
                continue
            if step > start:
                yield Advance(start, step)
                start = step
            if loser >= 0:
                yield Drop(loser)
            yield Save(step)
        if steps - 1 > start:
            yield Advance(start, steps - 1)
        yield Record(steps - 1, steps)

    def going_on(self, start: int) -> Iterator[Action]:
        """A sweep to an unknown end whose first ``start`` steps have been run already, from the states it would hold."""
        kept = set(self.kept(start + 1))
        for step in range(start):
            if step in kept:
                yield Save(step)
            yield Advance(step, step + 1)
        if start in kept:
            yield Save(start)
        yield from self._unknown(start)

    def _unknown(self, start: int = 0) -> Iterator[Action]:
        if self.slots == 0:
            raise ValueError("slots=0 cannot reverse a chain of unknown length; give at least 1")
        policy = _policy(self.slots)
        for step in count(start):
            yield Advance(step, step + 1)
            loser = policy.loser(step)
            if loser == step:
                continue
            if loser >= 0:
                yield Drop(loser)
            yield Save(step)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return Binomial(self.slots).backward(steps, saved)

    def kept(self, steps: int) -> tuple[int, ...]:
        """The steps whose states lie in the slots when step ``steps - 1`` proves to be the last."""
        steps, _ = binomial.check(steps, self.slots)
        return _policy(self.slots).kept(steps - 1)

    def price(self, steps: int) -> Report:
        steps, slots = binomial.check(steps, self.slots)
        if steps == 1:
            return Report(1, 0, 1, 1, 1)
        kept = self.kept(steps)
        plain, saves, peak, most = steps - 1, _policy(slots).saves(steps - 1), len(kept), 2
        for below, (start, stop) in enumerate(pairwise((*kept, steps - 1))):
            length, free = stop - start, slots - below
            if length > 1:
                plain += binomial.extra_steps(steps=length, slots=free)
                saves += binomial.fewest_writes(steps=length, slots=free) - 1
                peak = max(peak, below + min(free, length - 1))
                most = max(most, binomial.repetitions(steps=length, slots=free) + 2)
        return Report(steps, plain, steps, most, 1, {0: TierReport(saves, steps - 1, peak)})


class _Policy:
    """What is dropped for the sake of x_k, for k = 0, 1, ...: the same for every length, so made once, as far as asked.

    With the kept states s_0 < s_1 < ... and the gaps g_i between them, dropping s_j makes the reverse sweep cost

        sum_{i<j-1} t(g_i, c-i)  +  t(g_{j-1} + g_j, c-j+1)  +  sum_{i>j} t(g_i, c-i+1).

    Less the sum over all i of t(g_i, c-i+1), that is a value of the gaps up to g_j alone: most values stay as they are.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.losses = array("q")
        self.starts: list[int] = []
        self.values: list[int] = []
        self.below: list[int] = [0]
        """sum_{i<j} t(g_i, c-i), for j = 0, 1, ..."""
        self.eased: list[int] = [0]
        """sum_{i<j} t(g_i, c-i+1)"""

    def loser(self, step: int) -> int:
        """-1 if there is room for x_step, x_step itself if it is not kept, else the state that makes room."""
        if step >= LONGEST:
            raise ValueError(f"steps={step + 1} is too long for an online schedule; give at most {LONGEST}")
        for new in range(len(self.losses), step + 1):
            self.losses.append(self._next(new))
        return self.losses[step]

    def losers(self, steps: int) -> Iterator[int]:
        return (self.loser(step) for step in range(steps))

    def kept(self, steps: int) -> tuple[int, ...]:
        if steps:
            self.loser(steps - 1)
        held: dict[int, None] = {}
        for step, loser in enumerate(self.losses[:steps]):
            if loser != step:
                held.pop(loser, None)
                held[step] = None
        return tuple(held)

    def saves(self, steps: int) -> int:
        return sum(loser != step for step, loser in enumerate(self.losses[:steps]))

    def _next(self, step: int) -> int:
        starts = self.starts
        starts.append(step)
        if len(starts) <= self.slots:
            return -1
        if self.slots == 1:
            return starts.pop()
        self._evaluate()
        j = 1 + self.values.index(min(self.values))
        del self.values[max(0, j - 2) :], self.below[j:], self.eased[j:]
        return starts.pop(j)

    def _evaluate(self) -> None:
        """The values that are missing; x_{n-1} lies one step above the last state."""
        starts, slots, below, eased = self.starts, self.slots, self.below, self.eased
        for j in range(len(below), len(starts)):
            gap = starts[j] - starts[j - 1]
            below.append(below[-1] + cost(gap, slots - j + 1))
            eased.append(eased[-1] + cost(gap, slots - j + 2))
        ends = (*starts[1:], starts[-1] + 1)
        for j in range(len(self.values) + 1, len(starts)):
            merged = cost(ends[j] - starts[j - 1], slots - j + 1)
            self.values.append(below[j - 1] + merged - eased[j] - cost(ends[j] - starts[j], slots - j + 1))


@lru_cache(maxsize=64)
def _policy(slots: int) -> _Policy:
    return _Policy(slots)


def cost(steps: int, slots: int) -> int:
    """t(n, c) by tables: the same as ``binomial.extra_steps``, fast for many small calls."""
    if steps == 1:
        return 0
    row, above = _betas(slots), _betas(slots + 1)
    while row[-1] < steps:
        _extend(slots, row)
    r = bisect_left(row, steps)
    while len(above) < r:
        _extend(slots + 1, above)
    return r * steps - above[r - 1]


@cache
def _betas(slots: int) -> list[int]:
    return [1]


def _extend(slots: int, row: list[int]) -> None:
    r = len(row)
    row.append(row[-1] * (slots + r) // r)
