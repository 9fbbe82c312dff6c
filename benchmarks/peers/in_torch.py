"""This library, a loop over torch operations, and torch.utils.checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import adjoint
from benchmarks.peers.problems import Problem

Gradient = Callable[[], Sequence[Tensor]]


def leaves(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first state and the parameters, to be differentiated."""
    y0, *parameters = (torch.tensor(x, requires_grad=True) for x in (problem.y0, *problem.parameters))
    return y0, tuple(parameters)


def numbers(gradient: Sequence[Tensor]) -> list[np.ndarray]:
    return [g.numpy() for g in gradient]


def of_loss(last: Tensor, y0: Tensor, parameters: tuple[Tensor, ...]) -> Sequence[Tensor]:
    return torch.autograd.grad(last.square().sum(), (y0, *parameters))


def ours(problem: Problem, slots: int | str) -> Gradient:
    y0, parameters = leaves(problem)

    def run() -> Sequence[Tensor]:
        solution = adjoint.solve(
            lambda t, y: problem.f(torch, y, parameters),
            y0,
            [0.0, problem.end],
            method="rk4",
            dt=problem.h,
            slots=slots,
        )
        return of_loss(solution.ys[-1], y0, parameters)

    return run


def warm() -> None:
    """Make torch import what its first gradient imports."""
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for engine in ("eager", "native"):
        solution = adjoint.solve(lambda t, y: -y, y0, [0.0, 1.0], method="rk4", dt=0.5, engine=engine)
        torch.autograd.grad(solution.ys.sum(), y0)


def engine(problem: Problem) -> Gradient:
    """By the native engine, where it takes the problem."""
    y0, parameters = leaves(problem)
    t = torch.tensor([0.0, problem.end], dtype=y0.dtype)
    how: dict[str, Any] = {"method": "rk4", "dt": problem.h, "slots": min(problem.slots, problem.steps)}
    if problem.rtol is not None:
        how = {"method": "dopri5", "rtol": problem.rtol, "atol": problem.rtol}

    slope = problem.f

    def f(t: Tensor, y: Tensor, p: tuple[Tensor, ...]) -> Tensor:
        return slope(torch, y, p)

    def run() -> Sequence[Tensor]:
        solution = adjoint.solve(f, y0, t, args=(parameters,), engine="native", **how)
        return of_loss(solution.ys[-1], y0, parameters)

    return run


def in_slots(problem: Problem) -> Gradient:
    return ours(problem, min(problem.slots, problem.steps))


def all_tapes(problem: Problem) -> Gradient:
    return ours(problem, "all")


def several_steps(problem: Problem, count: int) -> Callable[..., Tensor]:
    """``count`` steps from y with these parameters, as one would write them."""

    def run(y: Tensor, *parameters: Tensor) -> Tensor:
        h = problem.h
        for _ in range(count):
            k1 = problem.f(torch, y, parameters)
            k2 = problem.f(torch, y + h / 2 * k1, parameters)
            k3 = problem.f(torch, y + h / 2 * k2, parameters)
            k4 = problem.f(torch, y + h * k3, parameters)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    return run


def loop(problem: Problem) -> Gradient:
    if problem.rtol is not None:
        raise ValueError("takes fixed steps")
    y0, parameters = leaves(problem)
    steps = several_steps(problem, problem.steps)
    return lambda: of_loss(steps(y0, *parameters), y0, parameters)


def checkpointed(problem: Problem) -> Gradient:
    """The reentrant kind: quicker and lighter here than the other one, which keeps the graph of every operation."""
    y0, parameters = leaves(problem)
    steps = several_steps(problem, problem.steps // problem.segments)

    def run() -> Sequence[Tensor]:
        y = y0
        for _ in range(problem.segments):
            y = checkpoint(steps, y, *parameters, use_reentrant=True, preserve_rng_state=False)
        for x in (y0, *parameters):
            x.grad = None
        y.square().sum().backward()
        return [x.grad for x in (y0, *parameters)]

    return run
