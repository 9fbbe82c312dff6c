"""How wrong is a gradient, and what does it cost? Discrete and continuous adjoints at equal tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from adjoint.cases import Case
from adjoint.measure import Differentiated, Recipe, Scales, differentiate, how_weighed, norm, power, quickest
from adjoint.problems import reference_of
from adjoint.reversible import Reversible
from adjoint.solve import Solution, solve
from adjoint.timeline import SolveError

TIGHTER = 1e-3
"""The tolerance of both reference gradients, over the tightest that is compared."""
THOUSANDFOLD = 1000.0
FEW = 100
"""Inputs in numbers, up to which forward sensitivities take part."""
ROUNDING = 2.0**-52
STIFF_STEPS = 3000
"""The most steps of a stiff solve, of which implicit methods need some hundreds: some adjoints would never end."""
DT = 0.1
"""The step of yoshida4 at a tolerance of one."""


@dataclass(frozen=True)
class Counted:
    """A solution without statistics of its own, and the calls of f (so far: the reverse sweep adds to them)."""

    ys: Tensor
    calls: list[int]


def by_adjoint(
    case: Case,
    method: str,
    tolerance: float,
    gradient: str,
    slots: int | str | None = None,
    small: float = 1.0,
    max_steps: int = 100_000,
) -> Solution:
    return solve(
        case.f,
        case.y0,
        case.t,
        args=case.args,
        method=case.suited(method),
        rtol=tolerance,
        atol=small * tolerance,
        slots=slots,
        gradient=gradient,
        max_steps=max_steps,
    )


def by_moves(case: Case, method: str, tolerance: float, gradient: str | Reversible) -> Solution:
    """Of an equation in two parts: fixed steps of yoshida4, as long as the fourth root of the tolerance allows."""
    dt = DT * tolerance**0.25
    how: dict[str, Any] = {"method": "yoshida4", "dt": dt, "gradient": gradient}
    if gradient == "discrete":
        how["slots"] = "all"
    parts: Any = case.pair
    solution = solve(parts, tuple(case.y0.unbind(0)), case.t, args=case.args, **how)
    return replace(solution, ys=torch.stack(solution.ys, 1))


def by_torchdiffeq(case: Case, method: str, tolerance: float, adjoint: bool, **options: Any) -> Counted:
    calls = [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return case.f(t, y, *case.args)

    more: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "method": method, "options": options}
    ys = (
        odeint_adjoint(f, case.y0, case.t, adjoint_params=case.args, **more)
        if adjoint
        else odeint(f, case.y0, case.t, **more)
    )
    return Counted(ys, calls)


@dataclass(frozen=True)
class Way:
    """One way to a gradient at a tolerance."""

    name: str
    solved: Callable[..., Any]
    peer: bool = False
    """Whether it is torchdiffeq's, which has fewer methods."""

    def at(self, method: str, tolerance: float) -> Work:
        return Work(self, "dopri5" if self.peer else method, tolerance)


@dataclass(frozen=True)
class Work:
    """A gradient by one way at one tolerance, as a value that another process can be asked for."""

    way: Way
    method: str
    tolerance: float

    def __call__(self, case: Case) -> Differentiated:
        return differentiate(partial(self.way.solved, method=self.method, tolerance=self.tolerance), case)


def ways(slots: int) -> list[Way]:
    """The ways that the demo compares; the discrete adjoint twice, with the same bits."""
    return [*_first_ways(slots), *_peers()]


def _first_ways(slots: int, **more: Any) -> list[Way]:
    return [
        Way("discrete", partial(by_adjoint, gradient="discrete", slots="all", **more)),
        Way(f"discrete, {slots} slots", partial(by_adjoint, gradient="discrete", slots=slots, **more)),
        Way("backsolve", partial(by_adjoint, gradient="backsolve", **more)),
    ]


def _peers() -> list[Way]:
    return [
        Way("torchdiffeq adjoint", partial(by_torchdiffeq, adjoint=True), peer=True),
        Way("torchdiffeq backprop", partial(by_torchdiffeq, adjoint=False), peer=True),
    ]


def every_way(slots: int, recipe: Recipe) -> list[Way]:
    """Every gradient that there is: "tangent" for few inputs only, each of which is carried along; "reversible", beside
    the discrete gradient of the same steps, for an equation in two parts; torchdiffeq's for what explicit methods can do.
    """
    problem, case = recipe.named, recipe.case()
    names = ["interpolating", "quadrature", "gauss", "backprop"]
    if sum(x.numel() for x in case.inputs.values()) <= FEW:
        names.append("tangent")
    how: dict[str, Any] = {} if problem.small is None else {"small": problem.small}
    if problem.stiff:
        how["max_steps"] = STIFF_STEPS
    found = [*_first_ways(slots, **how), *(Way(name, partial(by_adjoint, gradient=name, **how)) for name in names)]
    if case.pair is not None:
        found.append(Way("discrete, yoshida4", partial(by_moves, gradient="discrete")))
        found.append(Way("reversible, yoshida4", partial(by_moves, gradient=Reversible())))
    return found if problem.stiff else [*found, *_peers()]


@dataclass(frozen=True)
class Reference:
    """A gradient at a much tighter tolerance, from two computations that share no code, and how far they agree."""

    gradient: dict[str, Tensor]
    agreement: float
    """The norm of their difference over that of the gradient."""
    scales: dict[str, Tensor] | None = None
    """What each number of the gradient is multiplied with before errors are taken: inputs of many sizes."""


def stored(recipe: Recipe) -> Reference | None:
    """The gradient that ships with a problem, if it does, each number scaled by its input (a zero by what it becomes)."""
    known = reference_of(recipe.problem, recipe.size)
    if known is None:
        return None
    case = replace(recipe, device="cpu", dtype=torch.float64).case()
    scales = {name: x.detach().abs() for name, x in case.inputs.items()}
    scales["y0"] = torch.where(scales["y0"] == 0, known.state.abs(), scales["y0"])
    return Reference(known.gradient, max(known.agreement), scales)


def reference(recipe: Recipe, tolerance: float) -> Reference:
    """tsit5 with the discrete adjoint, against torchdiffeq's dopri8 with backpropagation, both in double precision."""
    case = replace(recipe, dtype=torch.float64).case()
    own = differentiate(partial(by_adjoint, method="tsit5", tolerance=tolerance, gradient="discrete"), case).gradient
    landing = partial(by_torchdiffeq, method="dopri8", tolerance=tolerance, adjoint=False, step_t=case.t[1:])
    other = differentiate(landing, case).gradient
    return Reference(own, error(other, own))


def error(gradient: dict[str, Tensor], true: dict[str, Tensor], scales: dict[str, Tensor] | None = None) -> float:
    """The norm of the difference over that of the true gradient, all inputs together."""
    if scales is not None:
        gradient, true = ({name: x[name].double().cpu() * scales[name] for name in scales} for x in (gradient, true))
    difference = [gradient[name].double() - true[name].double() for name in true]
    return norm(difference) / norm(true.values())


@dataclass(frozen=True)
class Row:
    """One gradient: how wrong, how slow, how large."""

    way: str
    tolerance: float
    error: float
    """Infinite if there is no gradient."""
    seconds: float
    evaluations: int | None
    bytes: int | None = None
    """Only the gradients of the tightest tolerance are weighed."""
    failure: str = ""

    def facts(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "tolerance": self.tolerance,
            "error": self.error,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "bytes": self.bytes,
            "failure": self.failure or None,
        }


@dataclass(frozen=True)
class Comparison:
    """All rows, tolerance by tolerance, and what they were measured against."""

    recipe: Recipe
    method: str
    agreement: float
    weighed: str
    rows: tuple[Row, ...]

    @property
    def tolerances(self) -> list[float]:
        return list(dict.fromkeys(row.tolerance for row in self.rows))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(row.way for row in self.rows))

    def of(self, way: str) -> list[Row]:
        return [row for row in self.rows if row.way == way]

    @property
    def least_ratio(self) -> float:
        """By how many times backsolve is more wrong than the discrete adjoint, at the tolerance where it is least."""
        pairs = zip(self.of("backsolve"), self.of("discrete"), strict=True)
        return min(continuous.error / max(discrete.error, ROUNDING) for continuous, discrete in pairs)

    @property
    def verdict(self) -> str:
        """What is wrong with this comparison, in a sentence; empty if nothing is."""
        if self.agreement > min(self.tolerances):
            return (
                f"the two reference gradients of {self.recipe.problem} agree to {self.agreement:.1e} only, "
                f"which is no better than the tolerance {power(min(self.tolerances))}"
            )
        if self.recipe.named.dissipative and not self.least_ratio > THOUSANDFOLD:
            return (
                f"{self.recipe.problem} is dissipative, but backsolve's error is only {self.least_ratio:.3g} times "
                f"the discrete one's at equal tolerance, not a thousand times"
            )
        return ""

    def facts(self) -> dict[str, Any]:
        return {
            "problem": self.recipe.problem,
            "method": self.method,
            "reference_agreement": self.agreement,
            "memory": self.weighed,
            "least_ratio": self.least_ratio,
            "rows": [row.facts() for row in self.rows],
        }


def compare(
    recipe: Recipe,
    tolerances: Sequence[float],
    scales: Scales,
    *,
    method: str = "dopri5",
    slots: int = 8,
    patience: float = 0.2,
    tick: Callable[[], None] = lambda: None,
    made: Sequence[Way] | None = None,
) -> Comparison:
    """Every way, or those ``made``, at every tolerance, timed as often as fits ``patience`` seconds, and weighed at the
    tightest. ``tick`` is called after the reference and after each gradient.
    """
    tightest = min(tolerances)
    true = stored(recipe) or reference(recipe, max(1e-13, TIGHTER * tightest))
    tick()
    rows = []
    for tolerance in sorted(tolerances, reverse=True):
        for way in every_way(slots, recipe) if made is None else made:
            work = way.at(method, tolerance)
            row = _timed(work, recipe, true, patience)
            if tolerance == tightest and not row.failure:
                row = replace(row, bytes=scales.peak(work, recipe))
            rows.append(row)
            tick()
    return Comparison(recipe, method, true.agreement, how_weighed(recipe.case()), tuple(rows))


def _timed(work: Work, recipe: Recipe, true: Reference, patience: float) -> Row:
    case, way = recipe.case(), work.way
    try:
        result = quickest(lambda: work(case), patience)
    except torch.OutOfMemoryError:
        raise
    except (SolveError, AssertionError, RuntimeError) as failure:  # torchdiffeq asserts; a step cannot be undone
        return Row(way.name, work.tolerance, float("inf"), float("nan"), None, failure=str(failure))
    solution = result.solution
    calls = solution.stats.evaluations if isinstance(solution, Solution) else solution.calls[0]
    return Row(way.name, work.tolerance, error(result.gradient, true.gradient, true.scales), result.seconds, calls)
