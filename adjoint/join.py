"""Where a finished sweep meets torch's graph: its results as differentiable functions, once and twice.

y = S(x)         the results, made beforehand
g = S'(x)^T c    the reverse sweep                                  (the backward of S)
S'(x) v,  d/dx (S'(x)^T c) v    tangents, and a sweep of them       (the backward of the reverse sweep)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, Cotangent, Recorded
from adjoint.tangents import Directions, Linearisation, Second
from adjoint.tensors import State, differentiable
from adjoint.tiers import Store
from revolve import Run


class Reversal(Protocol):
    """What turns cotangents of results into cotangents of inputs."""

    def check(self) -> None:
        """Raise if something that is still needed has changed."""
        ...

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]: ...


class TwiceDifferentiable(Reversal, Protocol):
    """A reversal that has a derivative itself; one that has tangents alone is differentiable in its cotangents."""

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        """Derivatives of the outputs and the last state along one direction in the inputs."""
        ...

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        """The derivative of :meth:`reverse` along one direction in the inputs, and the tangents."""
        ...


@dataclass
class Sweep:
    """A chain that has been run, with all that its reverse sweep needs; it may be reversed again and again."""

    run: Run[State, list[Recorded], Cotangent]
    stepper: AutogradStepper
    slots: Store
    ambient: Ambient
    linear: Linearisation

    def check(self) -> None:
        self.stepper.captured.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        """Cotangents of (x_0, the program's inputs, the captured tensors)."""
        stepper, program = self.stepper, self.stepper.program
        stepper.begin_reverse(of_outputs)
        with self.ambient.entered(), torch.enable_grad():
            first = self.run.backward(of_state or [None] * self.slots.leaves)
        self.slots.release()
        if program.initial is not None:
            first = [_sum(x, g if g is None else g[program.initial]) for x, g in zip(first, of_outputs, strict=True)]
        sums, stepper.sums, stepper.cotangents = stepper.sums, [], []
        return [*first, *program.input_cotangents(), *sums]

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        outputs, state = self.linear.push([None if v is None else v[None] for v in directions], 1)
        return [x[0] for x in outputs], tuple(x[0] for x in state)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        return self.linear.second(of_outputs, of_state, directions)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@dataclass
class Filled:
    """A reversal whose cotangents are zeros where the results do not depend on an input."""

    reversal: Reversal
    inputs: Sequence[Tensor]

    def check(self) -> None:
        self.reversal.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        return self._filled(self.reversal.reverse(of_outputs, of_state))

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        return cast(TwiceDifferentiable, self.reversal).tangents(directions)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        second = cast(TwiceDifferentiable, self.reversal).second(of_outputs, of_state, directions)
        return second._replace(inputs=self._filled(second.inputs))

    def _filled(self, found: list[Tensor | None]) -> list[Tensor | None]:
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, self.inputs, strict=True)]


class _Join(torch.autograd.Function):
    """Hands the results of a finished sweep to torch's graph; the inputs are x_0, the program's, the captured."""

    @staticmethod
    def forward(ctx: Any, sweep: Reversal, results: list[Tensor], outputs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.sweep, ctx.outputs = sweep, outputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        values = tuple(results)
        results.clear()
        ctx.mark_non_differentiable(*(x for x in values if not differentiable(x)))
        return values

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        ctx.sweep.check()  # before torch's own check, which names nothing
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            gradients = _Reverse.apply(ctx.sweep, ctx.outputs, len(inputs), *inputs, *cotangents)
        else:  # nobody will differentiate it
            gradients = ctx.sweep.reverse(list(cotangents[: ctx.outputs]), list(cotangents[ctx.outputs :]))
        return None, None, None, *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True))


class _Reverse(torch.autograd.Function):
    """The reverse sweep as a function of inputs and cotangents; its derivative is another sweep."""

    @staticmethod
    def forward(ctx: Any, sweep: Reversal, outputs: int, inputs: int, *tensors: Tensor | None) -> Any:
        ctx.sweep, ctx.outputs, ctx.inputs = sweep, outputs, inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        cotangents = list(tensors[inputs:])
        twice = any(ctx.needs_input_grad[3 + inputs :])
        if twice and not any(c is not None and bool(c.any()) for c in cotangents):
            # a Jacobian is being multiplied by a vector: what it takes to transpose twice is the graph alone
            return tuple(torch.zeros_like(x) if x is not None and differentiable(x) else None for x in tensors[:inputs])
        return tuple(sweep.reverse(cotangents[:outputs], cotangents[outputs:]))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        ctx.sweep.check()
        tensors = ctx.saved_tensors
        needed = _wanted(ctx, tensors)
        wanted = any(needed[: ctx.inputs])
        sweep = ctx.sweep.reversal if isinstance(ctx.sweep, Filled) else ctx.sweep
        if not hasattr(sweep, "second" if wanted else "tangents"):
            raise RuntimeError(
                "this gradient cannot be differentiated again, nor be had in forward mode; "
                "use gradient='discrete' or 'backprop' for that"
            )
        if any(v is not None and torch._C._functorch.is_legacy_batchedtensor(v) for v in directions):
            raise RuntimeError(
                "second derivatives were asked for in one batch; ask for them one by one (vectorize=False, or a loop "
                "in place of is_grads_batched=True), or use torch.func"
            )
        found = _Second.apply(ctx.sweep, ctx.outputs, ctx.inputs, wanted, *tensors, *directions)
        return None, None, None, *(g if need else None for g, need in zip(found, needed, strict=True))


def _wanted(ctx: Any, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which of a function's last arguments the running backward asks for; torch itself says what could be asked for."""
    nodes = iter([node for node, _ in ctx.next_functions])
    wanted = []
    for x, needed in zip(tensors, ctx.needs_input_grad[-len(tensors) :], strict=True):
        node = None if x is None else next(nodes)
        wanted.append(needed and node is not None and _runs(node))
    return wanted


def _runs(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


class _Second(torch.autograd.Function):
    """For each input of the reverse sweep the transposed derivative of what comes out; its own is refused."""

    @staticmethod
    def forward(
        ctx: Any, sweep: TwiceDifferentiable, outputs: int, inputs: int, wanted: bool, *tensors: Tensor | None
    ) -> Any:
        count = len(tensors) - 2 * inputs
        cotangents, directions = list(tensors[inputs : inputs + count]), tensors[inputs + count :]
        if not wanted:
            of_outputs, of_state = sweep.tangents(directions)
            return (*[None] * inputs, *of_outputs, *of_state[: count - outputs])
        second = sweep.second(cotangents[:outputs], cotangents[outputs:], directions)
        return (*second.inputs, *second.outputs, *second.state[: count - outputs])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        raise RuntimeError(
            "third derivatives are not made from checkpoints; use gradient='backprop', whose graph has all orders"
        )


def join(
    reversal: Reversal, outputs: list[Tensor], final: State | None, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], State | None]:
    """Finished results (and the last state, unless None) as differentiable functions of the inputs."""
    count = len(outputs)
    results = _Join.apply(reversal, [*outputs, *(x.clone() for x in final or ())], count, *inputs)
    return list(results[:count]), tuple(results[count:]) if final is not None else None
