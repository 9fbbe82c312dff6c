"""A plan written out: both sweeps, action by action, as a search or a larger planner made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from revolve.actions import GIVEN, Action, Drop, Report, Reverse, Saved, encode, left_behind, tally
from revolve.binomial import whole
from revolve.hierarchy import with_given
from revolve.schedules import Segment, close_gaps, regenerate


@dataclass(frozen=True)
class Written:
    """These actions, for the chain that they reverse. From anything but what the first sweep leaves, in one state's memory."""

    actions: tuple[Action, ...]

    def __post_init__(self) -> None:
        reversed_steps = [a for a in self.actions if isinstance(a, Reverse)]
        if not reversed_steps or reversed_steps[-1].start != 0:
            raise ValueError("actions= do not end with the reverse of step 0; give both sweeps of a whole plan")

    def __str__(self) -> str:
        return f"Written({self.steps} steps, {len(self.actions)} actions)"

    @property
    def steps(self) -> int:
        return max(action.stop for action in self.actions if isinstance(action, Reverse))

    def forward(self, steps: int | None) -> Iterator[Action]:
        if steps is None:
            raise ValueError("Written holds a plan for steps that it knows; give steps, or use Online(slots)")
        self._checked(steps)
        return takewhile(lambda action: not isinstance(action, Reverse), self.actions)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        self._checked(steps)
        first = list(self.forward(steps))
        left, rest = left_behind(first), self.actions[len(first) :]
        given = (0, GIVEN) in saved.states
        states = frozenset(state for state in left.states if state != (0, 0)) | {(0, GIVEN)} if given else left.states
        if states == saved.states and left.tapes == saved.tapes:
            return with_given(rest) if given else iter(rest)
        return close_gaps(steps, saved, _slowly, drops=True)

    def price(self, steps: int) -> Report:
        return tally(encode(self.actions), self._checked(steps))

    def _checked(self, steps: int) -> int:
        steps = whole("steps", steps, least=1)
        if steps != self.steps:
            raise ValueError(f"steps={steps}: this plan was written for {self.steps}; give that many")
        return steps


def _slowly(segment: Segment) -> Iterable[Action] | None:
    """From a state that is kept nowhere there is no way to begin again."""
    if segment.tier is None:
        return None
    return *regenerate(segment), *((Drop(segment.start, segment.tier),) if segment.tier != GIVEN else ())
