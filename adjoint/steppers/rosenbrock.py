"""Rosenbrock steps: stages that are linear equations, with the exact Jacobian at the start of the step.

    (M - h gamma J) k_i = gamma (f(t + alpha_i h, y + h sum_j a_ij k_j) + M sum_j c_ij k_j + h d_i f_t)

A stage is a root of F(k) = right-hand side + h gamma J k like any other (:mod:`adjoint.steppers.roots`): its transpose
solves with A^T, and the derivative of F takes the second derivatives of f in, since J k is a derivative with a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.implicit_method import IMPLICITLY
from adjoint.linear import Factored
from adjoint.memory import aside
from adjoint.rosenbrock_tableaus import RosenbrockTableau
from adjoint.steppers.implicit import ImplicitProgram
from adjoint.steppers.implicit_stages import ImplicitStages
from adjoint.steppers.roots import Equation, Evaluated
from adjoint.steppers.stages import Terms
from adjoint.tensors import State
from adjoint.touched import leaves_behind


class RosenbrockProgram(ImplicitProgram):
    """The steps of a Rosenbrock method."""

    iterates = False

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        table = self.how.tableau
        assert isinstance(table, RosenbrockTableau)
        self.couplings = [Terms(row) if any(row) else None for row in table.coupling]
        self.shifts = table.d

    def stages(self, *how: Any) -> RosenbrockStages:
        return RosenbrockStages(self, *how)


class RosenbrockStages(ImplicitStages):
    """One step of a Rosenbrock method being computed."""

    program: RosenbrockProgram

    def run(self, first: State | None = None) -> None:
        program, table = self.program, self.program.how.tableau
        assert isinstance(table, RosenbrockTableau)
        self._shared: list[Factored] = []
        self._jacobian, self._slope_in_time = self._at_rest()
        self._factors = program.factored([self._jacobian], (((self.stop - self.start) * table.gamma,),))
        for i in range(table.stages):
            self.slopes.append(program.vectors.unpack(self._stage_of(i, table.gamma)))
        self.new = self._moved(program.weights)
        self._betray()

    def _at_rest(self) -> tuple[Any, Tensor | None]:
        """The Jacobian at the start of the step, and df/dt there; None if f does not depend on t."""
        program, vectors = self.program, self.program.vectors
        place = self.jacobian.place
        known = program.memory.at(place)
        if known is None:
            program.work.jacobians += 1
            with torch.enable_grad():
                t = self.start_time().detach().requires_grad_()
                y = place.y.detach().requires_grad_()
                value = vectors.pack(program.part(self.function, IMPLICITLY, t, vectors.unpack(y)))
                jacobian = program.how.linear.jacobian(value, y)
                moved = derivative_along(value, [t], [torch.ones_like(t)])
            known = program.memory.add(place, (jacobian, None if moved is None else moved.detach()))
        found: tuple[Any, Tensor | None] = known.jacobian
        return found

    def _stage_of(self, i: int, gamma: float) -> Tensor:
        program, vectors = self.program, self.program.vectors
        function, mass = self.function, program.how.mass
        y, point = vectors.pack(self.state), vectors.pack(self.point(i))
        terms = program.couplings[i]
        rest = torch.zeros_like(y)
        if terms is not None:
            sums = [terms.of(self.slopes, leaf) for leaf in range(len(self.state))]
            rest = vectors.pack(tuple(x * terms.scale for x in sums))
            rest = rest if mass is None else rest @ mass.T.to(rest)
        t_0, t_i, h = self.start_time(), self.times[i], self.stop - self.start
        d, weights = program.shifts[i], ((h * gamma,),)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recording):
            at = vectors.unpack(point.detach())
            value = vectors.pack(program.part(function, IMPLICITLY, t_i.detach(), at))
            if value.requires_grad:  # a plain run that uses what is not known: whoever called must see it
                self.suspect, value = value, value.detach()
            right = value + rest.detach()
            if self._slope_in_time is not None:
                right = right + (h * d) * self._slope_in_time
            found = self._factors.solve((gamma * right)[None])
        if not self.recording:
            return found[0]

        def evaluate(x: Tensor, own: Sequence[Tensor]) -> Evaluated:
            y, point, rest, *moving = own
            start, now, step = moving if moving else (t_0.detach(), t_i.detach(), h)
            with torch.enable_grad(), aside():
                y = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
                start = start.view_as(start) if start.requires_grad else start.detach().requires_grad_()
                there = vectors.pack(program.part(function, IMPLICITLY, start, vectors.unpack(y)))
                slope = vectors.pack(program.part(function, IMPLICITLY, now, vectors.unpack(point)))
                gone = (step * gamma).to(x.dtype) if isinstance(step, Tensor) else step * gamma
                directions = (gone * x[0], (gone * d) * torch.ones_like(start))
                value = plus_derivative(gamma * (slope + rest), there, (y, start), directions)
                return Evaluated(value[None], [there], [y])

        own = (y, point, rest, t_0, t_i, self.h) if isinstance(self.h, Tensor) else (y, point, rest)
        how = program.how
        return Equation(evaluate, own, how.linear, weights, how.mass, self._shared, program.work).root(found)[0]


def derivative_along(value: Tensor, points: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor | None:
    """The derivative of ``value`` along directions in ``points``; None if there is none."""
    if not value.requires_grad:
        return None
    seed = torch.zeros_like(value).requires_grad_()
    back = torch.autograd.grad(value, points, seed, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(back, directions, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return None
    ends, along = zip(*pairs, strict=True)
    (moved,) = torch.autograd.grad(ends, seed, [v.detach().to(g.dtype) for g, v in pairs], retain_graph=True)
    return moved


def plus_derivative(total: Tensor, value: Tensor, points: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """``total`` + the derivative of ``value`` along directions in ``points``, as a function of all that it depends on."""
    moved = derivative_along(value, points, along)
    if moved is None:
        return total
    behind = leaves_behind(points)
    held = [leaf for key, leaf in leaves_behind([value]).items() if key not in behind]
    return total + _Along.apply(moved, [value], len(points), *points, *along, *held)


class _Along(torch.autograd.Function):
    """``moved`` = :func:`derivative_along`, with a transpose: that of its product with w, d(w^T value) along the directions.

    So f is differentiated twice, as often as torch's own formulas can be: a third time those of layer norms, say, hold
    fixed what is not. Inputs: the points, the directions, and the leaves that f holds.
    """

    @staticmethod
    def forward(ctx: Any, moved: Tensor, value: list[Tensor], count: int, *inputs: Tensor) -> Tensor:
        ctx.value, ctx.count, ctx.inputs = value[0], count, inputs
        return moved.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        points, directions = ctx.inputs[: ctx.count], ctx.inputs[ctx.count : 2 * ctx.count]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            (w,) = cotangents
            back = torch.autograd.grad(ctx.value, points, w, create_graph=True, allow_unused=True)
            total = sum((g * v.to(g.dtype)).sum() for g, v in zip(back, directions, strict=True) if g is not None)
            wanted = [x for x in ctx.inputs if x.requires_grad]
            if not (isinstance(total, Tensor) and total.requires_grad):
                return (None,) * (3 + len(ctx.inputs))
            found = torch.autograd.grad(total, wanted, create_graph=again, retain_graph=True, allow_unused=True)
        left = iter(found)
        return None, None, None, *(next(left) if x.requires_grad else None for x in ctx.inputs)
