"""An explicit Runge-Kutta step and its transpose as programs, from those of f and its vector-Jacobian product.

    Y_i = y + h sum_{j<i} a_ij k_j,    k_i = f(t_i, Y_i),    y_new = y + h sum_i b_i k_i
    w_i = h (b_i lam + sum_{j>i} a_ji th_j),    th_i = f_y^T w_i,    lam_new = lam + sum_i th_i,    mu += f_p^T w_i

Source: Sandu (2006), Springer LNCS 3994, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adjoint.engines.native.program import Graph, Node
from adjoint.engines.native.trace import Name, Traced
from adjoint.steppers.stages import Terms
from adjoint.tableaus import Tableau


@dataclass(frozen=True)
class Formulas:
    """One step over the inputs "start", "stop" (f64), ("y", i), ("p", j), and its transpose, over ("lam", i) too."""

    graph: Graph
    new: list[Node]
    of_state: list[Node]
    of_held: dict[Name, Node]
    """What a step adds to the cotangents of ("p", j) and ("q", j)."""
    of_ends: tuple[Node, Node]
    """What it adds to those of its start and its stop."""


def compose(traced: Traced, tableau: Tableau) -> Formulas:
    graph, kind = traced.graph, traced.kind
    leaves = len(traced.slope)
    start, stop = graph.input(("start",), "f64"), graph.input(("stop",), "f64")
    h = graph("time_sub", stop, start)
    y = [graph.input(("y", i), kind) for i in range(leaves)]
    lam = [graph.input(("lam", i), kind) for i in range(leaves)]

    def length(scale: float) -> Node:
        """h times a weight: in double precision, as the step is."""
        exact = h if scale == 1 else graph("time_mul", h, graph.constant(scale, "f64"))
        return graph("convert", exact, kind=kind)

    def increment(weights: Sequence[float], columns: dict[int, list[Node]]) -> list[Node] | None:
        """h sum_i w_i column_i; None without weights."""
        if not any(weights):
            return None
        terms = Terms(weights)
        total = columns[terms.first]
        for i, ratio in terms.rest:
            total = [graph("add", x, graph.scaled(ratio, k)) for x, k in zip(total, columns[i], strict=True)]
        return [graph("mul", length(terms.scale), x) for x in total]

    def plus(x: list[Node], more: list[Node] | None) -> list[Node]:
        return x if more is None else [graph("add", a, b) for a, b in zip(x, more, strict=True)]

    points: list[dict[tuple[object, ...], Node]] = []
    slopes: dict[int, list[Node]] = {}
    for i in range(tableau.weighted):
        at = plus(y, increment([*tableau.a[i], 0.0], slopes))
        now = graph("convert", _time(graph, start, stop, h, tableau.c[i]), kind=traced.time)
        points.append({("t", 0): now, **{("y", n): x for n, x in enumerate(at)}})
        slopes[i] = graph.substituted(traced.slope, points[i])
    new = plus(y, increment(tableau.b, slopes))

    wanted = traced.of_held
    transposed: dict[int, list[Node]] = {}
    of_state, of_held = lam, dict[Name, Node]()
    of_times: dict[int, Node] = {}
    for i in reversed(range(tableau.weighted)):
        later = range(i + 1, tableau.weighted)
        weights = [tableau.b[i], *(tableau.a[j][i] for j in later)]
        w = increment(weights, {0: lam, **{n: transposed[j] for n, j in enumerate(later, 1)}})
        if w is None:
            transposed[i] = [graph.constant(0, kind)] * leaves
            continue
        names = points[i] | {("lam", n): x for n, x in enumerate(w)}
        found = graph.substituted([*traced.of_state, *wanted.values(), traced.of_time], names)
        transposed[i], of_times[i] = found[:leaves], found[-1]
        of_state = plus(of_state, transposed[i])
        for j, node in zip(wanted, found[leaves:-1], strict=True):
            of_held[j] = graph("add", of_held[j], node) if j in of_held else node
    pairs = [(lam, [(b, slopes[i]) for i, b in enumerate(tableau.b) if b])]
    pairs += [(transposed[i], [(a, slopes[j]) for j, a in enumerate(tableau.a[i]) if a]) for i in slopes]
    of_length = graph.sum(
        (
            graph("mul", x, graph.scaled(w, k))
            for xs, terms in pairs
            for w, ks in terms
            for x, k in zip(xs, ks, strict=True)
        ),
        kind,
    )
    of_length = graph("convert", of_length, kind="f64")
    first, last = graph("neg", of_length), of_length
    for i, tau in of_times.items():
        wide = graph("convert", tau, kind="f64")
        first = graph("add", first, graph.scaled(1 - tableau.c[i], wide))
        last = graph("add", last, graph.scaled(tableau.c[i], wide))
    return Formulas(graph, new, of_state, of_held, (first, last))


def _time(graph: Graph, start: Node, stop: Node, h: Node, c: float) -> Node:
    """The time of a stage, as :meth:`ExplicitProgram.stage_times` has it."""
    if c in (0, 1):
        return stop if c else start
    return graph("time_add", start, graph("time_mul", h, graph.constant(c, "f64")))
