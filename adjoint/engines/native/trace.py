"""A right-hand side and its vector-Jacobian product as one program of scalars.

torch runs f once, and differentiates it, on real tensors while every number is followed. So detach, no_grad, and ties in
max, abs and clamp mean what they mean to torch. What depends on numbers otherwise than through torch is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjoint.engines.native.cells import KIND_OF, Cells, Refused, Unpeeked
from adjoint.engines.native.operators import FORMULAS, SIMPLER
from adjoint.engines.native.program import Graph, Kind, Node
from adjoint.tensors import Reach, State, Structure, Touched


@dataclass(frozen=True)
class Held:
    """The tensors that a function holds. Those typed like the state are inputs of the program, the others part of it."""

    reach: Reach
    tensors: tuple[Tensor, ...]
    others: tuple[Tensor, ...]

    @classmethod
    def of(cls, reach: Reach, dtype: torch.dtype) -> Held:
        """Raises Refused if a tensor of another type wants a gradient."""
        tensors = [x for _, x in reach.tensors.values()]
        own = tuple(x for x in tensors if x.dtype == dtype)
        others = tuple(x for x in tensors if x.dtype != dtype)
        for name, x in reach.requiring_grad:
            if x.dtype != dtype:
                raise Refused(f"{name} of {x.dtype} beside a state of {dtype}")
        return cls(reach, own, others)

    def rebound(self, aliases: Sequence[Tensor]) -> Any:
        """The function with these tensors in place of its inputs."""
        return self.reach.rebind({id(x): a for x, a in zip(self.tensors, aliases, strict=True)})


@dataclass(frozen=True)
class Traced:
    """k = f(t, y, p) and lam^T df/d(y, p, t), over inputs ("t", 0), ("y", i), ("p", j) and ("lam", i)."""

    graph: Graph
    kind: Kind
    """Of the state."""
    time: Kind
    slope: list[Node]
    of_state: list[Node]
    of_held: dict[int, Node]
    """By the index j of ("p", j), where something depends on it and a gradient is wanted."""
    of_time: Node


def trace(function: Any, held: Held, structure: Structure, state: State, t: Tensor, most: int) -> Traced:
    """Follow f at this point. Raises Refused for what no program can say."""
    if len({x.dtype for x in state}) > 1 or state[0].dtype not in KIND_OF or not state[0].is_floating_point():
        raise Refused(f"a state of {', '.join(str(x.dtype) for x in state)}; it takes float64 or float32")
    graph = Graph()
    cells = Cells(graph, FORMULAS, SIMPLER, most)
    leaves = tuple(_leaf(x, True) for x in state)
    now = _leaf(t, True)
    aliases = [_leaf(x, x.requires_grad) for x in held.tensors]
    seeds = tuple(torch.randn_like(x, memory_format=torch.contiguous_format, requires_grad=False) for x in leaves)
    for name, tensors in (("y", leaves), ("p", aliases), ("lam", seeds)):
        _named(cells, name, tensors)
    cells.name(now, "t")
    f, args = held.rebound(aliases)
    known = (*leaves, now, *aliases, *held.others, *seeds)
    with torch.enable_grad(), Touched(known) as touched, Unpeeked(), cells:
        slope = structure.flatten(f(now, structure.unflatten(leaves), *args), "the value of f")
        roots = [(k, seed) for k, seed in zip(slope, seeds, strict=True) if k.requires_grad]
        inputs = [*leaves, *(x for x in aliases if x.requires_grad), now]
        found: list[Tensor | None] = [None] * len(inputs)
        if roots:
            found = list(torch.autograd.grad([k for k, _ in roots], inputs, [s for _, s in roots], allow_unused=True))
    if any(not cells.known(x) for x in touched.outside.values()):
        raise Refused("a tensor that f holds where it cannot be followed")
    for k, y in zip(slope, state, strict=True):
        if k.shape != y.shape or k.dtype != y.dtype:
            raise Refused(f"f returned shape {tuple(k.shape)} for a state of shape {tuple(y.shape)}")
    kind = KIND_OF[state[0].dtype]

    def numbers(g: Tensor | None, like: Tensor) -> list[Node]:
        if g is None:
            return [graph.constant(0, cells.kind(like))] * like.numel()
        return list(cells.read(g).flat)

    of_state = [n for g, x in zip(found, leaves, strict=False) for n in numbers(g, x)]
    of_held: dict[int, Node] = {}
    rest, first = iter(found[len(leaves) :]), 0
    for x in aliases:
        g = next(rest) if x.requires_grad else None
        if g is not None:
            of_held |= dict(enumerate(cells.read(g).flat, first))
        first += x.numel()
    ks = [n for k in slope for n in cells.read(k).flat]
    return Traced(graph, kind, KIND_OF[t.dtype], ks, of_state, of_held, numbers(next(rest), now)[0])


def _leaf(x: Tensor, wanted: bool) -> Tensor:
    """The same numbers in memory of their own; a parameter stays one."""
    alias = x.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(x, torch.nn.Parameter):
        alias = torch.nn.Parameter(alias, wanted)
    alias.__dict__.update(x.__dict__)
    return alias.requires_grad_(wanted)


def _named(cells: Cells, name: str, tensors: Sequence[Tensor]) -> None:
    """Number the inputs of several tensors in a row."""
    first = 0
    for x in tensors:
        cells.name(x, name, first)
        first += x.numel()
