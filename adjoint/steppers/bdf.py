"""Backward differentiation formulas of order 1 to 5 in steps and orders that are chosen on the way (:mod:`adjoint.bdf`).

The differences of earlier states are a part of the chain's state, in units of the step before: a step is a function of its
state alone, with its length and its order frozen once they were accepted, and is transposed as that. What comes out at
t_0 converges to the gradient; what stands on the way is the cotangent of a grid of differences, and no solution of the
adjoint equation (Sandu 2006, Springer LNCS 3994): it is shown nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.autograd import Step
from adjoint.bdf import ALPHA, ERROR, GAMMA, INTERPOLANTS, ROWS
from adjoint.frozen import replayed
from adjoint.implicit_method import IMPLICITLY, Implicit
from adjoint.memory import aside
from adjoint.steppers.control import Control
from adjoint.steppers.implicit import HALVED, ImplicitProgram
from adjoint.steppers.implicit_stages import ImplicitStages
from adjoint.steppers.newton import NewtonFailed
from adjoint.steppers.roots import Equation, Evaluated
from adjoint.tensors import State, Structure
from adjoint.timeline import SolveError

LARGEST, SMALLEST = 10.0, 0.2
"""By what the step is multiplied at most and at least."""


@dataclass
class Orders:
    """The order of each step that was taken."""

    taken: list[int] = field(default_factory=list)
    next: int = 1
    alike: int = 0
    """So many steps in a row were of this order and length."""

    def moved_along(self, noted: Orders) -> Orders:
        return Orders([*noted.taken], noted.next, noted.alike)


def refuse_moving(what: str) -> None:
    """Raise ValueError: the first steps are of order 1, and short; what a change of their length does is far from exact."""
    raise ValueError(
        f"{what}, and BDF begins with order 1 there: the derivative in that time would converge as the root of rtol only. "
        f"Give 'radau5' or 'kvaerno5', or solve under torch.no_grad()"
    )


class BdfProgram(ImplicitProgram):
    """The steps of a BDF solve. Behind y and the Jacobian's place a state has D_1 .. D_7 and the length of the last step."""

    def __init__(self, how: Implicit, t: Tensor, structure: Structure, like: State, control: Control) -> None:
        super().__init__(how, t, structure, like, control)
        if t.requires_grad and torch.is_grad_enabled():
            refuse_moving("t requires grad")
        self.orders = replayed(Orders())
        self.initial = None

    def first(self, state: State) -> State:
        zeros = self.vectors.zeros()
        rows = torch.zeros((ROWS, *zeros.shape), dtype=zeros.dtype, device=zeros.device)
        length = torch.ones((), dtype=torch.float64, device=zeros.device)
        return (*super().first(state), rows, length)

    def sample(self) -> BdfProgram:
        other = super().sample()
        assert isinstance(other, BdfProgram)
        other.orders = Orders()
        return other

    def stages(self, *how: Any) -> BdfStages:
        return BdfStages(self, *how)

    def order_of(self, k: int) -> int:
        taken = self.orders.taken
        return taken[k] if k < len(taken) else self.orders.next

    def _explore(self, function: Any, k: int, state: State, recording: bool) -> Step:
        timeline, tolerance, y, orders = self.timeline, self.control.tolerance, state[: self.leaves], self.orders
        assert isinstance(timeline, AdaptiveTimeline)
        worst, tried = "", 0.0
        while True:
            try:
                start, stop = timeline.propose()
            except SolveError as end:
                raise self._diagnosed(end, function, y, (), worst or self._fastest(function, end.t, y)) from None
            self._announce("step", start, state, stop - start)
            stages = self.stages(function, state, k, start, stop, recording, True)
            if not stages.goes_on and orders.next > 1:
                orders.next, orders.alike = 1, 0
                stages = self.stages(function, state, k, start, stop, recording, True)
            timeline.order = orders.next + 1
            try:
                stages.run()
            except NewtonFailed:
                self.work.failures += 1
                ratio = (self.control.controller.safety / HALVED) ** timeline.order
                worst = "; Newton's method does not converge, which f with jumps or a kink may cause"
            else:
                with torch.no_grad():
                    error = stages.error()
                    ratio = tolerance.ratio(error, y, stages.new)
                    if not ratio <= 1:
                        worst = f"; the largest error is in {tolerance.worst(error, y, stages.new)}"
            accepted = timeline.judge(stop, ratio)
            self._announce("accept" if accepted else "reject", start, state, stop - start)
            if not accepted:
                orders.alike = 0
                continue
            tried = abs(stop - start)
            orders.taken.append(orders.next)
            with torch.no_grad():
                timeline.begin(tried * self._chosen(stages, ratio))
            self._announced = k + 1
            if self.watch is not None:
                self.watch(stages)
            return stages.finish()

    def _chosen(self, stages: BdfStages, ratio: float) -> float:
        """The order of the next step is set; by what to multiply its length.

        Nothing changes before so many steps were alike that the differences are those of one grid.
        """
        orders, q = self.orders, self.orders.next
        same = abs(stages.length - stages.last_length) <= 1e-9 * abs(stages.length)
        orders.alike = orders.alike + 1 if stages.goes_on and same else 1
        if orders.alike < q + 1:
            return 1.0
        ratios = {q: ratio}
        for other, row in ((q - 1, q - 1), (q + 1, q + 1)):
            if 1 <= other <= self.how.tableau.order:
                size = self.vectors.unpack(stages.differences[row] * ERROR[other])
                ratios[other] = self.control.tolerance.ratio(size, stages.state, stages.new)
        safety = self.control.controller.safety
        factors = {p: safety * max(x, 1e-10) ** (-1 / (p + 1)) for p, x in ratios.items()}
        best = max(factors, key=lambda p: (factors[p], p == q))
        orders.next, orders.alike = best, 0
        return min(LARGEST, max(SMALLEST, factors[best]))


class BdfStages(ImplicitStages):
    """One step."""

    differences: Tensor
    """D_1 .. D_7 behind the step, (7, .., n)."""

    def __init__(self, program: BdfProgram, function: Any, state: State, k: int, *how: Any) -> None:
        super().__init__(program, function, state, k, *how)
        self.order = program.order_of(k)
        self._history, self._last = state[-2], state[-1]

    @property
    def length(self) -> float:
        return self.stop - self.start

    @property
    def last_length(self) -> float:
        return float(self._last.detach())

    def run(self, first: State | None = None) -> None:
        program, q = self.program, self.order
        vectors, h = program.vectors, self.h
        y = vectors.pack(self.state)
        rows = self._on_this_grid(y)
        gammas = torch.tensor(GAMMA[1 : q + 1], dtype=torch.float64) / ALPHA[q]
        psi = _weighted(gammas, rows[1:])
        base = rows.sum(0) - psi
        slope = self._slope_at_end(base, psi)
        c = h / ALPHA[q]
        gone = slope * c.to(slope.dtype) if isinstance(c, Tensor) else slope * c
        new = base + gone
        self.change = gone - psi
        self.slopes = [vectors.unpack(slope)]
        self.new = vectors.unpack(new)
        self._behind(rows, new)
        self._betray()

    def error(self) -> State:
        return self.program.vectors.unpack(self.change * ERROR[self.order])

    def carried(self) -> State:
        h = self.h.to(self._last) if isinstance(self.h, Tensor) else self._last.new_tensor(self.h)
        return (*super().carried(), self.differences, h)

    def polynomial(self) -> State:
        return tuple([torch.stack(column) for column in self._coefficients()])

    def interpolate(self) -> list[State]:
        leaves = self._coefficients()
        return [tuple([_horner(column, theta) for column in leaves]) for theta in self.fractions]

    def _coefficients(self) -> list[list[Tensor]]:
        """For each leaf those of 1, theta, theta^2, .. over this step."""
        vectors, q = self.program.vectors, self.order
        rows = torch.cat((vectors.pack(self.new)[None], self.differences[:q]))
        found = _combined(torch.from_numpy(INTERPOLANTS.weights[q]), rows)
        return [list(column) for column in zip(*(vectors.unpack(row) for row in found), strict=True)]

    def _on_this_grid(self, y: Tensor) -> Tensor:
        """D_0 = y, D_1 .. D_q on the grid of this step; at first the slope alone is known."""
        q, vectors = self.order, self.program.vectors
        if not self.goes_on:
            slope = vectors.pack(self._at_start())
            return torch.stack((y, slope * self.h.to(slope.dtype) if isinstance(self.h, Tensor) else slope * self.h))
        return _combined(_resampled(q, self.h / self._last), torch.cat((y[None], self._history[:q])))

    def _at_start(self) -> State:
        """f at the start of the step; with a mass matrix, the slope."""
        program, mass = self.program, self.program.how.mass
        slope: State = program.part(self.function, IMPLICITLY, self.start_time(), self.state)
        if mass is None:
            return slope
        flat = program.vectors.pack(slope)
        found: State = program.vectors.unpack(torch.linalg.solve(mass.to(flat), flat[..., None])[..., 0])
        return found

    def _behind(self, rows: Tensor, new: Tensor) -> None:
        """The differences at the new state: D_i = sum of D_i .. D_q, and the change."""
        q, change = self.order, self.change
        sums = rows.flip(0).cumsum(0).flip(0)[1:] + change
        history = self._history if self.goes_on else torch.zeros_like(self._history)
        higher = torch.stack((change, change - history[q]))
        self.differences = torch.cat((sums, higher, history[q + 2 :]))

    def _slope_at_end(self, base: Tensor, psi: Tensor) -> Tensor:
        """k = f(t_new, base + (h / alpha) k)."""
        program, function, a = self.program, self.function, 1 / ALPHA[self.order]
        vectors, t, h, mass = program.vectors, self.times[0], self.stop - self.start, program.how.mass
        known, still = base.detach(), t.detach()
        coefficients = ((a,),)

        def slope(t: Tensor, y: Tensor) -> Tensor:
            found: Tensor = vectors.pack(program.part(function, IMPLICITLY, t, vectors.unpack(y)))
            return found

        def residual(x: Tensor) -> Tensor:
            found = slope(still, torch.add(known, x[0], alpha=h * a))[None]
            if found.requires_grad:  # a plain run that uses what is not known: whoever called must see it
                self.suspect, found = found, found.detach()
            return found - (x if mass is None else x @ mass.T.to(x))

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recording):
            x = self._found(residual, coefficients, (psi.detach() / (h * a))[None], known, [still])
        if self.recording:

            def evaluate(x: Tensor, own: Sequence[Tensor]) -> Evaluated:
                start, *moving = own
                time, step = (moving[0], moving[1]) if moving else (still, h)
                with torch.enable_grad(), aside():
                    point = (
                        start + (step * a).to(start.dtype) * x[0]
                        if isinstance(step, Tensor)
                        else start + step * a * x[0]
                    )
                    point = point if point.requires_grad else point.requires_grad_()
                    part = slope(time, point)
                    return Evaluated(part[None], [part], [point])

            own = (base, t, self.h) if isinstance(self.h, Tensor) else (base,)
            x = Equation(evaluate, own, program.how.linear, ((h * a,),), mass, work=program.work).root(x)
        return x[0]


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    return _combined(weights[None], rows)[0]


def _combined(weights: Tensor, rows: Tensor) -> Tensor:
    """sum_j w_ij x_j for every i."""
    return torch.tensordot(weights.to(rows), rows, 1)


@lru_cache
def _pascal(q: int) -> Tensor:
    """From values at 0, -1, -2, .. to differences, and back: it is its own inverse."""
    return _powers(q, torch.ones((), dtype=torch.float64))


def _powers(q: int, factor: Tensor) -> Tensor:
    """R of Shampine & Reichelt, section 2.2: prod_{m <= i} (m - 1 - j factor) / m."""
    i, j = torch.arange(1, q + 1, dtype=torch.float64)[:, None], torch.arange(q + 1, dtype=torch.float64)
    rows = [torch.ones(q + 1, dtype=torch.float64, device=factor.device)]
    for row in (i - 1 - j * factor) / i:
        rows.append(rows[-1] * row)
    return torch.stack(rows)


def _resampled(q: int, factor: Tensor) -> Tensor:
    """From differences on a grid to those on one whose step is ``factor`` as long."""
    return (_powers(q, factor) @ _pascal(q).to(factor.device)).mT


def _horner(coefficients: Sequence[Tensor], theta: float | Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + (theta * value).to(value.dtype)
    return value
