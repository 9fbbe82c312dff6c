"""Running costs and observations: what a solve returns beside its states, or in place of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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


def seen_of_members(observe: Function, times: Tensor, ys: Any, first: Any) -> Any:
    """The same of a batch: g gets times of shape (members,) and all members at once, and gives a row for each.

    Where a member has no state (it failed, or its times are over), g sees its ``first`` one, and what it gives is NaN
    without gradient: zero times NaN would be NaN in the gradient of all that g holds.
    """
    leaves, spec = pytree.tree_flatten(ys)
    start = [torch.nan_to_num(x.detach(), posinf=0.0, neginf=0.0) for x in pytree.tree_leaves(first)]
    members, values = len(start[0]), []
    for j in range(len(leaves[0])):
        there = [x[j] for x in leaves]
        good = torch.stack([torch.isfinite(x.detach()).reshape(members, -1).all(1) for x in there]).all(0)
        t = times[j].expand(members) if times.ndim == 1 else times[:, j]
        known = torch.where(good, t, (times[0] if times.ndim == 1 else times[:, 0]).detach())
        state = [torch.where(_rows(good, x), x, y) for x, y in zip(there, start, strict=True)]
        structure, found = Structure.of(observe(known, spec.unflatten(state)), "the value of observe")
        for x in found:
            if not differentiable(x) or x.ndim == 0 or len(x) != members:
                raise ValueError(
                    f"observe returned shape {tuple(x.shape)} and {x.dtype} for {members} members; with batched=True it must "
                    f"return real or complex tensors with a row for each member"
                )
        values.append([torch.where(_rows(good, x), x, torch.nan) for x in found])
    return structure.unflatten([torch.stack(column) for column in zip(*values, strict=True)])


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A mask over members, for a tensor whose first dimension counts them."""
    return mask.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
