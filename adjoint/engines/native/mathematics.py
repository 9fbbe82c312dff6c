"""Functions of whole vectors, where the C library would take them apart lane by lane.

Reductions and series are the textbook ones: Cody & Waite (1980), Software Manual for the Elementary Functions; Muller
(2016), Elementary Functions, chapters 9 to 11. All of them are within two units in the last place of double precision. In
single precision they are computed in double, and rounded once. What a lane gives never depends on the others.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from adjoint.engines.native.program import Kind

TERMS = 13
"""Of the series of exp(r) for |r| <= log(2) / 2: what is left out is below 5e-18."""
LOG2_HIGH, LOG2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
"""log(2) in two parts; the last 21 bits of the first are zero: an exponent times it is exact."""
QUARTERS = (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33)
"""pi / 2 in three parts."""
LARGEST_ANGLE = 1e5
"""Beyond, the three parts are not enough, and the C library takes over."""
Helper = tuple[str, str]


@dataclass
class Lanes:
    """The lines of a function of one or two vectors; numbers inside are doubles."""

    width: int
    lines: list[str] = field(default_factory=list)
    calls: set[Helper] = field(default_factory=set)
    _count: int = 0

    @property
    def wide(self) -> str:
        return f"<{self.width} x double>"

    @property
    def whole(self) -> str:
        return f"<{self.width} x i64>"

    def let(self, text: str) -> str:
        self._count += 1
        self.lines.append(f"  %v{self._count} = {text}")
        return f"%v{self._count}"

    def number(self, x: float | str) -> str:
        return x if isinstance(x, str) else f"splat (double 0x{struct.pack('>d', x).hex().upper()})"

    def do(self, op: str, a: float | str, b: float | str) -> str:
        return self.let(f"{op} {self.wide} {self.number(a)}, {self.number(b)}")

    def call(self, name: str, *values: float | str) -> str:
        self.calls.add((f"llvm.{name}.v{self.width}f64", f"f64 {self.width} {len(values)}"))
        given = ", ".join(f"{self.wide} {self.number(x)}" for x in values)
        return self.let(f"call {self.wide} @llvm.{name}.v{self.width}f64({given})")

    def fused(self, a: float | str, b: float | str, c: float | str) -> str:
        return self.call("fma", a, b, c)

    def integer(self, op: str, a: str, b: int | str) -> str:
        return self.let(f"{op} {self.whole} {a}, {b if isinstance(b, str) else f'splat (i64 {b})'}")

    def bits(self, x: str) -> str:
        return self.let(f"bitcast {self.wide} {x} to {self.whole}")

    def of_bits(self, x: str) -> str:
        return self.let(f"bitcast {self.whole} {x} to {self.wide}")

    def floated(self, x: str) -> str:
        return self.let(f"sitofp {self.whole} {x} to {self.wide}")

    def where(self, how: str, a: float | str, b: float | str) -> str:
        return self.let(f"fcmp {how} {self.wide} {self.number(a)}, {self.number(b)}")

    def select(self, chosen: str, a: float | str, b: float | str) -> str:
        return self.let(
            f"select <{self.width} x i1> {chosen}, {self.wide} {self.number(a)}, {self.wide} {self.number(b)}"
        )

    def series(self, x: str, coefficients: list[float]) -> str:
        """c_0 + c_1 x + c_2 x^2 + .."""
        value: float | str = coefficients[-1]
        for c in reversed(coefficients[:-1]):
            value = self.fused(value, x, c)
        return self.number(value)

    def power_of_two(self, n: str) -> str:
        return self.of_bits(self.integer("shl", self.integer("add", n, 1023), 52))

    def any(self, chosen: str) -> str:
        """Whether it is so in any lane."""
        return self.let(f"call i1 @llvm.vector.reduce.or.v{self.width}i1(<{self.width} x i1> {chosen})")

    def reduced(self, x: str, least: float, most: float) -> tuple[str, str]:
        """x = n log(2) + r, for x between these."""
        inside = self.call("maxnum", self.call("minnum", x, most), least)
        n = self.call("roundeven", self.do("fmul", inside, math.log2(math.e)))
        r = self.fused(n, -LOG2_LOW, self.fused(n, -LOG2_HIGH, inside))
        return self.let(f"fptosi {self.wide} {n} to {self.whole}"), r

    def exp(self, x: str) -> str:
        """2^n exp(r). The power in two factors, which both are normal numbers."""
        exponent, r = self.reduced(x, -746.0, 710.0)  # zero and infinite from there on
        value = self.series(r, [1 / math.factorial(k) for k in range(TERMS + 1)])
        half = self.integer("ashr", exponent, 1)
        for part in (half, self.integer("sub", exponent, half)):
            value = self.do("fmul", value, self.power_of_two(part))
        return self.select(self.where("uno", x, x), x, value)

    def expm1(self, x: str, most: float = 40.0) -> str:
        """2^n (exp(r) - 1) + (2^n - 1), for x up to ``most``."""
        exponent, r = self.reduced(x, -60.0, most)
        small = self.fused(
            self.do("fmul", r, r), self.series(r, [1 / math.factorial(k) for k in range(2, TERMS + 2)]), r
        )
        power = self.power_of_two(exponent)
        value = self.fused(power, small, self.do("fsub", power, 1.0))
        tiny = self.where("olt", self.call("fabs", x), 2.0**-60)
        return self.select(self.let(f"or <{self.width} x i1> {tiny}, {self.where('uno', x, x)}"), x, value)

    def tanh(self, x: str) -> str:
        """e / (e + 2) with e = exp(2 |x|) - 1; one beyond 22."""
        size = self.call("minnum", self.call("fabs", x), 22.0)
        e = self.expm1(self.do("fadd", size, size), 45.0)
        value = self.call("copysign", self.do("fdiv", e, self.do("fadd", e, 2.0)), x)
        return self.select(self.where("uno", x, x), x, value)

    def apart(self, x: str) -> tuple[str, str]:
        """x = 2^k m, with m between sqrt(1/2) and sqrt(2); x is positive and finite."""
        small = self.where("olt", x, 2.0**-1022)
        bits = self.bits(self.select(small, self.do("fmul", x, 2.0**54), x))
        root = struct.unpack(">q", struct.pack(">d", math.sqrt(0.5)))[0]
        shifted = self.integer("sub", bits, root)
        k = self.integer("ashr", shifted, 52)
        m = self.of_bits(self.integer("sub", bits, self.integer("shl", k, 52)))
        return self.do("fsub", self.floated(k), self.select(small, 54.0, 0.0)), m

    def log_parts(self, x: str) -> tuple[str, str, str]:
        """k, and log(m) as a sum of two: 2 s + (2 s^3 / 3 + ..), s = (m - 1) / (m + 1)."""
        k, m = self.apart(x)
        f, d = self.do("fsub", m, 1.0), self.do("fadd", m, 1.0)
        s = self.do("fdiv", f, d)
        lost = self.do("fsub", m, self.do("fsub", d, 1.0))  # of d, by rounding
        rest = self.do("fsub", self.fused(self.do("fmul", s, -1.0), d, f), self.do("fmul", s, lost))
        z = self.do("fmul", s, s)
        odd = self.do("fmul", z, self.series(z, [2 / (2 * n + 3) for n in range(10)]))
        low = self.fused(s, odd, self.do("fmul", 2.0, self.do("fdiv", rest, d)))
        return k, self.do("fadd", s, s), low

    def outside(self, x: str, value: str) -> str:
        """The logarithm of what is not positive and finite."""
        value = self.select(self.where("olt", x, math.inf), value, x)
        value = self.select(self.where("oeq", x, 0.0), -math.inf, value)
        return self.select(self.where("olt", x, 0.0), math.nan, value)

    def log(self, x: str) -> str:
        k, high, low = self.log_parts(x)
        rest = self.fused(k, LOG2_LOW, low)
        return self.outside(x, self.fused(k, LOG2_HIGH, self.do("fadd", high, rest)))

    def log2(self, x: str) -> str:
        k, high, low = self.log_parts(x)
        return self.outside(x, self.fused(self.do("fadd", high, low), math.log2(math.e), k))

    def log10(self, x: str) -> str:
        k, high, low = self.log_parts(x)
        mantissa = self.do("fmul", self.do("fadd", high, low), math.log10(math.e))
        return self.outside(x, self.fused(k, math.log10(2), mantissa))

    def log1p(self, x: str) -> str:
        """log(u) + c / u, with u + c = 1 + x and u as it is rounded."""
        u = self.do("fadd", x, 1.0)
        lost = self.do("fsub", x, self.do("fsub", u, 1.0)), self.do("fsub", 1.0, self.do("fsub", u, x))
        c = self.select(self.where("olt", x, 1.0), *lost)
        value = self.log(u)
        ordinary = self.let(f"and <{self.width} x i1> {self.where('ogt', u, 0.0)}, {self.where('olt', u, math.inf)}")
        value = self.select(ordinary, self.do("fadd", value, self.do("fdiv", c, u)), value)
        return self.select(self.where("olt", self.call("fabs", x), 2.0**-60), x, value)

    def turned(self, x: str, quarters: int) -> str:
        """sin(x + quarters pi / 2), of an x that is not too large."""
        n = self.call("roundeven", self.do("fmul", x, 2 / math.pi))
        r = x
        for part in QUARTERS:
            r = self.fused(n, -part, r)
        z = self.do("fmul", r, r)
        odd = self.series(z, [(-1) ** (k + 1) / math.factorial(2 * k + 3) for k in range(8)])
        sine = self.fused(self.do("fmul", r, z), odd, r)
        sine = self.select(self.where("olt", self.call("fabs", x), 2.0**-30), x, sine)  # zero has a sign
        even = self.series(z, [(-1) ** (k + 1) / math.factorial(2 * k + 2) for k in range(9)])
        cosine = self.fused(z, even, 1.0)
        turns = self.integer("add", self.let(f"fptosi {self.wide} {n} to {self.whole}"), quarters)
        is_odd = self.let(f"trunc {self.whole} {turns} to <{self.width} x i1>")
        sign = self.integer("shl", self.integer("and", turns, 2), 62)
        value = self.bits(self.select(is_odd, cosine, sine))
        return self.of_bits(self.integer("xor", value, sign))

    def pow(self, x: str, y: str) -> str:
        """exp(y log x), the product in two parts; x is positive, both are finite."""
        k, high, low = self.log_parts(x)
        whole = self.do("fmul", k, LOG2_HIGH)
        most = self.do("fadd", whole, high)
        back = self.do("fsub", most, whole)
        lost = self.do("fadd", self.do("fsub", whole, self.do("fsub", most, back)), self.do("fsub", high, back))
        rest = self.do("fadd", lost, self.fused(k, LOG2_LOW, low))
        total = self.do("fadd", most, rest)
        rest = self.do("fsub", rest, self.do("fsub", total, most))
        product = self.do("fmul", y, total)
        behind = self.fused(y, rest, self.fused(y, total, self.do("fmul", product, -1.0)))
        ordinary = self.where(
            "olt", self.call("fabs", self.do("fadd", product, 45.0)), 754.78
        )  # neither 0 nor infinite
        value = self.exp(product)
        return self.select(ordinary, self.fused(value, self.select(ordinary, behind, 0.0), value), value)


VECTORS: dict[str, tuple[int, Callable[..., str]]] = {
    "exp": (1, Lanes.exp),
    "tanh": (1, Lanes.tanh),
    "log": (1, Lanes.log),
    "log2": (1, Lanes.log2),
    "log10": (1, Lanes.log10),
    "log1p": (1, Lanes.log1p),
    "sin": (1, lambda lanes, x: lanes.turned(x, 0)),
    "cos": (1, lambda lanes, x: lanes.turned(x, 1)),
    "pow": (2, Lanes.pow),
}
"""How many arguments, and what is computed."""
ODD: dict[str, Callable[..., str]] = {
    "sin": lambda lanes, x: lanes.where("uge", lanes.call("fabs", x), LARGEST_ANGLE),
    "cos": lambda lanes, x: lanes.where("uge", lanes.call("fabs", x), LARGEST_ANGLE),
    "pow": lambda lanes, x, y: lanes.let(
        f"xor <{lanes.width} x i1> splat (i1 true), "
        + lanes.let(
            f"and <{lanes.width} x i1> {lanes.where('ogt', x, 0.0)}, "
            + lanes.where("olt", lanes.call("maximum", x, lanes.call("fabs", y)), math.inf)
        )
    ),
}
"""Which lanes are left to the C library."""


def written(op: str, name: str, kind: Kind, width: int) -> tuple[str, set[Helper]]:
    """The text of a function of vectors, and what it calls; also that of what takes odd lanes apart."""
    lanes, (count, function) = Lanes(width), VECTORS[op]
    given = lanes.wide if kind == "f64" else f"<{width} x float>"
    heads = ", ".join(f"{given} %x{i}" for i in range(count))
    values = [f"%x{i}" for i in range(count)]
    if kind == "f32":
        values = [lanes.let(f"fpext {given} {x} to {lanes.wide}") for x in values]
    result = function(lanes, *values)
    if op in ODD:
        odd = ODD[op](lanes, *values)
        lanes.calls.add((f"llvm.vector.reduce.or.v{width}i1", f"i1 {width} 1"))
        lanes.calls.add((f"lanes.llvm.{op}.f64", f"f64 {width} {count}"))
        lanes.lines.append(f"  br i1 {lanes.any(odd)}, label %some, label %all")
        lanes.lines.append("some:")
        spoken = ", ".join(f"{lanes.wide} {x}" for x in values)
        other = lanes.select(odd, lanes.let(f"call {lanes.wide} @lanes.llvm.{op}.f64({spoken})"), result)
        lanes.lines += ["  br label %all", "all:"]
        result = lanes.let(f"phi {lanes.wide} [{result}, %entry], [{other}, %some]")
    if kind == "f32":
        result = lanes.let(f"fptrunc {lanes.wide} {result} to {given}")
    text = [f"define internal {given} @{name}({heads}) {{", "entry:", *lanes.lines, f"  ret {given} {result}", "}"]
    return "\n".join(text), lanes.calls
