"""The Jacobians of implicit steps: made at a step's start, or kept from that of an earlier one.

What an attempt of a step goes by is a function of the state before it alone, so that a step that is computed again has
the same bits. So the state of the chain has two more leaves: at which state the Jacobian was made; and when (no number if
it is not to be used again), and for which step size it was factored. They hold bits, not numbers: nothing is
differentiated by them. The matrices themselves are made again where they are no longer known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.linear import Factored, Weights
from adjoint.tensors import State

KNOWN = 2
"""Jacobians that are remembered: that of the start of this step, and that of an earlier one."""
FACTORED = 3
"""Of each so many factorisations."""

BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


@dataclass
class Work:
    """What implicit steps took, counted."""

    jacobians: int = 0
    factorisations: int = 0
    iterations: int = 0
    """Of Newton's method."""
    failures: int = 0
    """Steps whose stages were not found."""


class Place(NamedTuple):
    """Where a Jacobian is that of f."""

    t: float
    y: Tensor
    """Packed."""

    def same(self, other: Place) -> bool:
        return self.t == other.t and (self.y is other.y or torch.equal(self.y, other.y))


@dataclass
class Known:
    """A Jacobian that was made, and what was factored of it."""

    place: Place
    jacobian: Any
    factors: dict[Weights, Factored] = field(default_factory=dict)


class Memory:
    """Jacobians and factorisations that steps after one another share."""

    def __init__(self, most: int = KNOWN) -> None:
        self._most = most
        self._known: list[Known] = []

    def at(self, place: Place) -> Known | None:
        return next((x for x in self._known if x.place.same(place)), None)

    def add(self, place: Place, jacobian: Any) -> Known:
        known = Known(place, jacobian)
        self._known = [known, *self._known][: self._most]
        return known


class Jacobian:
    """That which an attempt of a step goes by. ``stages`` is the attempt."""

    def __init__(self, stages: Any, kept: State) -> None:
        self._stages, self._program = stages, stages.program
        self._length: float = stages.stop - stages.start
        self._known: Known | None = None
        self._stale = False
        """Whether it is that of an earlier step."""
        if kept and stages.goes_on:
            numbers = kept[1].view(torch.float64).tolist()
            t, length = numbers
            if not math.isnan(t):
                self._stale = True
                self.place = Place(t, kept[0].view(self._program.vectors.zeros().dtype))
                if abs(self._length / length - 1) <= self._program.how.linear.drift:
                    self._length = length
        if not self._stale:
            self.place = self._here()

    def _here(self) -> Place:
        stages, vectors = self._stages, self._program.vectors
        packed = vectors.pack(tuple(x.detach() for x in stages.state))
        return Place(float(stages.start_time().detach()), packed)

    def renew(self) -> bool:
        """Take that of the start of this step, made for its own length; False if it was that already."""
        if not self._stale:
            return False
        self._stale, self._known, self.place = False, None, self._here()
        self._length = self._stages.stop - self._stages.start
        return True

    @property
    def relaxation(self) -> float:
        """By what to multiply Newton's changes: the matrix may be that of a step of another length.

        2 / (1 + h / h_0) treats what is stiff and what is not alike. Source: Hindmarsh et al. (2005), ACM TOMS 31(3),
        363-396, section 2.1.
        """
        return 2 / (1 + (self._stages.stop - self._stages.start) / self._length)

    def factored(self, coefficients: Weights) -> Factored:
        """Of M - h a J."""
        known = self._matrix()
        weights = tuple(tuple(self._length * a for a in row) for row in coefficients)
        found = known.factors.get(weights)
        if found is None:
            if len(known.factors) == FACTORED:
                del known.factors[next(iter(known.factors))]
            found = known.factors[weights] = self._program.factored([known.jacobian], weights)
        return found

    def _matrix(self) -> Known:
        if self._known is None:
            program, (t, y) = self._program, self.place
            found = program.memory.at(self.place)
            if found is None:
                at = program.time(t)
                found = program.memory.add(self.place, program.jacobian(self._stages.function, at, y))
            self._known = found
        return self._known

    def kept(self, theta: float) -> State:
        """What the state after the step has of it; ``theta``: how quickly Newton's method went at worst."""
        y, how = self.place.y, self._program.how
        t = self.place.t if theta <= how.newton.reuse or self._program.on_trial else math.nan
        numbers = torch.tensor([t, self._length], dtype=torch.float64, device=y.device)
        return y.view(BITS[y.dtype]), numbers.view(torch.int64)


def none_yet(like: Tensor) -> State:
    """What the first state of a chain has: no Jacobian."""
    numbers = torch.tensor([math.nan, math.nan], dtype=torch.float64, device=like.device)
    return torch.zeros_like(like, memory_format=torch.contiguous_format).view(BITS[like.dtype]), numbers.view(
        torch.int64
    )
