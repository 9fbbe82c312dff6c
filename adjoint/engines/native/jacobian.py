"""The Jacobian of f as a program, entry by entry, from the transpose that torch made of it.

The transpose lam^T df/dy is linear in lam: what stands beside lam_i in its j-th number is df_i/dy_j. So the entries mean
what they mean to torch (detach, ties, where), and those that are not there are known to be zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adjoint.engines.native.cells import Refused
from adjoint.engines.native.program import Graph, Node, behind
from adjoint.engines.native.trace import Traced

Row = dict[int, Node]


@dataclass(frozen=True)
class Jacobian:
    entries: dict[tuple[int, int], Node]
    """df_i/dy_j, by (i, j), where it is not zero always."""
    in_time: Row
    """df_i/dt, by i."""


def jacobian(traced: Traced) -> Jacobian:
    """Raises Refused if the transpose is not linear, as an autograd.Function of the caller's own may have it."""
    *columns, in_time = coefficients(traced.graph, [*traced.of_state, traced.of_time], "lam")
    entries = {(i, j): x for j, column in enumerate(columns) for i, x in column.items()}
    return Jacobian(entries, in_time)


def coefficients(graph: Graph, roots: Sequence[Node], name: str) -> list[Row]:
    """What each root multiplies the inputs (name, i) with, by i."""
    found: dict[Node, Row] = {}
    for x in behind(roots):
        if x.op == "input" and x.payload[0] == name:
            found[x] = {x.payload[1]: graph.constant(1, x.kind)}
        elif any(y in found for y in x.args):
            found[x] = _linear(graph, x, found)
    return [{i: c for i, c in _of(x, found).items() if not _is_zero(c)} for x in roots]


def _of(x: Node, found: dict[Node, Row]) -> Row:
    """Its coefficients; of a sum, what does not depend on the inputs must be zero."""
    if x not in found and not _is_zero(x):
        raise Refused("a transpose that is not linear")
    return found.get(x, {})


def _is_zero(x: Node) -> bool:
    """Whatever its inputs are, if they are finite."""
    if x.op == "const":
        return bool(x.payload == 0)
    if x.op == "mul":
        return any(map(_is_zero, x.args))
    return x.op in ("add", "sub", "neg") and all(map(_is_zero, x.args))


def _linear(graph: Graph, x: Node, found: dict[Node, Row]) -> Row:
    first, *rest = x.args
    if x.op == "neg":
        return {i: graph("neg", c) for i, c in found[first].items()}
    if x.op == "convert" and x.kind[0] == "f":
        return {i: graph("convert", c, kind=x.kind) for i, c in found[first].items()}
    if x.op in ("add", "sub"):
        sums = dict(_of(first, found))
        for i, c in _of(rest[0], found).items():
            if i in sums:
                sums[i] = graph(x.op, sums[i], c)
            else:
                sums[i] = c if x.op == "add" else graph("neg", c)
        return sums
    if x.op == "mul" and not all(y in found for y in x.args):
        row, factor = (first, rest[0]) if first in found else (rest[0], first)
        return {i: graph("mul", c, factor) for i, c in found[row].items()}
    if x.op == "div" and rest[0] not in found:
        return {i: graph("div", c, rest[0]) for i, c in found[first].items()}
    if x.op == "select" and first not in found:
        yes, no = (_of(y, found) for y in rest)
        zero = graph.constant(0, x.kind)
        return {i: graph("select", first, yes.get(i, zero), no.get(i, zero)) for i in (*yes, *no)}
    raise Refused(f"a transpose that is not linear ({x.op})")
