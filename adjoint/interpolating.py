"""Continuous adjoints along the solution itself, which is computed again, piece by piece, from checkpoints.

    dlam/dt = -f_y(t, u(t))^T lam,    mu = integral of f_p(t, u(t))^T lam dt

u is the dense output of the forward steps. Nothing is solved backwards but the adjoint, which is as stable in that direction
as the equation is forwards; what is left is the error of the backward solve, of the interpolant, and of the integral.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.captured import Captured
from adjoint.continuous import Backsolve, Right, carried_out, chosen, least, spread, taken
from adjoint.interpolate import Polynomials
from adjoint.methods import Method, program_of
from adjoint.problem import Outcome, Problem
from adjoint.steppers.control import Tolerance, root_mean_square
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.stages import Stages
from adjoint.tensors import State, Structure
from adjoint.timeline import SolveError

CHECKPOINTS = 100
LEAST = 16
"""Checkpoints are at least so many steps apart: each piece is a solve of its own."""


class Wishes(Protocol):
    """What the continuous adjoints here have in common."""

    @property
    def rtol(self) -> Any: ...
    @property
    def atol(self) -> Any: ...
    @property
    def method(self) -> str | Method | None: ...
    @property
    def checkpoints(self) -> int: ...


@dataclass(frozen=True)
class Interpolating:
    """lam and mu solved backwards together, along the dense solution between checkpoints.

    Tolerances and method default to those of the forward solve. ``checkpoints``: how many states are kept at most; from
    each the steps to the next are taken once more. ``norm``: None (the largest error among lam and each parameter)
    or "seminorm" (parameters do not count: Kidger, Chen & Lyons 2021, ICML).

    Source: the checkpointed InterpolatingAdjoint of Rackauckas et al. (2020), arXiv:2001.04385, and CVODES' scheme
    (Hindmarsh et al. 2005, ACM TOMS 31(3), section 4.2).
    """

    rtol: Any = None
    atol: Any = None
    method: str | Method | None = None
    checkpoints: int = CHECKPOINTS
    norm: str | None = None

    def __post_init__(self) -> None:
        if self.norm not in (None, "seminorm"):
            raise ValueError(f"norm={self.norm!r} of a backward solve is unknown; give 'seminorm' or None")

    def __call__(self, problem: Problem) -> Outcome:
        return _carried_out(self, problem, "interpolating", _Together(self.norm))


@dataclass(frozen=True)
class Quadrature:
    """lam alone solved backwards; mu by adaptive Gauss-Kronrod quadrature (7 and 15 nodes) over each of its steps.

    The backward solve is smaller, and parameters do not shorten its steps. The quadrature is refined until its own error
    is within the tolerances. Source: QuadratureAdjoint of Rackauckas et al. (2020), arXiv:2001.04385; nodes: QUADPACK
    (Piessens et al. 1983), qk15.
    """

    rtol: Any = None
    atol: Any = None
    method: str | Method | None = None
    checkpoints: int = CHECKPOINTS

    def __call__(self, problem: Problem) -> Outcome:
        return _carried_out(self, problem, "quadrature", _Apart(None))


@dataclass(frozen=True)
class Gauss:
    """lam alone solved backwards; mu by Gauss-Legendre quadrature with ``nodes`` nodes over each of its steps.

    Exact for polynomials of degree 2 nodes - 1: with 3, of a higher order than the dense output. Source: GaussAdjoint of
    SciMLSensitivity; Norcliffe & Deisenroth (2023), TMLR, Faster training of neural ODEs using Gauss-Legendre quadrature.
    """

    rtol: Any = None
    atol: Any = None
    method: str | Method | None = None
    checkpoints: int = CHECKPOINTS
    nodes: int = 3

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes} integrates nothing; give at least 1")

    def __call__(self, problem: Problem) -> Outcome:
        return _carried_out(self, problem, "gauss", _Apart(self.nodes))


CONTINUOUS = (Backsolve, Interpolating, Quadrature, Gauss)
"""Gradients of the equation, not of what was computed."""


def _carried_out(how: Wishes, problem: Problem, name: str, rule: Rule) -> Outcome:
    if how.checkpoints < 1:
        raise ValueError(f"checkpoints={how.checkpoints} keeps not even the first state; give at least 1")
    kept = Checkpoints(how.checkpoints)

    def run(stepper: AutogradStepper, state: State, differentiable: bool) -> tuple[State, SolveError | None]:
        kept.most = how.checkpoints if differentiable else 1
        return kept.run(stepper, state, problem.steps)

    return carried_out(problem, name, how.method, run, partial(_Backwards, how, rule, kept))


class Checkpoints:
    """The states before every so many steps; twice as many apart whenever there would be too many."""

    def __init__(self, most: int) -> None:
        self.most, self.every, self.steps = most, LEAST, 0
        self.states: dict[int, State] = {}

    def run(self, stepper: AutogradStepper, state: State, steps: int | None) -> tuple[State, SolveError | None]:
        """Take the steps, plainly."""
        stepper.start(state)
        k = 0
        try:
            while not stepper.program.done if steps is None else k < steps:
                if k % self.every == 0:
                    self.keep(k, state)
                state = stepper.advance(state, k, k + 1)
                k += 1
        except SolveError as error:
            return state, error
        self.steps = k
        return state, None

    def keep(self, k: int, state: State) -> None:
        self.states[k] = state
        if len(self.states) > self.most:
            self.every *= 2
            self.states = {j: x for j, x in self.states.items() if j % self.every == 0}

    def backwards(self) -> Iterator[tuple[int, int, State]]:
        """Pieces of the solve from the last to the first: (first step, step behind the last, the state to start from)."""
        stop = self.steps
        for start, state in sorted(self.states.items(), reverse=True):
            yield start, stop, state
            stop = start


@dataclass
class _Backwards:
    """The backward solve of one gradient."""

    how: Wishes
    rule: Rule
    kept: Checkpoints
    program: ExplicitProgram
    captured: Captured
    outputs: State
    ambient: Ambient = field(default_factory=Ambient)

    def __post_init__(self) -> None:
        self.right = Right(self.program, self.captured)

    def check(self) -> None:
        self.captured.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        """Cotangents of (y0, t if it is differentiated, the captured tensors)."""
        with self.ambient.entered():
            return self._reverse(of_outputs)

    def _reverse(self, of_outputs: Cotangent) -> list[Tensor | None]:
        asked = self.program.asked.t
        lam: State = tuple(torch.zeros_like(x[0]) for x in self.outputs)
        mu: State = tuple(torch.zeros_like(x) for x in self.captured.leaves)
        of_times = torch.zeros(len(asked), dtype=torch.float64)
        j, first = len(asked) - 1, None
        for start, stop, state in self.kept.backwards():
            u = self._dense(start, stop, state)
            at, end = self.program.timeline.ends(stop - 1)[1], self.program.timeline.ends(start)[0]
            while j > 0 and abs(asked[j] - asked[0]) > abs(end - asked[0]):
                lam, mu, first = self._between(u, at, asked[j], lam, mu, first)
                at = asked[j]
                there, jump = self.right.jump(self.outputs, of_outputs, j)
                of_times[j] = self.right.along(at, there, jump)
                lam = tuple(x + g for x, g in zip(lam, jump, strict=True))
                j -= 1
            lam, mu, first = self._between(u, at, end, lam, mu, first)
        return self.right.cotangents(self.outputs, of_outputs, lam, mu, of_times)

    def _dense(self, start: int, stop: int, state: State) -> Polynomials:
        """The polynomials of these steps, which are taken once more."""
        program, found = self.program, list[State]()
        times = [program.timeline.ends(start)[0]]

        def slope(t: float, y: State) -> State:
            return program.slope(self.captured.plain, program.time(t), y)

        def see(stages: Stages) -> None:
            found.append(polynomial_of(stages, program.method, slope))
            times.append(stages.stop)

        watch, program.watch = program.watch, see
        try:
            with torch.no_grad():
                for k in range(start, stop):
                    state = program.step(self.captured.plain, k, state, False, False).state
        finally:
            program.watch = watch
        ends = torch.tensor(times, dtype=program.wide, device=program.device)
        return Polynomials(ends, [torch.stack(column) for column in zip(*found, strict=True)])

    def _between(
        self, u: Polynomials, start: float, stop: float, lam: State, mu: State, first: float | None
    ) -> tuple[State, State, float | None]:
        """lam and mu from one time back to another; and how long the last step was, to begin the next solve with."""
        if start == stop or not any(bool(x.any()) for x in lam):
            return lam, mu, first
        program, rule, control = self.program, self.rule, self.program.control
        method = chosen(self.how.method, program)
        longest = control.dt or float(u.times.diff().abs().max())
        together = rule.start(lam, mu)
        structure, _ = Structure.of(together, "the adjoint state")
        with torch.no_grad():
            stepping = replace(
                control,
                dt=first if method.adaptive else longest,
                tolerance=self._tolerance(len(lam), len(together) - len(lam)),
                time_dtype=program.time(0.0).dtype,
                grid=None,
                construct=None,
                callbacks={},
                twins={},
            )
            t = torch.tensor([start, stop], dtype=torch.float64)
            solve = program_of(method, t, structure, together, stepping)
            integral = rule.watched(solve, self, u, mu)
            function = (lambda t, state: rule.slopes(self.right, t, u.at(t), state), ())
            state, k = taken(solve, function, together)
        lengths = [abs(b - a) for a, b in map(solve.timeline.ends, range(max(0, k - 2), k))]
        lam, mu = rule.end(state, len(lam), mu, integral)
        return lam, mu, max(lengths)

    def _tolerance(self, size: int, parameters: int) -> Tolerance:
        """What holds for a leaf of the state holds for its cotangent, the least for parameters."""
        forward = self.program.control.tolerance

        of_lam = forward.norm or root_mean_square

        def measure(leaves: State) -> float:
            counted = [] if self.rule.seminorm else leaves[size:]
            return max(float(of_lam(leaves[:size])), *(root_mean_square((x,)) for x in counted), 0.0)

        rtol, atol = (spread(wished, size, 1, parameters) for wished in _wished(self.how, forward))
        return Tolerance(rtol, atol, measure)


def polynomial_of(stages: Stages, method: Any, slope: Callable[[float, State], State]) -> State:
    """The interpolant of a step; where that of the method is a line, the cubic through both ends and their slopes."""
    if getattr(method, "dense_order", 3) >= 3 and getattr(method, "interp", "cubic") != "linear":
        return stages.polynomial()
    h = stages.stop - stages.start
    slopes = [slope(t, y) for t, y in ((stages.start, stages.state), (stages.stop, stages.new))]
    columns = []
    for y, z, a, b in zip(stages.state, stages.new, *slopes, strict=True):
        a, b, d = h * a, h * b, z - y
        columns.append(torch.stack((y, a, 3 * d - 2 * a - b, a + b - 2 * d)))
    return tuple(columns)


class Rule(Protocol):
    """What becomes of mu while lam is solved backwards."""

    seminorm: bool

    def start(self, lam: State, mu: State) -> State:
        """The state of the backward solve."""
        ...

    def slopes(self, right: Right, t: Tensor, y: State, state: State) -> State: ...

    def watched(self, solve: ExplicitProgram, backwards: _Backwards, u: Polynomials, mu: State) -> list[State]:
        """Look at the steps of the backward solve; what is added to mu, by the step."""
        ...

    def end(self, state: State, size: int, mu: State, integral: list[State]) -> tuple[State, State]: ...


class _Together:
    """mu is a part of the state."""

    def __init__(self, norm: str | None) -> None:
        self.seminorm = norm == "seminorm"

    def start(self, lam: State, mu: State) -> State:
        return (*lam, *mu)

    def slopes(self, right: Right, t: Tensor, y: State, state: State) -> State:
        of_state, of_parameters = right.products(t, y, state[: len(y)], True, True)
        return tuple(-x for x in (*of_state, *of_parameters))

    def watched(self, solve: ExplicitProgram, backwards: _Backwards, u: Polynomials, mu: State) -> list[State]:
        return []

    def end(self, state: State, size: int, mu: State, integral: list[State]) -> tuple[State, State]:
        return state[:size], state[size : size + len(mu)]


class _Apart:
    """mu is an integral over each step: with so many Gauss nodes, or (None) refined until it is good."""

    seminorm = False

    def __init__(self, nodes: int | None) -> None:
        self.nodes = nodes

    def start(self, lam: State, mu: State) -> State:
        return lam

    def slopes(self, right: Right, t: Tensor, y: State, state: State) -> State:
        of_state, _ = right.products(t, y, state, True, False)
        return tuple(-x for x in of_state)

    def watched(self, solve: ExplicitProgram, backwards: _Backwards, u: Polynomials, mu: State) -> list[State]:
        added: list[State] = []
        if not mu:
            return added
        right, how, forward = backwards.right, backwards.how, backwards.program.control.tolerance
        rtol, atol = map(least, _wished(how, forward))

        def slope(t: float, lam: State) -> State:
            at = torch.tensor(t, dtype=u.times.dtype, device=u.times.device)
            return self.slopes(right, backwards.program.time(t), u.at(at), lam)

        def see(stages: Stages) -> None:
            ends = torch.tensor([stages.start, stages.stop], dtype=u.times.dtype, device=u.times.device)
            lam = Polynomials(ends, [x[None] for x in polynomial_of(stages, solve.method, slope)])

            def integrand(t: float) -> State:
                at = torch.tensor(t, dtype=u.times.dtype, device=u.times.device)
                time = backwards.program.time(t)
                return right.products(time, u.at(at), lam.at(at), False, True)[1]

            low, high = sorted((stages.start, stages.stop))
            if self.nodes is not None:
                added.append(_weighted(integrand, low, high, *gauss(self.nodes)))
            else:
                added.append(kronrod(integrand, low, high, rtol, atol))

        solve.watch = see
        return added

    def end(self, state: State, size: int, mu: State, integral: list[State]) -> tuple[State, State]:
        for part in integral:
            mu = tuple(x + y for x, y in zip(mu, part, strict=True))
        return state[:size], mu


def _wished(how: Wishes, forward: Tolerance) -> tuple[Any, Any]:
    """rtol and atol; where nothing is said, those of the forward solve."""
    return forward.rtol if how.rtol is None else how.rtol, forward.atol if how.atol is None else how.atol


Integrand = Callable[[float], State]


@lru_cache
def gauss(nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights on [-1, 1]."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return tuple(places.tolist()), tuple(weights.tolist())


_PLACES = (
    0.991455371120812639206854697526329,
    0.949107912342758524526189684047851,
    0.864864423359769072789712788640926,
    0.741531185599394439863864773280788,
    0.586087235467691130294144691258130,
    0.405845151377397166906606412076961,
    0.207784955007898467600689403773245,
)
_KRONROD = (
    0.022935322010529224963732008058970,
    0.063092092629978553290700663189204,
    0.104790010322250183839876322541518,
    0.140653259715525918745189590510238,
    0.169004726639267902826583426598550,
    0.190350578064785409913256402421014,
    0.204432940075298892414161999234649,
)
_GAUSS = (0.129484966168869693270611432679082, 0.279705391489276667901467771423780, 0.381830050505118944950369775488975)
PLACES = (*(-x for x in _PLACES), 0.0, *reversed(_PLACES))
"""Of the 15 Kronrod nodes; every second one is one of the 7 of Gauss."""
KRONROD = (*_KRONROD, 0.209482141084727828012999174891714, *reversed(_KRONROD))
GAUSS = (*_GAUSS, 0.417959183673469387755102040816327, *reversed(_GAUSS))
DEEPEST = 8


def kronrod(integrand: Integrand, low: float, high: float, rtol: float, atol: float, depth: int = 0) -> State:
    """The integral from low to high; halved where 7 and 15 nodes disagree by more than the tolerances."""
    middle, half = (low + high) / 2, (high - low) / 2
    values = [integrand(middle + half * x) for x in PLACES]
    fine, coarse = _sum(values, KRONROD, half), _sum(values[1::2], GAUSS, half)
    good = all(bool(((a - b).abs() <= atol + rtol * a.abs()).all()) for a, b in zip(fine, coarse, strict=True))
    if good or depth == DEEPEST or not math.isfinite(half):
        return fine
    halves = (kronrod(integrand, a, b, rtol, atol / 2, depth + 1) for a, b in ((low, middle), (middle, high)))
    left, right = halves
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _weighted(
    integrand: Integrand, low: float, high: float, places: Sequence[float], weights: Sequence[float]
) -> State:
    middle, half = (low + high) / 2, (high - low) / 2
    return _sum([integrand(middle + half * x) for x in places], weights, half)


def _sum(values: Sequence[State], weights: Sequence[float], half: float) -> State:
    return tuple(
        sum((w * half * x for w, x in zip(weights, column, strict=True)), torch.zeros_like(column[0]))
        for column in zip(*values, strict=True)
    )
