"""A right-hand side and its vector-Jacobian product as one program of scalars.

torch runs f once, and differentiates it, on real tensors while every number is followed. So detach, no_grad, and ties in
max, abs and clamp mean what they mean to torch. What depends on numbers otherwise than through torch is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.engines.native.cells import KIND_OF, Cells, Refused, Unpeeked
from adjoint.engines.native.operators import FORMULAS, SIMPLER
from adjoint.engines.native.program import Graph, Kind, Node
from adjoint.reach import Reach
from adjoint.tensors import State, Structure
from adjoint.touched import Touched

Name = tuple[str, int]


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
    """k = f(t, y, p, q) and lam^T df/d(y, p, q, t), over inputs ("t", 0), ("y", i), ("p", j), ("q", j) and ("lam", i).

    p are numbers that are the same for all members of a batch, q those that each has of its own.
    """

    graph: Graph
    kind: Kind
    """Of the state."""
    time: Kind
    slope: list[Node]
    of_state: list[Node]
    of_held: dict[Name, Node]
    """Where something depends on p or q and a gradient is wanted."""
    of_time: Node
    bent: Bent | None = None


class Bent(NamedTuple):
    """The derivatives of lam^T (df/dy u + df/dt w), over ("u", i) and ("w", 0) too: second derivatives of f."""

    of_state: list[Node]
    of_held: dict[Name, Node]
    of_time: Node


@dataclass(frozen=True)
class Scene:
    """What f is followed on: some members of the state, or all of it."""

    held: Held
    own: tuple[bool, ...]
    """Of each held tensor, whether every member has a part of its own."""
    structure: Structure
    state: State
    t: Tensor
    dim: int | None
    """The dimension that counts members; None if there are none."""
    twice: bool = False
    """Whether second derivatives are wanted."""

    def rows(self, x: Tensor, count: int) -> Tensor:
        return x.detach() if self.dim is None else x.detach().narrow(self.dim, 0, count)

    def of_row(self, x: Tensor, row: int) -> Tensor:
        return x if self.dim is None else x.select(self.dim, row)


def trace(scene: Scene, most: int) -> Traced:
    """Follow f at this point. Raises Refused for what no program can say."""
    state = scene.state
    if len({x.dtype for x in state}) > 1 or state[0].dtype not in KIND_OF or not state[0].is_floating_point():
        raise Refused(f"a state of {', '.join(str(x.dtype) for x in state)}; it takes float64 or float32")
    cells = Cells(Graph(), FORMULAS, SIMPLER, most)
    traced = _followed(cells, scene)
    if scene.dim is not None:
        _refuse_mixing(cells, scene, traced)
    return traced


def _followed(cells: Cells, scene: Scene) -> Traced:
    """f and its transpose; in a batch, of its first member."""
    held, state = scene.held, scene.state
    leaves = tuple(_leaf(scene.rows(x, 1), x, True) for x in state)
    now = _leaf(scene.t, scene.t, True)
    aliases = _aliases(cells, scene, 1)
    seeds, along = (
        tuple(torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape) for x in leaves) for _ in range(2)
    )
    in_time = torch.ones_like(scene.t)
    for name, xs in (("y", leaves), ("lam", seeds), ("u", along), ("w", [in_time])):
        _named(cells, name, xs)
    cells.name(now, "t")
    known = (*leaves, now, *aliases, *held.others, *seeds, *along, in_time)
    inputs = [*leaves, *(x for x in aliases if x.requires_grad), now]
    with torch.enable_grad(), Touched(known) as touched, Unpeeked(), cells:
        slope = _slope(scene, leaves, now, aliases)
        found = _pulled(slope, inputs, seeds, scene.twice)
        second = _pulled([*found[: len(leaves)], found[-1]], inputs, [*along, in_time], False) if scene.twice else None
    if any(not cells.known(x) for x in touched.outside.values()):
        raise Refused("a tensor that f holds where it cannot be followed")
    ks = [n for k in slope for n in cells.read(k).flat]
    bent = None if second is None else Bent(*_gradient(cells, scene, leaves, aliases, now, second))
    first = _gradient(cells, scene, leaves, aliases, now, found)
    return Traced(cells.graph, KIND_OF[state[0].dtype], KIND_OF[scene.t.dtype], ks, *first, bent)


def _pulled(
    values: Sequence[Tensor | None], inputs: Sequence[Tensor], seeds: Sequence[Tensor], again: bool
) -> list[Tensor | None]:
    """The transposed derivative of values; ``again``: with its own graph."""
    roots = [(x, seed) for x, seed in zip(values, seeds, strict=True) if x is not None and x.requires_grad]
    if not roots:
        return [None] * len(inputs)
    ends, weights = zip(*roots, strict=True)
    return list(torch.autograd.grad(ends, inputs, weights, create_graph=again, retain_graph=True, allow_unused=True))


def _gradient(
    cells: Cells,
    scene: Scene,
    leaves: State,
    aliases: list[Tensor],
    now: Tensor,
    found: Sequence[Tensor | None],
) -> tuple[list[Node], dict[Name, Node], Node]:
    """Derivatives by leaves, aliases that want one, and the time, as nodes."""

    def numbers(g: Tensor | None, like: Tensor) -> list[Node]:
        if g is None:
            return [cells.graph.constant(0, cells.kind(like))] * like.numel()
        return list(cells.read(g).flat)

    of_state = [n for g, x in zip(found, leaves, strict=False) for n in numbers(g, x)]
    of_held: dict[Name, Node] = {}
    rest, first = iter(found[len(leaves) :]), {"p": 0, "q": 0}
    for x, own in zip(aliases, scene.own, strict=True):
        name = "q" if own else "p"
        g = next(rest) if x.requires_grad else None
        if g is not None:
            of_held |= {(name, j): node for j, node in enumerate(cells.read(g).flat, first[name])}
        first[name] += x.numel()
    return of_state, of_held, numbers(next(rest), now)[0]


def _refuse_mixing(cells: Cells, scene: Scene, traced: Traced) -> None:
    """Two members at once: each must come out as the first does alone, and know nothing of the other."""
    graph = cells.graph
    leaves = tuple(_leaf(scene.rows(x, 2), x, False) for x in scene.state)
    now = _leaf(scene.t, scene.t, False)
    aliases = _aliases(cells, scene, 2)
    for row, name in ((0, "y"), (1, "other y")):
        _named(cells, name, [scene.of_row(x, row) for x in leaves])
    cells.name(now, "t")
    with torch.no_grad(), Unpeeked(), cells:
        slope = _slope(scene, leaves, now, aliases)
    first, second = ([n for k in slope for n in cells.read(scene.of_row(k, row)).flat] for row in (0, 1))
    names = {x.payload: x for x in graph.nodes if x.op == "input"}
    others = {(f"other {name}", j): x for (name, j), x in names.items() if f"other {name}" in {n for n, _ in names}}
    alike = graph.substituted(second, others)
    if not all(a is b and b is c for a, b, c in zip(first, traced.slope, alike, strict=True)):
        raise Refused("members of a batch that depend on each other")


def _slope(scene: Scene, leaves: State, now: Tensor, aliases: list[Tensor]) -> State:
    f, args = scene.held.rebound(aliases)
    slope = scene.structure.flatten(f(now, scene.structure.unflatten(leaves), *args), "the value of f")
    for k, y in zip(slope, leaves, strict=True):
        if k.shape != y.shape or k.dtype != y.dtype:
            raise Refused(f"f returned shape {tuple(k.shape)} for a state of shape {tuple(y.shape)}")
    return slope


def _aliases(cells: Cells, scene: Scene, count: int) -> list[Tensor]:
    """The held tensors, or the parts of them that belong to so many members, named."""
    made = []
    first = {"p": 0, "q": 0}
    for x, own in zip(scene.held.tensors, scene.own, strict=True):
        alias = _leaf(scene.rows(x, count) if own else x, x, x.requires_grad)
        if own:
            for row, name in list(enumerate(("q", "other q")))[:count]:
                cells.name(scene.of_row(alias.detach(), row), name, first["q"])
        else:
            cells.name(alias, "p", first["p"])
        first["q" if own else "p"] += alias.numel() // (count if own else 1)
        made.append(alias)
    return made


def _leaf(x: Tensor, like: Tensor, wanted: bool) -> Tensor:
    """The same numbers in memory of their own; a parameter stays one."""
    alias = x.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(like, torch.nn.Parameter):
        alias = torch.nn.Parameter(alias, wanted)
    alias.__dict__.update(like.__dict__)
    return alias.requires_grad_(wanted)


def _named(cells: Cells, name: str, tensors: Sequence[Tensor]) -> None:
    """Number the inputs of several tensors in a row."""
    first = 0
    for x in tensors:
        cells.name(x.detach(), name, first)
        first += x.numel()
