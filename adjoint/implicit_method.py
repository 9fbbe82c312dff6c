"""An implicit method as a caller names it: the table, the iteration, the linear algebra, the mass matrix, the parts of f."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint.bdf import DifferentiationFormulas
from adjoint.implicit_tableau import ImplicitTableau
from adjoint.implicit_tableaus import IMPLICIT
from adjoint.linear import Dense, LinearAlgebra
from adjoint.names import named
from adjoint.rosenbrock_tableaus import ROSENBROCK, RosenbrockTableau
from adjoint.steppers.consistent import NullSpaces
from adjoint.steppers.newton import Newton


@dataclass(frozen=True, eq=False)
class Implicit:
    """An implicit method, and how its equations are solved.

    solve(f, y0, t, method=Implicit("radau5", mass=mass, linear=Dense()))
    """

    method: str | ImplicitTableau | RosenbrockTableau | DifferentiationFormulas = "kvaerno5"
    """One of ``IMPLICIT`` or ``ROSENBROCK``, or a table of your own."""
    linear: LinearAlgebra = field(default_factory=Dense)
    newton: Newton = field(default_factory=Newton)
    mass: Tensor | None = None
    """M in M dy/dt = f(t, y), (n, n), constant; singular for differential-algebraic equations of index 1."""
    consistent: str = "check"
    """Of a y0, and of a state behind an event, that does not fulfil the algebraic equations to rtol and atol: "check"
    refuses it, "solve" finds the nearby one that does, with M y as it is, and differentiates what it found."""
    split: bool = False
    """Whether f is a pair (explicit, implicit) of which the method takes the first part explicitly."""

    implicit = True

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            named("method", self.method, {**IMPLICIT, **ROSENBROCK})
        named("consistent", self.consistent, dict.fromkeys(("check", "solve")))
        if self.mass is not None:
            self._check_mass(self.mass)
        if self.split and self.mass is not None:
            raise ValueError("mass goes with one f, not with a pair (explicit, implicit); give the sum of both")
        if self.split and self.tableau.explicit is None:
            raise ValueError(
                f"method={self.name!r} has no explicit part for a pair (explicit, implicit); give the sum of both as one "
                f"function, or take 'kencarp3', 'kencarp4' or 'kencarp5'"
            )

    def _check_mass(self, mass: Tensor) -> None:
        if mass.ndim != 2 or mass.shape[0] != mass.shape[1]:
            raise ValueError(
                f"mass has shape {tuple(mass.shape)}; give a square matrix with a row for each number of y"
            )
        if mass.requires_grad:
            raise ValueError("mass requires grad, and no gradient reaches it; give mass.detach()")
        if self.tableau.starts_explicitly and self.null_spaces is not None:
            raise ValueError(
                f"mass is singular, and method={self.name!r} begins with an explicit stage, which has no solution then; "
                f"take 'radau5', 'rodas4', 'sdirk2' or 'backward_euler'"
            )

    @cached_property
    def null_spaces(self) -> NullSpaces | None:
        """Of a singular mass matrix."""
        return None if self.mass is None else NullSpaces.of(self.mass)

    @property
    def tableau(self) -> Any:
        if isinstance(self.method, str):
            return IMPLICIT[self.method] if self.method in IMPLICIT else ROSENBROCK[self.method]
        return self.method

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        return self.tableau.adaptive


class Split:
    """f = (explicit, implicit) as one function: their sum, or the part that is asked for by a last argument."""

    def __init__(self, explicit: Callable[..., Any], implicit: Callable[..., Any]) -> None:
        self.parts = (explicit, implicit)

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        if args and isinstance(args[-1], Part):
            return self.parts[args[-1].index](t, y, *args[:-1])
        first, second = (part(t, y, *args) for part in self.parts)
        return pytree.tree_map(torch.add, first, second)


@dataclass(frozen=True)
class Part:
    """Which part of a :class:`Split` is meant."""

    index: int


EXPLICITLY, IMPLICITLY = Part(0), Part(1)


def divided(f: Any, method: Any, with_cost: bool) -> tuple[Any, Any]:
    """A pair (explicit, implicit) as one function, and the method told so; a running cost takes all implicitly."""
    if not isinstance(f, tuple):
        return f, method
    if len(f) != 2 or not all(map(callable, f)):
        raise TypeError(f"f={f!r} must be a function, or a pair of functions (explicit, implicit)")
    if not isinstance(method, Implicit):
        raise ValueError(
            f"f is a pair (explicit, implicit), and method={method.name!r} has one part only; take 'kencarp4', say"
        )
    return Split(*f), method if with_cost else replace(method, split=True)


def BDF(
    max_order: int = 5,
    *,
    linear: LinearAlgebra | None = None,
    newton: Newton | None = None,
    mass: Tensor | None = None,
) -> Implicit:
    """Backward differentiation formulas of order 1 to ``max_order``, both step and order chosen on the way.

    The gradient is exact for the steps and orders that were taken, and converges as rtol falls; in between it has no
    meaning (docs/stiff.md). ``mass`` must be regular.
    """
    return Implicit(DifferentiationFormulas(max_order), linear=linear or Dense(), newton=newton or Newton(), mass=mass)
