"""A chain to be run and differentiated, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from adjoint.autograd import AutogradStepper, Program
from adjoint.tensors import State
from adjoint.tiers import Kind, Store, check_tiers
from adjoint.timeline import SolveError
from revolve import Journal, Plan, Schedule, parse_bytes, plan


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
    zeros: bool = False
    """Whether tensors that the function holds and does not use get zeros as their gradients, in place of None."""
    reversing: Callable[[int, State, list[Tensor | None], list[Tensor | None]], None] | None = None
    """Called by the reverse sweep before each step, with (k, state after it, its cotangent, those of the tensors)."""
    tiers: Sequence[Kind] | None = None
    schedule: Schedule | None = None
    journal: str | Path | Journal | None = None
    check: bool = False
    """Whether every step is computed again, to see that it gives the same bits."""
    engine: str = "eager"
    """Who takes the steps: "auto", "eager" or "native"."""

    def check_nothing(self, gradient: str) -> None:
        """Raise ValueError if the caller wants steps compared, of a gradient that computes each once."""
        if self.check:
            raise ValueError(
                f"check=True compares steps that are computed again; gradient={gradient!r} does not do that. Use "
                f"gradient='discrete' or 'tangent'"
            )

    def keep_nothing(self, gradient: str) -> None:
        """Raise ValueError if the caller said where to keep states, to a gradient that keeps none."""
        for name in ("tiers", "schedule", "journal"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}= belongs to gradient='discrete'; gradient={gradient!r} keeps no states by a plan"
                )


@dataclass
class Runs:
    """Counts of runs, as a stepper keeps them."""

    plain_runs: int = 0
    recorded_runs: int = 0
    linearisations: int = 0


@dataclass
class Stats:
    """What was done, counted; what a reverse sweep does is added when it happens."""

    program: Program = field(repr=False)
    stepper: AutogradStepper | Runs | None = field(default=None, repr=False)
    steps: int = 0
    """Steps from the first time to the last."""
    stores: dict[int, Store] = field(default_factory=dict, repr=False)

    @property
    def rejected(self) -> int:
        """Steps tried and not accepted."""
        return self.program.rejected

    @property
    def evaluations(self) -> int:
        """Calls of the caller's function."""
        return self.program.evaluations

    @property
    def linearisations(self) -> int:
        """Calls beside these, where kept stages were linearised (``schedule=revolve.Stages(..)``)."""
        return self.stepper.linearisations if self.stepper is not None else 0

    @property
    def jacobians(self) -> int:
        """Jacobians that implicit steps made, those of their transposes too."""
        return self._of_work("jacobians")

    @property
    def factorisations(self) -> int:
        """Matrices that implicit steps factored, those of their transposes too."""
        return self._of_work("factorisations")

    @property
    def iterations(self) -> int:
        """Of Newton's method."""
        return self._of_work("iterations")

    @property
    def newton_failures(self) -> int:
        """Steps tried whose stages were not found; they are among the rejected ones."""
        return self._of_work("failures")

    def _of_work(self, name: str) -> int:
        return int(getattr(getattr(self.program, "work", None), name, 0))

    @property
    def plain_runs(self) -> int:
        return self.stepper.plain_runs if self.stepper is not None else 0

    @property
    def tier_bytes(self) -> dict[int, int]:
        """The most that kept states took in each tier, so far."""
        return {tier: store.peak_bytes for tier, store in self.stores.items()}

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
    engine: str | None = None
    """Which engine took the steps, and why."""
    native: Any = None
    """What the native engine, if it was that, can make the same solve with again."""


def check_memory(
    slots: int | str | None,
    budget: int | str | None,
    tiers: Sequence[Kind] | None = None,
    schedule: Schedule | None = None,
) -> None:
    """Raise ValueError or TypeError for numbers of slots, budgets and tiers that no chain could use."""
    given = {"slots": slots, "budget": budget, "tiers": tiers}
    said = [name for name, value in given.items() if value is not None]
    if len(said) > 1:
        first, second = said[:2]
        raise ValueError(
            f"{first}={given[first]!r} and {second}={given[second]!r} were both given; one of them decides"
        )
    if slots is not None:
        plan(steps=2, slots=slots)  # a single step would need none
    if budget is not None:
        parse_bytes(budget, "budget")
    check_tiers(tiers)
    if schedule is None:
        return
    if slots is not None or budget is not None:
        raise ValueError(f"schedule={schedule} says itself what is kept; leave {said[0]} out, or name tiers= for it")
    if not all(hasattr(schedule, name) for name in ("forward", "backward", "price")):
        raise TypeError(f"schedule={schedule!r} is no schedule; give one such as revolve.Binomial(8)")


class Gradient(Protocol):
    """A way to differentiate a chain."""

    def __call__(self, problem: Problem) -> Outcome: ...
