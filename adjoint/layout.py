"""How states lie in memory: as kept ones do, since other strides and another alignment are other kernels, and other bits."""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.tensors import State, differentiable

ALIGNMENT = 64
"""Bytes to which torch aligns memory."""


def linked(state: State) -> State | None:
    """Leaves for the next step on the same graph; None if that would not be the same: then the graph is cut."""
    if not all((x.requires_grad or not differentiable(x)) and _plain(x) for x in state):
        return None
    return tuple([x.view_as(x) if differentiable(x) else x for x in state])


def _plain(x: Tensor) -> bool:
    """Whether x lies as a kept state will: other strides and other alignment are other kernels, and other bits."""
    return x.is_contiguous() and x.storage_offset() * x.itemsize % ALIGNMENT == 0 and not (x.is_conj() or x.is_neg())


def settled(state: State) -> State:
    """A state ready for the next step: no graph, and in memory as a kept one."""
    for x in state:
        if x.requires_grad or not _plain(x):
            return tuple([x.detach() if _plain(x) else _copied(x.detach()) for x in state])
    return state


def _copied(x: Tensor) -> Tensor:
    return x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def apart(state: State, entry: State) -> State:
    """The state in memory of its own: a step that hands its input on must not keep a slot alive by it."""
    if state is entry:
        return tuple(x.clone() for x in state)
    if len(state) == 1 and state[0].untyped_storage()._cdata != entry[0].untyped_storage()._cdata:
        return state
    held = {x.untyped_storage()._cdata for x in entry}
    if any(x.untyped_storage()._cdata in held for x in state):
        return tuple(x.clone() if x.untyped_storage()._cdata in held else x for x in state)
    return state
