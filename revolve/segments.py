"""Segments that are each recorded again as a whole: one state and one more run for each, the tapes of a segment at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

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
    TierReport,
)
from revolve.schedules import Segment, close_gaps


@dataclass(frozen=True)
class Segments:
    """The state before each segment is kept; a segment is run again once, and its tapes are held together.

    ``starts``: the first step of each segment, 0 among them. The last segment keeps its tapes in the first sweep,
    unless ``last``: then it is run again too. Every step runs at most twice. The classical way to checkpoint networks
    (Chen, Xu, Zhang & Guestrin 2016, arXiv:1604.06174).
    """

    starts: tuple[int, ...]
    last: bool = False

    def __post_init__(self) -> None:
        starts = tuple(binomial.whole("starts", start) for start in self.starts)
        if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
            raise ValueError(f"starts={self.starts} cut no chain; give rising steps, 0 first")
        object.__setattr__(self, "starts", starts)

    def _cuts(self, steps: int) -> list[int]:
        return [start for start in self.starts if start < steps]

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Segments places its states by the number of steps; give steps, or use Online(slots)")
        cuts = self._cuts(binomial.whole("steps", steps, least=1))
        for start, stop in zip(cuts, [*cuts[1:], steps], strict=True):
            if stop < steps or self.last:
                yield Save(start)
                yield Advance(start, stop)
            else:
                yield Record(start, stop)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return close_gaps(steps, saved, self._reverse)

    def _reverse(self, segment: Segment) -> Iterator[Action]:
        """From one state: the states of the segments above it are kept again, if there are several."""
        start, stop, tier, _ = segment
        cuts = [start, *(cut for cut in self._cuts(stop) if cut > start)]
        own = tier is None and len(cuts) > 1
        if own:
            yield Save(start)
        for low, high in pairwise(cuts):
            if low > start:
                yield Save(low)
            yield Advance(low, high)
        ends = [*cuts[1:], stop]
        for low, high in zip(reversed(cuts), reversed(ends), strict=True):
            if high < stop:
                yield Load(low, 0 if low > start or tier is None else tier)
            yield Record(low, high)
            yield Reverse(low, high)
            if start < low and high < stop:
                yield Drop(low)
        if own:
            yield Drop(start)

    def price(self, steps: int) -> Report:
        steps = binomial.whole("steps", steps, least=1)
        cuts = self._cuts(steps)
        lengths = [stop - start for start, stop in pairwise([*cuts, steps])]
        again = lengths if self.last else lengths[:-1]
        states = {0: TierReport(len(again), len(again), len(again))} if again else {}
        return Report(steps, sum(again), steps, 2 if again else 1, max(lengths), states)
