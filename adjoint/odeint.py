"""``odeint`` and its family with torchdiffeq's signatures: change the import, and the exact gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Cotangent
from adjoint.continuous import Backsolve
from adjoint.gradients import gradient_named, is_backprop
from adjoint.join import Filled, join
from adjoint.methods import Method, program_of
from adjoint.options import Question, callbacks_of, control_of, method_named, tolerance_of
from adjoint.problem import Gradient, Problem, check_memory
from adjoint.solve import check_args, checked_state, checked_times, steps_of
from adjoint.steppers.explicit import Control, ExplicitProgram, Tolerance
from adjoint.tensors import Reach, State, Structure
from adjoint.transforms import leaves_of_tree, through_transforms, tree_of_leaves


@through_transforms(leaves_of_tree, tree_of_leaves, lambda arguments: is_backprop(arguments["gradient"]))
def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    gradient: str | Gradient = "backprop",
) -> Any:
    """The solution of dy/dt = func(t, y, *args) at the times ``t``, like torchdiffeq's: a tree like y0 with the times
    as the leading dimension of its leaves, on torch's own graph, so that derivatives of any order work.

    Besides torchdiffeq's arguments: ``args``, and ``gradient``, ``slots``, ``budget`` as in :func:`adjoint.solve`.
    ``rtol`` and ``atol`` are numbers, tensors that fit y0, or one of these for each leaf. Attributes ``callback_step``,
    ``callback_accept_step`` and ``callback_reject_step`` of func are called with (t, y, dt). Options:

    - fixed steps: ``step_size``, ``grid_constructor``, ``interp``, ``perturb``; for Adams methods also ``max_order``,
      ``max_iters``, ``implicit``;
    - controlled ones: ``first_step``, ``safety``, ``ifactor``, ``dfactor``, ``max_num_steps``, ``min_step``,
      ``max_step``, ``jump_t``, ``step_t``, ``dtype``, ``norm``.
    """
    how = gradient_named(gradient)
    call = _Call.of(func, y0, args, method, options, (slots, budget), how)
    return call.values(t, rtol, atol)


@through_transforms(leaves_of_tree, tree_of_leaves, lambda arguments: is_backprop(arguments["gradient"]))
def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    gradient: str | Gradient = "discrete",
) -> Any:
    """Like :func:`odeint`, with the discrete adjoint within ``slots`` or a ``budget`` as its gradient.

    Nothing is solved backwards, so ``adjoint_rtol``, ``adjoint_atol``, ``adjoint_method`` and ``adjoint_options`` say
    nothing, unless ``gradient="backsolve"`` asks for the continuous adjoint; ``adjoint_options={"norm": "seminorm"}``
    then leaves the parameters out of its error. ``adjoint_params`` is not needed: the tensors that func holds are
    found. They, and those given there, get zeros as gradients if func does not use them. Attributes
    ``callback_step_adjoint``, .. of func are called with (t, (0, y, its cotangent, those of the parameters ..), dt).
    """
    how = gradient_named(gradient)
    declared = tuple(x for x in adjoint_params or () if x.requires_grad)
    call = _Call.of(func, y0, args, method, options, (slots, budget), how, zeros=True, declared=declared)
    call = call.backwards(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    return call.values(t, rtol, atol)


class _Declared:
    """A function, and tensors that count as its own though it may not use them."""

    def __init__(self, func: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
        self.func, self.tensors = func, tensors

    def __call__(self, *given: Any) -> Any:
        return self.func(*given)


@dataclass(frozen=True)
class _Call:
    """What all the doors have in common."""

    question: Question
    function: tuple[Callable[..., Any], tuple[Any, ...]]
    method: Method
    options: Mapping[str, Any]
    memory: tuple[int | str | None, int | str | None]
    how: Gradient
    zeros: bool = False
    backward: Mapping[str, Any] = field(default_factory=dict)
    """What a continuous adjoint does otherwise than the solve: rtol, atol, method, options."""

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
    ) -> _Call:
        structure, state = Structure.of(y0, "y0")
        checked_state(state)
        check_args(args)
        check_memory(*memory)
        known = dict(options or {})
        found = method_named("method", method, known)
        if state[0].is_meta and (found.adaptive or getattr(found, "implicit", False)):
            raise ValueError(f"method={found.name!r} measures errors, and meta tensors hold none; use 'rk4'")
        function = (_Declared(func, declared) if declared else func, tuple(args))
        return cls(Question(func, y0, structure, state), function, found, known, memory, how, zeros)

    def backwards(self, rtol: Any, atol: Any, method: str | None, options: Mapping[str, Any] | None) -> _Call:
        """The same, with wishes for the continuous adjoint; they are read, and checked, even if it is not asked for."""
        given = {"rtol": rtol, "atol": atol, "method": method, "options": options}
        if method is not None:
            method_named("adjoint_method", method, dict(options or {}))
        return replace(self, backward={name: value for name, value in given.items() if value is not None})

    def values(self, t: Tensor, rtol: Any, atol: Any) -> Any:
        """The solution at the times asked for."""
        question = self.question
        times = checked_times(t, question.state)
        control = control_of(
            question, self.method, tolerance_of(question, rtol, atol, self.options), self.options, times
        )
        if len(times) == 1:
            return question.structure.unflatten(self._still())
        program = self._program(times, control)
        outcome = self._how()(self._problem(program))
        if outcome.failure is not None:
            raise outcome.failure
        return question.structure.unflatten(outcome.outputs)

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
