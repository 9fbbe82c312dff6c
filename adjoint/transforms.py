"""torch.func's grad, jvp and vmap, and forward mode, over a whole call: one solve or scan at the bottom of them all.

A transform replaces tensors by wrappers, which a reverse sweep over detached aliases would lose. So the call as a whole
is made one operation y = S(x) of the tensors that are wrapped, wherever they stand in its arguments or in what these
reach. Below all transforms the operation makes the call on plain tensors, and torch's ordinary graph of that call gives

    S'(x)^T c,    S'(x) v,    d/dx (S'(x)^T c) v

each an operation again, so that transforms nest: grad of grad, hessian, jacfwd, vmap of grad, grad of vmap.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from adjoint.captured import forwards, transformed
from adjoint.reach import Reach
from adjoint.tensors import differentiable, leaves_of, map_tree, tensors_in
from adjoint.touched import UntrackedTensorError

functorch = torch._C._functorch
KNOWN = ("Grad", "Jvp", "Vmap")

P = ParamSpec("P")
R = TypeVar("R")
Tensors = Sequence[Tensor]


def mapped() -> bool:
    """Whether a vmap is among the transforms."""
    return any(x.key().name == "Vmap" for x in functorch.get_interpreter_stack() or ())


def through_transforms(
    leaves: Callable[[Any], list[Tensor]],
    rebuild: Callable[[Any, list[Any], list[Tensor], dict[str, Any]], Any],
    native: Callable[[dict[str, Any]], bool],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a door work under transforms.

    ``leaves(result)``: the tensors of what it returns. ``rebuild(result, results, tensors, arguments)``: a result with
    these tensors; under vmap ``results`` are those of all members, the first of which is ``result``. ``native(
    arguments)``: whether this call follows transforms by itself.
    """

    def decorate(door: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(door)

        @functools.wraps(door)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not transformed():
                return door(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if native(bound.arguments):
                return door(*args, **kwargs)
            return _lifted(door, leaves, rebuild, bound)

        return call

    return decorate


def leaves_of_tree(result: Any) -> list[Tensor]:
    return [x for x in leaves_of(result) if isinstance(x, Tensor)]


def tree_of_leaves(result: Any, results: list[Any], tensors: list[Tensor], arguments: dict[str, Any]) -> Any:
    """A tree with other tensors."""
    given = iter(tensors)
    return map_tree(lambda x: next(given) if isinstance(x, Tensor) else x, result)


def _lifted(door: Callable[..., Any], leaves: Any, rebuild: Any, bound: inspect.BoundArguments) -> Any:
    _check_stack(door.__name__)
    reach = Reach((bound.args, bound.kwargs), door.__name__)
    inputs = [x for _, x in reach.tensors.values() if _levels(x) or _wanted(x)]

    def run(points: Tensors) -> tuple[list[Tensor], Any]:
        args, kwargs = reach.rebind({id(x): p for x, p in zip(inputs, points, strict=True)})
        result = door(*args, **kwargs)
        return leaves(result), result

    box = Box(run, [_wanted(x) for x in inputs])
    found = _Call.apply(box, *inputs)
    results = box.results()
    return rebuild(results[0], results, list(found), dict(bound.arguments))


def _check_stack(name: str) -> None:
    for interpreter in functorch.get_interpreter_stack() or ():
        kind = interpreter.key().name
        if kind not in KNOWN:
            raise NotImplementedError(
                f"{name} is called inside torch.func's {kind.lower()}, which it cannot follow; call it outside, or use "
                f"gradient='backprop' and a fixed-step method"
            )


def _levels(x: Tensor) -> list[tuple[int, bool]]:
    """The levels of the wrappers around a tensor, and whether each is one of differentiation."""
    found = []
    while functorch.is_functorch_wrapped_tensor(x):
        found.append((functorch.maybe_get_level(x), functorch.is_gradtrackingtensor(x)))
        x = functorch.get_unwrapped(x)
    return found


def _wanted(x: Tensor) -> bool:
    """Whether somebody may differentiate with respect to this tensor."""
    if not differentiable(x):
        return False
    if any(tracking for _, tracking in _levels(x)) and (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled()):
        return True
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return (x.requires_grad and torch.is_grad_enabled()) or (forwards() and _tangent(x) is not None)


def _tangent(x: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(x).tangent


class _Hidden(TorchFunctionMode):
    """Refuses tensors of a transform that a function holds where they were not found: here they look like constants."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if functorch.peek_interpreter_stack() is None:
            for x in tensors_in((*args, *(kwargs or {}).values())):
                if functorch.is_functorch_wrapped_tensor(x) or (forward_ad._current_level >= 0 and _is_dual(x)):
                    _refuse_hidden(x)
        return function(*args, **(kwargs or {}))


def _is_dual(x: Tensor) -> bool:
    if not differentiable(x):
        return False
    with forward_ad._set_fwd_grad_enabled(True):
        return _tangent(x) is not None


def _refuse_hidden(x: Tensor) -> NoReturn:
    raise UntrackedTensorError(
        f"a tensor of shape {tuple(x.shape)} that a torch.func transform differentiates or maps over is used where it "
        f"cannot be followed; its derivative would be lost. Pass it through args=, or hold it in a closure, a module, a "
        f"list or a dict"
    )


@contextmanager
def _below() -> Iterator[None]:
    """Plain torch, below all transforms: hidden wrappers are refused, and hooks on saved tensors work again."""
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if disabled is not None:
        torch._C._autograd._saved_tensors_hooks_enable()
    try:
        with _Hidden():
            yield
    finally:
        if disabled is not None:
            torch._C._autograd._saved_tensors_hooks_disable(disabled)


@dataclass
class Box:
    """One call: how it is made, and what is left of it. Under vmap a box of boxes."""

    run: Callable[[Tensors], tuple[list[Tensor], Any]]
    wanted: list[bool]
    members: list[Box] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    result: Any = None

    def member(self) -> Box:
        self.members.append(Box(self.run, self.wanted))
        return self.members[-1]

    def results(self) -> list[Any]:
        """What the door returned, for all members."""
        return [x for box in self.members for x in box.results()] if self.members else [self.result]

    def call(self, inputs: Tensors) -> list[Tensor]:
        self.points = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, self.wanted, strict=True)]
        with torch.set_grad_enabled(any(self.wanted)), _below():
            self.outputs, self.result = self.run(self.points)
        return [x.detach() for x in self.outputs]

    def pull(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """S'(x)^T c, None for what nobody wants."""
        live = [(y, c) for y, c in zip(self.outputs, cotangents, strict=True) if y.requires_grad and c is not None]
        return self._of_wanted(self._grad([y for y, _ in live], self._own, [c for _, c in live]))

    def push(self, directions: Sequence[Tensor | None]) -> list[Tensor]:
        """S'(x) v: the derivative of the transpose in its cotangent."""
        live = [y for y in self.outputs if y.requires_grad]
        seeds = [torch.zeros_like(y).requires_grad_() for y in live]
        with torch.enable_grad():
            transposed = self._grad(live, self._own, seeds, create_graph=True)
        found = iter(self._along(transposed, seeds, directions))
        moved = (next(found) if y.requires_grad else None for y in self.outputs)
        return [torch.zeros_like(y) if v is None else v for y, v in zip(self.outputs, moved, strict=True)]

    def bend(self, cotangents: Sequence[Tensor | None], directions: Sequence[Tensor | None]) -> list[Tensor | None]:
        """d/dx (S'(x)^T c) v, None for what nobody wants."""
        live = [(y, c) for y, c in zip(self.outputs, cotangents, strict=True) if y.requires_grad and c is not None]
        with torch.enable_grad():
            transposed = self._grad([y for y, _ in live], self._own, [c for _, c in live], create_graph=True)
        return self._of_wanted(self._along(transposed, self._own, directions))

    @property
    def _own(self) -> list[Tensor]:
        return [x for x in self.points if x.requires_grad]

    def _grad(self, roots: Tensors, points: Tensors, seeds: Tensors, create_graph: bool = False) -> list[Tensor | None]:
        if not roots or not points:
            return [None] * len(points)
        with _below():
            return list(
                torch.autograd.grad(
                    roots, points, seeds, retain_graph=True, create_graph=create_graph, allow_unused=True
                )
            )

    def _along(self, roots: Sequence[Tensor | None], points: Tensors, directions: Any) -> list[Tensor | None]:
        own = [v for v, wanted in zip(directions, self.wanted, strict=True) if wanted]
        pairs = [(g, v) for g, v in zip(roots, own, strict=True) if g is not None and g.requires_grad and v is not None]
        return self._grad([g for g, _ in pairs], points, [v for _, v in pairs])

    def _of_wanted(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """For every input; zeros where nothing depends on one that is wanted."""
        given = iter(found)
        rows = [(x, next(given)) if wanted else (x, None) for x, wanted in zip(self.points, self.wanted, strict=True)]
        return [
            (torch.zeros_like(x) if g is None else g) if wanted else None
            for (x, g), wanted in zip(rows, self.wanted, strict=True)
        ]


def _mapped(operation: Any, info: Any, in_dims: Any, box: Box, count: int, tensors: Sequence[Tensor | None]) -> Any:
    """An operation for each member of a batch, one after another, and the results stacked.

    ``count``: how many of the tensors are inputs of the call; if one of these is mapped, members have calls of their own.
    """
    dims = in_dims[-len(tensors) :]
    apart = any(d is not None for d in dims[:count])
    if apart and operation is _Call:
        box.members.clear()
    rows = []
    for b in range(info.batch_size):
        own = box if not apart else box.member() if operation is _Call else box.members[b]
        some = [x if d is None or x is None else x.select(d, b) for x, d in zip(tensors, dims, strict=True)]
        rows.append(operation.of(own, count, some))
    columns = list(zip(*rows, strict=True))
    for column in columns:
        if column[0] is not None and len({x.shape for x in column}) > 1:
            raise ValueError(
                f"under vmap one member has a result of shape {tuple(column[0].shape)}, another one has another; ask for "
                f"values at times that are given, not at every step"
            )
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in columns)
    return stacked, tuple(None if x is None else 0 for x in stacked)


class _Call(torch.autograd.Function):
    """y = S(x)."""

    @staticmethod
    def of(box: Box, count: int, tensors: Any) -> Any:
        return _Call.apply(box, *tensors)

    @staticmethod
    def forward(box: Box, *inputs: Tensor) -> Any:
        return tuple(box.call(inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.box, *tensors = inputs
        ctx.mark_non_differentiable(*(x for x in output if not differentiable(x)))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        return None, *_Pull.apply(ctx.box, len(inputs), *inputs, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *directions: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        return _Push.apply(ctx.box, len(inputs), *inputs, *directions)

    @staticmethod
    def vmap(info: Any, in_dims: Any, box: Box, *inputs: Tensor) -> Any:
        return _mapped(_Call, info, in_dims, box, len(inputs), inputs)


class _Pull(torch.autograd.Function):
    """S'(x)^T c, as a function of x and c."""

    @staticmethod
    def of(box: Box, count: int, tensors: Any) -> Any:
        return _Pull.apply(box, count, *tensors)

    @staticmethod
    def forward(box: Box, count: int, *tensors: Tensor | None) -> Any:
        return tuple(box.pull(tensors[count:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.box, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        box, count, tensors = ctx.box, ctx.count, ctx.saved_tensors
        of_inputs: Any = [None] * count
        of_cotangents: Any = [None] * (len(tensors) - count)
        if any(ctx.needs_input_grad[2 : 2 + count]):
            of_inputs = _Bend.apply(box, count, *tensors, *directions)
        if any(ctx.needs_input_grad[2 + count :]):
            of_cotangents = _Push.apply(box, count, *tensors[:count], *directions)
        return None, None, *of_inputs, *of_cotangents

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *directions: Tensor | None) -> Any:
        box, count, tensors = ctx.box, ctx.count, ctx.saved_tensors
        bent = _Bend.apply(box, count, *tensors, *directions[:count])
        pulled = _Pull.apply(box, count, *tensors[:count], *directions[count:])
        return tuple(None if a is None else a + b for a, b in zip(bent, pulled, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, box: Box, count: int, *tensors: Tensor) -> Any:
        return _mapped(_Pull, info, in_dims, box, count, tensors)


class _Push(torch.autograd.Function):
    """S'(x) v, as a function of x and v."""

    @staticmethod
    def of(box: Box, count: int, tensors: Any) -> Any:
        return _Push.apply(box, count, *tensors)

    @staticmethod
    def forward(box: Box, count: int, *tensors: Tensor | None) -> Any:
        return tuple(box.push(tensors[count:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.box, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        box, count, tensors = ctx.box, ctx.count, ctx.saved_tensors
        inputs, directions = tensors[:count], tensors[count:]
        of_inputs: Any = [None] * count
        if any(ctx.needs_input_grad[2 : 2 + count]):
            of_inputs = _Bend.apply(box, count, *inputs, *cotangents, *directions)
        return None, None, *of_inputs, *_Pull.apply(box, count, *inputs, *cotangents)

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Any:
        raise NotImplementedError(
            "forward mode over forward mode is not made from checkpoints; use jacfwd over jacrev (torch.func.hessian), "
            "or gradient='backprop' and a fixed-step method"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, box: Box, count: int, *tensors: Tensor) -> Any:
        return _mapped(_Push, info, in_dims, box, count, tensors)


class _Bend(torch.autograd.Function):
    """d/dx (S'(x)^T c) v; a third derivative is refused."""

    @staticmethod
    def of(box: Box, count: int, tensors: Any) -> Any:
        return _Bend.apply(box, count, *tensors)

    @staticmethod
    def forward(box: Box, count: int, *tensors: Tensor | None) -> Any:
        return tuple(box.bend(tensors[count:-count], tensors[-count:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _refuse_third()

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> Any:
        _refuse_third()

    @staticmethod
    def vmap(info: Any, in_dims: Any, box: Box, count: int, *tensors: Tensor) -> Any:
        return _mapped(_Bend, info, in_dims, box, count, tensors)


def _refuse_third() -> NoReturn:
    raise NotImplementedError(
        "third derivatives are not made from checkpoints; use gradient='backprop' and a fixed-step method"
    )
