"""Schedules and steppers that the tests of revolve share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from typing import Any

import numpy as np

from revolve import SCHEDULES, Action, Advance, Record, Save, Saved, Schedule

VALUES: dict[str, tuple[Any, ...]] = {
    "slots": (1, 2, 3, 12),
    "every": (None, 1, 7, 50),
    "inside": ("keep", "rerun"),
    "kept": ((), (1, 2, 7, 23)),
    "starts": ((0,), (0, 1, 2, 7, 23)),
    "last": (False, True),
    "tiers": (((3,),), ((2,), (3, 2.0, 1.0)), ((1,), (1, 0.5, 0.25), (2, 5.0, 9.0))),
    "memory": (1, 3),
    "promotes": (True, False),
    "disk": (0, 2),
    "write": (4.0,),
    "read": (1.5,),
    "rereads": (False, True),
    "state": (1,),
    "tape": (1, 3),
    "stages": (2,),
    "holds_end": (False, True),
    "last_is_solution": (False, True),
    "costs": (tuple(1 + k % 4 for k in range(110)),),
    "states": (tuple(1 + k % 3 for k in range(110)),),
    "budget": (6, 25),
    "tapes": (None, tuple(2 + k % 5 for k in range(110))),
}
"""What the tests try for each field of a schedule; a new field without a default needs a line here."""


BY_TABLES = tuple(
    SCHEDULES[name] for name in ("online", "hrevolve", "multistage", "disk", "mixed", "stages", "differing")
)
"""Schedules that are priced step by step or by tables, and refuse a chain that is too long for that."""


def members() -> list[Schedule]:
    """Every schedule of ``SCHEDULES``, with every combination of the values above."""
    made: list[Schedule] = []
    for schedule in SCHEDULES.values():
        assert all(f.default is not MISSING or f.name in VALUES for f in fields(schedule)), schedule  # type: ignore[arg-type]
        names = [f.name for f in fields(schedule) if f.name in VALUES]  # type: ignore[arg-type]
        choices = product(*(VALUES[name] for name in names))
        made += (schedule(**dict(zip(names, choice, strict=True))) for choice in choices)
    return made


def fits(schedule: Schedule, states: int) -> bool:
    """Whether the schedule has a slot for so many states."""
    return states <= getattr(schedule, "slots", states)


def finds_ends(schedule: Schedule) -> bool:
    """Whether the schedule can run a chain whose length it is not told."""
    try:
        next(schedule.forward(None))
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Scripted:
    """A schedule that does as it is told."""

    first: tuple[Action, ...]
    second: tuple[Action, ...] = ()

    def forward(self, steps: int | None) -> Iterator[Action]:
        return iter(self.first)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return iter(self.second)

    def price(self, steps: int) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Leaving:
    """A first sweep that leaves chosen states and tapes behind; another schedule reverses from there."""

    schedule: Schedule
    states: tuple[int, ...]
    tapes: tuple[tuple[int, int], ...] = ()

    def forward(self, steps: int | None) -> Iterator[Action]:
        assert steps is not None
        recorded = dict(self.tapes)
        step = 0
        while step < steps:
            if step in self.states:
                yield Save(step)
            stop = recorded.get(step, step + 1)
            yield Record(step, stop) if step in recorded else Advance(step, stop)
            step = stop

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return self.schedule.backward(steps, saved)

    def price(self, steps: int) -> Any:
        raise NotImplementedError


@dataclass
class Chain:
    """x_{k+1} = x_k + h tanh(A_k x_k), and its transpose by hand. Tapes hold the states of the recorded steps."""

    matrices: np.ndarray
    """(steps, size, size)"""
    h: float = 0.1
    runs: int = 0
    gradient: np.ndarray = field(init=False)
    """That of the matrices, as far as it has been reversed."""

    def __post_init__(self) -> None:
        self.gradient = np.zeros_like(self.matrices)

    def advance(self, state: np.ndarray, start: int, stop: int) -> np.ndarray:
        for k in range(start, stop):
            state = state + self.h * np.tanh(self.matrices[k] @ state)
            self.runs += 1
        return state

    def record(self, state: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        tape = []
        for k in range(start, stop):
            tape.append((k, state))
            state = self.advance(state, k, k + 1)
        return state, tape

    def reverse(self, tape: list[tuple[int, np.ndarray]], cotangent: np.ndarray) -> np.ndarray:
        for k, state in reversed(tape):
            slope = self.h * (1 - np.tanh(self.matrices[k] @ state) ** 2) * cotangent
            self.gradient[k] += np.outer(slope, state)
            cotangent = cotangent + self.matrices[k].T @ slope
        return cotangent

    def last(self, step: int) -> bool:
        return step == len(self.matrices) - 1

    def jacobian(self, state: np.ndarray) -> np.ndarray:
        """dx_n / dx_0 as a dense matrix product."""
        product = np.eye(len(state))
        for k, matrix in enumerate(self.matrices):
            slope = self.h * (1 - np.tanh(matrix @ state) ** 2)
            product = (np.eye(len(state)) + slope[:, None] * matrix) @ product
            state = self.advance(state, k, k + 1)
        return product


def chain(steps: int, size: int = 3) -> tuple[Chain, np.ndarray, np.ndarray]:
    """A chain, a first state and a last cotangent, the same for the same sizes."""
    random = np.random.default_rng(steps)
    return Chain(random.normal(size=(steps, size, size))), random.normal(size=size), random.normal(size=size)
