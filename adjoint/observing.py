"""Running costs and observations: what a solve returns beside its states, or in place of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjoint.tensors import Structure, differentiable, map_tree

Function = Callable[..., Any]


def with_cost(f: Function, cost: Function, y0: Any, t0: Tensor, args: tuple[Any, ...]) -> tuple[Function, Any]:
    """f and y0 with the integral of the running cost as one more part of the state: (y, q), dq/dt = cost(t, y, *args)."""
    with torch.no_grad():
        value = cost(t0, map_tree(torch.Tensor.detach, y0), *args)
    if not isinstance(value, Tensor) or not differentiable(value):
        raise TypeError(f"cost returned {value!r}; return a real or complex tensor, such as (y ** 2).sum()")
    shape, dtype = value.shape, value.dtype

    def both(t: Tensor, state: Any, *args: Any) -> Any:
        y, _ = state
        found = cost(t, y, *args)
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(
                f"cost returned shape {tuple(found.shape)} and {found.dtype}, and shape {tuple(shape)} and {dtype} at "
                f"first; it must return the same always"
            )
        return f(t, y, *args), found

    return both, (y0, torch.zeros_like(value))


def with_integral(observe: Function) -> Function:
    """The observation of y, and the integral of the running cost beside it."""

    def see(t: Tensor, state: Any) -> Any:
        y, q = state
        return observe(t, y), q

    return see


def seen_afterwards(observe: Function, times: Tensor, ys: Any) -> Any:
    """g(t_j, y_j) of finished states, for a gradient that needs them all."""
    pairs = [(t, map_tree(lambda x, j=j: x[j], ys)) for j, t in enumerate(times)]
    values = [Structure.of(observe(t, y), "the value of observe") for t, y in pairs]
    return values[0][0].unflatten(
        [torch.stack(column) for column in zip(*(leaves for _, leaves in values), strict=True)]
    )
