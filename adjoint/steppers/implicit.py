"""Implicit Runge-Kutta steps.

    M k_i = f(t + c_i h, y + h sum_j a_ij k_j),    y_new = y + h sum_i b_i k_i

Stages are found by Newton's method with a Jacobian at the start of the step or of an earlier one: that is a part of the
chain's state, so that a step computed again has the same bits. The transpose is that of the equations, exact wherever
the iteration ended (:mod:`adjoint.steppers.roots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.autograd import Step
from adjoint.implicit_method import IMPLICITLY, Implicit, Part
from adjoint.linear import Factored, Weights
from adjoint.steppers.consistent import Algebraic
from adjoint.steppers.control import Control
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.implicit_stages import ImplicitStages
from adjoint.steppers.jacobians import BITS, Memory, Work, none_yet
from adjoint.steppers.newton import NewtonFailed
from adjoint.steppers.stages import Terms
from adjoint.steppers.vectors import Vectors
from adjoint.tensors import State, Structure
from adjoint.timeline import SolveError

HALVED = 0.5
"""By what a step is multiplied whose stages are not found."""


class ImplicitProgram(ExplicitProgram):
    """The steps of an implicit method.

    Behind the leaves of y a state has the last slope, if it is the first of the next step, and which Jacobian there is.
    """

    iterates = True
    """Whether stages are found by iteration."""

    def __init__(self, how: Implicit, t: Tensor, structure: Structure, like: State, control: Control) -> None:
        super().__init__(how.tableau, t, structure, like, control)
        self.how = self.method = how
        self.vectors = Vectors(like, how.linear.members)
        if how.mass is not None and len(how.mass) != self.vectors.size:
            raise ValueError(f"mass has {len(how.mass)} rows, and y0 {self.vectors.size} numbers; give as many")
        rows = how.tableau.a
        lower = rows if how.tableau.coupled else [row[:i] for i, row in enumerate(rows)]
        self.rows = [Terms(row) if any(row) else None for row in lower]
        explicit = [row[:i] for i, row in enumerate(how.tableau.explicit or ())] if how.split else []
        self.explicit_rows = [Terms(row) if any(row) else None for row in explicit]
        if how.linear.members and control.tolerance.norm is None:
            self.control = _of_members(control)
        self.work, self.memory = Work(), Memory()
        self.on_trial = False
        self.broken: SolveError | None = None
        """Of fixed steps: why they cannot go on, from this step."""
        self.carries = how.tableau.carries and not how.split
        """Whether the state has the last slope; that of a pair's implicit part is not taken at the new state."""
        self.keeps = self.iterates and how.newton.reuse > 0 and how.linear.reusable and like[0].real.dtype in BITS
        """Whether the state has a Jacobian that was kept."""
        if self.carries or self.keeps:
            self.initial = None  # the first step shows it: the chain's state has more leaves

    def first(self, state: State) -> State:
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format).detach() for x in state]
        kept = none_yet(self.vectors.zeros()) if self.keeps else ()
        return (*state, *(zeros if self.carries else ()), *kept)

    def sample(self) -> ImplicitProgram:
        other = super().sample()
        assert isinstance(other, ImplicitProgram)
        other.on_trial, other.work, other.memory = True, Work(), Memory(0)  # f must not seem to keep tensors
        return other

    def begin_anew(self) -> None:
        super().begin_anew()
        self.work, self.memory, self.broken = Work(), Memory(), None

    def begin(self, function: Any, state: State) -> None:
        super().begin(function, state[: self.leaves])

    def unstarted(self, state: State) -> list[Tensor]:
        """The outputs if not even one step could be taken."""
        if self.view is not None:
            return []
        rest = self.outputs - 1
        return [torch.cat((x[None], x.detach().new_full((rest, *x.shape), torch.nan))) for x in state[: self.leaves]]

    def stages(self, *how: Any) -> ImplicitStages:
        return ImplicitStages(self, *how)

    def identity(self) -> Any:
        how = self.how
        return repr((how.tableau, how.newton, how.linear, how.split)), how.mass, super().identity()

    def settled(self, function: Any, t: Tensor, state: State, what: str) -> State:
        spaces, t = self.how.null_spaces, t.to(device=self.device, dtype=self.dtype)
        if spaces is None:
            return state
        if self.jumps_at(float(t.detach())):
            with torch.no_grad():
                hair = torch.nextafter(t, t.new_tensor(self.asked.t[-1])) - t
            t = t + hair
        vectors, still = self.vectors, t.detach()
        y = vectors.pack(state)
        plain = Algebraic(spaces, lambda y: self._flat(function, still, y), y, what, float(still))
        if self.how.consistent == "check":
            if not plain.fulfilled():
                self._check_correction(plain, state)
            return state
        z = plain.solved(vectors.rounding_of)
        if torch.is_grad_enabled():
            z = Algebraic(spaces, lambda y: self._flat(function, t, y), y, what, float(still)).differentiable(z, y)
        return vectors.unpack(y + z @ plain.right.mT)

    def _flat(self, function: Any, t: Tensor, y: Tensor) -> Tensor:
        return self.vectors.pack(self.part(function, IMPLICITLY, t, self.vectors.unpack(y)))

    def _check_correction(self, equations: Algebraic, state: State) -> None:
        """Raise ValueError for a state that is farther from a consistent one than the tolerances allow."""
        tolerance, change = self.control.tolerance, self.vectors.unpack(equations.correction())
        known = tuple(x.detach() for x in state)
        largest = max(float(x.abs().max()) for x in tolerance.scaled(change, known, known) if x.numel())
        if not largest <= 1:
            raise ValueError(
                f"{equations.what} does not fulfil the algebraic equations of mass at t={equations.t:.6g}: "
                f"{tolerance.worst(change, known, known)} is {largest:.3g} times as far from a consistent state as rtol and "
                f"atol allow. Give a consistent one, or have it found by Implicit(.., mass=mass, consistent='solve')"
            )

    def part(self, function: Any, part: Part, t: Tensor, state: State) -> State:
        """One part of f; all of it, if it has no parts."""
        if not self.how.split:
            return self.slope(function, t, state)
        f, args = function
        return self.slope((f, (*args, part)), t, state)

    def _explore(self, function: Any, k: int, state: State, recording: bool) -> Step:
        timeline, tolerance, y = self.timeline, self.control.tolerance, state[: self.leaves]
        assert isinstance(timeline, AdaptiveTimeline)
        worst = ""
        while True:
            try:
                start, stop = timeline.propose()
            except SolveError as end:
                raise self._diagnosed(end, function, y, (), worst or self._fastest(function, end.t, y)) from None
            self._announce("step", start, state, stop - start)
            stages = self.stages(function, state, k, start, stop, recording, True)
            try:
                stages.run()
            except NewtonFailed:
                self.work.failures += 1
                ratio = (self.control.controller.safety / HALVED) ** timeline.order
                worst = (
                    "; Newton's method does not converge, which f with jumps or a kink may cause, or no number in it"
                )
            else:
                with torch.no_grad():
                    error = stages.error()
                    ratio = tolerance.ratio(error, y, stages.new)
                    if not ratio <= 1:
                        worst = f"; the largest error is in {tolerance.worst(error, y, stages.new)}"
            accepted = timeline.judge(stop, ratio)
            self._announce("accept" if accepted else "reject", start, state, stop - start)
            if accepted:
                self._announced = k + 1
                if self.watch is not None:
                    self.watch(stages)
                return stages.finish()

    def _fastest(self, function: Any, t: float, y: State) -> str:
        with torch.no_grad():
            return f"; f is largest in {self.control.tolerance.worst(self.slope(function, self.time(t), y), y, y)}"

    def jacobian(self, function: Any, t: Tensor, y: Tensor) -> Any:
        """df/dy of a packed state, of the part that is taken implicitly."""
        self.work.jacobians += 1
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            value = self.vectors.pack(self.part(function, IMPLICITLY, t.detach(), self.vectors.unpack(at)))
        return self.how.linear.jacobian(value, at)

    def factored(self, jacobians: Sequence[Any], weights: Weights) -> Factored:
        self.work.factorisations += 1
        return self.how.linear.factored(jacobians, weights, self.how.mass)

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        if self.broken is not None and k >= self.broken.step:
            return self._nowhere(k, state, outputs)
        try:
            return super().step(function, k, state, recording, outputs)
        except NewtonFailed as failed:
            self.work.failures += 1
            start, stop = self.timeline.ends(k)
            change = self.vectors.unpack(failed.change[-1])
            y = tuple(x.detach() for x in state[: self.leaves])
            self.broken = SolveError(
                "newton",
                f"Newton's method does not find the stages of step {k}, from t={start:.6g} to {stop:.6g} "
                f"({self.control.tolerance.worst(change, y, y)} moves most); give shorter steps by dt=, or take a method "
                f"that controls them, such as 'kvaerno5'",
                t=start,
                step=k,
                state=y,
            )
            if self.timeline.landing and self.watch is None:
                return self._nowhere(k, state, outputs)
            raise self.broken from None

    def _nowhere(self, k: int, state: State, outputs: bool) -> Step:
        """A step from where no step leads on: what is shown of it is no number."""
        lost = tuple(torch.full_like(x, torch.nan) if x.is_floating_point() or x.is_complex() else x for x in state)
        inside = self.asked.inside(*self.timeline.ends(k)) if outputs and self.view is None else ()
        shown = tuple((j, lost[: self.leaves]) for j in inside)
        return Step(tuple(x.detach().clone() for x in lost), shown)


def _of_members(control: Control) -> Control:
    """The error of the member with the largest one decides."""

    def largest(leaves: State) -> float:
        squares = torch.cat([x.abs().double().square().flatten(1) for x in leaves], -1)
        return float(squares.mean(-1).max().sqrt())

    return replace(control, tolerance=replace(control.tolerance, norm=largest))
