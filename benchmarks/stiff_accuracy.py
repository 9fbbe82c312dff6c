"""How wrong is a gradient of a stiff problem, beside the error of the state it is taken through?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import adjoint
from adjoint.cases import Case, NamedProblem
from adjoint.measure import Differentiated, differentiate, norm, power
from adjoint.problems import Known, problem_named, reference_of
from benchmarks.measure import Section

TITLE = "Gradients of stiff problems: their error beside that of the state"
TEXT = (
    "Against references computed in two ways that share no code (`python -m benchmarks.references`). State: the largest "
    "error of a number at the end, relative to its size (or, where that is smaller, to the size below which the problem "
    "counts nothing). Gradient: of the loss in y0 and all parameters, each component scaled by its parameter (a zero of y0 by "
    "what it becomes); the norm of the error over the norm of the gradient. Ratio: gradient over state. Where it is above "
    "10, the last columns show the tangent carried forwards through the same frozen steps: its error, and how far it is from "
    "the discrete gradient, by the same norm. Both are then what these steps say, and the error is that of the steps."
)
HEADER = ("rtol", "steps", "state", "gradient", "ratio", "tangent", "apart")
TOLERANCES = tuple(10.0**-k for k in range(4, 11))
MUCH = 10.0
"""A ratio above which the tangent is asked."""
WORK = (
    ("robertson", None, ("kvaerno5", "radau5")),
    ("robertson_dae", None, ("radau5",)),
    ("hires", None, ("kvaerno5",)),
    ("pollution", None, ("kvaerno5",)),
    ("oregonator", None, ("kvaerno5",)),
    ("relaxation", 1000, ("kvaerno5", "radau5")),
    ("brusselator", 20, ("kvaerno5",)),
    ("hodgkin_huxley", None, ("tsit5",)),
    ("pleiades", None, ("dopri8",)),
)


@dataclass(frozen=True)
class Errors:
    """Of one solve and its gradient."""

    steps: int
    state: float
    gradient: float
    tangent: float | None = None
    apart: float = 0.0
    """The tangent from the discrete gradient."""

    @property
    def ratio(self) -> float:
        return self.gradient / self.state

    def cells(self) -> tuple[str, ...]:
        more = ("", "") if self.tangent is None else (f"{self.tangent:.1e}", f"{self.apart:.0e}")
        return f"{self.steps}", f"{self.state:.1e}", f"{self.gradient:.1e}", f"{self.ratio:.2g}", *more


def errors(problem: NamedProblem, case: Case, known: Known, method: str, rtol: float) -> Errors:
    """How wrong state and gradient are at this tolerance."""
    with adjoint.frozen_steps() as steps:
        found = _by(case, problem, method, rtol, "discrete")
        y = found.solution.ys[-1].detach()
        size = torch.clamp(known.state.abs(), min=problem.small or 0.0)
        off = Errors(
            found.solution.stats.steps,
            float(((y - known.state).abs() / size).max()),
            away(case, found.gradient, known.gradient, known),
        )
        if off.ratio <= MUCH:
            return off
        steps.rewind()
        tangent = _by(case, problem, method, rtol, "tangent").gradient
    return replace(
        off,
        tangent=away(case, tangent, known.gradient, known),
        apart=away(case, tangent, found.gradient, known),
    )


def _by(case: Case, problem: NamedProblem, method: str, rtol: float, gradient: str) -> Differentiated:
    how: dict[str, Any] = {"method": case.suited(method), "gradient": gradient, **problem.tolerances(rtol)}
    return differentiate(partial(_solved, how=how), replace(case, t=case.t[[0, -1]]))


def _solved(case: Case, how: dict[str, Any]) -> adjoint.Solution:
    return adjoint.solve(case.f, case.y0, case.t, args=case.args, **how)


def away(case: Case, found: dict[str, Tensor], true: dict[str, Tensor], known: Known) -> float:
    """The norm of the scaled difference over that of the scaled gradient."""
    y0 = case.y0.detach()
    scales = {name: x.detach().abs() for name, x in case.inputs.items()}
    scales["y0"] = torch.where(y0 == 0, known.state, y0).abs()
    return norm((found[k] - true[k]) * s for k, s in scales.items()) / norm(true[k] * s for k, s in scales.items())


def run(device: str) -> Section:
    parts = []
    for name, size, methods in WORK:
        problem, known = problem_named(name), reference_of(name, size)
        assert known is not None
        case = problem.case(size)
        for method in methods:
            rows = [(power(tol), *errors(problem, case, known, method, tol).cells()) for tol in TOLERANCES]
            print(name, method, *rows, sep="\n  ", flush=True)
            title = f"{name}{'' if size is None else f', {size} {problem.size_is}'}: {method}"
            parts.append(Section(title, problem.description.capitalize() + ".", HEADER, tuple(rows)))
    return Section(TITLE, TEXT, parts=tuple(parts))
