"""Operations that move numbers and change none, or add them where they meet: torch itself says where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native.cells import Cells, Formulas, Nodes, Refused
from adjoint.engines.native.program import Node

MOVED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys("cat stack roll flip repeat clone _unsafe_view select_backward slice_backward".split(), (0,)),
    **dict.fromkeys("diag_embed tril triu index_select gather index expand_copy diagonal_backward".split(), (0,)),
    **dict.fromkeys("permute_copy view_copy lift_fresh_copy constant_pad_nd _reshape_copy".split(), (0,)),
    **dict.fromkeys("select_scatter slice_scatter".split(), (0, 1)),
    "index_put": (0, 2),
    "scatter": (0, 3),
}
"""Which arguments hold the numbers; the others say where they go."""
ADDED = {"index_put": 2, "_index_put_impl": 2, "index_add": 3, "scatter_add": 3}
"""The argument that is added to the first, at places that the others say."""


def _moved(cells: Cells, function: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    """Asked of torch: place 0 holds a zero, the others the numbers of the arguments."""
    name = function.overloadpacket.__name__.rstrip("_")
    kind, places = cells.kind(result), MOVED[name]
    if name == "index_put" and (kwargs.get("accumulate") or (len(args) > 3 and args[3])):
        return _added_at(cells, function, result, args, kwargs)
    if name == "constant_pad_nd" and (args[2] if len(args) > 2 else kwargs.get("value", 0)) != 0:
        raise Refused("padding that is not zero")
    nodes: list[Node] = [cells.graph.constant(0, kind)]

    def numbered(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [numbered(y) for y in x]
        if not isinstance(x, Tensor):
            raise Refused(f"the arguments of {function}")
        first = len(nodes)
        nodes.extend(cells.read(x, kind).flat)
        return torch.arange(first, len(nodes)).reshape(x.shape)

    _refuse_computed(cells, [x for i, x in enumerate(args) if i not in places])
    moved = [numbered(x) if i in places else x for i, x in enumerate(args)]
    found = function(*moved, **{k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format")})
    table = np.empty(len(nodes), dtype=object)
    table[:] = nodes
    return table[found.numpy()]


def _added_at(cells: Cells, function: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    name, kind, g = function.overloadpacket.__name__.rstrip("_"), cells.kind(result), cells.graph
    last = ADDED[name]
    if name.endswith("index_put") and not (kwargs.get("accumulate") or (len(args) > 3 and args[3])):
        return _moved(cells, torch.ops.aten.index_put.default, result, args[:3], {})
    if name == "_index_put_impl":
        function = torch.ops.aten.index_put.default
        args, kwargs = args[:3], {"accumulate": True}
    _refuse_computed(cells, [x for i, x in enumerate(args) if i not in (0, last)])
    alpha = kwargs.get("alpha", 1)
    target, source = cells.read(args[0], kind).copy(), cells.read(args[last], kind)
    flat, size = target.reshape(-1), args[last].numel()
    for i, x in enumerate(source.flat):  # where does one number go?
        single = torch.zeros(size, dtype=torch.int64)
        single[i] = 1
        given = [*args]
        given[0] = torch.zeros(args[0].shape, dtype=torch.int64)
        given[last] = single.reshape(args[last].shape)
        functional = getattr(torch.ops.aten, name.removeprefix("_").removesuffix("_impl")).default
        for place in functional(*given, **{k: v for k, v in kwargs.items() if k == "accumulate"}).flatten().nonzero():
            flat[int(place)] = g("add", flat[int(place)], g.scaled(alpha, x))
    return flat.reshape(target.shape)


def _refuse_computed(cells: Cells, places: Sequence[Any]) -> None:
    for x in places:
        for y in x if isinstance(x, (list, tuple)) else (x,):
            if isinstance(y, Tensor) and cells.known(y):
                raise Refused("indices, or masks in brackets, that are computed")


MOVES: Formulas = {**dict.fromkeys(ADDED, _added_at), **dict.fromkeys(MOVED, _moved)}
