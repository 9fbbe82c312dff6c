"""The memory that one stiff step works in: arrays at fixed places of a single block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adjoint.engines.native.arrays import Arrays, Term
from adjoint.engines.native.emit import BYTES
from adjoint.engines.native.explore import double
from adjoint.steppers.stages import Terms

PAGE = 64


@dataclass(frozen=True)
class Space:
    """``counts``: how many arrays there are of each name, in a row."""

    counts: Mapping[str, int]
    stride: int
    width: int
    """Bytes of a number."""

    @property
    def bytes(self) -> int:
        return sum(self._bytes(name) for name in self.counts)

    def _bytes(self, name: str) -> int:
        return -(-self.counts[name] * self.stride * self.width // PAGE) * PAGE

    def place(self, name: str, index: int = 0) -> int:
        """Where an array begins, in bytes."""
        before = 0
        for other in self.counts:
            if other == name:
                return before + index * self.stride * self.width
            before += self._bytes(other)
        raise KeyError(name)


class Desk:
    """The arrays of a block at hand, while a function is written that is given the block as %space."""

    def __init__(self, space: Space, arrays: Arrays, block: str = "%space") -> None:
        self.space, self.arrays, self.code, self.block = space, arrays, arrays.code, block

    def __call__(self, name: str, index: int = 0) -> str:
        place = self.space.place(name, index)
        return self.code.let(f"getelementptr inbounds i8, ptr {self.block}, i64 {place}")

    def scaled(self, h: str, number: float) -> str:
        """h times a number, as a number of the state."""
        return self.arrays.rounded(self.code.let(f"fmul double {h}, {double(number)}"))

    def weighted(self, target: str, base: str | None, h: str, weights: tuple[float, ...], columns: str) -> None:
        """target = base + h sum_j w_j x_j, as torch adds it up; the x_j are the arrays of one name."""
        if not any(weights):
            self.arrays.combine(target, base, [])
            return
        terms = Terms(weights)
        pairs: list[Term] = [("1", self(columns, terms.first))]
        pairs += [(self.rounded(ratio), self(columns, j)) for j, ratio in terms.rest]
        self.arrays.combine(target, base, pairs, self.scaled(h, terms.scale))

    def rounded(self, number: float) -> str:
        """A constant of the state's kind."""
        if BYTES[self.arrays.kind] == 8:
            return double(number)
        return self.code.let(f"fptrunc double {double(number)} to float")
