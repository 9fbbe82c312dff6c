"""The function that carries out a plan: every verb of revolve over every tile of trajectories, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from adjoint.engines.native.compose import Formulas, Transpose
from adjoint.engines.native.emit import Body, Code, declarations, depending_on
from adjoint.engines.native.explore import Controlled, Form, explore, take_seeds, trial
from adjoint.engines.native.program import Kind, Node
from adjoint.tableaus import Tableau
from revolve.actions import ADVANCE, LOAD, RECORD, REVERSE, SAVE

FIELDS = (
    "rows row_count times index x0 slots tape work lam p of_p pre q of_q outputs cotangents ends "
    "first_tile last_tile slots_each tape_each outputs_each emitting g inner asked"
).split()
"""The words of the block of arguments, 64 bits each: pointers and counts."""
COLUMNS = 5
"""Of a row: verb, a, b, place, and for Record whether the last of its steps is run."""


class Module(NamedTuple):
    text: str
    hoisted: int
    """How many numbers the prelude makes, of eight bytes each."""


def module(
    formulas: Formulas, tableau: Tableau, kind: Kind, leaves: int, held: tuple[int, int], width: int, times: bool
) -> Module:
    """A module with one function, ``sweep(arguments)``. ``held``: how many p and q there are; ``times``: with cotangents
    of the steps' ends."""
    helpers: set[tuple[str, str]] = set()
    graph = formulas.graph
    uniform = depending_on(graph, ("start", "stop", "t", "p"))
    of_held_alone = {x for x in depending_on(graph, ("p",)) if x.op not in ("const", "input") and x.kind[0] == "f"}
    kinds = Form(kind, leaves, held, width, times)
    bodies = [formulas.transpose, *(() if formulas.trial is None else (formulas.trial.transpose,))]
    roots = [x for f in bodies for x in (*f.of_state, *f.of_held.values(), *(f.of_ends if times else ()))]
    if formulas.trial is not None:
        roots += [*formulas.trial.error, *(x for slope in formulas.trial.slopes for x in slope)]
    hoisted = {x: i for i, x in enumerate(edge([*formulas.new, *roots], of_held_alone))}
    text = [
        prelude(hoisted, uniform, helpers),
        _step(formulas.new, uniform, hoisted, kinds, helpers),
        _transpose("transpose", formulas.transpose, uniform, hoisted, kinds, helpers),
    ]
    if formulas.trial is not None:
        text += [
            _transpose("transpose_seen", formulas.trial.transpose, uniform, hoisted, kinds, helpers),
            trial(formulas, uniform, hoisted, kinds, helpers),
            explore(tableau, kinds, helpers),
        ]
    text.append(sweep(None if formulas.trial is None else tableau, kinds, helpers))
    return Module("\n\n".join([*text, declarations(helpers)]) + "\n", len(hoisted))


def edge(roots: Iterable[Node], inside: set[Node]) -> list[Node]:
    """The nodes of a set that are used outside of it."""
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        x = stack.pop()
        if x in inside:
            found[x] = None
        elif x not in seen:
            seen.add(x)
            stack.extend(x.args)
    return sorted(found, key=lambda x: x.index)


def prelude(hoisted: dict[Node, int], uniform: set[Node], helpers: set[tuple[str, str]]) -> str:
    """What depends on the held tensors alone is computed once."""
    code = Code("define internal void @prelude(ptr noalias %p, ptr noalias %pre)", 1, helpers)
    body = Body(code, uniform, {"p": "%p"}, {})
    for x, place in hoisted.items():
        body.write([x])
        at = code.let(f"getelementptr inbounds i64, ptr %pre, i64 {place}")
        code.line(f"store {code.type(x.kind, False)} {body.value(x, False)}, ptr {at}, align 8")
    return code.text()


def _step(
    new: list[Node], uniform: set[Node], hoisted: dict[Node, int], form: Form, helpers: set[tuple[str, str]]
) -> str:
    head = "define internal void @step(ptr %y, ptr noalias %p, ptr noalias %pre, ptr noalias %q, double %start, double %stop)"
    code = Code(head, form.width, helpers)
    body = Body(code, uniform, {"y": "%y", "p": "%p", "q": "%q", "start": "%start", "stop": "%stop"}, hoisted)
    body.write(new)
    for i, x in enumerate(new):
        code.store(body.value(x, True), "%y", i, form.kind, True)
    return code.text()


def _transpose(
    name: str,
    f: Transpose,
    uniform: set[Node],
    hoisted: dict[Node, int],
    form: Form,
    helpers: set[tuple[str, str]],
) -> str:
    head = (
        f"define internal void @{name}(ptr noalias %y, ptr noalias %lam, ptr noalias %g, ptr noalias %of_p, "
        "ptr noalias %of_q, ptr noalias %p, ptr noalias %pre, ptr noalias %q, ptr noalias %ends, double %start, double %stop)"
    )
    code, kind = Code(head, form.width, helpers), form.kind
    names = {"y": "%y", "lam": "%lam", "g": "%g", "p": "%p", "q": "%q", "start": "%start", "stop": "%stop"}
    body = Body(code, uniform, names, hoisted)
    body.write([*f.of_state, *f.of_held.values()])
    added = code.type(kind, True)
    for (of, j), x in f.of_held.items():
        before = code.load(f"%of_{of}", j, kind, True)
        after = code.let(f"fadd {added} {before}, {body.value(x, True)}")
        code.store(after, f"%of_{of}", j, kind, True)
    if form.times:
        body.write(f.of_ends)
        wide = code.type("f64", True)
        for j, x in enumerate(f.of_ends):
            before = code.load("%ends", j, "f64", True)
            after = code.let(f"fadd {wide} {before}, {body.value(x, True)}")
            code.store(after, "%ends", j, "f64", True)
    for i, x in enumerate(f.of_state):
        code.store(body.value(x, True), "%lam", i, kind, True)
    return code.text()


def sweep(tableau: Controlled | None, form: Form, helpers: set[tuple[str, str]]) -> str:
    """``tableau``: of a method whose interpolant may be looked at."""
    kind, leaves, held, width, times = form.kind, form.leaves, form.held, form.width, form.times
    code = Code("define void @sweep(ptr noalias %arguments)", width, helpers)
    numbers = {"row_count", "first_tile", "last_tile", "slots_each", "tape_each", "outputs_each", "emitting"}
    stages = 0 if tableau is None else max(tableau.weighted, tableau.interpolated)
    zero = "zeroinitializer" if width > 1 else "0.0"
    have = {
        name: code.load("%arguments", i, "i64", False)
        if name in numbers
        else code.let(f"load ptr, ptr {code.at('%arguments', i, 'i64', False)}, align 8")
        for i, name in enumerate(FIELDS)
    }
    code.line(f"call void @prelude(ptr {have['p']}, ptr {have['pre']})")
    emitting = code.let(f"icmp ne i64 {have['emitting']}, 0")
    with code.loop(have["first_tile"], have["last_tile"]) as tile:

        def of_tile(name: str, rows: str | int, columns: int = leaves) -> str:
            """The part of an array that belongs to this tile: so many rows of so many numbers."""
            return code.at(have[name], code.times(code.times(tile, rows), columns), kind, True)

        x0, work, lam = of_tile("x0", 1), of_tile("work", 1), of_tile("lam", 1)
        slots, tape = of_tile("slots", have["slots_each"]), of_tile("tape", have["tape_each"])
        outputs, cotangents = (of_tile(name, have["outputs_each"]) for name in ("outputs", "cotangents"))
        of_p, q, of_q = of_tile("of_p", 1, held[0]), of_tile("q", 1, held[1]), of_tile("of_q", 1, held[1])

        def state(of: str, index: str) -> str:
            return code.at(of, code.times(index, leaves), kind, True)

        def copy(target: str, source: str) -> None:
            with code.loop(0, leaves) as i:
                code.store(code.load(source, i, kind, True), target, i, kind, True)

        def ends(k: str) -> tuple[str, str]:
            return code.load(have["times"], k, "f64", False), code.load(have["times"], code.plus(k, 1), "f64", False)

        def run(k: str) -> None:
            start, stop = ends(k)
            code.line(
                f"call void @step(ptr {work}, ptr {have['p']}, ptr {have['pre']}, ptr {q}, "
                f"double {start}, double {stop})"
            )
            with code.when(emitting):
                j = code.load(have["index"], k, "i64", False)
                with code.when(code.let(f"icmp sge i64 {j}, 0")):
                    copy(state(outputs, j), work)

        with code.loop(0, have["row_count"]) as row:
            first = code.times(row, COLUMNS)
            verb, a, b, place, last = (
                code.load(have["rows"], code.plus(first, i), "i64", False) for i in range(COLUMNS)
            )

            def verb_is(number: int, verb: str = verb) -> str:
                return code.let(f"icmp eq i64 {verb}, {number}")

            with code.when(verb_is(ADVANCE)), code.loop(a, b) as k:
                run(k)
            with code.when(verb_is(RECORD)), code.loop(a, b) as k:
                copy(state(tape, code.plus(place, code.integer("sub", k, a))), work)
                following = code.plus(k, 1)
                before = code.let(f"icmp slt i64 {following}, {b}")
                with code.when(code.let(f"or i1 {before}, {code.let(f'icmp ne i64 {last}, 0')}")):
                    run(k)
            with code.when(verb_is(REVERSE)), code.loop(0, code.integer("sub", b, a)) as back:
                k = code.integer("sub", code.integer("sub", b, 1), back)
                j = code.load(have["index"], k, "i64", False)
                with code.when(code.let(f"icmp sge i64 {j}, 0")), code.loop(0, leaves) as i:
                    seed = code.load(state(cotangents, j), i, kind, True)
                    total = code.let(f"fadd {code.type(kind, True)} {code.load(lam, i, kind, True)}, {seed}")
                    code.store(total, lam, i, kind, True)
                start, stop = ends(k)
                x = state(tape, code.plus(place, code.integer("sub", k, a)))
                of_ends = code.at(have["ends"], k, "f64", True) if times else have["ends"]

                def transpose(
                    name: str, g: str, x: str = x, start: str = start, stop: str = stop, of_ends: str = of_ends
                ) -> None:
                    code.line(
                        f"call void @{name}(ptr {x}, ptr {lam}, ptr {g}, ptr {of_p}, ptr {of_q}, ptr {have['p']}, "
                        f"ptr {have['pre']}, ptr {q}, ptr {of_ends}, double {start}, double {stop})"
                    )

                if tableau is None:
                    transpose("transpose", "null")
                else:
                    first, last = (code.load(have["inner"], i, "i64", False) for i in (k, code.plus(k, 1)))
                    seen = code.let(f"icmp slt i64 {first}, {last}")
                    with code.when(seen):
                        with code.loop(0, (stages + 1) * leaves) as i:
                            code.store(zero, have["g"], i, kind, True)
                        with code.loop(first, last) as j:
                            at = code.load(have["asked"], j, "f64", False)
                            take_seeds(code, tableau, form, (at, start, stop), state(cotangents, j), have["g"])
                        transpose("transpose_seen", have["g"])
                    with code.when(code.let(f"xor i1 {seen}, true")):
                        transpose("transpose", "null")
            with code.when(verb_is(SAVE)):
                copy(state(slots, place), work)
            with code.when(verb_is(LOAD)):
                given = code.let(f"icmp slt i64 {place}, 0")
                source = code.let(f"select i1 {given}, ptr {x0}, ptr {state(slots, place)}")
                copy(work, source)
    return code.text()
