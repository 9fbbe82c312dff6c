"""Adams-Bashforth and Adams-Moulton steps of rising order.

    y_new = y + h sum_j b_j f_{k-j}                                        explicit (Bashforth)
    y_new = y + h (m_0 f(t_new, y_new) + sum_j m_{j+1} f_{k-j})            implicit (Moulton)

The implicit equation is iterated from the explicit step's value. The slopes of earlier steps are part of the chain's
state, x_k = (y_k, f_{k-1}, f_{k-2}, ..): a step is a function of its state alone, and its transpose that of the torch
graph of what was computed, iterations included. Coefficients are those of equal steps: Hairer, Norsett & Wanner,
Solving ODEs I, section III.1. Names, start (the 3/8 rule) and orders are torchdiffeq's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.frozen import replayed
from adjoint.steppers.control import Control
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.stages import Stages, Terms
from adjoint.tableaus import RK4_38
from adjoint.tensors import State, Structure

HIGHEST = 12
LEAST = 3
"""With fewer slopes than these a step is one of the 3/8 rule."""


@dataclass(frozen=True)
class Adams:
    """A multistep method: as many slopes as there are, ``max_order - 1`` at most.

    That is the order of explicit steps; implicit ones, which have the new slope too, reach ``max_order``. The higher the
    order, the shorter the steps must be: explicit ones beyond order 5 or so grow rounding errors.
    """

    name: str
    implicit: bool
    max_order: int = HIGHEST
    max_iters: int = 4
    """Of the implicit equation; a step that has not converged by then is kept as it is, and warned of."""
    restart: bool = True
    """Whether to start afresh where the length of the step changes. If not, the order falls to one there."""
    interp: str = "cubic"
    """Between the ends of a step: "linear", or the cubic through both values and slopes."""
    order = 4
    adaptive = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_order <= HIGHEST:
            raise ValueError(f"max_order={self.max_order} is no order of an Adams method here; give 4 to {HIGHEST}")
        if self.max_iters < 1:
            raise ValueError(f"max_iters={self.max_iters} corrects nothing; give at least 1")

    @property
    def depth(self) -> int:
        """How many earlier slopes a state holds."""
        return self.max_order - 2 if self.max_order > LEAST else 0


MULTISTEP = {
    "explicit_adams": Adams("explicit_adams", implicit=False),
    "implicit_adams": Adams("implicit_adams", implicit=True),
    "fixed_adams": Adams("fixed_adams", implicit=True),
}


@lru_cache
def bashforth(slopes: int) -> tuple[float, ...]:
    """b_0 .. of the explicit method with so many slopes, the newest first; they sum to one."""
    return _integrals(range(0, -slopes, -1))


@lru_cache
def moulton(slopes: int) -> tuple[float, ...]:
    """m_0 .. of the implicit method with so many slopes, that at the new time first."""
    return _integrals(range(1, 1 - slopes, -1))


def _integrals(nodes: Sequence[int]) -> tuple[float, ...]:
    """The integral over [0, 1] of each Lagrange polynomial over these nodes, exact before it is rounded."""
    found = []
    for own in nodes:
        polynomial = [Fraction(1)]  # coefficients of s^0, s^1, ..
        for other in nodes:
            if other != own:
                lower = [-other * c for c in polynomial] + [Fraction(0)]
                raised = [Fraction(0), *polynomial]
                polynomial = [(a + b) / (own - other) for a, b in zip(lower, raised, strict=True)]
        found.append(float(sum(c / (power + 1) for power, c in enumerate(polynomial))))
    return tuple(found)


@dataclass
class Choices:
    """What a step decides when it is first taken, and never again: how many slopes it uses, how often it corrects."""

    slopes: list[int] = field(default_factory=list)
    corrections: list[int] = field(default_factory=list)
    kept: int = 0
    """Slopes that the last step left behind."""
    warned: bool = False

    def moved_along(self, noted: Choices) -> Choices:
        """These choices, made as others were."""
        return Choices([*noted.slopes], [*noted.corrections], noted.kept)


class AdamsProgram(ExplicitProgram):
    """The steps of an Adams method; its states are those of the caller with the earlier slopes behind them."""

    initial = None

    def __init__(self, method: Adams, t: Tensor, structure: Structure, like: State, control: Control) -> None:
        super().__init__(RK4_38, t, structure, like, control)
        self.method = method
        self.choices = replayed(Choices())
        self.on_trial = False

    def first(self, state: State) -> State:
        zeros = (torch.zeros_like(x, memory_format=torch.contiguous_format).detach() for x in state)
        return (*state, *(tuple(zeros) * self.method.depth))

    def sample(self) -> AdamsProgram:
        """Its step takes as much memory as any: an implicit one with all its slopes and corrections."""
        other = super().sample()
        assert isinstance(other, AdamsProgram)
        other.choices, other.on_trial = Choices(), self.method.implicit and self.method.depth > 0
        return other

    def stages(self, *how: Any) -> AdamsStages:
        return AdamsStages(self, *how)

    def begin_step(self, k: int) -> int:
        """How many slopes step k uses."""
        if self.on_trial:
            return self.method.max_order - 1
        choices = self.choices
        if k == len(choices.slopes):
            if k > 0 and self.method.restart and self._changes(k):
                choices.kept = 0
            choices.kept = min(choices.kept + 1, max(self.method.max_order - 1, 1))
            choices.slopes.append(choices.kept)
        return choices.slopes[k]

    def _changes(self, k: int) -> bool:
        (a, b), (_, c) = self.timeline.ends(k - 1), self.timeline.ends(k)
        return abs((c - b) - (b - a)) > max(1e-9 * abs(c - b), 8 * math.ulp(max(abs(a), abs(c))))

    def identity(self) -> Any:
        return repr(self.method), super().identity()

    def snapshot(self) -> Any:
        choices = self.choices
        made = np.array(choices.slopes), np.array(choices.corrections), choices.kept, choices.warned
        return super().snapshot(), *made

    def restore(self, snapshot: Any) -> None:
        found, slopes, corrections, kept, warned = snapshot
        super().restore(found)
        vars(self.choices).update(slopes=slopes.tolist(), corrections=corrections.tolist(), kept=kept, warned=warned)

    def corrections(self, k: int) -> int | None:
        """How often step k corrects; None: that is to be found."""
        if self.on_trial:
            return self.method.max_iters
        found = self.choices.corrections
        return found[k] if k < len(found) else None

    def corrected(self, k: int, times: int, converged: bool) -> None:
        """Note how often step k was corrected; one that did not converge leaves one slope less behind."""
        choices = self.choices
        choices.corrections += [0] * (k - len(choices.corrections)) + [times]
        if converged:
            return
        choices.kept -= 1
        if not choices.warned:
            choices.warned = True
            warnings.warn(
                f"{self.method.name}: the corrector did not converge in {times} iterations at "
                f"t={self.timeline.ends(k)[0]:.6g}; take smaller steps, loosen rtol and atol, or raise max_iters",
                stacklevel=2,
            )


class AdamsStages(Stages):
    """One step of an Adams method being computed."""

    program: AdamsProgram

    def __init__(self, program: AdamsProgram, function: Any, state: State, *how: Any) -> None:
        size = len(state) // (1 + program.method.depth)
        super().__init__(program, function, state[:size], *how)
        self.history = [state[i : i + size] for i in range(size, len(state), size)]

    def run(self, first: State | None = None) -> None:
        program, k = self.program, self.k
        self.slope = program.slope(self.function, self.times[0], self.state)
        count = program.begin_step(k)
        if count < LEAST:
            super().run(self.slope)
            return
        earlier = [self.slope] * len(self.history) if program.on_trial else self.history
        slopes = [self.slope, *earlier[: count - 1]]
        change = self._over_step(bashforth(count), slopes)
        if program.method.implicit:
            change = self._corrected(change, moulton(count + 1), slopes)
        self.new = tuple([y + d for y, d in zip(self.state, change, strict=True)])

    def _corrected(self, change: State, weights: tuple[float, ...], slopes: list[State]) -> State:
        """y_new - y, iterated."""
        program, times = self.program, self.program.corrections(self.k)
        known = self._over_step(weights[1:], slopes)
        for i in range(program.method.max_iters if times is None else times):
            before = change
            there = tuple([y + d for y, d in zip(self.state, before, strict=True)])
            own = self._over_step(weights[:1], [program.slope(self.function, self.times[-1], there)])
            change = tuple([x + z for x, z in zip(own, known, strict=True)])
            settled = (times is None or program.on_trial) and self._settled(before, change)  # on trial for its memory
            if times is None and settled:
                program.corrected(self.k, i + 1, True)
                return change
        if times is None:
            program.corrected(self.k, program.method.max_iters, False)
        return change

    def _over_step(self, weights: Sequence[float], slopes: list[State]) -> State:
        """h times the weighted sum of slopes."""
        terms = Terms(weights)
        h = self.h * terms.scale
        return tuple([(terms.of(slopes, leaf) * h).to(y.dtype) for leaf, y in enumerate(self.state)])

    def _settled(self, before: State, after: State) -> bool:
        with torch.no_grad():
            moved = tuple(x - y for x, y in zip(after, before, strict=True))
            scaled = self.program.control.tolerance.scaled(moved, before, after)
            return all(bool((x < 1).all()) for x in scaled)

    def carried(self) -> State:
        size = len(self.history)
        return (*self.new, *(x for slope in [self.slope, *self.history][:size] for x in slope))

    def finish(self) -> Step:
        step = super().finish()
        if self.k == 0 and self.wanted and self.program.view is None:
            return step._replace(outputs=((0, self.state), *step.outputs))
        return step

    def interpolate(self) -> list[State]:
        leaves = self._coefficients()
        return [tuple([_horner(column, theta) for column in leaves]) for theta in self.fractions]

    def polynomial(self) -> State:
        return tuple([torch.stack(column) for column in self._coefficients()])

    def _coefficients(self) -> tuple[list[Tensor], ...]:
        """For each leaf those of 1, theta, theta^2, .. over this step."""
        change = tuple([y - x for x, y in zip(self.state, self.new, strict=True)])
        if self.program.method.interp == "linear":
            return tuple([[y, d] for y, d in zip(self.state, change, strict=True)])
        begin = self._over_step((1.0,), [self.slope])
        end = self._over_step((1.0,), [self.program.slope(self.function, self.times[-1], self.new)])
        return tuple(
            [
                [y, a, 3 * d - 2 * a - b, a + b - 2 * d]
                for y, d, a, b in zip(self.state, change, begin, end, strict=True)
            ]
        )


def _horner(coefficients: Sequence[Tensor], theta: float | Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + (theta * value).to(value.dtype)
    return value
