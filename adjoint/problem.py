"""A chain to be run and differentiated, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from adjoint.autograd import AutogradStepper, Program
from adjoint.tensors import State
from adjoint.timeline import SolveError
from revolve import Plan, parse_bytes, plan


@dataclass(frozen=True)
class Problem:
    """A program with the caller's function, first state and wishes."""

    program: Program
    function: Any
    state: State
    """x_0, as the caller gave it."""
    steps: int | None
    """None: the end is found on the way."""
    slots: int | str | None = None
    budget: int | str | None = None
    wants_final: bool = False
    tick: Callable[[int], None] | None = None
    """Called with the number of steps done, in the first sweep."""


@dataclass
class Stats:
    """What was done, counted; what a reverse sweep does is added when it happens."""

    program: Program = field(repr=False)
    stepper: AutogradStepper | None = field(default=None, repr=False)
    steps: int = 0
    """Steps from the first time to the last."""

    @property
    def rejected(self) -> int:
        """Steps tried and not accepted."""
        return self.program.rejected

    @property
    def evaluations(self) -> int:
        """Calls of the caller's function."""
        return self.program.evaluations

    @property
    def plain_runs(self) -> int:
        return self.stepper.plain_runs if self.stepper is not None else 0

    @property
    def recorded_runs(self) -> int:
        return self.stepper.recorded_runs if self.stepper is not None else 0


@dataclass
class Outcome:
    """Output buffers by leaf, the last state if wanted, and how it was done."""

    outputs: list[Tensor]
    final: State | None
    stats: Stats
    plan: Plan | None = None
    failure: SolveError | None = None


def check_memory(slots: int | str | None, budget: int | str | None) -> None:
    """Raise ValueError or TypeError for numbers of slots and budgets that no chain could use."""
    if slots is not None and budget is not None:
        raise ValueError(f"slots={slots!r} and budget={budget!r} were both given; one of them decides")
    if slots is not None:
        plan(steps=2, slots=slots)  # a single step would need none
    if budget is not None:
        parse_bytes(budget, "budget")


class Gradient(Protocol):
    """A way to differentiate a chain."""

    def __call__(self, problem: Problem) -> Outcome: ...
