"""Schedules whose kept states are chosen by hand, or by halving: Selected, Bisection."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Literal, NamedTuple

from revolve import binomial
from revolve.actions import Action, Advance, Drop, Load, Record, Report, Reverse, Save, Saved, TierReport
from revolve.pieces import Piece, walk
from revolve.schedules import Segment, check_inside, close_gaps, in_pieces, kept_here, sweep


@dataclass(frozen=True)
class Selected:
    """Exactly the named states are kept, and x_0: the boundaries of blocks, or whatever a user has chosen.

    ``inside`` is as in :class:`Periodic`: a piece's states are kept while it is reversed, or each is run to again.
    """

    kept: tuple[int, ...]
    inside: Literal["keep", "rerun"] = "keep"

    def __post_init__(self) -> None:
        kept = {binomial.whole("kept", step) for step in self.kept}
        object.__setattr__(self, "kept", tuple(sorted(kept | {0})))
        check_inside(self.inside)

    def forward(self, steps: int | None) -> Iterator[Action]:
        kept = set(self.kept)
        if steps is None:
            return sweep(None, lambda step: step in kept)
        steps = binomial.whole("steps", steps, least=1)
        last = max(step for step in self.kept if step < steps)
        return sweep(steps, lambda step: step in kept or (self.inside == "keep" and step > last))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        def reverse(segment: Segment) -> Iterator[Action]:
            above = [step for step in self.kept if segment.start < step < segment.stop]
            return in_pieces(segment, [segment.start, *above], self.inside)

        return close_gaps(steps, saved, lambda segment: kept_here(segment, reverse))

    def price(self, steps: int) -> Report:
        steps = binomial.whole("steps", steps, least=1)
        if steps == 1:
            return Report(1, 0, 1, 1, 1)
        *pieces, top = (b - a for a, b in pairwise([*(step for step in self.kept if step < steps), steps]))
        states = len(pieces) + (top > 1)
        if self.inside == "keep":
            plain = steps - 1 + sum(length - 1 for length in pieces)
            saves = states + sum(max(0, length - 2) for length in (*pieces, top))
            peak = max(states + max(0, top - 2), *(i + max(1, length - 1) for i, length in enumerate(pieces)), 0)
            most = 3 if any(length > 1 for length in pieces) else 2
        else:
            plain = steps - 1 + sum(k * (k - 1) // 2 for k in (*pieces, top - 1))
            saves = peak = states
            most = max(top, *(length + 1 for length in pieces), 2)
        return Report(steps, plain, steps, most, 1, {0: TierReport(saves, steps - 1, peak)})


@dataclass(frozen=True)
class Bisection:
    """Keep the first state, run to the middle, reverse the upper half, then the lower: about log2(n) + 1 slots.

    About n log2(n) / 2 plain runs; :class:`Binomial` with as many slots takes fewer.
    """

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Bisection halves a number of steps; give steps, or use Online(slots)")
        whole = _Halved(0, binomial.whole("steps", steps, least=1), None)
        return takewhile(lambda action: not isinstance(action, Reverse), walk((whole,)))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return walk(self.pieces(steps, saved))

    def pieces(self, steps: int, saved: Saved) -> Iterator[Action | Piece]:
        def reverse(segment: Segment) -> Iterator[Piece]:
            yield _Halved(segment.start, segment.stop, segment.tier)

        return close_gaps(steps, saved, reverse)

    def price(self, steps: int) -> Report:
        steps = binomial.whole("steps", steps, least=1)
        if steps == 1:
            return Report(1, 0, 1, 1, 1)
        plain, inner, most, depth = _halves(steps)
        return Report(steps, plain, steps, most + 1, 1, {0: TierReport(inner + 1, steps - 1, depth)})


class _Halved(NamedTuple):
    """Steps to be reversed from the working state, which is kept in ``tier``, or nowhere yet."""

    start: int
    stop: int
    tier: int | None

    @property
    def kind(self) -> Hashable:
        return _Halved, self.stop - self.start, self.tier

    def parts(self) -> tuple[Action | Piece, ...]:
        start, stop, tier = self
        if stop - start == 1:
            return Record(start, stop), Reverse(start, stop)
        if tier is None:
            return Save(start), _Halved(start, stop, 0), Drop(start)
        middle = (start + stop + 1) // 2
        upper, lower = _Halved(middle, stop, None), _Halved(start, middle, tier)
        return Advance(start, middle), upper, Load(start, tier), lower


@lru_cache(maxsize=256)
def _halves(steps: int) -> tuple[int, int, int, int]:
    """Plain runs, saves but the first, most plain runs of a step, and slots, for two steps or more."""
    if steps == 1:
        return 0, 0, 0, 0
    lower = (steps + 1) // 2
    left, right = _halves(lower), _halves(steps - lower)
    saves = left[1] + right[1] + (steps - lower > 1)
    return lower + left[0] + right[0], saves, max(1 + left[2], right[2]), max(1, left[3], 1 + right[3])
