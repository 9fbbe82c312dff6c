"""Programs of scalars in single-assignment form. Equal expressions are one node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Kind = str
"""What a scalar is: "f64", "f32", "i64" or "i1"."""
KINDS: dict[Kind, Any] = {"f64": np.float64, "f32": np.float32, "i64": np.int64, "i1": np.bool_}
COMMUTING = frozenset(("add", "mul", "and", "or", "xor", "eq", "ne", "maximum", "minimum"))
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
FOLDED: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    **COMPARISONS,
}


class Node:
    """One scalar: ``op`` of ``args``, a constant (``op="const"``), or an input (``op="input"``, by its name)."""

    __slots__ = ("args", "index", "kind", "op", "payload")

    def __init__(self, op: str, kind: Kind, args: tuple[Node, ...], payload: Any, index: int) -> None:
        self.op, self.kind, self.args, self.payload, self.index = op, kind, args, payload, index

    def __repr__(self) -> str:
        inside = repr(self.payload) if not self.args else ", ".join(f"%{x.index}" for x in self.args)
        return f"%{self.index} = {self.op}({inside}): {self.kind}"


class Graph:
    """All nodes, each after those that it uses."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[Any, Node] = {}

    def constant(self, value: Any, kind: Kind) -> Node:
        number = KINDS[kind](value)
        return self._node("const", kind, (), number, number.tobytes())

    def input(self, name: tuple[Any, ...], kind: Kind) -> Node:
        return self._node("input", kind, (), name, name)

    def __call__(self, op: str, *args: Node, kind: Kind | None = None) -> Node:
        """The node for ``op`` of ``args``; its kind is theirs, unless it is said or ``op`` compares."""
        if kind is None:
            kind = "i1" if op in COMPARISONS else args[-1].kind
        if all(x.op == "const" for x in args) and (op in FOLDED or op == "convert"):
            with np.errstate(all="ignore"):
                values = [x.payload for x in args]
                return self.constant(values[0] if op == "convert" else FOLDED[op](*values), kind)
        simple = self._simpler(op, args, kind)
        if simple is not None:
            return simple
        if op in COMMUTING and args[0].index > args[1].index:
            args = (args[1], args[0])
        return self._node(op, kind, args, None, tuple(x.index for x in args))

    def _simpler(self, op: str, args: tuple[Node, ...], kind: Kind) -> Node | None:
        """x + 0, x - 0, 1 x, x / 1, -(-x) and a conversion to what it is; what could be NaN stays."""
        if op == "convert":
            return args[0] if args[0].kind == kind else None
        if op == "neg":
            return args[0].args[0] if args[0].op == "neg" else None
        if op == "select" and args[1] is args[2]:
            return args[1]
        if op in ("add", "mul"):
            for x, other in (args, args[::-1]):
                if _is(x, 0 if op == "add" else 1):
                    return other
                if op == "mul" and _is(x, -1) and kind != "i1":
                    return self("neg", other)
        if op == "sub" and _is(args[0], 0):
            return self("neg", args[1])
        if (op == "sub" and _is(args[1], 0)) or (op == "div" and _is(args[1], 1)):
            return args[0]
        return None

    def _node(self, op: str, kind: Kind, args: tuple[Node, ...], payload: Any, key: Any) -> Node:
        found = self._known.get((op, kind, key))
        if found is None:
            found = Node(op, kind, args, payload, len(self.nodes))
            self.nodes.append(found)
            self._known[op, kind, key] = found
        return found

    def substituted(self, roots: Sequence[Node], names: Mapping[tuple[Any, ...], Node]) -> list[Node]:
        """The same expressions with other nodes in place of the inputs of these names."""
        made: dict[Node, Node] = {}
        for x in behind(roots):
            if x.op == "input":
                made[x] = names.get(x.payload, x)
            elif x.op == "const" or all(made[y] is y for y in x.args):
                made[x] = x
            else:
                made[x] = self(x.op, *(made[y] for y in x.args), kind=x.kind)
        return [made[x] for x in roots]

    # -- small words that formulas are written in

    def sum(self, terms: Iterable[Node], kind: Kind) -> Node:
        total: Node | None = None
        for x in terms:
            total = x if total is None else self("add", total, x)
        return self.constant(0, kind) if total is None else total

    def scaled(self, number: float, x: Node) -> Node:
        return self("mul", self.constant(number, x.kind), x)


def _is(x: Node, number: int) -> bool:
    return x.op == "const" and bool(x.payload == number)


def behind(roots: Iterable[Node]) -> list[Node]:
    """Every node that these use, themselves included, each after those that it uses."""
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            stack.extend(x.args)
    return sorted(seen, key=lambda x: x.index)


def depth_first(roots: Iterable[Node], known: Collection[Node], leaves: Collection[Node]) -> list[Node]:
    """What these use and is not known yet, each expression finished before the next is begun: few values are alive at
    once. What is among ``leaves`` is had without what it is made of."""
    order: dict[Node, None] = {}
    for root in roots:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            x, ready = stack.pop()
            if x in order or x in known:
                continue
            if ready or x in leaves:
                order[x] = None
            else:
                stack.append((x, True))
                stack.extend((y, False) for y in reversed(x.args))
    return list(order)
