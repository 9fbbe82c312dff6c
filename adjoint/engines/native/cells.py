"""What torch does to tensors, followed number by number.

Every storage is an array of nodes: its tensors, however they are sliced, transposed or written to, are strided views of
that array, as they are of the memory. So views need no rule, and a change in place is seen by all who share it. What
moves numbers without changing any is asked of torch itself, with the places of the numbers in place of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adjoint.engines.native.program import Graph, Kind, Node
from adjoint.tensors import tensors_in

KIND_OF = {torch.float64: "f64", torch.float32: "f32", torch.int64: "i64", torch.bool: "i1"}
DTYPE_OF = {kind: dtype for dtype, kind in KIND_OF.items()}
RESHAPED = frozenset(("squeeze_", "unsqueeze_", "t_", "transpose_", "detach_", "requires_grad_", "as_strided_"))
"""In place, and no number changes."""
COPYING = frozenset(("to", "contiguous", "reshape", "flatten", "type_as"))
"""Views where that will do, else copies, in the same order."""
Nodes = np.ndarray[Any, Any]
Formulas = dict[str, Callable[..., Any]]


class Refused(Exception):
    """What a program cannot say, in words."""


class Cells(TorchDispatchMode):
    """While it is on, operations on named tensors are written down in ``graph``; the others are merely carried out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, graph: Graph, formulas: Formulas, simpler: Formulas, most: int) -> None:
        super().__init__()
        self.graph, self.most, self._formulas, self._simpler = graph, most, formulas, simpler
        self._cells: dict[int, Nodes] = {}
        self._held: list[Tensor] = []

    def name(self, x: Tensor, name: str, first: int = 0) -> None:
        """Make every number of x an input of the program, (name, index), counted from ``first``."""
        kind = self.kind(x)
        nodes = [self.graph.input((name, i), kind) for i in range(first, first + x.numel())]
        self.write(x, _objects(nodes).reshape(x.shape))

    def kind(self, x: Tensor) -> Kind:
        if x.dtype not in KIND_OF:
            raise Refused(f"numbers of type {x.dtype}")
        return KIND_OF[x.dtype]

    def known(self, x: Tensor) -> bool:
        """Whether it holds, or may hold, what depends on an input."""
        return x.untyped_storage()._cdata in self._cells

    def read(self, x: Tensor, kind: Kind | None = None) -> Nodes:
        """The nodes of a tensor, shaped like it; numbers that depend on nothing are constants."""
        graph = self.graph
        if not self.known(x):
            kind = kind or self.kind(x)
            values = torch.zeros(x.shape) if x._is_zerotensor() else x.detach().to(DTYPE_OF[kind])
            found = [graph.constant(v, kind) for v in values.flatten().tolist()]
            return _objects(found).reshape(x.shape)
        nodes = self._view(x)
        return (
            nodes
            if kind is None or kind == self.kind(x)
            else self.each(lambda v: graph("convert", v, kind=kind), nodes)
        )

    def write(self, x: Tensor, nodes: Nodes) -> None:
        """Put nodes in place of a tensor's numbers."""
        key = x.untyped_storage()._cdata
        if key not in self._cells:
            whole = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
            if x.numel() == whole.numel():
                self._cells[key] = np.empty(whole.numel(), dtype=object)
            else:
                self._cells[key] = self.read(whole).copy()
            self._held.append(x.detach())
        self._view(x)[...] = nodes

    def _view(self, x: Tensor) -> Nodes:
        flat = self._cells[x.untyped_storage()._cdata]
        if x.untyped_storage().nbytes() != len(flat) * x.itemsize or x.is_conj() or x.is_neg():
            raise Refused("memory that is looked at as another type")
        strides = [s * flat.itemsize for s in x.stride()]
        return np.lib.stride_tricks.as_strided(flat[x.storage_offset() :], x.shape, strides)

    def each(self, function: Callable[..., Node], *arrays: Nodes) -> Nodes:
        """The function of every number, broadcast."""
        with np.errstate(all="ignore"):
            return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)

    # -- the mode

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise Refused(f"random numbers ({function})")
        if not any(self.known(x) for x in tensors_in((*args, *kwargs.values()))):
            return function(*args, **kwargs)
        if len(self.graph.nodes) > self.most:
            raise Refused(f"more than {self.most} operations on numbers")
        return self._followed(function, args, kwargs)

    def _followed(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = function.overloadpacket.__name__
        schema = function._schema
        if name.endswith("_like") or name.startswith("new_") or name in RESHAPED:
            return function(*args, **kwargs)
        if schema.is_mutable:
            return self._in_place(function, name, args, kwargs)
        if any(x.alias_info is not None for x in schema.returns):
            return self._viewed(function, name, args, kwargs)
        formula = self._formulas.get(name)
        if formula is None:
            return self._decomposed(function, args, kwargs)
        result = function(*args, **kwargs)
        values = formula(self, function, result, args, kwargs)
        for x, nodes in zip(*((result,), (values,)) if isinstance(result, Tensor) else (result, values), strict=True):
            self.write(x, nodes)
        return result

    def _viewed(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A view of the same memory; or a copy, of operations that may be either."""
        result = function(*args, **kwargs)
        copies = [x for x in tensors_in((result,)) if not self.known(x) and not x.is_meta]
        if copies and (name not in COPYING or result is not copies[0]):
            raise Refused(f"the operation {function}, which copies here")
        for x in copies:
            self.write(x, self.read(args[0], self.kind(x)).reshape(x.shape))
        return result

    def _in_place(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        formula = self._formulas.get(name.removesuffix("_"))
        if formula is None or not name.endswith("_") or "out" in kwargs:
            raise Refused(f"the operation {function}")
        target = args[0]
        self.write(target, self.read(target))
        values = formula(self, function, target, args, kwargs)
        result = function(*args, **kwargs)
        self._view(target)[...] = values
        return result

    def _decomposed(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The same in simpler operations, if torch knows how."""
        simpler = self._simpler.get(function.overloadpacket.__name__)
        simpler = simpler or torch._decomp.decomposition_table.get(function)
        if simpler is None:
            raise Refused(f"the operation {function}")
        with self:
            return simpler(*args, **kwargs)


class Unpeeked(TorchFunctionMode):
    """Refuses what takes numbers out of tensors behind torch's back: they would be taken for constants."""

    TAKES = frozenset(("numpy", "tolist", "__array__", "data_ptr", "__dlpack__", "storage", "untyped_storage"))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.TAKES:
            raise Refused(f"{name}(), which hands numbers to something that is not torch")
        return function(*args, **(kwargs or {}))


def _objects(nodes: Sequence[Node]) -> Nodes:
    found = np.empty(len(nodes), dtype=object)
    found[:] = nodes
    return found
