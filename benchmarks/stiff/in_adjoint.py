"""This library: alone, as a batch with steps in common, and as a batch whose members step for themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import adjoint
from benchmarks.stiff.problems import Array, Stiff

Gradient = Any


def prepared(problem: Stiff, members: int) -> tuple[Tensor, Tensor]:
    """y_0 and the parameters as leaves, with a leading dimension of members if there are several."""
    torch.set_num_threads(1)
    y0, p = (torch.tensor(x, requires_grad=True) for x in problem.inputs(members))
    if members == 1:
        y0, p = (x.detach()[0].requires_grad_() for x in (y0, p))
    return y0, p


def arguments(problem: Stiff, p: Tensor) -> tuple[Tensor, ...]:
    return (p,) if problem.name == "pollution" else p.unbind(-1)


def _gradient(problem: Stiff, members: int, **how: Any) -> Gradient:
    y0, p = prepared(problem, members)
    f, t = problem.case.f, problem.case.t[[0, -1]]

    def run() -> tuple[Array, Array]:
        solution = adjoint.solve(f, y0, t, args=arguments(problem, p), **problem.tolerances, **how)
        last = solution.ys[..., -1, :] if how.get("batched") and solution.ys.shape[0] == members else solution.ys[-1]
        seen = last[..., problem.seen]
        loss = (seen.log() if problem.logarithm else seen).sum()
        found = torch.autograd.grad(loss, (y0, p))
        run.steps = int(torch.as_tensor(solution.stats.steps).max())  # type: ignore[attr-defined]
        return tuple(x.reshape(members, -1).numpy() for x in found)  # type: ignore[return-value]

    return run


def kvaerno5(problem: Stiff, members: int) -> Gradient:
    return _gradient(problem, members, method="kvaerno5")


def together(problem: Stiff, members: int) -> Gradient:
    method = adjoint.Implicit("kvaerno5", linear=adjoint.Dense(members=True))
    return _gradient(problem, members, method=method)


def apart(problem: Stiff, members: int) -> Gradient:
    return _gradient(problem, members, method="kvaerno5", batched=True)


def native(problem: Stiff, members: int) -> Gradient:
    """Refused where the engine would fall back."""
    run = _gradient(problem, members, method="rodas5p", engine="native")
    y0, p = prepared(problem, members)
    said = adjoint.solve(
        problem.case.f, y0, [0.0, 1e-6], args=arguments(problem, p), method="rodas5p", engine="native"
    ).engine
    if not said.startswith("native"):
        raise NotImplementedError(said)
    return run
