"""The stages of an implicit step: found by Newton's method, differentiated as what they are.

Stages x solve M x = F(x, p), with p all that F depends on besides. Newton's method finds x and leaves no graph. Then

    dx = A^-1 dF,    A = M - dF/dx at x    (dF: with x held)

is attached to it: a node that holds one evaluation of F at x with its graph, and whose transpose solves with A^T. A is
made anew at the stages themselves when the transpose is wanted; the matrices of the iteration enter no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.linear import Factored, LinearAlgebra, Weights
from adjoint.steppers.jacobians import Work
from adjoint.touched import leaves_behind


class Evaluated(NamedTuple):
    """F with its graph, and the pieces by which dF/dx is known: F_i = f at y_i, y_i = .. + sum_j w_ij x_j."""

    value: Tensor
    """(stages, *state)"""
    parts: Sequence[Tensor]
    """f at each stage."""
    points: Sequence[Tensor]
    """Each stage, as a tensor of the graph."""


@dataclass(frozen=True)
class Equation:
    """M x = F(x, *own): how to evaluate F, and how to solve with its derivative."""

    evaluate: Callable[[Tensor, Sequence[Tensor]], Evaluated]
    own: Sequence[Tensor]
    """All tensors of the step's own graph that F depends on; beside these there are leaves, which f holds."""
    linear: LinearAlgebra
    weights: Weights
    mass: Tensor | None
    shared: list[Factored] | None = None
    """Where equations with one matrix A in common leave what they made of it."""
    work: Work | None = None
    """Where it is counted."""

    def root(self, found: Tensor) -> Tensor:
        """``found`` itself, as the differentiable function of all that F depends on."""
        cut = [x.detach().requires_grad_(x.requires_grad) for x in self.own]
        there = self.evaluate(found, cut)
        known = {id(x) for x in (*cut, *there.points)}
        held = [x for key, x in leaves_behind([there.value]).items() if key not in known]
        own = [x for x in self.own if x.requires_grad]
        if not own and not held:
            return found
        inside = [*(x for x in cut if x.requires_grad), *held]
        root: Tensor = _Root.apply(found, self, there, inside, len(own), *own, *held)
        return root

    def factored(self, there: Evaluated) -> Factored:
        """Of A at these stages."""
        if self.shared:
            return self.shared[0]
        with torch.no_grad():
            jacobians = [self.linear.jacobian(v, y) for v, y in zip(there.parts, there.points, strict=True)]
            found = self.linear.factored(jacobians, self.weights, self.mass)
        if self.work is not None:
            self.work.jacobians += len(jacobians)
            self.work.factorisations += 1
        if self.shared is not None:
            self.shared.append(found)
        return found

    def massed(self, w: Tensor) -> Tensor:
        """M^T w"""
        return w if self.mass is None else w @ self.mass.to(w)


class _Root(torch.autograd.Function):
    """Inputs: x, and all that F depends on, so that a second derivative can evaluate F at x as it depends on them."""

    @staticmethod
    def forward(
        ctx: Any, found: Tensor, equation: Equation, there: Evaluated, inside: list[Tensor], own: int, *inputs: Tensor
    ) -> Tensor:
        ctx.equation, ctx.there, ctx.inside, ctx.own = equation, there, inside, own
        root = found.clone()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (of_root,) = cotangents
        equation: Equation = ctx.equation
        if torch.is_grad_enabled():
            (root,) = ctx.saved_tensors
            own, held = equation.own, ctx.inside[ctx.own :]
            wanted = [i for i, x in enumerate(own) if x.requires_grad]
            found = _Twice.apply(equation, len(own), wanted, root, of_root, *own, *held)
        else:
            w = equation.factored(ctx.there).solve_transposed(of_root)
            found = torch.autograd.grad(ctx.there.value, ctx.inside, w, retain_graph=True, allow_unused=True)
        return None, None, None, None, None, *found


class _Twice(torch.autograd.Function):
    """The transpose of :class:`_Root` as a function of x, of x's cotangent c and of F's inputs z, with its derivative.

    It is (dF/dz)^T w with A^T w = c. With M^T w = c + (dF/dx)^T w it is differentiated as x is: dw = A^-T (dc + d((dF/dx)^T
    w)), w held on the right.
    """

    @staticmethod
    def forward(
        ctx: Any, equation: Equation, own: int, wanted: list[int], root: Tensor, of_root: Tensor, *inputs: Tensor
    ) -> Any:
        held = inputs[own:]
        with torch.enable_grad():
            x = root.detach().requires_grad_()
            cut = [z.detach().requires_grad_(z.is_floating_point()) for z in inputs[:own]]
            there = equation.evaluate(x, cut)
            ctx.factors = equation.factored(there)
            w = ctx.factors.solve_transposed(of_root.detach()).requires_grad_()
            points = [x, *(cut[i] for i in wanted), *held]
            grads = torch.autograd.grad(there.value, points, w, create_graph=True, allow_unused=True)
        ctx.back, *ctx.found = grads
        ctx.inner, ctx.own = [w, x, *cut, *held], own
        return tuple(
            torch.zeros_like(z) if g is None else g.detach() for g, z in zip(ctx.found, points[1:], strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "third derivatives of an implicit step are not there: the gradient of a gradient is as far as it goes"
            )
        of_w, *sums = _pulled(ctx.found, ctx.inner, cotangents)
        of_c = None if of_w is None else ctx.factors.solve(of_w)
        if of_c is not None:
            _, *more = _pulled([ctx.back], ctx.inner, [of_c])
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, more, strict=True)]
        return None, None, None, sums[0], of_c, *sums[1:]


def _pulled(
    ends: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """The transposed derivative of ``ends``, where these depend on the inputs at all."""
    pairs = [(x, c) for x, c in zip(ends, cotangents, strict=True) if x is not None and x.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    roots, seeds = zip(*pairs, strict=True)
    needed = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(roots, needed, seeds, retain_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]
