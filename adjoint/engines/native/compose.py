"""An explicit Runge-Kutta step and its transpose as programs, from those of f and its vector-Jacobian product.

    Y_i = y + h sum_{j<i} a_ij k_j,    k_i = f(t_i, Y_i),    y_new = y + h sum_i b_i k_i
    w_i = h (b_i lam + sum_{j>i} a_ji th_j),    th_i = f_y^T w_i,    lam_new = lam + sum_i th_i,    mu += f_p^T w_i

Source: Sandu (2006), Springer LNCS 3994, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adjoint.engines.native.program import Graph, Node
from adjoint.engines.native.trace import Name, Traced
from adjoint.steppers.stages import Terms
from adjoint.tableaus import Tableau


class Transpose(NamedTuple):
    """The transpose of a step, over ("lam", i) too; with ("g", i) it takes cotangents of the slopes, stage by stage."""

    of_state: list[Node]
    of_held: dict[Name, Node]
    """What a step adds to the cotangents of ("p", j) and ("q", j)."""
    of_ends: tuple[Node, Node]
    """What it adds to those of its start and its stop."""


class Trial(NamedTuple):
    """What a step on trial finds beside the new state."""

    slopes: list[list[Node]]
    """Of the stages that the interpolant needs."""
    error: list[Node]
    transpose: Transpose
    """That of a step whose interpolant was looked at."""


@dataclass(frozen=True)
class Formulas:
    """One step over the inputs "start", "stop" (f64), ("y", i), ("p", j), ("q", j), and its transpose."""

    graph: Graph
    new: list[Node]
    transpose: Transpose
    trial: Trial | None
    """Of a method that controls its steps."""


def compose(traced: Traced, tableau: Tableau) -> Formulas:
    step = _Step(traced, tableau)
    new, trial = step.moved(tableau.b), None
    if tableau.adaptive and tableau.error is not None:
        error = step.increment(tableau.error, step.slopes) or []
        slopes = [step.slopes[i] for i in range(tableau.interpolated)]
        trial = Trial(slopes, error, step.transposed(max(tableau.weighted, tableau.interpolated), True))
    return Formulas(step.graph, new, step.transposed(tableau.weighted, False), trial)


class _Step:
    """The stages of a step, and their transposes."""

    def __init__(self, traced: Traced, tableau: Tableau) -> None:
        self.traced, self.tableau, self.graph, self.kind = traced, tableau, traced.graph, traced.kind
        graph, leaves = self.graph, range(len(traced.slope))
        self.start, self.stop = graph.input(("start",), "f64"), graph.input(("stop",), "f64")
        self.h = graph("time_sub", self.stop, self.start)
        self.y, self.lam = ([graph.input((name, i), self.kind) for i in leaves] for name in ("y", "lam"))
        self.points: list[dict[tuple[object, ...], Node]] = []
        self.slopes: dict[int, list[Node]] = {}
        for i in range(tableau.stages if tableau.adaptive else tableau.weighted):
            now = graph("convert", _time(graph, self.start, self.stop, self.h, tableau.c[i]), kind=traced.time)
            at = self.moved(tableau.a[i]) if i else self.y
            self.points.append({("t", 0): now, **{("y", n): x for n, x in enumerate(at)}})
            self.slopes[i] = graph.substituted(traced.slope, self.points[i])

    def moved(self, weights: Sequence[float]) -> list[Node]:
        """y + h sum_i w_i k_i."""
        return self._plus(self.y, self.increment(weights, self.slopes))

    def increment(self, weights: Sequence[float], columns: dict[int, list[Node]]) -> list[Node] | None:
        """h sum_i w_i column_i; None without weights."""
        if not any(weights):
            return None
        graph, terms = self.graph, Terms(weights)
        total = columns[terms.first]
        for i, ratio in terms.rest:
            total = [graph("add", x, graph.scaled(ratio, k)) for x, k in zip(total, columns[i], strict=True)]
        exact = self.h if terms.scale == 1 else graph("time_mul", self.h, graph.constant(terms.scale, "f64"))
        length = graph("convert", exact, kind=self.kind)
        return [graph("mul", length, x) for x in total]

    def _plus(self, x: list[Node], more: list[Node] | None) -> list[Node]:
        return x if more is None else [self.graph("add", a, b) for a, b in zip(x, more, strict=True)]

    def transposed(self, stages: int, looked_at: bool) -> Transpose:
        """``looked_at``: with cotangents ("g", i leaves + n) of the slopes, and one of y behind those of all stages."""
        graph, tableau, traced, leaves = self.graph, self.tableau, self.traced, len(self.y)
        th: dict[int, list[Node]] = {}
        of_state, of_held = self.lam, dict[Name, Node]()
        of_times: dict[int, Node] = {}

        def seen(i: int) -> list[Node]:
            return [graph.input(("g", i * leaves + n), self.kind) for n in range(leaves)]

        if looked_at:
            of_state = self._plus(of_state, seen(stages))
        for i in reversed(range(stages)):
            later = range(i + 1, stages)
            weights = [tableau.b[i], *(tableau.a[j][i] for j in later)]
            w = self.increment(weights, {0: self.lam, **{n: th[j] for n, j in enumerate(later, 1)}})
            if looked_at:
                w = seen(i) if w is None else self._plus(w, seen(i))
            if w is None:
                th[i] = [graph.constant(0, self.kind)] * leaves
                continue
            names = self.points[i] | {("lam", n): x for n, x in enumerate(w)}
            found = graph.substituted([*traced.of_state, *traced.of_held.values(), traced.of_time], names)
            th[i], of_times[i] = found[:leaves], found[-1]
            of_state = self._plus(of_state, th[i])
            for j, node in zip(traced.of_held, found[leaves:-1], strict=True):
                of_held[j] = graph("add", of_held[j], node) if j in of_held else node
        return Transpose(of_state, of_held, self._of_ends(th, of_times))

    def _of_ends(self, th: dict[int, list[Node]], of_times: dict[int, Node]) -> tuple[Node, Node]:
        """dL/dh by way of the states, and what the stages' own times add."""
        graph, tableau, slopes = self.graph, self.tableau, self.slopes
        pairs = [(self.lam, [(b, slopes[i]) for i, b in enumerate(tableau.b) if b])]
        pairs += [(th[i], [(a, slopes[j]) for j, a in enumerate(tableau.a[i]) if a]) for i in sorted(th)]
        terms = [
            graph("mul", x, graph.scaled(weight, k))
            for cotangents, parts in pairs
            for weight, slope in parts
            for x, k in zip(cotangents, slope, strict=True)
        ]
        last = graph("convert", graph.sum(terms, self.kind), kind="f64")
        first = graph("neg", last)
        for i, tau in of_times.items():
            wide = graph("convert", tau, kind="f64")
            first = graph("add", first, graph.scaled(1 - tableau.c[i], wide))
            last = graph("add", last, graph.scaled(tableau.c[i], wide))
        return first, last


def _time(graph: Graph, start: Node, stop: Node, h: Node, c: float) -> Node:
    """The time of a stage, as :meth:`ExplicitProgram.stage_times` has it."""
    if c in (0, 1):
        return stop if c else start
    return graph("time_add", start, graph("time_mul", h, graph.constant(c, "f64")))
