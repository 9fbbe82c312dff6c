"""One call of the ``odeint`` family: read, carried out, and its results put on torch's graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Cotangent
from adjoint.continuous import Backsolve
from adjoint.discrete import Discrete
from adjoint.events import EventFunction, EveryStep
from adjoint.gradients import Backprop
from adjoint.interpolate import DenseSolution, Polynomials
from adjoint.interpolating import CONTINUOUS
from adjoint.join import Filled, join
from adjoint.methods import Method, program_of
from adjoint.options import (
    CALLBACKS,
    METHODS,
    Question,
    callbacks_of,
    control_of,
    method_named,
    scipy_named,
    tolerance_of,
)
from adjoint.problem import Gradient, Outcome, Problem, check_memory
from adjoint.reach import Reach
from adjoint.scipy_solver import ByScipy, Scipy, program_by_scipy
from adjoint.solve import check_args, checked_state, checked_times, steps_of
from adjoint.steppers.control import Control, Tolerance
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.first_event import FirstEvent
from adjoint.tensors import State, Structure


class _Declared:
    """A function, and tensors that count as its own though it may not use them."""

    def __init__(self, func: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
        self.func, self.tensors = func, tensors

    def __call__(self, *given: Any) -> Any:
        return self.func(*given)


@dataclass(frozen=True)
class Call:
    """What all the doors have in common: an equation, a method, a memory, a gradient."""

    question: Question
    function: tuple[Callable[..., Any], tuple[Any, ...]]
    method: Method
    options: Mapping[str, Any]
    memory: tuple[int | str | None, int | str | None]
    how: Gradient
    zeros: bool = False
    backward: Mapping[str, Any] = field(default_factory=dict)
    """What a continuous adjoint does otherwise than the solve: rtol, atol, method, options."""
    scipy: Scipy | None = None
    """Who solves in place of ``method``."""

    @classmethod
    def of(
        cls,
        func: Callable[..., Any],
        y0: Any,
        args: tuple[Any, ...],
        method: str | None,
        options: Mapping[str, Any] | None,
        memory: tuple[int | str | None, int | str | None],
        how: Gradient,
        zeros: bool = False,
        declared: tuple[Tensor, ...] = (),
    ) -> Call:
        structure, state = Structure.of(y0, "y0")
        checked_state(state)
        check_args(args)
        check_memory(*memory)
        known = dict(options or {})
        scipy = scipy_named("method", known) if method == Scipy.name else None
        if scipy is not None and (
            any(x is not None for x in memory) or not isinstance(how, (Backprop, Backsolve, Discrete))
        ):
            raise ValueError(
                f"method='scipy_solver' has the continuous adjoint along scipy's interpolant as its gradient, without slots "
                f"or a budget; gradient={how!r}, slots={memory[0]!r}, budget={memory[1]!r} go with 'dopri5', 'radauIIA5', .."
            )
        found = METHODS["bosh3"] if scipy is not None else method_named("method", method, known)
        if state[0].is_meta and (found.adaptive or getattr(found, "implicit", False)):
            raise ValueError(f"method={found.name!r} measures errors, and meta tensors hold none; use 'rk4'")
        function = (_Declared(func, declared) if declared else func, tuple(args))
        question = Question(func, y0, structure, state)
        return cls(question, function, found, known, memory, how, zeros, scipy=scipy)

    def backwards(self, rtol: Any, atol: Any, method: str | None, options: Mapping[str, Any] | None) -> Call:
        """The same, with wishes for the continuous adjoint; they are read, and checked, even if it is not asked for."""
        given = {"rtol": rtol, "atol": atol, "method": method, "options": options}
        if method == Scipy.name and self.scipy is None:
            raise ValueError("adjoint_method='scipy_solver' goes with method='scipy_solver'; give 'dopri5', say")
        if self.scipy is not None and method not in (None, Scipy.name):
            raise ValueError(
                f"adjoint_method={method!r}: method='scipy_solver' is solved backwards by scipy too; leave it out"
            )
        if method is not None and self.scipy is None:
            method_named("adjoint_method", method, dict(options or {}))
        return replace(self, backward={name: value for name, value in given.items() if value is not None})

    def values(self, t: Tensor, rtol: Any, atol: Any) -> Any:
        """The solution at the times asked for."""
        times = checked_times(t, self.question.state)
        if self.scipy is not None and len(times) > 1:
            return self._by_scipy(self.scipy, times, rtol, atol)
        control = self._control(times, rtol, atol)
        if len(times) == 1:
            return self.question.structure.unflatten(self._still())
        outcome = self._carried_out(self._how(), self._program(times, control))
        return self.question.structure.unflatten(outcome.outputs)

    def until(self, t: Tensor, rtol: Any, atol: Any, event_fn: EventFunction) -> tuple[Tensor, Any]:
        """The time of the first event after t[0], in the direction of t[1], and the solution at t[0] and there."""
        self._refuse_scipy("meets no events")
        question, how = self.question, self._how()
        times = checked_times(t, question.state)
        if len(times) != 2:
            raise ValueError(f"t has {len(times)} times; with event_fn give two: the start, and one in its direction")
        first, second = times.tolist()
        way = math.inf if second > first else -math.inf
        open_ended = torch.cat((times[:1], times.new_tensor([way])))
        view = FirstEvent(event_fn, question.structure)
        program = self._program(open_ended, self._control(None, rtol, atol)).seen_by(view)
        if isinstance(how, CONTINUOUS):
            with torch.no_grad():
                outcome = self._carried_out(Discrete(), program)
                known = self._polynomials(program, open_ended, outcome, view)
            if torch.is_grad_enabled():
                known = self._continuous(how, times, known, view.time, rtol, atol)
        else:
            known = self._polynomials(program, open_ended, self._carried_out(how, program), view)
        moment, there = view.moment(known)
        both = [torch.stack((x, y)) for x, y in zip(question.state, there, strict=True)]
        return moment.to(times), question.structure.unflatten(both)

    def dense(self, t0: Any, t1: Any, rtol: Any, atol: Any) -> DenseSolution:
        """The solution between two times."""
        self._refuse_scipy("gives no function of time")
        if isinstance(self.how, CONTINUOUS):
            raise ValueError("gradient='backsolve' keeps no steps to interpolate; use 'discrete' or 'backprop'")
        given = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (t0, t1)]
        times = checked_times(torch.cat([x.reshape(-1).to(given[0]) for x in given]), self.question.state)
        if len(times) != 2:
            raise ValueError(f"t0 and t1 hold {len(times)} numbers; give one each")
        control = self._control(times, rtol, atol)
        if not self.method.adaptive and control.grid is None:
            raise ValueError(f"method={self.method.name!r} takes fixed steps; give options={{'step_size': ...}}")
        program = self._program(times, control).seen_by(EveryStep())
        outcome = self._carried_out(self._how(), program)
        knots = program.timeline.knots(times.to(device=program.device, dtype=program.wide))
        return DenseSolution(self.question.structure, Polynomials(knots, outcome.outputs))

    def _by_scipy(self, forward: Scipy, times: Tensor, rtol: Any, atol: Any) -> Any:
        """The solution by scipy, with a continuous adjoint."""
        question, wishes = self.question, self.backward
        if any(hasattr(question.func, name) for name in CALLBACKS.values()):
            warnings.warn("method='scipy_solver' calls no callbacks of func", stacklevel=4)
        tolerance = tolerance_of(question, rtol, atol, {})
        start = tuple(x.detach().contiguous() for x in question.state)
        program = program_by_scipy(times, question.structure, start, tolerance, question.time_dtype)
        backward = scipy_named("adjoint_method", wishes["options"]) if "options" in wishes else forward
        own = tolerance_of(question, wishes.get("rtol", rtol), wishes.get("atol", atol), {})
        outcome = self._carried_out(ByScipy(forward, backward, own.rtol, own.atol), program)
        return question.structure.unflatten(outcome.outputs)

    def _refuse_scipy(self, why: str) -> None:
        if self.scipy is not None:
            raise ValueError(f"method='scipy_solver' {why}; give 'dopri5', or for stiff equations 'radauIIA5'")

    def _polynomials(self, program: ExplicitProgram, times: Tensor, outcome: Outcome, view: FirstEvent) -> Polynomials:
        """That of the step in which the event happens."""
        assert view.step is not None
        knots = program.timeline.knots(times.to(device=program.device, dtype=program.wide))
        return Polynomials(knots[view.step : view.step + 2], outcome.outputs)

    def _continuous(
        self, how: Gradient, times: Tensor, known: Polynomials, stop: float, rtol: Any, atol: Any
    ) -> Polynomials:
        """The line through the state at the event, with its derivatives by a continuous adjoint from there."""
        at = torch.tensor(stop, dtype=known.times.dtype, device=known.times.device)
        there, velocity, found = known.at(at), known.slope(at), self.question.state
        if stop != times[0].item():
            ends = torch.cat((times[:1].to(at), at[None]))
            outcome = self._carried_out(how, self._program(ends, self._control(ends.detach(), rtol, atol)))
            found = tuple(x[-1] for x in outcome.outputs)
        line = [
            torch.stack((value + y - y.detach(), v))[None] for value, y, v in zip(there, found, velocity, strict=True)
        ]
        return Polynomials(torch.stack((at, at + 1)), line)

    def _control(self, times: Tensor | None, rtol: Any, atol: Any) -> Control:
        tolerance = tolerance_of(self.question, rtol, atol, self.options)
        return control_of(self.question, self.method, tolerance, self.options, times)

    def _carried_out(self, how: Gradient, program: ExplicitProgram) -> Outcome:
        outcome = how(self._problem(program))
        failure, question = outcome.failure, self.question
        if failure is not None:
            if failure.state:
                failure.y = question.structure.unflatten([x.clone() for x in failure.state[: len(question.state)]])
            raise failure
        return outcome

    def _program(self, times: Tensor, control: Control) -> ExplicitProgram:
        func = self.question.func
        control = replace(
            control, callbacks=callbacks_of(func, self.method), twins=callbacks_of(func, self.method, True)
        )
        start = tuple(x.detach().contiguous() for x in self.question.state)
        return program_of(self.method, times, self.question.structure, start, control)

    def _problem(self, program: ExplicitProgram) -> Problem:
        slots, budget = self.memory
        reversing = program.reversing if program.control.twins else None
        first = program.first(self.question.state)
        steps = steps_of(program)
        return Problem(program, self.function, first, steps, slots, budget, zeros=self.zeros, reversing=reversing)

    def _still(self) -> list[Tensor]:
        """The first state, at the only time."""
        state = self.question.state
        tensors = [x for _, x in Reach(self.function, "func").requiring_grad] if self.zeros else []
        if not tensors or not torch.is_grad_enabled():
            return [x[None] for x in state]
        inputs = (*state, *tensors)
        return join(Filled(_Still(len(tensors)), inputs), [x.detach()[None].clone() for x in state], None, inputs)[0]

    def _how(self) -> Gradient:
        """The gradient, told how to step backwards if it does."""
        how, wishes = self.how, self.backward
        if not isinstance(how, Backsolve) or how.control is not None or how.method is not None:
            return how
        options = dict(wishes.get("options", {name: x for name, x in self.options.items() if name != "norm"}))
        norm = options.pop("norm", how.norm)
        method = method_named("adjoint_method", wishes["method"], options) if "method" in wishes else self.method

        def control(func: Callable[..., Any], state: State, times: Tensor) -> Control:
            structure, _ = Structure.of(state, "the augmented state")
            return control_of(Question(func, state, structure, state), method, Tolerance(0.0, 1.0), options, times)

        own = {name: wishes.get(name, getattr(how, name)) for name in ("rtol", "atol")}
        return replace(how, **own, norm=norm, method=method, control=control)  # with tolerances of its own


@dataclass(frozen=True)
class _Still:
    """No step at all: what comes in goes out, and so many tensors are not used."""

    unused: int

    def check(self) -> None:
        pass

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        return [*(None if g is None else g[0] for g in of_outputs), *[None] * self.unused]
