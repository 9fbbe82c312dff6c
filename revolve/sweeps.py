"""The actions of one sweep: short ones made once and kept, and read a little ahead of where they are carried out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np

from revolve.actions import LOAD, Action, Saved, Schedule, encode

Row = Action | list[int]

CACHED_STEPS = 20_000
"""Plans of chains up to this length are kept as arrays between runs (3 MB at most, the last 16)."""

AHEAD = 64
"""How many actions are looked through for the next state to be loaded."""


def actions_of(schedule: Schedule, steps: int, saved: Saved | None) -> Iterator[Row]:
    """One sweep of a schedule: forward when nothing is saved yet. Short plans are made once and kept as arrays."""
    try:
        hash(schedule)
        cached = steps <= CACHED_STEPS
    except TypeError:  # a schedule with fields that change
        cached = False
    if not cached:
        yield from _sweep(schedule, steps, saved)
    else:
        yield from _rows(schedule, steps, saved).tolist()


def _sweep(schedule: Schedule, steps: int, saved: Saved | None) -> Iterator[Action]:
    return schedule.forward(steps) if saved is None else schedule.backward(steps, saved)


@lru_cache(maxsize=16)
def _rows(schedule: Schedule, steps: int, saved: Saved | None) -> np.ndarray:
    return encode(_sweep(schedule, steps, saved))


def with_next_load(actions: Iterable[Row], tiers: set[int], fetch: Callable[[int, int], bool]) -> Iterator[Row]:
    """The same actions. On the way the next state to be loaded from one of these tiers is fetched, as soon as it is
    there: ``fetch(step, tier)`` says whether it was. One state is on its way at a time.
    """
    source = iter(actions)
    window = deque(islice(source, AHEAD))
    wanted: tuple[int, int] | None = None
    fetched = False
    while window:
        if wanted is None:
            wanted = next(((step, tier) for verb, step, tier in window if verb == LOAD and tier in tiers), None)
        if wanted is not None and not fetched:
            fetched = fetch(*wanted)
        action = window.popleft()
        window.extend(islice(source, 1))
        yield action
        if wanted is not None and tuple(action) == (LOAD, *wanted):
            wanted, fetched = None, False
