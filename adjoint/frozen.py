"""Steps noted once and taken again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar


class Movable(Protocol):
    def moved_along(self, noted: Any) -> Any:
        """This timeline with the steps of another of its kind."""
        ...


Steps = TypeVar("Steps", bound=Movable)


class Replay:
    """What a sequence of solves found (the times of their steps), noted once and then used again in the same order."""

    def __init__(self) -> None:
        self._timelines: list[Movable] = []
        self._next: int | None = None

    def rewind(self) -> None:
        """From here on, solves take the steps that were noted."""
        self._next = 0

    def again(self, found: Steps) -> Steps:
        """What a solve is to use in place of what it made."""
        if self._next is None:
            self._timelines.append(found)
            return found
        if self._next == len(self._timelines):
            raise RuntimeError(f"only {len(self._timelines)} solves were noted; a replay must make as many")
        noted = self._timelines[self._next]
        if type(noted) is not type(found):
            raise RuntimeError("a replay must make the solves that were noted: fixed steps here, controlled ones there")
        self._next += 1
        moved: Steps = found.moved_along(noted)
        return moved


_REPLAY: ContextVar[Replay | None] = ContextVar("replay", default=None)


@contextmanager
def frozen_steps() -> Iterator[Replay]:
    """Inside, the steps of solves are noted; after ``rewind()`` they are taken again, whatever the errors and ``dt``.

    Finite differences need this: the gradient is that of the steps that were taken, not of how they were chosen.
    """
    token = _REPLAY.set(Replay())
    try:
        replay = _REPLAY.get()
        assert replay is not None
        yield replay
    finally:
        _REPLAY.reset(token)


def replaying() -> bool:
    """Whether steps are being noted, or taken again."""
    return _REPLAY.get() is not None


def replayed(found: Steps) -> Steps:
    """What was found itself, or what was noted while steps are frozen."""
    replay = _REPLAY.get()
    return found if replay is None else replay.again(found)
