"""``python -m benchmarks.references [NAME ...]`` writes adjoint/data/references.json (a few minutes).

The first way: collocation at nine Radau points in extended precision with forward sensitivities
(:mod:`benchmarks.references.collocation`), of right-hand sides written anew in numpy. The second: the library itself,
Radau IIA with seven stages on the steps that "radau5" chooses, and the discrete gradient, in double precision. For van
der Pol's oscillator, whose gradient loses in double precision what its jumps amplify, the state is that of "radau5" at a
tight tolerance, and extrapolated differences of solves in extended precision stand beside the sensitivities. Stored are
values of the first way, and for van der Pol's oscillator the gradient by differences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import torch
from torch import Tensor

import adjoint
from adjoint.cases import Case, NamedProblem
from adjoint.implicit_tableaus import ImplicitTableau
from adjoint.measure import differentiate
from adjoint.problems import problem_named
from benchmarks.references import collocation
from benchmarks.references.fields import FIELDS

FILE = Path(__file__).parents[2] / "adjoint" / "data" / "references.json"
NAMES = (
    "robertson",
    "robertson_dae",
    "hires",
    "pollution",
    "oregonator",
    "relaxation:1000",
    "relaxation:1000000",
    "brusselator:20",
    "hodgkin_huxley",
    "pleiades",
)
BY_DIFFERENCES = "relaxation"

Array = collocation.Array


def exactly(case: Case, name: str, stages: int = 9, tolerance: float = 1e-10) -> collocation.Reached:
    """The last state and its derivatives, in extended precision."""
    field = FIELDS[name]
    mass = None if field.mass is None else np.diag(field.mass)
    return collocation.solve(field.f, flat(case.y0), parameters(case), float(case.t[-1]), mass, stages, tolerance)


def flat(x: Tensor) -> Array:
    return x.detach().numpy().ravel()


def parameters(case: Case) -> Array:
    return np.concatenate([flat(x) for x in case.args])


def of_loss(case: Case, state: Array, sensitivity: Array) -> tuple[float, Array]:
    """The loss at this state, and its gradient in (y_0, p)."""
    y = torch.tensor(state.astype(float)).reshape(case.y0.shape).requires_grad_()
    loss = case.loss(y[None])
    (slope,) = torch.autograd.grad(loss, y)
    return float(loss.detach()), flat(slope).astype(collocation.REAL) @ sensitivity


def by_differences(case: Case, name: str) -> Array:
    """dy/d(y_0, p) by central differences with steps h, h/2, h/4, .., extrapolated to zero (Richardson)."""
    field, end = FIELDS[name], float(case.t[-1])
    start = np.concatenate((flat(case.y0), parameters(case))).astype(collocation.REAL)
    n = case.y0.numel()

    def last(x: Array) -> Array:
        return collocation.solve(field.f, x[:n], x[n:], end, None, 8, 1e-10).y

    columns = []
    for i in range(len(start)):
        table: list[list[Array]] = []
        for level in range(6):
            h = collocation.REAL(2e-3) * max(abs(start[i]), 1) / 2**level
            x, z = start.copy(), start.copy()
            x[i] += h
            z[i] -= h
            row = [(last(x) - last(z)) / (2 * h)]
            for k, coarser in enumerate(table[-1] if table else []):
                row.append(row[-1] + (row[-1] - coarser) / (4 ** (k + 1) - 1))
            table.append(row)
        columns.append(table[-1][-1])
    return np.stack(columns, -1)


def radau(stages: int) -> ImplicitTableau:
    """Radau IIA from Jacobi's polynomials, its integrals by Gauss quadrature."""
    inner, _ = scipy.special.roots_jacobi(stages - 1, 1, 0)
    c = np.append((1 + inner) / 2, 1.0)
    nodes, weights = np.polynomial.legendre.leggauss(stages)
    nodes, weights = (1 + nodes) / 2, weights / 2

    def through(j: int, x: Array) -> Array:
        others = np.delete(c, j)
        return np.prod((x[:, None] - others) / (c[j] - others), 1)

    a = [tuple(float(ci * weights @ through(j, ci * nodes)) for j in range(stages)) for ci in c]
    order = 2 * stages - 1
    return ImplicitTableau(f"radau{order}", order, tuple(map(float, c)), tuple(a), a[-1], "Ehle (1969)")


def by_the_library(case: Case, problem: NamedProblem) -> tuple[Array, Array]:
    """The last state and the gradient: seven stages on the steps of "radau5"."""
    ends = case.t[[0, -1]]
    with torch.no_grad():
        mesh = adjoint.solve(
            case.f,
            case.y0,
            ends,
            args=case.args,
            method=case.suited("radau5"),
            observe=lambda t, y: y.new_zeros(()),
            observe_at="steps",
            **problem.tolerances(1e-6),
        ).observed_ts
    method = case.suited(adjoint.Implicit(radau(7)))
    found = differentiate(
        lambda c: adjoint.solve(c.f, c.y0, c.t, args=c.args, method=method, slots="all"), replace(case, t=mesh)
    )
    gradient = np.concatenate([flat(x) for x in found.gradient.values()])
    return flat(found.solution.ys[-1]), gradient


def tightly(case: Case, problem: NamedProblem) -> Array:
    """The last state by "radau5"."""
    how = problem.tolerances(1e-10) | {"method": case.suited("radau5")}
    with torch.no_grad():
        return flat(adjoint.solve(case.f, case.y0, case.t[[0, -1]], args=case.args, **how).ys[-1])


def scales(case: Case, state: Array) -> Array:
    """The size of each input; for a zero of y_0 what it becomes."""
    y0, last = np.abs(flat(case.y0)), np.abs(state.astype(float).ravel())
    return np.concatenate((np.where(y0 == 0, last, y0), np.abs(parameters(case))))


def apart(a: Array, b: Array) -> float:
    """The largest relative difference of numbers."""
    return float(np.max(np.abs(a - b) / np.abs(b)))


def far(a: Array, b: Array, scale: Array) -> float:
    """The relative difference of gradients by norm, each number scaled by its input."""
    return float(np.linalg.norm(((a - b) * scale).astype(float)) / np.linalg.norm((b * scale).astype(float)))


def entry(name: str, say: Callable[[str], object]) -> dict[str, Any]:
    """One problem, both ways."""
    stem, _, size = name.partition(":")
    problem = problem_named(stem)
    case = problem.case(int(size) if size else None)
    found = exactly(case, stem)
    loss, best = of_loss(case, found.y, found.sensitivity)
    if stem == BY_DIFFERENCES:
        state, gradient = tightly(case, problem), best
        loss, best = of_loss(case, found.y, by_differences(case, stem))
    else:
        state, gradient = by_the_library(case, problem)
    agreement = {"state": apart(state, found.y), "gradient": far(gradient, best, scales(case, found.y))}
    say(f"{name:20} {found.steps:4} steps; state {agreement['state']:.0e}, gradient {agreement['gradient']:.0e}")
    pieces = np.split(best.astype(float), np.cumsum([x.numel() for x in case.inputs.values()])[:-1])
    named = zip(case.inputs.items(), pieces, strict=True)
    return {
        "state": found.y.astype(float).reshape(case.y0.shape).tolist(),
        "loss": loss,
        "gradient": {key: x.reshape(tuple(given.shape)).tolist() for (key, given), x in named},
        "agreement": agreement,
    }


def main() -> None:
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or NAMES
    known = json.loads(FILE.read_text())["problems"] if FILE.exists() else {}
    known |= {name: entry(name, print) for name in chosen}
    ordered = {name: known[name] for name in NAMES if name in known}
    FILE.write_text(json.dumps({"made by": "python -m benchmarks.references", "problems": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
