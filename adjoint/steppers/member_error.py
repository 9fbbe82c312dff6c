"""How large the errors of many members are, and how long their first steps may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adjoint.member_times import MemberTimes
from adjoint.steppers.control import Tolerance
from adjoint.steppers.member_step import SMALL, Slope, finite, spread
from adjoint.tensors import State, Structure

Number = float | Tensor


@dataclass(frozen=True)
class MemberTolerance:
    """``Tolerance`` for each member by itself; rtol and atol are numbers, or tensors with one for each member."""

    rtol: Number
    atol: Number
    norm: Callable[[Any], Any] | None = None
    """Of a tree like one member's state."""
    structure: Structure | None = None
    _fitted: dict[Any, Number] = field(default_factory=dict, repr=False)

    def squared(self, error: State, before: State, after: State, scale: float = 1.0) -> Tensor:
        """The squared error ratio of each member, at most 1 if it is acceptable; the error is ``scale`` times what is
        given."""
        if self.norm is None:  # a factor of all errors costs nothing in the tolerances
            scale /= max(sum(x[0].numel() for x in error), 1) ** 0.5
        scaled = []
        for e, x, y in zip(error, before, after, strict=True):
            allowed = torch.maximum(x.abs(), y.abs())
            allowed.mul_(self._fit("rtol", x, scale)).add_(self._fit("atol", x, scale))
            scaled.append((e.abs() if e.is_complex() else e) / allowed)
        if self.norm is not None:
            return self._normed(tuple(scaled), after)
        total: Tensor | None = None
        for x in scaled:
            total = _sum(x * x) if total is None else total + _sum(x * x)
        assert total is not None
        return total

    def allowed(self, state: State) -> State:
        """By what a change of each number is multiplied to be measured; of complex ones both parts alike."""
        found = []
        for x in state:
            x = x.detach()
            scale = 1 / (x.abs() * self._fit("rtol", x, 1.0) + self._fit("atol", x, 1.0))
            found.append(torch.complex(scale, scale) if x.is_complex() else scale)
        return tuple(found)

    def _fit(self, name: str, leaf: Tensor, scale: float) -> Number:
        """rtol or atol, divided by the scale of the errors, as it goes with a leaf."""
        number: Number = getattr(self, name)
        if not isinstance(number, Tensor):
            return number / abs(scale)
        key = (name, leaf.shape, leaf.dtype, scale)
        if key not in self._fitted:
            self._fitted[key] = spread((number / abs(scale)).to(leaf.real.dtype), leaf)
        return self._fitted[key]

    def _normed(self, scaled: State, after: State) -> Tensor:
        assert self.norm is not None and self.structure is not None
        tree = self.structure.unflatten([x.abs() for x in scaled])
        values: Tensor = torch.func.vmap(self.norm)(tree)
        return torch.where(finite(after), values, torch.inf) ** 2

    def of(self, member: int) -> Tolerance:
        """That of one member."""
        rtol, atol = (float(x[member]) if isinstance(x, Tensor) else x for x in (self.rtol, self.atol))
        return Tolerance(rtol, atol)


def _sum(x: Tensor) -> Tensor:
    """Of each member's entries; torch adds up few numbers in a row slowly."""
    if x.ndim == 1:
        return x
    x = x.flatten(1)
    return x.T.contiguous().sum(0) if x.shape[1] <= SMALL else x.sum(1)


def first_steps(
    slope: Slope, state: State, asked: MemberTimes, tolerance: MemberTolerance, order: int, time_type: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The length of everybody's first step to try, and for whom f is finite at all.

    Hairer, Norsett & Wanner I, section II.4; ``order`` is that of the error estimate. ``slope`` is called as the caller
    would call it: a tensor that is kept from these calls has its whole graph.
    """
    length = (asked.stop - asked.start).abs()

    def ratio(x: State) -> Tensor:
        return tolerance.squared(x, known, zero).to(length).sqrt()

    begin = slope(asked.start.to(time_type), state)
    known, speeds = (tuple(x.detach() for x in leaves) for leaves in (state, begin))
    zero = tuple(torch.zeros_like(x) for x in known)
    size, speed = ratio(known), ratio(speeds)
    guess = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    guess = torch.where(length < guess, length, guess)
    shift = asked.sign * guess
    moved = tuple(y + spread(shift.to(x.real.dtype), x) * x for y, x in zip(state, speeds, strict=True))
    bent = slope((asked.start + shift).to(time_type), moved)
    most = torch.fmax(speed, ratio(tuple(x.detach() - y for x, y in zip(bent, speeds, strict=True))) / guess)
    wanted = torch.where(most <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / most) ** (1 / order))
    chosen = torch.minimum(torch.minimum(100 * guess, wanted), length)
    return torch.where(chosen > 0, chosen, length.clamp(max=1e-6)), finite(speeds)
