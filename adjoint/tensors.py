"""Trees of tensors, and what is asked of tensors everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Structure:
    """The shape of a tree: nested tuples, lists, dicts (whatever torch's pytree knows) with tensors as leaves."""

    spec: pytree.TreeSpec
    single: bool

    @classmethod
    def of(cls, tree: Any, name: str) -> tuple[Structure, State]:
        """The structure and its leaves; TypeError if a leaf is not a tensor."""
        if type(tree) is Tensor:
            return SINGLE, (tree,)
        leaves, spec = pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} holds {leaf!r} ({type(leaf).__name__}); every leaf must be a torch tensor")
        if not leaves:
            raise TypeError(f"{name}={tree!r} holds no tensor")
        return cls(spec, isinstance(tree, Tensor)), tuple(leaves)

    def flatten(self, tree: Any, name: str) -> State:
        """The leaves of a tree of this structure; TypeError if it has another."""
        if self.single and isinstance(tree, Tensor):
            return (tree,)
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise TypeError(f"{name} has the structure {spec}, expected {self.spec}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} holds {leaf!r} ({type(leaf).__name__}); every leaf must be a torch tensor")
        return tuple(leaves)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return leaves[0] if self.single else pytree.tree_unflatten(list(leaves), self.spec)


SINGLE = Structure(pytree.tree_structure(0), True)
"""Of a tensor alone."""


def check_dense(state: State, name: str) -> None:
    for x in state:
        if x.layout != torch.strided or x.is_nested:
            kind = "is nested" if x.is_nested else f"has the layout {x.layout}"
            raise TypeError(f"{name} {kind}; states are dense tensors, such as {name}.to_dense()")


def leaves_of(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among these values, and in the trees among them."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
        elif type(x) in pytree.SUPPORTED_NODES:
            found += [y for y in leaves_of(x) if isinstance(y, Tensor)]
    return found


def map_tree(function: Callable[..., Any], *trees: Any) -> Any:
    return pytree.tree_map(function, *trees)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def versions_of(state: State) -> list[int]:
    """How often each leaf has been written to."""
    return [0 if x.is_inference() else x._version for x in state]


def refuse_writing(what: str) -> NoReturn:
    """Raise for a function that writes to its arguments."""
    raise RuntimeError(
        f"{what} in place; recomputed steps would differ. Return a new tensor instead (y = y * 2, not y.mul_(2))"
    )


def added(total: Tensor, start: int, part: Tensor) -> Tensor:
    """``total`` with ``part`` added from index ``start`` on: in place, unless many cotangents come in one batch."""
    if _is_single(part):
        total[start : start + len(part)] += part
        return total
    stop = start + len(part)
    return torch.cat((total[:start], total[start:stop] + part, total[stop:]))


def scattered(total: Tensor, column: Tensor, part: Tensor) -> Tensor:
    """``total`` with ``part`` added at one column of each row, as :func:`added` does."""
    return total.scatter_add_(1, column, part) if _is_single(part) else total.scatter_add(1, column, part)


def _is_single(part: Tensor) -> bool:
    return is_plain(part) and not torch._C._functorch.is_legacy_batchedtensor(part)


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def is_plain(x: Tensor) -> bool:
    """Whether it is not a wrapper that a torch.func transform inside the function made for the moment."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)
