"""Rosenbrock steps of many members at once: :mod:`adjoint.steppers.rosenbrock` with a time and a step size for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.linear import Factored
from adjoint.memory import aside
from adjoint.rosenbrock_tableaus import RosenbrockTableau
from adjoint.steppers.member_implicit import EACH, ImplicitLockstep, ImplicitMemberStep
from adjoint.steppers.member_step import MemberStep
from adjoint.steppers.roots import Equation, Evaluated
from adjoint.steppers.rosenbrock import derivative_along, plus_derivative
from adjoint.steppers.stages import Terms
from adjoint.tensors import State


class RosenbrockLockstep(ImplicitLockstep):
    """The steps of a batch."""

    iterates = False

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        table = self.how.tableau
        assert isinstance(table, RosenbrockTableau)
        self.couplings = [Terms(row) if any(row) else None for row in table.coupling]
        self.shifts = table.d

    def attempt(self, function: Any, k: int, state: State, start: Tensor, stop: Tensor, recording: bool) -> MemberStep:
        return RosenbrockMemberStep(self, function, k, state, start, stop, recording)


class RosenbrockMemberStep(ImplicitMemberStep):
    """One step being computed."""

    def run(self, first: State | None = None) -> None:
        self._set_times()
        table = self.program.how.tableau
        assert isinstance(table, RosenbrockTableau)
        self._prepare()
        self._shared: list[Factored] = []
        jacobian, self._slope_in_time = self._at_start_of_all()
        self._lu = self._of([jacobian], ((table.gamma,),))
        for i in range(table.stages):
            self.slopes.append(self.program.vectors.unpack(self._stage_of(i, table.gamma)))
        self._end()

    def _at_start_of_all(self) -> tuple[Tensor, Tensor | None]:
        """The Jacobians at the start of the step, and df/dt there; None if f does not depend on t."""
        program, vectors = self.program, self.program.vectors
        known = program._here
        if known is None or known[0] is not self.whole or program.trial:
            program.work.jacobians += 1
            with torch.enable_grad():
                t = self._rest_time().detach().requires_grad_()
                y = vectors.pack(tuple(x.detach() for x in self.state)).detach().requires_grad_()
                value = vectors.pack(self.slope(t, vectors.unpack(y)))
                jacobian = EACH.jacobian(value, y)
                moved = derivative_along(value, [t], [torch.ones_like(t)])
            known = program._here = (self.whole, (jacobian, None if moved is None else moved.detach()))
        found: tuple[Tensor, Tensor | None] = known[1]
        return found

    def _stage_of(self, i: int, gamma: float) -> Tensor:
        program, vectors = self.program, self.program.vectors
        mass, terms = program.how.mass, program.couplings[i]
        y, point = vectors.pack(self._base_state), vectors.pack(self._point(i))
        rest = torch.zeros_like(y)
        if terms is not None:
            sums = [terms.of(self.slopes, leaf) for leaf in range(len(self.state))]
            rest = vectors.pack(tuple(x * terms.scale for x in sums))
            rest = rest if mass is None else rest @ mass.T.to(rest)
        t_0, t_i, h, d = self.begins, self.times[i], self.length, program.shifts[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recording):
            value = vectors.pack(self.slope(t_i.detach(), vectors.unpack(point.detach())))
            if value.requires_grad:  # a plain run that uses what is not known: whoever called must see it
                self.suspect, value = value, value.detach()
            right = value + rest.detach()
            if self._slope_in_time is not None:
                right = right + (h * d)[:, None] * self._slope_in_time
            found = self._lu.solve((gamma * right)[None])
        if not self.recording:
            return found[0]

        def evaluate(x: Tensor, own: Sequence[Tensor]) -> Evaluated:
            y, point, rest, *moving = own
            start, now, step = moving if moving else (t_0.detach(), t_i.detach(), h)
            with torch.enable_grad(), aside():
                y = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
                start = start.view_as(start) if start.requires_grad else start.detach().requires_grad_()
                there = vectors.pack(self.slope(start, vectors.unpack(y)))
                slope = vectors.pack(self.slope(now, vectors.unpack(point)))
                gone = (step * gamma).to(x.dtype)
                directions = (gone[:, None] * x[0], (gone * d).to(start.dtype))
                value = plus_derivative(gamma * (slope + rest), there, (y, start), directions)
                return Evaluated(value[None], [there], [y])

        own = (y, point, rest, t_0, t_i, self.h) if self.h.requires_grad else (y, point, rest)
        weights = ((h * gamma,),)
        return Equation(evaluate, own, self.linear, weights, mass, self._shared, program.work).root(found)[0]
