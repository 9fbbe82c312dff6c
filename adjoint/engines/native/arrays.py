"""Arrays in memory, filled up to whole vectors, and what is done to all numbers of one at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adjoint.engines.native.emit import BYTES, SCALARS, Code
from adjoint.engines.native.program import Kind

UNROLLED = 4
"""Arrays of up to so many vectors are written out; longer ones are loops."""
Term = tuple[str, str]
"""A number (the name of a scalar), and the array that it multiplies."""


class Arrays:
    """Of ``size`` numbers each; what lies behind them, up to ``stride``, is nobody's."""

    def __init__(self, code: Code, kind: Kind, size: int) -> None:
        self.code, self.kind, self.size = code, kind, size
        self.lanes, self.stride = shape(kind, size)
        self.scalar, self.align = SCALARS[kind], self.lanes * BYTES[kind]
        self.vector = f"<{self.lanes} x {self.scalar}>"
        self.bits = f"i{8 * BYTES[kind]}"
        """The integer of as many bits."""

    def chunks(self, first: str | None = None) -> Iterator[str]:
        """The places at which vectors begin; ``first``: those before the one with this number may be left out."""
        count = self.stride // self.lanes
        if count <= UNROLLED:
            yield from (str(self.lanes * i) for i in range(count))
            return
        start = "0" if first is None else self.code.let(f"sdiv i64 {first}, {self.lanes}")
        with self.code.loop(start, count) as i:
            yield self.code.times(i, self.lanes)

    def at(self, array: str, index: str | int) -> str:
        return self.code.let(f"getelementptr inbounds {self.scalar}, ptr {array}, i64 {index}")

    def row(self, matrix: str, index: str | int) -> str:
        """One of the arrays of a matrix."""
        return self.at(matrix, self.code.times(index, self.stride))

    def load(self, array: str, place: str, type: str | None = None) -> str:
        return self.code.let(f"load {type or self.vector}, ptr {self.at(array, place)}, align {self.align}")

    def store(self, value: str, array: str, place: str, type: str | None = None) -> None:
        self.code.line(f"store {type or self.vector} {value}, ptr {self.at(array, place)}, align {self.align}")

    def get(self, array: str, index: str | int) -> str:
        """One number."""
        return self.code.let(f"load {self.scalar}, ptr {self.at(array, index)}, align {BYTES[self.kind]}")

    def put(self, value: str, array: str, index: str | int) -> None:
        self.code.line(f"store {self.scalar} {value}, ptr {self.at(array, index)}, align {BYTES[self.kind]}")

    def spread(self, number: str) -> str:
        """A vector of one number many times."""
        one = self.code.let(f"insertelement {self.vector} poison, {self.scalar} {number}, i64 0")
        zeros = f"<{self.lanes} x i32> zeroinitializer"
        return self.code.let(f"shufflevector {self.vector} {one}, {self.vector} poison, {zeros}")

    def rounded(self, number: str) -> str:
        """A double as a number of this kind."""
        return number if self.kind == "f64" else self.code.let(f"fptrunc double {number} to float")

    def product(self, a: str, b: str) -> str:
        return self.code.let(f"fmul contract {self.vector} {a}, {b}")

    def sum(self, a: str, b: str) -> str:
        return self.code.let(f"fadd contract {self.vector} {a}, {b}")

    def fill(self, array: str, count: int = 1) -> None:
        """Zeros, in so many arrays in a row."""
        with self.code.loop(0, count * self.stride // self.lanes) as i:
            self.store("zeroinitializer", array, self.code.times(i, self.lanes))

    def read(self, array: str, plain: str) -> None:
        """From numbers that are not filled up."""
        with self.code.loop(0, self.size) as i:
            self.put(self.get(plain, i), array, i)

    def write(self, array: str, plain: str) -> None:
        with self.code.loop(0, self.size) as i:
            self.put(self.get(array, i), plain, i)

    def combine(self, target: str, base: str | None, terms: Sequence[Term], scale: str | None = None) -> None:
        """target = base + scale (sum of number times array). A number "1" multiplies nothing."""
        factors = [None if number == "1" else self.spread(number) for number, _ in terms]
        whole = None if scale is None else self.spread(scale)
        for place in self.chunks():
            total: str | None = None
            for factor, (_, array) in zip(factors, terms, strict=True):
                x = self.load(array, place)
                x = x if factor is None else self.product(factor, x)
                total = x if total is None else self.sum(total, x)
            if total is not None and whole is not None:
                total = self.product(whole, total)
            if base is not None:
                total = self.load(base, place) if total is None else self.sum(self.load(base, place), total)
            self.store(total or "zeroinitializer", target, place)


def shape(kind: Kind, size: int) -> tuple[int, int]:
    """Numbers in a vector of up to 64 bytes, and in an array of whole vectors."""
    most = 64 // BYTES[kind]
    lanes = min(most, max(2, 1 << (size - 1).bit_length()))
    return lanes, -(-size // lanes) * lanes
