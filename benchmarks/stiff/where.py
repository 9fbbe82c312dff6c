"""Where the time of one gradient goes: f, Jacobians, factorisations and solves, and all the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import adjoint
from benchmarks.stiff.in_adjoint import arguments, prepared
from benchmarks.stiff.problems import Stiff


@dataclass
class Clock:
    """Processor seconds and calls, by name; what is timed inside of something else counts there only."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    busy: bool = False

    def timed(self, name: str, work: Callable[..., Any], *inputs: Any) -> Any:
        if self.busy:
            return work(*inputs)
        self.busy, start = True, time.process_time()
        try:
            return work(*inputs)
        finally:
            self.busy = False
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
            self.calls[name] = self.calls.get(name, 0) + 1


@dataclass(frozen=True)
class TimedFactors:
    clock: Clock
    factors: Any

    def solve(self, b: Tensor) -> Tensor:
        return self.clock.timed("solves", self.factors.solve, b)

    def solve_transposed(self, b: Tensor) -> Tensor:
        return self.clock.timed("solves", self.factors.solve_transposed, b)


@dataclass(frozen=True)
class Timed:
    """Dense linear algebra with a clock."""

    clock: Clock
    dense: adjoint.Dense

    @property
    def members(self) -> bool:
        return self.dense.members

    @property
    def reusable(self) -> bool:
        return self.dense.reusable

    @property
    def drift(self) -> float:
        return self.dense.drift

    def jacobian(self, value: Tensor, at: Tensor) -> Any:
        return self.clock.timed("Jacobians", self.dense.jacobian, value, at)

    def factored(self, jacobians: Sequence[Any], weights: Any, mass: Any) -> TimedFactors:
        return TimedFactors(
            self.clock, self.clock.timed("factorisations", self.dense.factored, jacobians, weights, mass)
        )


PARTS = ("f", "Jacobians", "factorisations", "solves")


def where(problem: Stiff, members: int) -> tuple[float, Clock, int]:
    """Seconds of a gradient with "kvaerno5" after one over a short time, its parts, and its steps."""
    y0, p = prepared(problem, members)
    f, whole = problem.case.f, problem.case.t[[0, -1]]
    for t in (1e-6 * whole, whole):
        clock = Clock()

        def timed(t: Tensor, y: Tensor, *args: Tensor, clock: Clock = clock) -> Any:
            return clock.timed("f", f, t, y, *args)

        start = time.process_time()
        method = adjoint.Implicit("kvaerno5", linear=Timed(clock, adjoint.Dense(members=members > 1)))
        solution = adjoint.solve(timed, y0, t, args=arguments(problem, p), method=method, **problem.tolerances)
        seen = solution.ys[-1][..., problem.seen]
        torch.autograd.grad((seen.log() if problem.logarithm else seen).sum(), (y0, p))
        seconds = time.process_time() - start
    return seconds, clock, solution.stats.steps
