"""Controlled steps as machine code: the first sweep of an adaptive method, and what its interpolant hands back.

The control is that of :class:`adjoint.timeline.AdaptiveTimeline`, line by line. A step that is accepted is taken again by
the function that recomputes it later: so no bit of a state depends on whether it was kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from adjoint.engines.native.compose import Formulas
from adjoint.engines.native.emit import Body, Code
from adjoint.engines.native.program import Kind, Node
from adjoint.rosenbrock_tableaus import RosenbrockTableau
from adjoint.tableaus import Tableau

Controlled = Tableau | RosenbrockTableau
WORDS = "p pre y tape times asked outputs slopes new error numbers counts moved first".split()
"""The block of arguments of ``explore``: pointers. A ``length`` below zero is to be found."""
NUMBERS = (
    "t stop length before earlier just_rejected sign power power_before power_earlier power_rejected "
    "safety smallest largest min_step max_step rtol atol resolution"
).split()
COUNTS = "steps rejected next status capacity max_steps recording asked_count".split()
GOING, TOO_MANY, TOO_SHORT, NO_ROOM, DONE = range(5)
"""What ``status`` says."""


@dataclass(frozen=True)
class Form:
    """Sizes that the text depends on."""

    kind: Kind
    leaves: int
    held: tuple[int, int]
    width: int
    times: bool


def trial(
    formulas: Formulas, uniform: set[Node], hoisted: dict[Node, int], form: Form, helpers: set[tuple[str, str]]
) -> str:
    """The new state, its error and the slopes of a step."""
    head = (
        "define internal void @trial(ptr noalias %y, ptr noalias %slopes, ptr noalias %new, ptr noalias %error, "
        "ptr noalias %p, ptr noalias %pre, double %start, double %stop) noinline"
    )
    assert formulas.trial is not None
    code = Code(head, form.width, helpers)
    body = Body(code, uniform, {"y": "%y", "p": "%p", "start": "%start", "stop": "%stop"}, hoisted)
    slopes = [x for slope in formulas.trial.slopes for x in slope]
    for place, nodes in (("%slopes", slopes), ("%new", formulas.new), ("%error", formulas.trial.error)):
        body.write(nodes)
        for i, x in enumerate(nodes):
            code.store(body.value(x, True), place, i, form.kind, True)
    return code.text()


def weights(code: Code, tableau: Controlled, theta: str) -> dict[int, str]:
    """b_i(theta) of the interpolant."""
    assert tableau.dense is not None
    found = {}
    for i, row in enumerate(tableau.dense[: tableau.interpolated]):
        if any(row):
            weight = "0.0"
            for coefficient in reversed(row):
                weight = code.let(f"fadd double {weight}, {double(coefficient)}")
                weight = code.let(f"fmul double {weight}, {theta}")
            found[i] = weight
    return found


def double(number: float) -> str:
    return "0x" + struct.pack(">d", number).hex().upper()


def as_kind(code: Code, value: str, kind: Kind) -> str:
    """A double as a number of the state."""
    return value if kind == "f64" else code.let(f"fptrunc double {value} to float")


def explore(tableau: Controlled, form: Form, helpers: set[tuple[str, str]], again: bool = True) -> str:
    """Steps until the end, or until there is no more room for them. ``again``: those on trial may have other bits than
    those that are taken."""
    code, kind, leaves = Code("define void @explore(ptr noalias %arguments)", 1, helpers), form.kind, form.leaves
    have = {w: code.let(f"load ptr, ptr {code.at('%arguments', i, 'i64', False)}") for i, w in enumerate(WORDS)}
    places = {name: code.at(have["numbers"], i, "f64", False) for i, name in enumerate(NUMBERS)}
    places |= {name: code.at(have["counts"], i, "i64", False) for i, name in enumerate(COUNTS)}

    def get(name: str) -> str:
        return code.let(f"load {'i64' if name in COUNTS else 'double'}, ptr {places[name]}")

    def put(name: str, value: str | int) -> None:
        code.line(f"store {'i64' if name in COUNTS else 'double'} {value}, ptr {places[name]}")

    def floats(op: str, *values: str) -> str:
        return code.let(f"{op} double {', '.join(values)}")

    def call(name: str, *values: str) -> str:
        helpers.add((f"llvm.{name}.f64", f"f64 1 {len(values)}"))
        return code.let(f"call double @llvm.{name}.f64({', '.join(f'double {v}' for v in values)})")

    def least(a: str, b: str) -> str:
        return call("minnum", a, b)

    def most(a: str, b: str) -> str:
        return call("maxnum", a, b)

    def either(condition: str, a: str, b: str) -> str:
        return code.let(f"select i1 {condition}, double {a}, double {b}")

    code.line(f"call void @prelude(ptr {have['p']}, ptr {have['pre']})")
    if isinstance(tableau, Tableau):
        with code.when(floats("fcmp olt", get("length"), "0.0")):
            put("length", _first_length(code, have, form, get, call))
    with code.while_zero(places["status"]):
        t, stop, length, sign, steps = get("t"), get("stop"), get("length"), get("sign"), get("steps")
        scale = most(call("fabs", t), get("resolution"))
        bits = code.let(f"and i64 {code.let(f'bitcast double {scale} to i64')}, 9218868437227405312")
        unit = code.let(f"bitcast i64 {bits} to double")
        resolved = floats("fmul", unit, double(16 * 2.0**-52))
        too_short = floats("fcmp olt", length, most(get("min_step"), resolved))
        put("status", code.let(f"select i1 {too_short}, i64 {TOO_SHORT}, i64 {GOING}"))
        full = code.let(f"icmp sge i64 {code.plus(steps, 1)}, {get('capacity')}")
        with code.when(full):
            put("status", NO_ROOM)
        with code.when(code.let(f"icmp sge i64 {steps}, {get('max_steps')}")):
            put("status", TOO_MANY)
        with code.when(code.let(f"icmp eq i64 {get('status')}, {GOING}")):
            ahead = floats("fadd", t, floats("fmul", sign, length))
            stretched = floats("fmul", double(1.01), length)
            reach = least(stretched, most(length, floats("fmul", get("max_step"), double(1 + 1e-9))))
            near = floats("fcmp ole", call("fabs", floats("fsub", stop, t)), reach)
            beyond = floats("fcmp oge", floats("fmul", sign, ahead), floats("fmul", sign, stop))
            new_t = either(code.let(f"or i1 {near}, {beyond}"), stop, ahead)
            code.line(
                f"call void @trial(ptr {have['y']}, ptr {have['slopes']}, ptr {have['new']}, ptr {have['error']}, "
                f"ptr {have['p']}, ptr {have['pre']}, double {t}, double {new_t})"
            )
            error = _ratio(code, have, form, get, call)
            tried = call("fabs", floats("fsub", new_t, t))
            accepted = floats("fcmp ole", error, "1.0")
            with code.when(accepted):
                before, earlier = get("before"), get("earlier")
                product = get("safety")
                for e, power in ((error, "power"), (before, "power_before"), (earlier, "power_earlier")):
                    product = floats("fmul", product, call("pow", most(e, double(1e-10)), get(power)))
                factor = least(get("largest"), most(get("smallest"), product))
                cautious = floats("fcmp une", get("just_rejected"), "0.0")
                factor = either(cautious, least("1.0", factor), factor)
                longer = floats("fmul", tried, factor)
                at_end = floats("fcmp oeq", new_t, stop)
                put("length", least(either(at_end, most(longer, length), longer), get("max_step")))
                put("earlier", before)
                put("before", most(error, double(1e-4)))
                put("just_rejected", "0.0")
                _show(code, tableau, have, form, (t, new_t, sign), get, put)
                with code.when(code.let(f"icmp ne i64 {get('recording')}, 0")):
                    tape = code.at(have["tape"], code.times(steps, leaves), kind, True)
                    with code.loop(0, leaves) as i:
                        code.store(code.load(have["y"], i, kind, True), tape, i, kind, True)
                if again:
                    code.line(
                        f"call void @step(ptr {have['y']}, ptr {have['p']}, ptr {have['pre']}, ptr null, "
                        f"double {t}, double {new_t})"
                    )
                else:
                    with code.loop(0, leaves) as i:
                        code.store(code.load(have["new"], i, kind, True), have["y"], i, kind, True)
                put("t", new_t)
                following = code.plus(steps, 1)
                put("steps", following)
                code.store(new_t, have["times"], following, "f64", False)
                with code.when(at_end):
                    put("status", DONE)
            with code.when(code.let(f"xor i1 {accepted}, true")):
                finite = floats("fcmp olt", error, double(float("inf")))
                shrunk = most(get("smallest"), floats("fmul", get("safety"), call("pow", error, get("power_rejected"))))
                shrunk = either(finite, shrunk, get("smallest"))
                put("length", least(floats("fmul", tried, shrunk), get("max_step")))
                put("just_rejected", "1.0")
                put("rejected", code.plus(get("rejected"), 1))
    return code.text()


def take_seeds(code: Code, tableau: Controlled, form: Form, times: tuple[str, str, str], seeds: str, g: str) -> None:
    """The transpose of :func:`_show` at one time: what a value in between hands to each slope, and to y behind them."""
    (at, start, stop), kind, leaves = times, form.kind, form.leaves
    h = code.let(f"fsub double {stop}, {start}")
    theta = code.let(f"fdiv double {code.let(f'fsub double {at}, {start}')}, {h}")
    scaled: dict[int, str | None] = {
        i: as_kind(code, code.let(f"fmul double {h}, {w}"), kind) for i, w in weights(code, tableau, theta).items()
    }
    scaled[max(tableau.weighted, tableau.interpolated)] = None
    number = code.type(kind, True)
    with code.loop(0, leaves) as n:
        seed = code.load(seeds, n, kind, True)
        for i, w in scaled.items():
            part = seed if w is None else code.let(f"fmul {number} {w}, {seed}")
            place = code.plus(n, i * leaves)
            total = code.let(f"fadd {number} {code.load(g, place, kind, True)}, {part}")
            code.store(total, g, place, kind, True)


Get = Callable[[str], str]


def _ratio(code: Code, have: dict[str, str], form: Form, get: Get, call: Callable[..., str]) -> str:
    """The root mean square of error / (atol + rtol max(|y|, |new|))."""

    def scaled(i: str) -> str:
        larger = call(
            "maximum", call("fabs", _wide(code, have["y"], i, form)), call("fabs", _wide(code, have["new"], i, form))
        )
        return code.let(
            f"fdiv double {call('fabs', _wide(code, have['error'], i, form))}, {_allowed(code, larger, get)}"
        )

    return _root_mean_square(code, form, scaled, call)


def _wide(code: Code, place: str, i: str, form: Form) -> str:
    """A number of the state as a double."""
    x = code.load(place, i, form.kind, True)
    return x if form.kind == "f64" else code.let(f"fpext float {x} to double")


def _allowed(code: Code, size: str, get: Get) -> str:
    relative = code.let(f"fmul double {get('rtol')}, {size}")
    return code.let(f"fadd double {get('atol')}, {relative}")


def _root_mean_square(code: Code, form: Form, term: Get, call: Callable[..., str]) -> str:
    total = code.place("double", "0.0")
    with code.loop(0, form.leaves) as i:
        scaled = term(i)
        sum_so_far = code.let(f"load double, ptr {total}")
        square = code.let(f"fmul double {scaled}, {scaled}")
        code.line(f"store double {code.let(f'fadd double {sum_so_far}, {square}')}, ptr {total}")
    mean = code.let(f"fdiv double {code.let(f'load double, ptr {total}')}, {double(float(form.leaves))}")
    return call("sqrt", mean)


def _first_length(code: Code, have: dict[str, str], form: Form, get: Get, call: Callable[..., str]) -> str:
    """The length of a first step to try, as :meth:`ExplicitProgram.begin` has it; it needs two slopes."""
    kind, t = form.kind, get("t")

    def floats(op: str, *values: str) -> str:
        return code.let(f"{op} double {', '.join(values)}")

    def either(condition: str, a: str, b: str) -> str:
        return code.let(f"select i1 {condition}, double {a}, double {b}")

    def slope(y: str, at: str) -> None:
        code.line(
            f"call void @trial(ptr {y}, ptr {have['slopes']}, ptr {have['new']}, ptr {have['error']}, "
            f"ptr {have['p']}, ptr {have['pre']}, double {at}, double {at})"
        )

    def size_of(value: Get) -> str:
        def scaled(i: str) -> str:
            allowed = _allowed(code, call("fabs", _wide(code, have["y"], i, form)), get)
            return floats("fdiv", value(i), allowed)

        return _root_mean_square(code, form, scaled, call)

    slope(have["y"], t)
    with code.loop(0, form.leaves) as i:
        code.store(code.load(have["slopes"], i, kind, True), have["first"], i, kind, True)
    size = size_of(lambda i: _wide(code, have["y"], i, form))
    speed = size_of(lambda i: _wide(code, have["first"], i, form))
    span = call("fabs", floats("fsub", get("stop"), t))
    small = code.let(f"or i1 {floats('fcmp olt', size, double(1e-5))}, {floats('fcmp olt', speed, double(1e-5))}")
    guess = either(small, double(1e-6), floats("fdiv", floats("fmul", double(0.01), size), speed))
    guess = call("minnum", guess, span)
    shift = floats("fmul", get("sign"), guess)
    scale = as_kind(code, shift, kind)
    with code.loop(0, form.leaves) as i:
        number = code.type(kind, True)
        change = code.let(f"fmul {number} {scale}, {code.load(have['first'], i, kind, True)}")
        moved = code.let(f"fadd {number} {code.load(have['y'], i, kind, True)}, {change}")
        code.store(moved, have["moved"], i, kind, True)
    slope(have["moved"], floats("fadd", t, shift))

    def bent(i: str) -> str:
        return floats("fsub", _wide(code, have["slopes"], i, form), _wide(code, have["first"], i, form))

    most = call("maxnum", speed, floats("fdiv", size_of(bent), guess))
    power = floats("fmul", "-1.0", get("power_rejected"))
    still = call("maxnum", double(1e-6), floats("fmul", guess, double(1e-3)))
    wanted = either(
        floats("fcmp ole", most, double(1e-15)), still, call("pow", floats("fdiv", double(0.01), most), power)
    )
    chosen = call("minnum", floats("fmul", double(100.0), guess), call("minnum", wanted, span))
    chosen = either(floats("fcmp ogt", chosen, "0.0"), chosen, call("minnum", double(1e-6), span))
    return call("minnum", chosen, get("max_step"))


def _show(
    code: Code,
    tableau: Controlled,
    have: dict[str, str],
    form: Form,
    step: tuple[str, str, str],
    get: Get,
    put: Callable[[str, str | int], None],
) -> None:
    """Values at the asked times inside of a step, the very last one left out: that is a state."""
    (start, stop, sign), kind, leaves = step, form.kind, form.leaves
    last = code.let(f"sub i64 {get('asked_count')}, 1")
    inside = code.place("i64", "0")
    h = code.let(f"fsub double {stop}, {start}")

    def look() -> None:
        j = get("next")
        there = code.let(f"icmp slt i64 {j}, {last}")
        at = code.load(have["asked"], j, "f64", False)  # asked_count numbers, and one more behind them
        ends = [code.let(f"fmul double {sign}, {x}") for x in (at, stop)]
        reached = code.let(f"fcmp ole double {ends[0]}, {ends[1]}")
        more = code.let(f"and i1 {there}, {reached}")
        code.line(f"store i64 {code.let(f'select i1 {more}, i64 0, i64 1')}, ptr {inside}")

    look()
    with code.while_zero(inside):
        j = get("next")
        at = code.load(have["asked"], j, "f64", False)
        theta = code.let(f"fdiv double {code.let(f'fsub double {at}, {start}')}, {h}")
        scaled = {
            i: as_kind(code, code.let(f"fmul double {h}, {w}"), kind) for i, w in weights(code, tableau, theta).items()
        }
        output = code.at(have["outputs"], code.times(j, leaves), kind, True)
        number = code.type(kind, True)
        with code.loop(0, leaves) as n:
            value = code.load(have["y"], n, kind, True)
            for i, w in scaled.items():
                slope = code.load(have["slopes"], code.plus(n, i * leaves), kind, True)
                value = code.let(f"fadd contract {number} {value}, {code.let(f'fmul contract {number} {w}, {slope}')}")
            code.store(value, output, n, kind, True)
        put("next", code.plus(j, 1))
        look()
