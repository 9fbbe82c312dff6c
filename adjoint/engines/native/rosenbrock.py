"""A Rosenbrock step and its transpose as machine code; equation and coefficients: :mod:`adjoint.rosenbrock_tableaus`.

    A k_i = gamma (f(t_i, Y_i) + sum_j c_ij k_j + h d_i f_t),    A = 1 - h gamma J,    Y_i = y + h sum_j a_ij k_j

Backwards, with q_i the cotangent of k_i, J and f_t at the start of the step:

    A^T v_i = q_i,    g_i = gamma v_i,    th_i = f_y(Y_i)^T g_i
    q_i = h b_i lam + sum_{j>i} (h a_ji th_j + c_ji g_j)
    lam_new = lam + sum_i th_i + d/dy sum_i v_i^T (h gamma J k_i + h gamma d_i f_t),    mu likewise

J is exact, so its own derivative belongs to the transpose. Source: the derivation of Sandu, Daescu & Carmichael (2003),
Atmospheric Environment 37, section 3.2, with J taken apart from f.
"""

from __future__ import annotations

from adjoint.engines.native.algebra import algebra
from adjoint.engines.native.arrays import Arrays, shape
from adjoint.engines.native.bodies import Bodies
from adjoint.engines.native.driver import Module, sweep
from adjoint.engines.native.emit import BYTES, Code, declarations
from adjoint.engines.native.explore import Form, double, explore
from adjoint.engines.native.space import Desk, Space
from adjoint.engines.native.trace import Traced
from adjoint.rosenbrock_tableaus import RosenbrockTableau

STEP = "ptr noalias %p, ptr noalias %pre"


def rosenbrock_module(traced: Traced, tableau: RosenbrockTableau, held: tuple[int, int]) -> Module:
    """A module with ``sweep`` and ``explore``, as an explicit method has them."""
    helpers: set[tuple[str, str]] = set()
    bodies = Bodies(traced, helpers)
    form = Form(traced.kind, len(traced.slope), held, 1, False)
    writer = _Writer(tableau, form, helpers, bool(bodies.in_time))
    text = [*bodies.text(), algebra(form.kind, form.leaves, helpers)]
    text += [writer.stages(), writer.step(), writer.trial()]
    text += [writer.transpose("transpose", False), writer.transpose("transpose_seen", True)]
    text += [explore(tableau, form, helpers, again=False), sweep(tableau, form, helpers)]
    return Module("\n\n".join([*text, declarations(helpers)]) + "\n", len(bodies.hoisted))


class _Writer:
    def __init__(self, tableau: RosenbrockTableau, form: Form, helpers: set[tuple[str, str]], moving: bool) -> None:
        self.tableau, self.form, self.helpers, self.moving = tableau, form, helpers, moving
        stages, size = tableau.stages, form.leaves
        counts = {"y": 1, "new": 1, "moving": 1, "right": 1, "inverse": 1, "points": stages, "slopes": stages}
        counts |= {"order": -(-8 // BYTES[form.kind]), "a": size, "lower": size}
        more = {"lam": 1, "of_y": 1, "seed": 1, "v": 1, "along": 1, "g": stages, "th": stages}
        more |= {"upper_rows": size, "lower_rows": size}
        _, stride = shape(form.kind, size)
        self.ahead, self.back = (Space(c, stride, BYTES[form.kind]) for c in (counts, counts | more))

    def _code(self, head: str, block: str = "%space", back: bool = False) -> tuple[Code, Desk, Arrays]:
        code = Code(f"define internal void {head}", 1, self.helpers)
        arrays = Arrays(code, self.form.kind, self.form.leaves)
        return code, Desk(self.back if back else self.ahead, arrays, block), arrays

    def stages(self) -> str:
        """All stages and the new state, into the block: the one function that every sweep calls, so that bits agree."""
        tableau = self.tableau
        code, desk, arrays = self._code(
            f"@stages(ptr noalias %given, {STEP}, double %start, double %stop, ptr noalias %space) noinline"
        )
        h = code.let("fsub double %stop, %start")
        y, a, right = desk("y"), desk("a"), desk("right")
        factors = f"ptr {a}, ptr {desk('lower')}, ptr {desk('inverse')}, ptr {desk('order')}"
        arrays.fill(y)
        arrays.read(y, "%given")
        at = f"ptr {y}, ptr %p, ptr %pre, double %start"
        code.line(f"call void @matrix({at}, double {code.let(f'fmul double {h}, {double(tableau.gamma)}')}, ptr {a})")
        code.line(f"call void @factor({factors})")
        if self.moving:
            code.line(f"call void @moving({at}, ptr {desk('moving')})")
        for i in range(tableau.stages):
            point, gamma = desk("points", i), desk.rounded(tableau.gamma)
            desk.weighted(point, y, h, tableau.a[i], "slopes")
            time = stage_time(code, h, tableau.c[i])
            code.line(f"call void @slope(ptr {point}, ptr %p, ptr %pre, double {time}, ptr {right})")
            terms = [("1", right)]
            terms += [(desk.rounded(c), desk("slopes", j)) for j, c in enumerate(tableau.coupling[i]) if c]
            if self.moving:
                terms.append((desk.scaled(h, tableau.d[i]), desk("moving")))
            arrays.combine(right, None, terms, gamma)
            code.line(f"call void @solve({factors}, ptr {right}, ptr {desk('slopes', i)})")
        desk.weighted(desk("new"), y, h, tableau.b, "slopes")
        return code.text()

    def _call_stages(self, code: Code, given: str, space: str) -> None:
        code.line(f"call void @stages(ptr {given}, ptr %p, ptr %pre, double %start, double %stop, ptr {space})")

    def step(self) -> str:
        head = f"@step(ptr %y, {STEP}, ptr noalias %q, double %start, double %stop)"
        code, _, arrays = self._code(head)
        block = code.array(self.ahead.bytes)
        self._call_stages(code, "%y", block)
        arrays.write(Desk(self.ahead, arrays, block)("new"), "%y")
        return code.text()

    def trial(self) -> str:
        head = (
            f"@trial(ptr noalias %y, ptr noalias %slopes, ptr noalias %new, ptr noalias %error, {STEP}, "
            "double %start, double %stop)"
        )
        code, _, arrays = self._code(head)
        block = code.array(self.ahead.bytes)
        desk, tableau = Desk(self.ahead, arrays, block), self.tableau
        assert tableau.error is not None
        self._call_stages(code, "%y", block)
        h = code.let("fsub double %stop, %start")
        desk.weighted(desk("right"), None, h, tableau.error, "slopes")
        arrays.write(desk("right"), "%error")
        arrays.write(desk("new"), "%new")
        for i in range(tableau.stages):
            arrays.write(desk("slopes", i), arrays.at("%slopes", i * self.form.leaves))
        return code.text()

    def transpose(self, name: str, seen: bool) -> str:
        """``seen``: with cotangents of the slopes, and one of y behind those of all stages, in %g."""
        tableau, size = self.tableau, self.form.leaves
        head = (
            f"@{name}(ptr noalias %y, ptr noalias %lam, ptr noalias %g, ptr noalias %of_p, ptr noalias %of_q, "
            f"{STEP}, ptr noalias %q, ptr noalias %ends, double %start, double %stop)"
        )
        code, _, arrays = self._code(head)
        block = code.array(self.back.bytes)
        desk = Desk(self.back, arrays, block)
        self._call_stages(code, "%y", block)
        turned = f"ptr {desk('upper_rows')}, ptr {desk('lower_rows')}"
        rest = f"ptr {desk('inverse')}, ptr {desk('order')}"
        code.line(f"call void @turn(ptr {desk('a')}, ptr {desk('lower')}, {rest}, {turned})")
        h = code.let("fsub double %stop, %start")
        length = code.let(f"fmul double {h}, {double(tableau.gamma)}")
        lam, of_y, seed, v, along = (desk(x) for x in ("lam", "of_y", "seed", "v", "along"))

        def add_seed(target: str, i: int) -> None:
            arrays.read(seed, arrays.at("%g", i * size))
            arrays.combine(target, target, [("1", seed)])

        arrays.read(lam, "%lam")
        arrays.combine(of_y, lam, [])
        if seen:
            add_seed(of_y, tableau.stages)
        right = desk("right")
        for i in reversed(range(tableau.stages)):
            later = range(i + 1, tableau.stages)
            terms = [(desk.scaled(h, tableau.b[i]), lam)] if tableau.b[i] else []
            terms += [(desk.scaled(h, tableau.a[j][i]), desk("th", j)) for j in later if tableau.a[j][i]]
            terms += [(desk.rounded(tableau.coupling[j][i]), desk("g", j)) for j in later if tableau.coupling[j][i]]
            arrays.combine(right, None, terms)
            if seen:
                add_seed(right, i)
            g, th, time = desk("g", i), desk("th", i), stage_time(code, h, tableau.c[i])
            code.line(f"call void @solve_turned({turned}, {rest}, ptr {right}, ptr {v})")
            arrays.combine(g, None, [(desk.rounded(tableau.gamma), v)])
            point = f"ptr {desk('points', i)}, ptr %p, ptr %pre, double {time}"
            code.line(f"call void @pull({point}, ptr {g}, ptr {th}, ptr %of_p)")
            arrays.combine(of_y, of_y, [("1", th)])
            arrays.combine(along, None, [(arrays.rounded(length), desk("slopes", i))])
            in_time = code.let(f"fmul double {length}, {double(tableau.d[i])}")
            at = f"ptr {desk('y')}, ptr %p, ptr %pre, double %start"
            code.line(f"call void @bend({at}, ptr {v}, ptr {along}, double {in_time}, ptr {of_y}, ptr %of_p)")
        arrays.write(of_y, "%lam")
        return code.text()


def stage_time(code: Code, h: str, c: float) -> str:
    """start + c h, and the ends themselves."""
    if c in (0, 1):
        return "%stop" if c else "%start"
    return code.let(f"fadd double %start, {code.let(f'fmul double {h}, {double(c)}')}")
