"""From programs to the text of LLVM's language. A number is a scalar, or a vector with one lane for each trajectory."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from adjoint.engines.native.mathematics import VECTORS, written
from adjoint.engines.native.program import Graph, Kind, Node, depth_first

SCALARS = {"f64": "double", "f32": "float", "i64": "i64", "i1": "i1"}
BYTES = {"f64": 8, "f32": 4, "i64": 8}
BINARY = {"add": "fadd contract", "sub": "fsub contract", "mul": "fmul contract", "div": "fdiv contract"}
EXACT = {"time_add": "fadd", "time_sub": "fsub", "time_mul": "fmul"}
INTEGER = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor"}
ORDERED = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}
SIGNED = {"eq": "eq", "ne": "ne", "lt": "slt", "le": "sle", "gt": "sgt", "ge": "sge"}
INTRINSIC = {
    **{name: name for name in "exp exp2 log log2 log10 sin cos tan asin acos atan sinh cosh tanh sqrt".split()},
    **{name: name for name in "floor ceil trunc pow atan2 maximum minimum copysign".split()},
    "abs": "fabs",
    "round": "roundeven",
    "fmax": "maxnum",
    "fmin": "minnum",
}
LIBRARY = frozenset("expm1 log1p asinh acosh atanh erf erfc fmod hypot".split())
"""Functions of the C library, lane by lane."""
WHOLE = "whole"
"""The form of a helper whose name is all of its declaration."""
CASTS = {
    ("f64", "f32"): "fptrunc",
    ("f32", "f64"): "fpext",
    ("i64", "f64"): "sitofp",
    ("i64", "f32"): "sitofp",
    ("i1", "f64"): "uitofp",
    ("i1", "f32"): "uitofp",
    ("f64", "i64"): "fptosi",
    ("f32", "i64"): "fptosi",
    ("i1", "i64"): "zext",
}


class Code:
    """The text of one function, written line by line. Whatever varies in a loop lies in memory; LLVM lifts it."""

    def __init__(self, head: str, width: int, helpers: set[tuple[str, str]]) -> None:
        self._head, self.width, self.helpers = head, width, helpers
        self._places: list[str] = []
        self._lines: list[str] = []
        self._count = 0

    def text(self) -> str:
        return "\n".join([f"{self._head} {{", "entry:", *self._places, *self._lines, "  ret void", "}"])

    def line(self, text: str) -> None:
        self._lines.append(f"  {text}")

    def let(self, text: str) -> str:
        """A new name for what the text computes."""
        self._count += 1
        self.line(f"%v{self._count} = {text}")
        return f"%v{self._count}"

    def type(self, kind: Kind, lanes: bool) -> str:
        return f"<{self.width} x {SCALARS[kind]}>" if lanes and self.width > 1 else SCALARS[kind]

    def at(self, pointer: str, index: str | int, kind: Kind, lanes: bool) -> str:
        """The place of the index-th number behind a pointer."""
        return self.let(f"getelementptr inbounds {self.type(kind, lanes)}, ptr {pointer}, i64 {index}")

    def load(self, pointer: str, index: str | int, kind: Kind, lanes: bool) -> str:
        return self.let(
            f"load {self.type(kind, lanes)}, ptr {self.at(pointer, index, kind, lanes)}, align {BYTES[kind]}"
        )

    def store(self, value: str, pointer: str, index: str | int, kind: Kind, lanes: bool) -> None:
        self.line(
            f"store {self.type(kind, lanes)} {value}, ptr {self.at(pointer, index, kind, lanes)}, align {BYTES[kind]}"
        )

    @contextmanager
    def loop(self, start: str | int, stop: str | int) -> Iterator[str]:
        """Integers from start to stop - 1."""
        self._count += 1
        n = self._count
        self._places.append(f"  %place{n} = alloca i64")
        self.line(f"store i64 {start}, ptr %place{n}")
        self._jump(f"head{n}")
        self._label(f"head{n}")
        index = self.let(f"load i64, ptr %place{n}")
        more = self.let(f"icmp slt i64 {index}, {stop}")
        self.line(f"br i1 {more}, label %body{n}, label %done{n}")
        self._label(f"body{n}")
        yield index
        following = self.let(f"add nsw i64 {index}, 1")
        self.line(f"store i64 {following}, ptr %place{n}")
        self._jump(f"head{n}")
        self._label(f"done{n}")

    @contextmanager
    def while_zero(self, place: str) -> Iterator[None]:
        """As long as the integer there is zero."""
        self._count += 1
        n = self._count
        self._jump(f"head{n}")
        self._label(f"head{n}")
        going = self.let(f"icmp eq i64 {self.let(f'load i64, ptr {place}')}, 0")
        self.line(f"br i1 {going}, label %body{n}, label %done{n}")
        self._label(f"body{n}")
        yield
        self._jump(f"head{n}")
        self._label(f"done{n}")

    def place(self, type: str, value: str) -> str:
        """Memory for one number, set to this value here."""
        self._count += 1
        self._places.append(f"  %place{self._count} = alloca {type}")
        self.line(f"store {type} {value}, ptr %place{self._count}")
        return f"%place{self._count}"

    def array(self, size: int) -> str:
        """Memory for so many bytes."""
        self._count += 1
        self._places.append(f"  %place{self._count} = alloca [{size} x i8], align 64")
        return f"%place{self._count}"

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        self._count += 1
        n = self._count
        self.line(f"br i1 {condition}, label %then{n}, label %after{n}")
        self._label(f"then{n}")
        yield
        self._jump(f"after{n}")
        self._label(f"after{n}")

    def _jump(self, label: str) -> None:
        self.line(f"br label %{label}")

    def _label(self, name: str) -> None:
        self._lines.append(f"{name}:")

    def integer(self, op: str, a: str | int, b: str | int) -> str:
        return self.let(f"{op} i64 {a}, {b}")

    def plus(self, a: str | int, b: str | int) -> str:
        return self.integer("add nsw", a, b)

    def times(self, a: str | int, b: str | int) -> str:
        return self.integer("mul nsw", a, b)


class Body:
    """Programs written into a function: each node once, in lanes only if lanes differ in it."""

    def __init__(self, code: Code, uniform: set[Node], inputs: Mapping[str, str], hoisted: Mapping[Node, int]) -> None:
        """``inputs``: where those of a name lie. ``hoisted``: nodes that lie behind %pre, by their place."""
        self.code, self.uniform, self.inputs, self.hoisted = code, uniform, inputs, hoisted
        self.names: dict[Node, str] = {}
        self._splats: dict[Node, str] = {}

    def write(self, roots: Iterable[Node]) -> None:
        for x in depth_first(roots, self.names, self.hoisted):
            self.names[x] = self._node(x)

    def lanes(self, x: Node) -> bool:
        return x not in self.uniform

    def value(self, x: Node, lanes: bool) -> str:
        """The name of a node that has been written; spread over all lanes if asked."""
        if x.op == "const":
            return constant(x, self.code.width if lanes else 1)
        if not lanes or self.lanes(x) or self.code.width == 1:
            return self.names[x]
        if x not in self._splats:
            code = self.code
            kind = code.type(x.kind, True)
            single = code.let(f"insertelement {kind} poison, {SCALARS[x.kind]} {self.names[x]}, i64 0")
            zeros = f"<{code.width} x i32> zeroinitializer"
            self._splats[x] = code.let(f"shufflevector {kind} {single}, {kind} poison, {zeros}")
        return self._splats[x]

    def _node(self, x: Node) -> str:
        if x.op == "const":
            return ""
        lanes, code = self.lanes(x), self.code
        if x in self.hoisted:
            place = code.let(f"getelementptr inbounds i64, ptr %pre, i64 {self.hoisted[x]}")
            return code.let(f"load {SCALARS[x.kind]}, ptr {place}, align 8")
        if x.op == "input":
            name, *index = x.payload
            return code.load(self.inputs[name], index[0], x.kind, lanes) if index else self.inputs[name]
        kind = x.args[-1].kind
        operands = [self.value(y, lanes) for y in x.args]
        type, of = code.type(x.kind, lanes), code.type(kind, lanes)
        if x.op in ORDERED:
            how = f"fcmp {ORDERED[x.op]}" if kind[0] == "f" else f"icmp {SIGNED[x.op]}"
            return code.let(f"{how} {of} {operands[0]}, {operands[1]}")
        if x.op == "select":
            chosen = code.type("i1", lanes)
            return code.let(f"select {chosen} {operands[0]}, {type} {operands[1]}, {type} {operands[2]}")
        if x.op == "convert":
            return self._converted(kind, x.kind, operands[0], of, type, lanes)
        if x.op == "neg":
            return code.let(
                f"fneg {type} {operands[0]}" if kind[0] == "f" else f"sub {type} {_zero(lanes, code)}, {operands[0]}"
            )
        if kind[0] != "f":
            return code.let(f"{INTEGER[x.op]} {type} {operands[0]}, {operands[1]}")
        if x.op in BINARY or x.op in EXACT:
            return code.let(f"{(BINARY | EXACT)[x.op]} {type} {operands[0]}, {operands[1]}")
        spoken = ", ".join(f"{type} {v}" for v in operands)
        return code.let(f"call contract {type} @{self._function(x, lanes)}({spoken})")

    def _function(self, x: Node, lanes: bool) -> str:
        width = self.code.width if lanes else 1
        if x.op in VECTORS and width > 1:
            name = f"lanes.{x.op}.{x.kind}"
        elif x.op in INTRINSIC:
            vector = f"v{width}" if width > 1 else ""
            name = f"llvm.{INTRINSIC[x.op]}.{vector}{x.kind}"
        else:
            assert x.op in LIBRARY, f"{x.op} is no known function"
            name = x.op + ("f" if x.kind == "f32" else "")
            name = f"lanes.{name}" if width > 1 else name
        self.code.helpers.add((name, f"{x.kind} {width} {len(x.args)}"))
        return name

    def _converted(self, source: Kind, target: Kind, value: str, of: str, type: str, lanes: bool) -> str:
        if target == "i1":
            zero = _zero(lanes, self.code)
            return self.code.let(f"{'fcmp une' if source[0] == 'f' else 'icmp ne'} {of} {value}, {zero}")
        return self.code.let(f"{CASTS[source, target]} {of} {value} to {type}")


def _zero(lanes: bool, code: Code) -> str:
    return "zeroinitializer" if lanes and code.width > 1 else "0"


def constant(x: Node, width: int) -> str:
    if x.kind[0] == "f":
        text = "0x" + struct.pack(">d", float(x.payload)).hex().upper()
    else:
        text = str(int(x.payload)) if x.kind == "i64" else str(bool(x.payload)).lower()
    return f"splat ({SCALARS[x.kind]} {text})" if width > 1 else text


def declarations(helpers: set[tuple[str, str]]) -> str:
    """The functions that are called, and those that take a vector apart for the C library."""
    lines = [f"declare {whole}" for whole, form in sorted(helpers) if form == WHOLE]
    declared: set[tuple[str, str]] = set()
    seen = {x for x in helpers if x[1] != WHOLE}
    waiting = sorted(seen)
    while waiting:
        name, form = waiting.pop(0)
        kind, width, count = form.split()
        calls: set[tuple[str, str]] = set()
        op = name.removeprefix("lanes.").removesuffix(f".{kind}")
        if name.startswith("lanes.") and op in VECTORS:
            text, calls = written(op, name, kind, int(width))
            lines.append(text)
        elif name.startswith("lanes."):
            lines.append(_lane_by_lane(name, kind, int(width), int(count)))
            calls = {(name.removeprefix("lanes."), f"{kind} 1 {count}")}
        else:
            declared.add((name, form))
        waiting += sorted(calls - seen)
        seen |= calls
    for name, form in sorted(declared):
        kind, width, count = form.split()
        type = SCALARS[kind] if width == "1" else f"<{width} x {SCALARS[kind]}>"
        back = SCALARS[kind] if ".reduce." in name else type
        lines.append(f"declare {back} @{name}({', '.join([type] * int(count))})")
    return "\n".join(lines)


def _lane_by_lane(name: str, kind: str, width: int, count: int) -> str:
    scalar = SCALARS[kind]
    vector = f"<{width} x {scalar}>"
    arguments = ", ".join(f"{vector} %x{i}" for i in range(count))
    lines = [f"define internal {vector} @{name}({arguments}) {{"]
    total = "poison"
    for lane in range(width):
        given = []
        for i in range(count):
            lines.append(f"  %a{lane}.{i} = extractelement {vector} %x{i}, i64 {lane}")
            given.append(f"{scalar} %a{lane}.{i}")
        lines.append(f"  %r{lane} = call {scalar} @{name.removeprefix('lanes.')}({', '.join(given)})")
        lines.append(f"  %t{lane} = insertelement {vector} {total}, {scalar} %r{lane}, i64 {lane}")
        total = f"%t{lane}"
    return "\n".join([*lines, f"  ret {vector} {total}", "}"])


def depending_on(graph: Graph, inputs: Iterable[str]) -> set[Node]:
    """The nodes that depend on nothing but constants and these inputs."""
    names = set(inputs)
    found: set[Node] = set()
    for x in graph.nodes:
        if x.op == "const" or (x.payload[0] in names if x.op == "input" else all(y in found for y in x.args)):
            found.add(x)
    return found
