"""torchdiffeq: its rk4 is the 3/8 rule, of the same four stages; torch's graph, or the continuous adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from benchmarks.peers.in_torch import Gradient, leaves, numbers, of_loss
from benchmarks.peers.problems import Problem

__all__ = ["backsolve", "graph", "numbers"]


def graph(problem: Problem) -> Gradient:
    y0, parameters = leaves(problem)
    t = torch.tensor([0.0, problem.end], dtype=torch.float64)
    how: dict[str, Any] = {"method": "rk4", "options": {"step_size": problem.h}}
    if problem.rtol is not None:
        how = {"method": "dopri5", "rtol": problem.rtol, "atol": problem.rtol}

    def run() -> Sequence[Tensor]:
        ys = odeint(lambda t, y: problem.f(torch, y, parameters), y0, t, **how)
        return of_loss(ys[-1], y0, parameters)

    return run


def backsolve(problem: Problem) -> Gradient:
    y0, parameters = leaves(problem)
    t, options = torch.tensor([0.0, problem.end], dtype=torch.float64), {"step_size": problem.h}

    def run() -> Sequence[Tensor]:
        ys = odeint_adjoint(
            lambda t, y: problem.f(torch, y, parameters),
            y0,
            t,
            method="rk4",
            options=options,
            adjoint_params=parameters,
        )
        return of_loss(ys[-1], y0, parameters)

    return run
