"""diffrax: the classic Runge-Kutta method as a tableau, and the on-line binomial schedule in equal slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.in_jax import Gradient, compiled, numbers
from benchmarks.peers.problems import Problem

__all__ = ["checkpointed", "numbers"]


class RK4(diffrax.AbstractERK):
    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0.0, 1 / 2]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
        c=np.array([1 / 2, 1 / 2, 1.0]),
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        return 4


def checkpointed(problem: Problem) -> Gradient:
    """Controlled steps with as many checkpoints as it likes."""
    if problem.rtol is not None:
        return controlled(problem, problem.rtol)
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=min(problem.slots, problem.steps))

    def last(y0: Any, p: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: problem.f(jnp, y, args)),
            RK4(),
            0.0,
            problem.end,
            problem.h,
            y0,
            args=p,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.ConstantStepSize(),
            adjoint=adjoint,
            max_steps=problem.steps,
        )
        return solution.ys[0]

    return compiled(problem, last)


def controlled(problem: Problem, rtol: float) -> Gradient:
    def last(y0: Any, p: Any) -> Any:
        term = diffrax.ODETerm(lambda t, y, args: problem.f(jnp, y, args))
        control = diffrax.PIDController(rtol=rtol, atol=rtol)
        solution = diffrax.diffeqsolve(
            term, diffrax.Dopri5(), 0.0, problem.end, None, y0, args=p, stepsize_controller=control, max_steps=4096
        )
        return solution.ys[0]

    return compiled(problem, last)
