"""How a gradient is made: one class each. None of them knows a solver; each is handed a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.autograd import Index
from adjoint.continuous import Backsolve
from adjoint.discrete import Discrete
from adjoint.interpolating import Gauss, Interpolating, Quadrature
from adjoint.names import named
from adjoint.problem import Gradient, Outcome, Problem, Stats
from adjoint.sensitivity import Tangent
from adjoint.steppers.lockstep import LockstepProgram
from adjoint.tensors import State, differentiable
from adjoint.timeline import SolveError


@dataclass(frozen=True)
class Backprop:
    """Torch's own graph through every step: everything is stored, and derivatives of any order work."""

    def __call__(self, problem: Problem) -> Outcome:
        problem.keep_nothing("backprop")
        problem.check_nothing("backprop")
        program, steps = problem.program, problem.steps
        failure: SolveError | None = None
        if steps is None and isinstance(program, LockstepProgram):  # who waits must be seen where f is defined
            steps, failure = _find_steps(problem)
        elif steps is None:
            program.begin(problem.function, problem.state)
        program = program.on_graph()
        state: State = tuple(x.contiguous() for x in problem.state)
        found: dict[Index, State] = {} if program.initial is None else {program.initial: state}
        k, recording = 0, torch.is_grad_enabled()
        while k < steps if steps is not None else not program.done:
            try:
                step = program.step(problem.function, k, state, recording)
            except SolveError as error:
                failure = error
                break
            found.update(step.outputs)
            state, k = step.state, k + 1
            if problem.tick is not None:
                problem.tick(k)
        outputs = _collected(found, program.outputs)
        return Outcome(outputs, state, Stats(program, None, k), None, failure)


def _find_steps(problem: Problem) -> tuple[int, SolveError | None]:
    """Run to the end with the caller's own function; each step's graph is dropped at once."""
    program, k = problem.program, 0
    program.begin(problem.function, problem.state)
    state: State = tuple(x.detach().contiguous() for x in problem.state)
    try:
        while not program.done:
            state = tuple(x.detach() for x in program.step(problem.function, k, state, False).state)
            k += 1
    except SolveError as error:
        return k, error
    return k, None


def _collected(found: dict[Index, State], count: int) -> list[Tensor]:
    """Values by index; what a failed solve did not reach is not a number."""
    some = next(iter(found.values()), ())
    beyond = tuple(torch.full_like(x, torch.nan if differentiable(x) else 0) for x in some)
    rows = (found.get(j) or beyond for j in range(count))
    outputs = [torch.stack(column) for column in zip(*rows, strict=True)]
    several = [(index, values) for index, values in found.items() if isinstance(index, tuple)]
    if several:
        indices = tuple(torch.cat(parts) for parts in zip(*(index for index, _ in several), strict=True))
        columns = zip(*(values for _, values in several), strict=True)
        outputs = [x.index_put(indices, torch.cat(parts)) for x, parts in zip(outputs, columns, strict=True)]
    return outputs


GRADIENTS: dict[str, Callable[[], Gradient]] = {
    "discrete": Discrete,
    "backprop": Backprop,
    "backsolve": Backsolve,
    "interpolating": Interpolating,
    "quadrature": Quadrature,
    "gauss": Gauss,
    "tangent": Tangent,
}


def gradient_named(gradient: str | Gradient) -> Gradient:
    """The gradient of this name, or the one given; ValueError with the nearest name."""
    if not isinstance(gradient, str):
        if isinstance(gradient, type) or not callable(gradient):
            raise TypeError(f"gradient={gradient!r} makes none; give a name, or an object such as Discrete()")
        return gradient
    return named("gradient", gradient, GRADIENTS)()


def is_backprop(gradient: str | Gradient) -> bool:
    """Whether it is torch's own graph, which follows whatever torch does."""
    return gradient == "backprop" or isinstance(gradient, Backprop)


__all__ = [
    "GRADIENTS",
    "Backprop",
    "Backsolve",
    "Discrete",
    "Gauss",
    "Interpolating",
    "Quadrature",
    "Tangent",
    "Tensor",
    "gradient_named",
]
