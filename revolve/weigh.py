"""Cost and peak of a plan for a chain whose steps differ, action by action."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence

from revolve.actions import Action, Advance, Drop, Record, Reverse, Save
from revolve.sizes import ALONE, Parts, Sizes, in_units


def weigh(
    actions: Iterator[Action] | Sequence[Action],
    costs: Sequence[float],
    states: Sequence[int],
    tapes: Sequence[int] | None = None,
    running: Sequence[int] | None = None,
    recording: Sequence[int] | None = None,
    parts: Parts | None = None,
) -> tuple[float, int]:
    """The cost of all runs of a whole plan, and the peak of its kept states and tapes and what its runs need."""
    zeros = (0,) * len(costs)
    sizes = in_units(1, 0, (states, tapes or zeros, running or zeros, recording or zeros), parts)
    total, taped, peak, actions = 0.0, 0, 0, list(actions)
    at_once: set[int] = set()
    kept: list[int] = []
    for action, following in zip(actions, [*actions[1:], None], strict=True):
        now = later = 0
        match action:
            case Advance(start, stop):
                total += sum(costs[start:stop])
                now = max(sizes.run(step, _nearest(kept, step)) for step in range(start, stop))
            case Record(start, stop):
                total += sum(costs[start:stop])
                if following == Reverse(start, stop):
                    at_once.add(start)
                    now = max(sizes.recording[start:stop])
                else:
                    now = max(sizes.run(step, _nearest(kept, step)) for step in range(start, stop))
                    later = sum(sizes.tapes[start:stop])
            case Reverse(start, stop) if start not in at_once:
                peak = max(peak, taped + _kept(kept, sizes))
                taped -= sum(sizes.tapes[start:stop])
                now = max(sizes.recording[start:stop])
            case Save(step):
                insort(kept, step)
            case Drop(step):
                kept.remove(step)
        peak = max(peak, taped + now + _kept(kept, sizes))
        taped += later
    return total, peak


def _kept(kept: Sequence[int], sizes: Sizes) -> int:
    return sum(map(sizes.state, kept, [ALONE, *kept]))


def _nearest(kept: Sequence[int], step: int) -> int:
    """The kept state that has most in common with this one."""
    return max((k for k in kept if k <= step), default=ALONE)
