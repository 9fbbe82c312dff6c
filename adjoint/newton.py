"""Products with second derivatives, for Newton's method: Hessians, Gauss-Newton matrices, and an objective for scipy.

Each product runs sweeps of tangents through the steps of the solves inside, within the slots or the budget that these
solves were given (a slot then holds a state and its tangent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint.tensors import differentiable, leaves_of

Vector = np.ndarray[Any, np.dtype[np.float64]]
Found = list[Tensor]


def hvp(loss: Callable[..., Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor]) -> Found:
    """H v: the derivative of the gradient of ``loss(*inputs)`` along ``directions``, shaped like the inputs.

    ``loss`` is any computation that ends in one real number, with solves and scans inside (gradient "discrete" or
    "backprop"). Complex inputs count as pairs of real ones. Differentiating a gradient made with ``create_graph=True``
    gives the same.
    """
    _check(inputs, directions)
    points = _points(inputs)
    value = _scalar(loss(*points), "loss")
    return _product(_gradient(value, points), points, directions)


def gauss_newton(
    model: Callable[..., Any],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
    loss: Callable[[Any], Tensor] | None = None,
) -> Found:
    """J^T (L'' (J v)) for a loss L of ``model(*inputs)``, J the derivative of the model: half its squares if not given.

    The part of the Hessian that needs no second derivatives of the model, and is positive semi-definite if L is convex.
    Source: Schraudolph (2002), Neural Computation 14(7), 1723-1738.
    """
    _check(inputs, directions)
    points = _points(inputs)
    return _gauss_newton(model(*points), points, directions, loss)


class Objective:
    """A loss of tensors as scipy's minimizers want it: of one vector, with gradient and Hessian products.

        objective = Objective(loss, start)
        minimize(objective.value_and_gradient, objective.start, jac=True, hessp=objective.hvp, method="trust-ncg")

    ``loss(*tensors)`` is one real number; ``start`` are the tensors to begin with. With ``model`` the loss is
    ``loss(model(*tensors))`` and ``gauss_newton`` may stand for ``hvp``. What was computed at a point is kept until
    another point is asked for, so that the many products of a Newton step share one solve and one gradient.
    """

    def __init__(
        self, loss: Callable[..., Tensor], start: Sequence[Tensor], *, model: Callable[..., Any] | None = None
    ) -> None:
        _check(start, start)
        self._loss, self._model = loss, model
        self._like = [x.detach() for x in start]
        self.start = _vector(self._like)
        """The first tensors as one vector."""
        self._at: bytes | None = None

    def tensors(self, x: Vector) -> list[Tensor]:
        """A vector as tensors like the first ones."""
        flat, found, begin = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)), [], 0
        if flat.numel() != self.start.size:
            raise ValueError(f"the vector has {flat.numel()} numbers, the tensors have {self.start.size}")
        for like in self._like:
            size = like.numel() * (2 if like.is_complex() else 1)
            part, begin = flat[begin : begin + size], begin + size
            part = torch.view_as_complex(part.reshape(-1, 2)) if like.is_complex() else part
            found.append(part.to(like).reshape(like.shape))
        return found

    def value_and_gradient(self, x: Vector) -> tuple[float, Vector]:
        self._move(x)
        return float(self._value.detach()), _vector([g.detach() for g in self._first])

    def value(self, x: Vector) -> float:
        return self.value_and_gradient(x)[0]

    def gradient(self, x: Vector) -> Vector:
        return self.value_and_gradient(x)[1]

    def hvp(self, x: Vector, v: Vector) -> Vector:
        """The product of the Hessian at x and v."""
        self._move(x)
        return _vector(_product(self._first, self._points, self.tensors(v), keep=True))

    def gauss_newton(self, x: Vector, v: Vector) -> Vector:
        """The product of the Gauss-Newton matrix at x and v."""
        if self._model is None:
            raise ValueError("gauss_newton needs a model: Objective(loss, start, model=...), with loss(model(*start))")
        self._move(x)
        return _vector(_gauss_newton(self._results, self._points, self.tensors(v), self._loss, keep=True))

    def _move(self, x: Vector) -> None:
        key = np.asarray(x, dtype=np.float64).tobytes()
        if key != self._at:
            self._at = None
            self._points = _points(self.tensors(x))
            self._results = None if self._model is None else self._model(*self._points)
            self._value = _scalar(
                self._loss(*self._points) if self._model is None else self._loss(self._results), "loss"
            )
            self._first = _gradient(self._value, self._points)
            self._at = key


def _check(inputs: Any, directions: Any) -> None:
    for name, series in (("inputs", inputs), ("directions", directions)):
        if isinstance(series, Tensor) or not isinstance(series, Sequence):
            raise TypeError(
                f"{name} is a {type(series).__name__}; give a list or tuple of tensors, also of a single one"
            )
    if len(inputs) != len(directions):
        raise ValueError(f"{len(inputs)} inputs and {len(directions)} directions; give one direction for each")
    for i, (x, v) in enumerate(zip(inputs, directions, strict=True)):
        if not isinstance(x, Tensor) or not differentiable(x):
            raise TypeError(f"inputs[{i}]={x!r} is no tensor of real or complex numbers")
        if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype != x.dtype:
            given = f"shape {tuple(v.shape)} and {v.dtype}" if isinstance(v, Tensor) else repr(v)
            raise ValueError(
                f"directions[{i}] has {given}, inputs[{i}] {tuple(x.shape)} and {x.dtype}; they must agree"
            )


def _points(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs]


def _scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        given = f"shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} returned {given}; it must return one real number")
    return value


def _gradient(value: Tensor, points: Sequence[Tensor]) -> Found:
    if not value.requires_grad:
        raise ValueError("the loss does not depend on its inputs; use the tensors that it is called with")
    found = torch.autograd.grad(value, points, torch.ones_like(value), create_graph=True, allow_unused=True)
    return _filled(found, points)


def _product(
    ends: Sequence[Tensor], points: Sequence[Tensor], directions: Sequence[Tensor], keep: bool = False
) -> Found:
    """The transposed derivative of ``ends`` times ``directions``."""
    pairs = [(x, v) for x, v in zip(ends, directions, strict=True) if x.requires_grad]
    if not pairs:
        return _filled([None] * len(points), points)
    roots, weights = zip(*pairs, strict=True)
    return _filled(torch.autograd.grad(roots, points, weights, retain_graph=keep, allow_unused=True), points)


def _gauss_newton(
    results: Any,
    points: Sequence[Tensor],
    directions: Sequence[Tensor],
    loss: Callable[[Any], Tensor] | None,
    keep: bool = False,
) -> Found:
    leaves = [x for x in leaves_of(results) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        raise ValueError("the model does not depend on its inputs; use the tensors that it is called with")
    seeds = [torch.zeros_like(x).requires_grad_() for x in leaves]
    transposed = torch.autograd.grad(leaves, points, seeds, create_graph=True, allow_unused=True)
    moved = _product(_filled(transposed, points), seeds, directions)
    if loss is not None:
        moved = _bent(results, loss, moved)
    return _filled(torch.autograd.grad(leaves, points, moved, retain_graph=keep, allow_unused=True), points)


def _bent(results: Any, loss: Callable[[Any], Tensor], moved: Found) -> Found:
    """The Hessian of the loss in the model's results times their tangents."""
    tree, spec = pytree.tree_flatten(results)
    places = [i for i, x in enumerate(tree) if isinstance(x, Tensor) and x.requires_grad]
    cut = [tree[i].detach().requires_grad_() for i in places]
    for i, x in zip(places, cut, strict=True):
        tree[i] = x
    value = _scalar(loss(pytree.tree_unflatten(tree, spec)), "loss")
    return _product(_gradient(value, cut), cut, moved)


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Found:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, like, strict=True)]


def _vector(tensors: Sequence[Tensor]) -> Vector:
    """All numbers in one vector; complex ones as pairs."""
    flat = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]
    return np.concatenate([x.detach().cpu().double().numpy().reshape(-1) for x in flat])
