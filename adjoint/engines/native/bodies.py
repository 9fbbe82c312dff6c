"""f and its derivatives as functions of machine code, which stiff steps call stage by stage.

@slope(y, p, pre, t, out)                  out = f(t, y)
@pull(y, p, pre, t, lam, out, of_p)        out = f_y^T lam, of_p += f_p^T lam
@matrix(y, p, pre, t, w, a)                a = M - w f_y, column by column
@moving(y, p, pre, t, out)                 out = f_t
@bend(y, p, pre, t, lam, u, w, out, of_p)  out += d/dy lam^T (f_y u + f_t w), of_p likewise
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adjoint.engines.native.arrays import shape
from adjoint.engines.native.driver import edge, prelude
from adjoint.engines.native.emit import Body, Code, depending_on
from adjoint.engines.native.jacobian import Jacobian, jacobian
from adjoint.engines.native.program import Node
from adjoint.engines.native.trace import Name, Traced

POINT = "ptr noalias %y, ptr noalias %p, ptr noalias %pre, double %t"


@dataclass
class Bodies:
    """What is written of one f; ``hoisted`` is what depends on p alone, and is made once, by @prelude."""

    traced: Traced
    helpers: set[tuple[str, str]]
    hoisted: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        traced, graph = self.traced, self.traced.graph
        assert traced.bent is not None
        self.kind, self.size = traced.kind, len(traced.slope)
        self.jacobian: Jacobian = jacobian(traced)
        clock: dict[tuple[object, ...], Node] = {
            ("t", 0): graph("convert", graph.input(("t",), "f64"), kind=traced.time)
        }
        clock[("w", 0)] = graph("convert", graph.input(("w",), "f64"), kind=traced.time)
        self._clock = clock
        bent, found = traced.bent, self.jacobian
        self.slope = self._timed(traced.slope)
        self.pull = self._sums(traced.of_state, traced.of_held)
        self.bend = self._sums(bent.of_state, bent.of_held)
        self.entries = dict(zip(found.entries, self._timed(list(found.entries.values())), strict=True))
        self.in_time = dict(zip(found.in_time, self._timed(list(found.in_time.values())), strict=True))
        roots = [*self.slope, *self.entries.values(), *self.in_time.values()]
        for state, held in (self.pull, self.bend):
            roots += [*state, *held.values()]
        alone = {x for x in depending_on(graph, ("p",)) if x.op not in ("const", "input") and x.kind[0] == "f"}
        self.hoisted = {x: i for i, x in enumerate(edge(roots, alone))}

    def _timed(self, nodes: list[Node]) -> list[Node]:
        return self.traced.graph.substituted(nodes, self._clock)

    def _sums(self, state: list[Node], held: Mapping[Name, Node]) -> tuple[list[Node], dict[Name, Node]]:
        found = self._timed([*state, *held.values()])
        return found[: self.size], dict(zip(held, found[self.size :], strict=True))

    def text(self) -> list[str]:
        every = prelude(self.hoisted, set(), self.helpers)
        return [every, self._slope(), self._pull(), self._matrix(), self._moving(), self._bend()]

    def _code(self, head: str, names: dict[str, str]) -> tuple[Code, Body]:
        code = Code(f"define internal void {head} noinline", 1, self.helpers)
        inputs = {"y": "%y", "p": "%p", "t": "%t", **names}
        return code, Body(code, set(), inputs, self.hoisted)

    def _slope(self) -> str:
        code, body = self._code(f"@slope({POINT}, ptr noalias %out)", {})
        body.write(self.slope)
        for i, x in enumerate(self.slope):
            code.store(body.value(x, True), "%out", i, self.kind, True)
        return code.text()

    def _pull(self) -> str:
        head = f"@pull({POINT}, ptr noalias %lam, ptr noalias %out, ptr noalias %of_p)"
        code, body = self._code(head, {"lam": "%lam"})
        state, held = self.pull
        body.write([*state, *held.values()])
        for i, x in enumerate(state):
            code.store(body.value(x, True), "%out", i, self.kind, True)
        self._add(code, body, "%of_p", {j: x for (_, j), x in held.items()})
        return code.text()

    def _matrix(self) -> str:
        code, body = self._code(f"@matrix({POINT}, double %w, ptr noalias %a)", {})
        kind, (_, stride), graph = self.kind, shape(self.kind, self.size), self.traced.graph
        with code.loop(0, self.size * stride) as i:
            code.store("0.0", "%a", i, kind, True)
        with code.loop(0, self.size) as i:
            code.store("1.0", "%a", code.times(i, stride + 1), kind, True)
        weight = graph("convert", graph.input(("w",), "f64"), kind=kind)
        body.inputs = {**body.inputs, "w": "%w"}
        one = graph.constant(1, kind)
        found = {}
        for (row, column), x in self.entries.items():
            moved = graph("mul", weight, x)
            found[column * stride + row] = graph("sub", one, moved) if row == column else graph("neg", moved)
        body.write(found.values())
        for place, x in found.items():
            code.store(body.value(x, True), "%a", place, kind, True)
        return code.text()

    def _moving(self) -> str:
        code, body = self._code(f"@moving({POINT}, ptr noalias %out)", {})
        body.write(self.in_time.values())
        with code.loop(0, self.size) as i:
            code.store("0.0", "%out", i, self.kind, True)
        for place, x in self.in_time.items():
            code.store(body.value(x, True), "%out", place, self.kind, True)
        return code.text()

    def _bend(self) -> str:
        head = f"@bend({POINT}, ptr noalias %lam, ptr noalias %u, double %w, ptr noalias %out, ptr noalias %of_p)"
        code, body = self._code(head, {"lam": "%lam", "u": "%u", "w": "%w"})
        state, held = self.bend
        body.write([*state, *held.values()])
        self._add(code, body, "%out", dict(enumerate(state)))
        self._add(code, body, "%of_p", {j: x for (_, j), x in held.items()})
        return code.text()

    def _add(self, code: Code, body: Body, target: str, nodes: Mapping[int, Node]) -> None:
        """Into memory; what is zero always is left out."""
        kind = code.type(self.kind, True)
        for i, x in nodes.items():
            if not (x.op == "const" and x.payload == 0):
                before = code.load(target, i, self.kind, True)
                code.store(code.let(f"fadd {kind} {before}, {body.value(x, True)}"), target, i, self.kind, True)
