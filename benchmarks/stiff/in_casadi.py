"""CVODES: BDF forwards, and its adjoint equation backwards, on expressions that casadi differentiates and compiles."""

from __future__ import annotations

from typing import Any

import casadi
import numpy as np

from benchmarks.stiff.problems import Array, Stiff


def cvodes(problem: Stiff, members: int) -> Any:
    """Members in turn."""
    all_y0, all_p = problem.inputs(members)
    n, m = all_y0.shape[1], all_p.shape[1]
    x, p = casadi.SX.sym("x", n), casadi.SX.sym("p", m)
    ode = casadi.vertcat(*problem.f([x[i] for i in range(n)], [p[i] for i in range(m)]))
    how = problem.tolerances
    options = {"reltol": how["rtol"], "abstol": how["atol"], "max_num_steps": 100_000}
    solver = casadi.integrator("solver", "cvodes", {"x": x, "p": p, "ode": ode}, 0.0, problem.end, options)
    y0, rates = casadi.MX.sym("y0", n), casadi.MX.sym("rates", m)
    seen = solver(x0=y0, p=rates)["xf"][problem.seen]
    loss = problem.seed * (casadi.log(seen) if problem.logarithm else seen)
    slopes = [casadi.gradient(loss, x) / problem.seed for x in (y0, rates)]
    gradient = casadi.Function("gradient", [y0, rates], slopes)

    def one(a: Array, b: Array) -> tuple[Array, Array]:
        try:
            of_y0, of_p = (np.asarray(x).ravel() for x in gradient(a, b))
        except RuntimeError:
            if members == 1:
                raise
            return np.full(n, np.nan), np.full(m, np.nan)
        return of_y0, of_p

    def run() -> tuple[Array, Array]:
        of_y0, of_p = zip(*(one(a, b) for a, b in zip(all_y0, all_p, strict=True)), strict=True)
        return np.array(of_y0), np.array(of_p)

    return run
