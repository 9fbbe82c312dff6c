"""Continuous adjoints: the adjoint equation discretised, not the adjoint of the discretisation. For comparison.

    dlam/dt = -f_y^T lam,    dmu/dt = -f_p^T lam,    backwards in time, with jumps at the times of the loss

The gradient agrees with the discrete one only in the limit of small steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.captured import Captured
from adjoint.discrete import run_plainly
from adjoint.join import Reversal, join
from adjoint.kept import heard
from adjoint.methods import NAMED, Method, program_of
from adjoint.names import named
from adjoint.probe import probe
from adjoint.problem import Outcome, Problem, Stats
from adjoint.steppers.control import Control, Tolerance, root_mean_square
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.symplectic import Splitting
from adjoint.tensors import State, Structure, leaves_of
from adjoint.timeline import SolveError


@dataclass(frozen=True)
class Backsolve:
    """Solve the state and its adjoint together, backwards from the last state: constant memory, no checkpoints.

    Source: Chen et al. (2018), NeurIPS, Algorithm 1. Solving the state backwards is unstable for dissipative systems:
    the gradient can then be wrong in every digit. Tolerances default to those of the forward solve.
    """

    rtol: Any = None
    atol: Any = None
    method: str | Method | None = None
    """Of the backward solve; None: that of the forward one."""
    norm: str | Callable[[State], Any] | None = None
    """How large a scaled error is. None: the largest among state, cotangent and each parameter; "seminorm": parameters
    do not count (Kidger, Chen & Lyons 2021, ICML); or a function of the leaves (0, y .., cotangent .., parameters ..)."""
    control: Callable[[Callable[..., Any], State, Tensor], Control] | None = None
    """How to step, from the augmented function, state and both times of an interval; None: as the forward solve."""

    def __post_init__(self) -> None:
        if not (self.norm is None or self.norm == "seminorm" or callable(self.norm)):
            raise ValueError(f"norm={self.norm!r} of a backward solve is unknown; give 'seminorm', a function, or None")

    def __call__(self, problem: Problem) -> Outcome:
        def run(stepper: AutogradStepper, state: State, differentiable: bool) -> tuple[State, SolveError | None]:
            return run_plainly(stepper, state, problem.steps)

        return carried_out(problem, "backsolve", self.method, run, partial(_Backwards, self))

    def tolerance(self, forward: Tolerance, size: int, parameters: int) -> Tolerance:
        """Of the augmented solve: what holds for a leaf of the state holds for its cotangent, the least for parameters."""

        rtol, atol = (
            spread(default if own is None else own, size, 2, parameters)
            for own, default in ((self.rtol, forward.rtol), (self.atol, forward.atol))
        )
        return Tolerance(rtol, atol, self._measure(forward.norm, size))

    def _measure(self, forward: Callable[[State], Any] | None, size: int) -> Callable[[State], Any]:
        norm, of_state = self.norm, forward or root_mean_square
        if callable(norm):
            return lambda leaves: norm((torch.zeros_like(leaves[0].real).sum(), *leaves))

        def measure(leaves: State) -> float:
            found = [float(of_state(leaves[:size])), float(of_state(leaves[size : 2 * size]))]
            return max(found + [root_mean_square((x,)) for x in leaves[2 * size :] if norm is None])

        return measure


@dataclass
class _Backwards:
    """The augmented solve of one gradient."""

    how: Backsolve
    program: ExplicitProgram
    captured: Captured
    outputs: State
    """The solution at the asked times, by leaf."""
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
        program, parameters = self.program, self.captured.leaves
        asked = program.asked.t
        lam: State = tuple(torch.zeros_like(x[0]) for x in self.outputs)
        mu: State = tuple(torch.zeros_like(x) for x in parameters)
        of_times = torch.zeros(len(asked), dtype=torch.float64)
        for j in range(len(asked) - 1, 0, -1):
            state, jump = self.right.jump(self.outputs, of_outputs, j)
            of_times[j] = self.right.along(asked[j], state, jump)
            lam = tuple(x + g for x, g in zip(lam, jump, strict=True))
            lam, mu = self._between(asked[j], asked[j - 1], state, lam, mu)
        return self.right.cotangents(self.outputs, of_outputs, lam, mu, of_times)

    def _between(self, start: float, stop: float, state: State, lam: State, mu: State) -> tuple[State, State]:
        """The augmented state (y, lam, mu) from one asked time back to the one before."""
        structure, together = Structure.of((*state, *lam, *mu), "the augmented state")
        size, method, control = len(state), chosen(self.how.method, self.program), self.program.control
        t = torch.tensor([start, stop], dtype=torch.float64)
        with torch.no_grad():
            stepping = control if self.how.control is None else self.how.control(self._slopes, together, t)
            stepping = replace(
                stepping if self.how.control else replace(stepping, grid=None, construct=None),
                tolerance=self.how.tolerance(control.tolerance, size, len(mu)),
                time_dtype=self.program.time(0.0).dtype,
                callbacks={what: self._shown(call) for what, call in control.twins.items()},
                twins={},
            )
            augmented = program_of(method, t, structure, together, stepping)
            state, _ = taken(augmented, (self._slopes, ()), together)
        return state[size : 2 * size], state[2 * size : 2 * size + len(mu)]

    def _shown(self, call: Callable[[Tensor, Any, Tensor], None]) -> Callable[[Tensor, Any, Tensor], None]:
        """A callback of the caller's, shown (0, y, its cotangent, those of the captured tensors ..)."""
        size, tree = len(self.outputs), self.program.structure.unflatten

        def shown(t: Tensor, together: State, length: Tensor) -> None:
            call(
                t,
                (torch.zeros_like(t), tree(together[:size]), tree(together[size : 2 * size]), *together[2 * size :]),
                length,
            )

        return shown

    def _slopes(self, t: Tensor, together: State) -> State:
        """(f, -f_y^T lam, -f_p^T lam)."""
        size = len(self.outputs)
        parameters = self.captured.leaves
        with torch.enable_grad():
            state = tuple(x.detach().requires_grad_() for x in together[:size])
            slope = self.right.slope(t, state)
            roots = [(x, -lam) for x, lam in zip(slope, together[size : 2 * size], strict=True) if x.requires_grad]
            gradients: Sequence[Tensor | None] = [None] * (size + len(parameters))
            if roots:
                values, seeds = zip(*roots, strict=True)
                gradients = torch.autograd.grad(values, (*state, *parameters), seeds, allow_unused=True)
        like = (*state, *parameters)
        adjoints = (torch.zeros_like(x) if g is None else g for x, g in zip(like, gradients, strict=True))
        return (*(x.detach() for x in slope), *adjoints)


@dataclass
class Right:
    """f with a graph; some calls are listened to, because the first sweep kept no graph of what f may have kept."""

    program: ExplicitProgram
    captured: Captured
    calls: int = 0

    def slope(self, t: Tensor, state: State) -> State:
        self.calls += 1
        if not heard(self.calls):
            return self.program.slope(self.captured.recorded, t, state)
        listener = self.captured.listener()
        when = f"at t={float(t):.6g}" if not t.is_meta else "on the way back"
        return listener.run(lambda function: self.program.slope(function, t, state), when)

    def products(self, t: Tensor, state: State, lam: State, of_state: bool, of_parameters: bool) -> tuple[State, State]:
        """(f_y^T lam, f_p^T lam), of those that are wanted."""
        parameters = self.captured.leaves if of_parameters else []
        with torch.enable_grad():
            points = tuple(x.detach().requires_grad_(of_state) for x in state)
            slope = self.slope(t, points)
            wanted = [*(points if of_state else ()), *parameters]
            roots = [(x, g) for x, g in zip(slope, lam, strict=True) if x.requires_grad]
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if roots and wanted:
                values, seeds = zip(*roots, strict=True)
                gradients = torch.autograd.grad(values, wanted, seeds, allow_unused=True)
        filled = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True))
        count = len(points) if of_state else 0
        return filled[:count], filled[count:]

    def along(self, t: float, state: State, cotangent: State) -> float:
        """The product of a cotangent with f at this time: the derivative in an asked time."""
        if not self.program.inputs:
            return 0.0
        slope = self.program.slope(self.captured.plain, self.program.time(t), state)
        return float(sum(torch.sum(x.conj() * g).real for x, g in zip(slope, cotangent, strict=True)))

    def jump(self, outputs: State, of_outputs: Cotangent, j: int) -> tuple[State, State]:
        """The solution at an asked time, and what the loss adds to lam there."""
        there = tuple(x[j] for x in outputs)
        return there, tuple(torch.zeros_like(x) if g is None else g[j] for x, g in zip(there, of_outputs, strict=True))

    def cotangents(
        self, outputs: State, of_outputs: Cotangent, lam: State, mu: State, of_times: Tensor
    ) -> list[Tensor | None]:
        """Of (y0, t if it is differentiated, the captured tensors), once lam is that of the first time, its jump apart."""
        of_times[0] = -self.along(self.program.asked.t[0], tuple(x[0] for x in outputs), lam)
        lam = tuple(x if g is None else x + g[0] for x, g in zip(lam, of_outputs, strict=True))
        return [*lam, *(of_times.to(x) for x in self.program.inputs), *mu]


def carried_out(
    problem: Problem,
    name: str,
    method: str | Method | None,
    run: Callable[[AutogradStepper, State, bool], tuple[State, SolveError | None]],
    backwards: Callable[[ExplicitProgram, Captured, State], Reversal],
) -> Outcome:
    """The forward solve and one node of torch's graph.

    ``run`` takes the steps, and is told whether they will be differentiated; ``backwards`` makes the backward solve from
    the program, what it captures, and the solution at the asked times.
    """
    problem.keep_nothing(name)
    problem.check_nothing(name)
    program = problem.program
    if not isinstance(program, ExplicitProgram):
        raise TypeError(f"gradient={name!r} integrates an ODE; {program.label} is not one")
    refuse_parts(method, program)
    if getattr(program.method, "mass", None) is not None:
        raise ValueError(
            f"gradient={name!r} knows no mass matrix, and method={program.method.name!r} has one; take 'discrete' or 'tangent'"
        )
    captured = Captured(problem.function, program.label)
    for x in (*problem.state, *program.inputs):
        captured.watch("y0 or t", x)
    stepper = AutogradStepper(program, captured)
    stepper.tick = problem.tick
    state = tuple(x.detach().contiguous() for x in problem.state)
    everything = (*problem.state[: program.leaves], *program.inputs, *captured.tensors)
    differentiable = stepper.tracking and any(x.requires_grad for x in everything)
    if differentiable:
        probe(problem, captured, state)
    else:
        program.begin(problem.function, problem.state)
    final, failure = run(stepper, state, differentiable)
    outputs = stepper.outputs.buffers
    if differentiable and failure is None:
        values = tuple(x.detach() for x in outputs)
        for x in values:
            captured.watch("the solution", x)
        outputs, _ = join(backwards(program, captured, values), outputs, None, everything)
    return Outcome(outputs, final, Stats(program, stepper, stepper.frontier), None, failure)


def chosen(method: str | Method | None, program: ExplicitProgram) -> Method:
    """The method of a backward solve; None: that of the forward one."""
    if method is None:
        return program.method
    return named("method", method, NAMED) if isinstance(method, str) else method


def taken(solve: ExplicitProgram, function: tuple[Any, ...], start: State) -> tuple[State, int]:
    """The state at the end of a solve without a graph, and the number of its steps."""
    state = solve.first(start)
    solve.begin(function, state)
    k = 0
    while k < solve.timeline.steps or not solve.done:
        state = solve.step(function, k, state, False).state
        k += 1
    return state, k


def spread(wished: Any, size: int, copies: int, parameters: int) -> tuple[float | Tensor, ...]:
    """A tolerance for each leaf of so many copies of a state, the least of them for each parameter."""
    given = leaves_of(wished)
    each = given * size if len(given) == 1 else given
    if len(each) != size:
        raise ValueError(f"the backward solve has {len(each)} tolerances for {size} leaves; give one, or as many")
    return (*each * copies, *[least(wished)] * parameters)


def least(tolerance: Any) -> float:
    return min(float(x.min()) if isinstance(x, Tensor) else float(x) for x in leaves_of(tolerance))


def refuse_parts(method: Any, program: ExplicitProgram) -> None:
    """Raise ValueError if the backward solve would take steps in parts."""
    if method is None and isinstance(program.method, Splitting):
        raise ValueError(
            f"the backward solve cannot take steps in parts (method={program.method.name!r}); give "
            f"Backsolve(method='tsit5'), or gradient='discrete'"
        )
