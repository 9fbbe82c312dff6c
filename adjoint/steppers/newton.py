"""Newton's method for the stages of an implicit step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from adjoint.linear import Factored


class NewtonFailed(ArithmeticError):
    """The stages of a step were not found; ``last`` is how far the iteration came, ``change`` its last change."""

    def __init__(self, last: Tensor, change: Tensor) -> None:
        super().__init__("Newton's method does not converge")
        self.last, self.change = last, change


class Found(NamedTuple):
    """Stages, and how quickly they were found."""

    x: Tensor
    eta: float
    """From which the next search begins."""
    theta: float
    """The largest ratio of two changes, one after the other; 0 if there was but one change."""
    iterations: int


@dataclass(frozen=True)
class Newton:
    """When the iteration for the stages ends: Hairer & Wanner, Solving ODEs II, section IV.8, equation (8.10).

    Of controlled steps once eta |dx| <= ``kappa`` in units of the step's own tolerance, eta = theta / (1 - theta) with
    theta the ratio of the last two |dx|; of fixed steps when rounding is reached. Slower or growing: with a new Jacobian
    once more; then the step fails, and a shorter one is tried.
    """

    kappa: float = 1e-2
    most: int = 10
    """Iterations."""
    reuse: float = 0.01
    """A Jacobian goes on to the next step if no theta was above; 0: every step makes its own."""

    def __post_init__(self) -> None:
        if not 0 < self.kappa <= 1:
            raise ValueError(f"kappa={self.kappa} is no part of the tolerance; give a number above 0 and at most 1")
        if self.most < 1:
            raise ValueError(f"most={self.most} iterations find nothing; give at least 1")
        if not 0 <= self.reuse < 1:
            raise ValueError(f"reuse={self.reuse} is no ratio of changes that shrink; give a number from 0 to below 1")

    def find(
        self,
        residual: Callable[[Tensor], Tensor],
        guess: Tensor,
        solver: Factored,
        size: Callable[[Tensor], float],
        eta: float,
        *,
        goal: float,
        floor: float = 0.0,
        relax: float = 1.0,
        anew: Callable[[Tensor], Factored] | None = None,
    ) -> Found:
        """x with ``residual(x)`` zero.

        ``size`` of a change of x is to be below ``goal``; below ``floor`` a change that no longer shrinks is rounding.
        ``relax``: by what changes are multiplied, where the matrix is that of a step of another length. ``anew(x)``: of
        the matrix at x; if given it is made for every iteration but the first.
        """
        x, before, largest = guess, math.inf, 0.0
        change = guess
        for m in range(self.most):
            if anew is not None and m:
                solver = anew(x)
            change = solver.solve(residual(x))
            if relax != 1.0:
                change = change * relax
            x = x + change
            now = size(change)
            if not math.isfinite(now):
                break
            if now == 0:
                return Found(x, eta, largest, m + 1)
            theta = now / before
            if m:
                if now <= floor and theta >= 0.25:
                    return Found(x, eta, largest, m + 1)
                largest = max(largest, theta)
                if theta >= 1 and anew is None:
                    break
                eta = theta / (1 - theta) if theta < 1 else math.inf
            if eta * now <= goal:
                return Found(x, max(eta, 1e-16) ** 0.8, largest, m + 1)
            if m and theta ** (self.most - 1 - m) / max(1 - theta, 1e-16) * now > goal and not (anew or floor):
                break
            before = now
        raise NewtonFailed(x, change)
