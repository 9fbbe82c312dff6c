"""Where the states of a network are kept: trees of tensors, each state with shapes of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint.stores import FileSlots, HostSlots
from adjoint.tensors import State
from adjoint.tiers import Device, Kind, Store

Tree = dict[str, Any]
"""The live values at a cut, by the name of the node that made them; each a tree of tensors and anything else."""

ALIGNMENT = 64
"""Bytes to which torch aligns memory."""


class Shelf:
    """A tier of states by reference: what two states have in common lies there once.

    A state is copied if ``copies(step)`` says that a later block writes to it, and if it would keep a larger tensor
    alive. A reference that was written to is refused when it is loaded.
    """

    lends = False

    def __init__(self, copies: Callable[[int], bool] = lambda step: False) -> None:
        self._copies = copies
        self._kept: dict[int, tuple[Any, list[Any], list[int]]] = {}

    def save(self, step: int, state: Tree) -> None:
        leaves, spec = pytree.tree_flatten(state)
        made: list[Any] = []
        for x in leaves:
            if not isinstance(x, Tensor):
                made.append(x)
            elif self._copies(step) or x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size() + ALIGNMENT:
                made.append(copied(x))
            else:
                made.append(x.detach())
        self._kept[step] = spec, made, [_version(x) for x in made]

    def load(self, step: int) -> Tree:
        spec, leaves, versions = self._kept[step]
        for x, version in zip(leaves, versions, strict=True):
            if _version(x) != version:
                raise RuntimeError(
                    f"the state before block {step} was written to in place after it was kept; the gradient would be "
                    f"wrong. Call backward() before changing outputs of the network, or change a clone"
                )
        state: Tree = pytree.tree_unflatten(leaves, spec)
        return state

    def drop(self, step: int) -> None:
        del self._kept[step]


class Elsewhere:
    """A tier in the host's memory or in a file, or in a lower precision: a store for each state's shapes."""

    lends = False

    def __init__(self, tier: Kind, copies: Callable[[int], bool]) -> None:
        self._tier, self._copies = tier, copies
        self._kept: dict[int, tuple[Any, list[Any], list[int], Store | None]] = {}

    def save(self, step: int, state: Tree) -> None:
        leaves, spec = pytree.tree_flatten(state)
        where = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
        dense = tuple(_line(leaves[k]) for k in where)
        if self._copies(step):  # copies and writes go on beside the next block, which writes to its input
            dense = tuple(x.clone() for x in dense)
        store = self._tier.open(dense, 1, None) if dense else None
        if store is not None:
            store.save(step, dense)
        shapes = [_Shape(x) if isinstance(x, Tensor) else x for x in leaves]
        self._kept[step] = spec, shapes, where, store

    def load(self, step: int) -> Tree:
        spec, shapes, where, store = self._kept[step]
        leaves = list(shapes)
        if store is not None:
            for k, line in zip(where, store.load(step), strict=True):
                leaves[k] = shapes[k].of(line)
        state: Tree = pytree.tree_unflatten(leaves, spec)
        return state

    def drop(self, step: int) -> None:
        store = self._kept.pop(step)[3]
        if store is not None:
            store.drop(step)
            store.release()

    def settle(self) -> None:
        """Nothing is on its way: each state has a store of its own."""

    def finish(self, step: int) -> None:
        """Wait until this state is where it is kept, so that its memory is free again."""
        store = self._kept[step][3]
        if isinstance(store, (HostSlots, FileSlots)):
            store.settle()


def shelf_for(tier: Kind | None, copies: Callable[[int], bool]) -> Shelf | Elsewhere:
    if tier is None or (isinstance(tier, Device) and tier.codec is None):
        return Shelf(copies)
    return Elsewhere(tier, copies)


class _Shape:
    """Shape and strides of a tensor, to be had again from the line of memory that it spans."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.strides = x.shape, x.stride() if _lies_as_it_is(x) else None

    def of(self, line: Tensor) -> Tensor:
        return line.view(self.shape) if self.strides is None else line.as_strided(self.shape, self.strides)


def _line(x: Tensor) -> Tensor:
    """The memory that a tensor spans, gaps included: other strides are other kernels, and other bits."""
    x = x.detach()
    return x.as_strided((_span(x),), (1,)) if _lies_as_it_is(x) else x.contiguous().view(-1)


def _span(x: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _lies_as_it_is(x: Tensor) -> bool:
    return x.layout == torch.strided and x.numel() > 0 and not x.is_conj() and not x.is_neg()


def copied(x: Tensor) -> Tensor:
    """The same numbers with the same strides and alignment, in memory of their own."""
    x = x.detach()
    if not _lies_as_it_is(x):
        return x.clone()
    span = _span(x)
    shift = x.storage_offset() % max(1, ALIGNMENT // x.element_size())
    room = x.new_empty(shift + span)
    room[shift:].copy_(x.as_strided((span,), (1,)))
    return room.as_strided(x.shape, x.stride(), shift)


def leaves_of(tree: Any) -> State:
    """The tensors of a tree."""
    return tuple(x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0
