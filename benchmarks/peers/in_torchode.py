"""torchode, whose states are (batch, features): the classic Runge-Kutta method as a tableau of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchode
from torch import Tensor
from torchode.interpolation import ThirdOrderPolynomialInterpolation
from torchode.single_step_methods.runge_kutta import ButcherTableau, ExplicitRungeKutta

from benchmarks.peers.in_torch import Gradient, leaves, numbers, of_loss
from benchmarks.peers.problems import Problem

__all__ = ["graph", "numbers"]


class RK4(ExplicitRungeKutta):
    def __init__(self, term: torchode.ODETerm) -> None:
        tableau = ButcherTableau.from_lists(
            c=[0.0, 1 / 2, 1 / 2, 1.0],
            a=[[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]],
            b=[1 / 6, 1 / 3, 1 / 3, 1 / 6],
            b_err=[0.0, 0.0, 0.0, 0.0],
        )
        super().__init__(term, tableau)

    def convergence_order(self) -> int:
        return 4

    def build_interpolation(self, data: Any) -> Any:
        return ThirdOrderPolynomialInterpolation.from_k(data.t0, data.dt, data.y0, data.y1, data.k)


def graph(problem: Problem) -> Gradient:
    y0, parameters = leaves(problem)
    batched = problem.y0.ndim == 2
    shape = y0.shape if batched else (1, y0.numel())
    count = shape[0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        return problem.f(torch, y.reshape(y0.shape), parameters).reshape(shape)

    term, controlled = torchode.ODETerm(f), problem.rtol is not None
    solver = torchode.AutoDiffAdjoint(RK4(term), torchode.FixedStepController())
    if controlled:
        control = torchode.IntegralController(atol=problem.rtol, rtol=problem.rtol, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term), control)
    start, end, h = (torch.full((count,), x, dtype=y0.dtype) for x in (0.0, problem.end, problem.h))

    def run() -> Sequence[Tensor]:
        problem_here = torchode.InitialValueProblem(y0=y0.reshape(shape), t_start=start, t_end=end)
        solution = solver.solve(problem_here, dt0=None if controlled else h)
        assert controlled or int(solution.stats["n_steps"][0]) == problem.steps, solution.stats
        return of_loss(solution.ys[:, -1], y0, parameters)

    return run
