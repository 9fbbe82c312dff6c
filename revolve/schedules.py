"""Schedules for a chain in one kind of memory: StoreAll, StoreNothing, Periodic, Binomial.

Each is a frozen dataclass: the way forward, the way back from whatever is at hand, and the price of both in closed
form. A new schedule is one more class and one more line in ``catalogue.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from math import inf, isqrt, sqrt
from typing import Literal, NamedTuple, TypeVar

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
    TierReport,
)
from revolve.pieces import Piece, as_array, walk

Part = TypeVar("Part")


class Segment(NamedTuple):
    """The steps start .. stop-1, still to be reversed; x_start is the working state."""

    start: int
    stop: int
    tier: int | None
    """Where somebody else keeps x_start; None: nowhere."""
    below: int
    """Kept states below x_start: what is taken from the slots."""


def close_gaps(
    steps: int, saved: Saved, reverse: Callable[[Segment], Iterable[Part] | None], *, drops: bool = False
) -> Iterator[Part | Action]:
    """Take the highest thing at hand, load it, reverse what lies above it; until nothing is left.

    ``reverse`` says how one segment is reversed from its start, leaving only that start in its slot; or, if it
    ``drops``, nothing. None says that there is no room to reverse from a working state that is kept nowhere: then that
    is let go.
    """
    states = sorted(saved.states, key=lambda kept: (kept[0], -kept[1]))  # of two copies the one in the faster tier
    tapes = sorted(saved.tapes)
    stop, at = steps, saved.at
    while stop > 0:
        if tapes and tapes[-1][1] == stop:
            start, _ = tapes.pop()
            yield Reverse(start, stop)
            stop, at = start, -1
        elif at == stop - 1:
            yield Record(at, stop)
            yield Reverse(at, stop)
            stop, at = at, -1
        elif max(states[-1][0] if states else -1, tapes[-1][1] - 1 if tapes else -1) < at < stop:
            parts = reverse(Segment(at, stop, None, len(states)))
            yield from parts or ()
            stop, at = (stop if parts is None else at), -1
        elif states and states[-1][0] < stop:
            start, tier = states[-1]
            if tapes and tapes[-1][1] > start:
                raise ValueError(f"the tape {tapes[-1]} lies inside the gap {start} .. {stop}")
            if at != start:
                yield Load(start, tier)
            yield from reverse(Segment(start, stop, tier, len(states) - 1)) or ()
            if drops:
                states.pop()
            stop, at = start, -1
        elif not states:
            raise ValueError(f"nothing at hand from which the steps before {stop} can be reversed")
        while states and states[-1][0] >= stop:
            start, tier = states.pop()
            if tier != GIVEN:
                yield Drop(start, tier)


def kept_here(
    segment: Segment, reverse: Callable[[Segment], Iterable[Part]], *, slots: int | None = None
) -> Iterable[Part | Action] | None:
    """The same segment with its start kept, in tier 0 if nowhere yet; None if the ``slots`` have no room for it."""
    if segment.tier is not None:
        return reverse(segment)
    if slots is not None and segment.below >= slots:
        return None
    return Save(segment.start), *reverse(segment._replace(tier=0)), Drop(segment.start)


@dataclass(frozen=True)
class StoreAll:
    """Every step is recorded in the first sweep: backpropagation, nothing recomputed."""

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            yield from (Record(k, k + 1) for k in count())
        else:
            yield Record(0, binomial.whole("steps", steps, least=1))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return close_gaps(steps, saved, self._reverse)

    @staticmethod
    def _reverse(segment: Segment) -> Iterator[Action]:
        yield Record(segment.start, segment.stop)
        yield Reverse(segment.start, segment.stop)

    def price(self, steps: int) -> Report:
        steps = binomial.whole("steps", steps, least=1)
        return Report(steps, plain_runs=0, recorded_runs=steps, most_runs=1, peak_tapes=steps)


@dataclass(frozen=True)
class StoreNothing:
    """Only x_0 is kept and every step is reached from it again: n(n-1)/2 plain runs."""

    def forward(self, steps: int | None) -> Iterator[Action]:
        yield from sweep(steps, lambda step: step == 0)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return close_gaps(steps, saved, lambda segment: kept_here(segment, regenerate, slots=1))

    def price(self, steps: int) -> Report:
        return Binomial(1).price(steps)


@dataclass(frozen=True)
class Periodic:
    """Every ``every``-th state is kept; by default the spacing is sqrt(n).

    ``inside="keep"``: to reverse a segment, its states are kept too: n/k + k states at most, least at k = sqrt(n).
    ``inside="rerun"``: each state of a segment is regenerated from the segment's start: n/k states, about n(k-1)/2 runs
    more; :meth:`priced` gives the spacing that balances memory against time.
    """

    every: int | None = None
    inside: Literal["keep", "rerun"] = "keep"

    def __post_init__(self) -> None:
        if self.every is not None:
            object.__setattr__(self, "every", binomial.whole("every", self.every, least=1))
        check_inside(self.inside)

    @classmethod
    def priced(cls, *, memory_price: float, step_price: float, state_bytes: float) -> Periodic:
        """The spacing of least price when a kept byte costs ``memory_price`` and a run costs ``step_price``.

        J / L = alpha a / k + beta (k - 1) / 2 is least at k* = sqrt(2 alpha a / beta).
        """
        for name, value in {"memory_price": memory_price, "state_bytes": state_bytes, "step_price": step_price}.items():
            if not 0 < value < inf:
                raise ValueError(f"{name}={value} is not a price; give a positive number, and finite")
        below = max(1, int(sqrt(2 * memory_price * state_bytes / step_price)))

        def cost(k: int) -> float:
            return memory_price * state_bytes / k + step_price * (k - 1) / 2

        return cls(min(below, below + 1, key=cost), "rerun")

    def spacing(self, steps: int | None) -> int:
        if self.every is not None:
            return self.every
        if steps is None:
            raise ValueError("Periodic() takes sqrt(n) steps to a segment; with an unknown number of steps give every=")
        return 1 + isqrt(steps - 1)

    def forward(self, steps: int | None) -> Iterator[Action]:
        steps = steps if steps is None else binomial.whole("steps", steps, least=1)
        every = self.spacing(steps)
        last = (steps - 1) // every * every if steps is not None and self.inside == "keep" else None
        yield from sweep(steps, lambda step: step % every == 0 or (last is not None and step > last))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        every = self.spacing(steps)

        def reverse(segment: Segment) -> Iterator[Action]:
            return in_pieces(segment, range(segment.start, segment.stop, every), self.inside)

        return close_gaps(steps, saved, lambda segment: kept_here(segment, reverse))

    def price(self, steps: int) -> Report:
        if binomial.whole("steps", steps, least=1) == 1:
            return Binomial(0).price(1)
        steps, every = int(steps), self.spacing(steps)
        starts = -(-steps // every)
        top = steps - (starts - 1) * every
        if self.inside == "keep":
            plain = (steps - 1) + (starts - 1) * (every - 1)
            saves = starts + max(0, top - 2) + (starts - 1) * max(0, every - 2)
            saves -= top == 1
            loads = steps - 1
            peak = max(starts - (top == 1) + max(0, top - 2), (starts - 1) + max(0, every - 2) if starts > 1 else 0)
            most = 3 if starts > 1 and every > 1 else 2
        else:
            plain = (steps - 1) + (starts - 1) * every * (every - 1) // 2 + (top - 1) * (top - 2) // 2
            saves = starts - (top == 1)
            loads = steps - 1
            peak = saves
            most = max(top, every + 1 if starts > 1 else 0)
        return Report(steps, plain, steps, most, 1, {0: TierReport(saves, loads, peak)})


@dataclass(frozen=True)
class Binomial:
    """Least recomputation in ``slots`` slots (that of x_0 included), and among those schedules the fewest writes.

    Source: Griewank & Walther (2000), ACM TOMS 26(1), Algorithm 799.
    """

    slots: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", binomial.whole("slots", self.slots))

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Binomial places its slots by the number of steps; give steps, or use Periodic(every=)")
        steps, _ = binomial.check(steps, self.slots)
        if steps > 1:
            yield Save(0)
        start, slots = 0, self.slots
        while steps - start > 1:
            middle = start + binomial.first_split(steps - start, slots)
            yield Advance(start, middle)
            if steps - middle > 1:
                yield Save(middle)
            start, slots = middle, slots - 1
        yield Record(start, steps)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return walk(self.pieces(steps, saved))

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        def reverse(segment: Segment) -> Iterator[Span]:
            assert segment.tier is not None
            slots = self.slots - segment.below
            binomial.check(segment.stop - segment.start, slots)
            yield Span(segment.start, segment.stop, segment.tier, slots)

        return close_gaps(steps, saved, lambda segment: kept_here(segment, reverse, slots=self.slots))

    def array(self, steps: int) -> np.ndarray:
        """Both sweeps as rows (verb, a, b), a million steps in a fraction of a second."""
        return as_array(self, steps)

    def price(self, steps: int) -> Report:
        steps, _ = binomial.check(steps, self.slots)
        if steps == 1:
            return Report(1, 0, 1, 1, 1, {})
        r = binomial.repetitions(steps=steps, slots=self.slots)
        extra = binomial.extra_steps(steps=steps, slots=self.slots)
        saves = binomial.fewest_writes(steps=steps, slots=self.slots)
        tier = TierReport(saves, steps - 1, min(self.slots, steps - 1))
        return Report(steps, extra, steps, r + 1, 1, {0: tier})


_split = lru_cache(maxsize=4096)(binomial.first_split)


class Span(NamedTuple):
    """A segment that Binomial reverses in ``slots`` slots, that of its start included."""

    start: int
    stop: int
    tier: int
    slots: int

    @property
    def kind(self) -> Hashable:
        return Span, self.stop - self.start, self.tier, self.slots

    def parts(self) -> tuple[Action | Span, ...]:
        start, stop, tier, slots = self
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop)
        middle = start + _split(stop - start, slots)
        upper: tuple[Action | Span, ...]
        if stop - middle > 1:
            upper = Save(middle), Span(middle, stop, 0, slots - 1), Drop(middle)
        else:
            upper = Record(middle, stop), Reverse(middle, stop)
        return Advance(start, middle), *upper, Load(start, tier), Span(start, middle, tier, slots)


def check_inside(inside: str) -> None:
    if inside not in ("keep", "rerun"):
        raise ValueError(f"inside={inside!r} is unknown; give 'keep' or 'rerun'")


def in_pieces(segment: Segment, starts: Sequence[int], inside: str) -> Iterator[Action]:
    """Keep the states at ``starts``, the segment's own among them, and reverse the pieces between them from the top."""
    reverse = _keep if inside == "keep" else regenerate
    assert segment.tier is not None
    for start, stop in pairwise(starts):
        yield Advance(start, stop)
        yield Save(stop)
    stop = segment.stop
    for start in reversed(starts):
        tier = segment.tier if start == segment.start else 0
        if stop != segment.stop:
            yield Load(start, tier)
        yield from reverse(Segment(start, stop, tier, segment.below))
        if start != segment.start:
            yield Drop(start)
        stop = start


def sweep(steps: int | None, kept: Callable[[int], bool], tier: int = 0) -> Iterator[Action]:
    """Save the chosen states on the way; the last step is recorded, or left to the reverse sweep if unknown."""
    if steps is None:
        for step in count():
            if kept(step):
                yield Save(step, tier)
            yield Advance(step, step + 1)
    else:
        steps, start = binomial.whole("steps", steps, least=1), 0
        for step in filter(kept, range(steps - 1)):
            if step > start:
                yield Advance(start, step)
            yield Save(step, tier)
            start = step
        if steps - 1 > start:
            yield Advance(start, steps - 1)
        yield Record(steps - 1, steps)


def _keep(segment: Segment) -> Iterator[Action]:
    """Keep every state of the segment, then reverse from the top."""
    assert segment.tier is not None
    for step in range(segment.start, segment.stop - 1):
        yield Advance(step, step + 1)
        if step + 2 < segment.stop:
            yield Save(step + 1)
    yield Record(segment.stop - 1, segment.stop)
    yield Reverse(segment.stop - 1, segment.stop)
    for step in reversed(range(segment.start, segment.stop - 1)):
        yield Load(step, segment.tier if step == segment.start else 0)
        yield Record(step, step + 1)
        yield Reverse(step, step + 1)
        if step > segment.start:
            yield Drop(step)


def regenerate(segment: Segment) -> Iterator[Action]:
    """Reach every step of the segment from its start again."""
    assert segment.tier is not None
    for step in reversed(range(segment.start, segment.stop)):
        if step < segment.stop - 1:
            yield Load(segment.start, segment.tier)
        if step > segment.start:
            yield Advance(segment.start, step)
        yield Record(step, step + 1)
        yield Reverse(step, step + 1)
