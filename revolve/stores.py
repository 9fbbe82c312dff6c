"""Where kept states lie. A tier is three methods."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Generic, Protocol, TypeVar

State = TypeVar("State")


class CheckpointStore(Protocol[State]):
    """One tier of slots, addressed by step.

    What ``load`` gives may share the slot's memory: a dropped slot is given back when neither the working state nor a
    tape recorded from it is in use any more. A store whose loads are copies says ``lends = False`` and is told at once.
    """

    def save(self, step: int, state: State) -> None:
        """Keep a state; what the caller does to it afterwards must not show."""
        ...

    def load(self, step: int) -> State:
        """The state kept for this step; KeyError if there is none."""
        ...

    def drop(self, step: int) -> None:
        """Give the slot back; KeyError if there is none."""
        ...


class Memory(Generic[State]):
    """States in a dictionary, copied on the way in and out (``copy=lambda x: x`` for immutable states)."""

    lends = False

    def __init__(self, copy: Callable[[State], State] = deepcopy) -> None:
        self._copy = copy
        self._states: dict[int, State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def save(self, step: int, state: State) -> None:
        self._states[step] = self._copy(state)

    def load(self, step: int) -> State:
        return self._copy(self._states[step])

    def drop(self, step: int) -> None:
        del self._states[step]
