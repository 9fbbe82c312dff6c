"""What each of torch's operations is, number by number. What is missing here is refused by name.

A formula gets (cells, the operation, a tensor of the type and shape of its result, args, kwargs), and returns nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native.cells import Cells, Nodes, Refused
from adjoint.engines.native.moves import MOVES
from adjoint.engines.native.program import COMPARISONS, Graph, Kind, Node

Formula = Callable[..., Any]


def _operand(cells: Cells, x: Any, kind: Kind) -> Nodes:
    """A tensor or a number, as nodes of one kind: torch, too, converts before it computes."""
    if isinstance(x, Tensor):
        return cells.read(x, kind)
    return np.asarray(cells.graph.constant(x, kind), dtype=object)


# -- one number from one number of each argument

UNARY = (
    "neg exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc sqrt "
    "abs floor ceil trunc round"
).split()


def _sign(g: Graph, x: Node) -> Node:
    zero, one = g.constant(0, x.kind), g.constant(1, x.kind)
    return g("select", g("gt", x, zero), one, g("select", g("lt", x, zero), g.constant(-1, x.kind), zero))


def _sigmoid(g: Graph, x: Node) -> Node:
    one = g.constant(1, x.kind)
    return g("div", one, g("add", one, g("exp", g("neg", x))))


def _power(g: Graph, x: Node, y: Node) -> Node:
    """As torch does it: small powers are products."""
    exponent = float(y.payload) if y.op == "const" else math.nan
    if exponent in (1.0, 2.0, 3.0):
        return reduce(partial(g, "mul"), [x] * int(exponent))
    if exponent == 0.0:
        return g.constant(1, x.kind)
    if exponent in (0.5, -0.5):
        return g("sqrt", x) if exponent > 0 else _reciprocal(g, g("sqrt", x))
    if exponent in (-1.0, -2.0):
        return _reciprocal(g, x if exponent == -1.0 else g("mul", x, x))
    return g("pow", x, y)


def _reciprocal(g: Graph, x: Node) -> Node:
    return g("div", g.constant(1, x.kind), x)


def _remainder(g: Graph, x: Node, y: Node) -> Node:
    """With the sign of y."""
    rest, zero = g("fmod", x, y), g.constant(0, x.kind)
    other_way = g("xor", g("lt", rest, zero), g("lt", y, zero))
    return g("select", g("and", g("ne", rest, zero), other_way), g("add", rest, y), rest)


def _not(g: Graph, x: Node) -> Node:
    return g("eq", x, g.constant(0, x.kind))


POINTWISE: dict[str, Callable[..., Node]] = {
    **{name: (lambda g, x, name=name: g(name, x)) for name in UNARY},
    "reciprocal": _reciprocal,
    "rsqrt": lambda g, x: _reciprocal(g, g("sqrt", x)),
    "square": lambda g, x: g("mul", x, x),
    "sigmoid": _sigmoid,
    "relu": lambda g, x: g("maximum", x, g.constant(0, x.kind)),
    "sign": _sign,
    "sgn": _sign,
    "frac": lambda g, x: g("sub", x, g("trunc", x)),
    "positive": lambda g, x: x,
    "mul": lambda g, x, y: g("and" if x.kind == "i1" else "mul", x, y),
    "atan2": lambda g, x, y: g("atan2", x, y),
    "hypot": lambda g, x, y: g("hypot", x, y),
    "copysign": lambda g, x, y: g("copysign", x, y),
    "fmod": lambda g, x, y: g("fmod", x, y),
    "remainder": _remainder,
    "maximum": lambda g, x, y: g("maximum", x, y),
    "minimum": lambda g, x, y: g("minimum", x, y),
    "fmax": lambda g, x, y: g("fmax", x, y),
    "fmin": lambda g, x, y: g("fmin", x, y),
    "clamp_min": lambda g, x, y: g("maximum", x, y),
    "clamp_max": lambda g, x, y: g("minimum", x, y),
    "pow": _power,
    "tanh_backward": lambda g, d, y: g("mul", d, g("sub", g.constant(1, y.kind), g("mul", y, y))),
    "sigmoid_backward": lambda g, d, y: g("mul", d, g("mul", g("sub", g.constant(1, y.kind), y), y)),
    "threshold_backward": lambda g, d, x, y: g("select", g("le", x, y), g.constant(0, d.kind), d),
    "lerp": lambda g, x, y, w: g("add", x, g("mul", w, g("sub", y, x))),
    "copy": lambda g, x, y: y,
    "fill": lambda g, x, y: y,
}
"""Of numbers that are converted to the kind of the result first."""


def _pointwise(function: Callable[..., Node]) -> Formula:
    def formula(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
        if any(not isinstance(x, (Tensor, bool, int, float)) for x in args[: function.__code__.co_argcount - 1]):
            raise Refused(f"the arguments {args[1:]}")
        kind = cells.kind(result)
        operands = [_operand(cells, x, kind) for x in args[: function.__code__.co_argcount - 1]]
        return cells.each(partial(function, cells.graph), *operands)

    return formula


def _linear(cells: Cells, function: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    """x + alpha y, and the like."""
    g, kind, name = cells.graph, cells.kind(result), function.overloadpacket.__name__.rstrip("_")
    x, y = (_operand(cells, v, kind) for v in args[:2])
    if name == "rsub":
        x, y = y, x
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if alpha != 1:
        y = cells.each(partial(g.scaled, alpha), y)
    if kind == "i1":
        return cells.each(partial(g, "or"), x, y)
    return cells.each(partial(g, "add" if name == "add" else "sub"), x, y)


def _divided(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    g, kind, rounding = cells.graph, cells.kind(result), kwargs.get("rounding_mode")
    if kind[0] != "f" or rounding == "floor":
        raise Refused("division that is rounded down")
    x, y = (_operand(cells, v, kind) for v in args[:2])
    quotient = cells.each(partial(g, "div"), x, y)
    return quotient if rounding is None else cells.each(partial(g, "trunc"), quotient)


def _compared(cells: Cells, function: Any, _: Tensor, args: Any, kwargs: Any) -> Nodes:
    g, name = cells.graph, function.overloadpacket.__name__.rstrip("_")
    x, y = _alike(cells, args[:2])
    return cells.each(partial(g, name), x, y)


def _alike(cells: Cells, args: Sequence[Any]) -> list[Nodes]:
    """Operands in the type that torch compares them in."""
    kind = cells.kind(torch.empty(0, dtype=torch.result_type(*args)))
    return [_operand(cells, x, kind) for x in args]


def _logical(cells: Cells, function: Any, _: Tensor, args: Any, kwargs: Any) -> Nodes:
    kind, _, word = function.overloadpacket.__name__.strip("_").rpartition("_")
    if kind != "logical" and any(not isinstance(x, Tensor) or x.dtype is not torch.bool for x in args):
        raise Refused(f"the operation {function}, of numbers that are not truths")
    g = cells.graph
    truths = [
        cells.each(lambda v: g("ne", v, g.constant(0, v.kind)) if v.kind != "i1" else v, cells.read(x)) for x in args
    ]
    return cells.each(partial(_not, g) if word == "not" else partial(g, word), *truths)


def _tested(cells: Cells, function: Any, _: Tensor, args: Any, kwargs: Any) -> Nodes:
    g, name = cells.graph, function.overloadpacket.__name__

    def test(x: Node) -> Node:
        if name == "isnan":
            return g("ne", x, x)
        size, infinite = g("abs", x), g.constant(math.inf, x.kind)
        return g("eq", size, infinite) if name == "isinf" else g("lt", size, infinite)

    return cells.each(test, cells.read(args[0]))


def _where(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    kind = cells.kind(result)
    return cells.each(
        partial(cells.graph, "select"), cells.read(args[0], "i1"), *(_operand(cells, x, kind) for x in args[1:3])
    )


def _masked(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    kind = cells.kind(result)
    x, value = _operand(cells, args[0], kind), _operand(cells, args[2], kind)
    return cells.each(partial(cells.graph, "select"), cells.read(args[1], "i1"), value, x)


def _clamp(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    g, kind = cells.graph, cells.kind(result)
    x = _operand(cells, args[0], kind)
    least = kwargs.get("min", args[1] if len(args) > 1 else None)
    most = kwargs.get("max", args[2] if len(args) > 2 else None)
    if least is not None:
        x = cells.each(partial(g, "maximum"), x, _operand(cells, least, kind))
    return x if most is None else cells.each(partial(g, "minimum"), x, _operand(cells, most, kind))


def _with_product(cells: Cells, function: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    """self + value a b, self + value a / b."""
    g, kind = cells.graph, cells.kind(result)
    how = "mul" if "mul" in function.overloadpacket.__name__ else "div"
    x, a, b = (_operand(cells, v, kind) for v in args[:3])
    scaled = cells.each(partial(g.scaled, kwargs.get("value", 1)), a)
    return cells.each(lambda x, a, b: g("add", x, g(how, a, b)), x, scaled, b)


# -- many numbers into one


def _rows(nodes: Nodes, dims: Any) -> tuple[Nodes, tuple[int, ...]]:
    """The numbers along these dimensions as one last dimension, and which they were."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = range(nodes.ndim)
    chosen = tuple(sorted(d % max(nodes.ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)))
    chosen = chosen if nodes.ndim else ()
    kept = [d for d in range(nodes.ndim) if d not in chosen]
    moved = nodes.transpose(*kept, *chosen)
    return moved.reshape(*(nodes.shape[d] for d in kept), -1), chosen


def _reduced(combine: Callable[..., Node]) -> Formula:
    def formula(cells: Cells, function: Any, result: Any, args: Any, kwargs: Any) -> Nodes:
        names = [x.name for x in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if not isinstance(result, Tensor):
            raise Refused(f"the operation {function}")
        x, dims = given.get("self", given.get("inp")), given.get("dim", given.get("dims"))  # torch's primitives say inp
        rows, _ = _rows(cells.read(x, cells.kind(result)), dims)
        if rows.shape[-1] == 0:
            raise Refused("a sum of nothing")
        found = np.empty(rows.shape[:-1], dtype=object)
        for index in np.ndindex(found.shape):
            found[index] = combine(cells.graph, list(rows[index]))
        return found.reshape(result.shape)

    return formula


def _total(g: Graph, terms: list[Node]) -> Node:
    if terms[0].kind == "i1":
        terms = [g("convert", x, kind="i64") for x in terms]
    return g.sum(terms, terms[0].kind)


def _mean(g: Graph, terms: list[Node]) -> Node:
    return g("div", _total(g, terms), g.constant(len(terms), terms[0].kind))


def _cumulated(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    g, nodes = cells.graph, cells.read(args[0], cells.kind(result))
    if nodes.ndim == 0:
        return nodes
    found = np.moveaxis(nodes.copy(), args[1], 0)
    for i in range(1, len(found)):
        found[i, ...] = cells.each(partial(g, "add"), found[i - 1], found[i])
    return np.moveaxis(found, 0, args[1])


# -- products of matrices


def _product(g: Graph, a: Nodes, b: Nodes) -> Nodes:
    """(.., n, k) times (.., k, m), with as many leading dimensions in both."""
    kind = next(iter((*a.flat, *b.flat))).kind if a.size else "f64"
    found = np.empty((*a.shape[:-1], b.shape[-1]), dtype=object)
    for index in np.ndindex(found.shape):
        row, column = a[index[:-1]], b[(*index[:-2], slice(None), index[-1])]
        found[index] = g.sum((g("mul", x, y) for x, y in zip(row, column, strict=True)), kind)
    return found


def _matrices(cells: Cells, function: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    g, kind, name = cells.graph, cells.kind(result), function.overloadpacket.__name__.rstrip("_")
    factors = args[1:3] if name in ("addmm", "baddbmm", "addmv", "addr") else args[:2]
    a, b = (cells.read(x, kind) for x in factors)
    if name == "addr":
        a, b = a[:, None], b[None, :]
    elif a.ndim == 1:
        a = a[None]
    product = _product(g, a, b[:, None] if b.ndim == 1 else b).reshape(result.shape)
    if len(factors) == 2 and args[0] is factors[0]:
        return product
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if alpha != 1:
        product = cells.each(partial(g.scaled, alpha), product)
    if beta == 0:
        return product
    bias = cells.read(args[0], kind)
    bias = bias if beta == 1 else cells.each(partial(g.scaled, beta), bias)
    return cells.each(partial(g, "add"), bias, product)


def _converted(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    return cells.read(args[0], cells.kind(result))


def _zeroed(cells: Cells, _: Any, result: Tensor, args: Any, kwargs: Any) -> Nodes:
    zero = cells.graph.constant(0, cells.kind(result))
    return cells.each(lambda _: zero, cells.read(args[0]))


FORMULAS: dict[str, Formula] = {
    **{name: _pointwise(function) for name, function in POINTWISE.items()},
    **dict.fromkeys(("add", "sub", "rsub"), _linear),
    **dict.fromkeys(COMPARISONS, _compared),
    **dict.fromkeys("logical_and logical_or logical_xor logical_not".split(), _logical),
    **dict.fromkeys("bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__".split(), _logical),
    **dict.fromkeys("isnan isinf isfinite".split(), _tested),
    **dict.fromkeys(("addcmul", "addcdiv"), _with_product),
    **dict.fromkeys("mm bmm mv dot addmm baddbmm addmv addr".split(), _matrices),
    **MOVES,
    **dict.fromkeys(("div", "divide", "true_divide"), _divided),
    "where": _where,
    "masked_fill": _masked,
    "clamp": _clamp,
    "sum": _reduced(_total),
    "mean": _reduced(_mean),
    "prod": _reduced(lambda g, terms: reduce(partial(g, "mul"), terms)),
    "amax": _reduced(lambda g, terms: reduce(partial(g, "maximum"), terms)),
    "amin": _reduced(lambda g, terms: reduce(partial(g, "minimum"), terms)),
    "max": _reduced(lambda g, terms: reduce(partial(g, "maximum"), terms)),
    "min": _reduced(lambda g, terms: reduce(partial(g, "minimum"), terms)),
    "cumsum": _cumulated,
    "_to_copy": _converted,
    "zero": _zeroed,
}


def _variance(x: Tensor, dim: Any = None, correction: Any = 1, keepdim: bool = False, **_: Any) -> Tensor:
    dims = list(range(x.ndim)) if dim is None else dim
    count = math.prod(x.shape[d] for d in ([dims] if isinstance(dims, int) else dims))
    return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim) / (count - correction)


SIMPLER: dict[str, Callable[..., Any]] = {"var": _variance}
"""In other operations of torch, where torch's own table says nothing that is of use."""
