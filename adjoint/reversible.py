"""The gradient of steps that can be undone: states come back from the last one, and none is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.discrete import prepare, tried_and_run, without_gradient
from adjoint.join import join
from adjoint.probe import Unmarked
from adjoint.problem import Outcome, Problem, Stats
from adjoint.steppers.symplectic import SplittingProgram
from adjoint.tensors import State


@dataclass(frozen=True)
class Reversible:
    """The discrete adjoint of a splitting method without kept states: each step is undone, and then transposed.

    Undoing a move subtracts what it added, so the states come back to rounding; how rounding errors grow on the way back
    depends on the equation (linearly for regular orbits, exponentially for chaotic ones). The first state, which
    is known, tells: the reverse sweep raises RuntimeError if it comes back further off than ``tolerance`` times its size
    (None: the square root of the precision of its numbers). One undone, one recorded and one plain run of each step.
    """

    tolerance: float | None = None

    def __call__(self, problem: Problem) -> Outcome:
        problem.keep_nothing("reversible")
        problem.check_nothing("reversible")
        if not isinstance(problem.program, SplittingProgram):
            raise ValueError(
                "gradient=Reversible() undoes steps, and only those of a splitting method can be; give method='leapfrog', "
                "or gradient='discrete' with slots="
            )
        if problem.slots is not None or problem.budget is not None:
            raise ValueError("gradient=Reversible() keeps no states; leave slots= and budget= out")
        stepper, state, inputs = prepare(problem)
        if not (stepper.tracking and any(x.requires_grad for x in inputs)):
            return without_gradient(problem, stepper, state)
        ambient = Ambient()
        with ambient.entered():
            final, failure = tried_and_run(problem, stepper, state)
            values = stepper.outputs.finished(problem.program.outputs)
        undone = _Undone(stepper, state, tuple(x.clone() for x in final), ambient, self.tolerance)
        outputs, last = join(undone, values, final if problem.wants_final else None, inputs)
        return Outcome(outputs, last, Stats(problem.program, stepper, stepper.frontier), None, failure)


@dataclass
class _Undone:
    """The reverse sweep from the last state alone."""

    stepper: AutogradStepper
    first: State
    last: State
    ambient: Ambient
    tolerance: float | None

    def check(self) -> None:
        self.stepper.captured.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        stepper = self.stepper
        program = stepper.program
        assert isinstance(program, SplittingProgram)
        stepper.marks = Unmarked(program.label)
        stepper.begin_reverse(of_outputs)
        state, cotangent = self.last, of_state or [None] * len(self.last)
        with self.ambient.entered(), torch.enable_grad():
            for k in reversed(range(stepper.frontier)):
                with torch.no_grad():
                    state = tuple(x.contiguous() for x in program.undo(stepper.captured.plain, k, state))
                _, tape = stepper.record(state, k, k + 1)
                cotangent = stepper.reverse(tape, cotangent)
        self._check_return(state)
        if program.initial is not None:
            shown = [None if g is None else g[program.initial] for g in of_outputs]
            cotangent = [b if a is None else a if b is None else a + b for a, b in zip(cotangent, shown, strict=True)]
        sums, stepper.sums, stepper.cotangents = stepper.sums, [], []
        return [*cotangent, *program.input_cotangents(), *sums]

    def _check_return(self, state: State) -> None:
        for x, y in zip(state, self.first, strict=True):
            limit = torch.finfo(x.dtype).eps ** 0.5 if self.tolerance is None else self.tolerance
            off, size = float((x - y).abs().max()), float(y.abs().max())
            if not off <= limit * max(size, 1e-300) and not (size == 0 and off <= limit):
                raise RuntimeError(
                    f"the first state came back {off:.2e} off, of a size of {size:.2e}: this equation does not let steps be "
                    f"undone so far (it is chaotic, or dissipative, or a flow is not the inverse of its own with -h). Use "
                    f"gradient='discrete' with slots=, or allow more with Reversible(tolerance=..)"
                )
