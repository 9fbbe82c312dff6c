"""States that fulfil the algebraic equations of M dy/dt = f(t, y), M singular.

With N M = 0 and M Z = 0 (rows of N and columns of Z: bases of both null spaces), every solution has N f(t, y) = 0. From a
state y_0 that has not, y = y_0 + Z z is found by Newton's method: M y, which is all that the differential equations say
about y, stays. With A = N f_y Z, regular for equations of index 1, the implicit function theorem gives

    dz = -A^-1 N (f_y dy_0 + f_p dp + f_t dt)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adjoint.timeline import SolveError

MOST = 50
"""Iterations."""

Residual = Callable[[Tensor], Tensor]
"""f at a packed state of shape (.., n)."""


class NullSpaces(NamedTuple):
    """Of a matrix M, (n, n): N, (m, n), and Z, (n, m)."""

    left: Tensor
    right: Tensor

    @staticmethod
    def of(mass: Tensor) -> NullSpaces | None:
        """None: there are none. Unit vectors where rows and columns of zeros are all of them."""
        eye = torch.eye(len(mass), dtype=mass.dtype, device=mass.device)
        diagonal = mass.diagonal()
        if torch.equal(mass, torch.diag(diagonal)):
            missing = int((diagonal == 0).sum())
        else:
            missing = len(mass) - int(torch.linalg.matrix_rank(mass))
        if missing == 0:
            return None
        rows, columns = (mass == 0).all(1), (mass == 0).all(0)
        if int(rows.sum()) == int(columns.sum()) == missing:
            return NullSpaces(eye[rows], eye[:, columns])
        u, _, vh = torch.linalg.svd(mass)
        return NullSpaces(u[:, -missing:].mT.contiguous(), vh[-missing:].mT.contiguous())


class Algebraic:
    """0 = N f(t, y) at one time, around one state ``y`` of shape (.., n), for the change Z z of it."""

    def __init__(self, spaces: NullSpaces, f: Residual, y: Tensor, what: str, t: float) -> None:
        known = y.detach()
        self.left, self.right = spaces.left.to(known), spaces.right.to(known)
        self.f, self.y, self.what, self.t = f, known, what, t

    def residual(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.f((self.y if y is None else y) + z @ self.right.mT) @ self.left.mT

    def fulfilled(self) -> bool:
        """Whether nothing is left, to the last bit."""
        with torch.no_grad():
            return not bool(self.residual(self.y.new_zeros((*self.y.shape[:-1], len(self.left)))).any())

    def correction(self) -> Tensor:
        """The change of y that Newton's first iteration makes."""
        z = self.y.new_zeros((*self.y.shape[:-1], len(self.left)))
        return self._change(z) @ self.right.mT

    def solved(self, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """z. ``rounding``: below what a change of a state of this size is rounding."""
        z = self.y.new_zeros((*self.y.shape[:-1], len(self.left)))
        before = float("inf")
        for _ in range(MOST):
            change = self._change(z)
            z = z + change
            moved = (change @ self.right.mT).abs()
            now = float((moved / rounding((self.y + z @ self.right.mT).abs())).max())
            if now <= 1 or (now <= 1e6 and now >= 0.25 * before):
                return z
            before = now
        raise SolveError(
            "newton",
            f"Newton's method does not find a consistent state from {self.what} at t={self.t:.6g}; start nearer to one",
            t=self.t,
            step=0,
        )

    def differentiable(self, z: Tensor, y: Tensor) -> Tensor:
        """z as the function of ``y`` and of all that f depends on; first and second derivatives are exact.

        Each round of Newton's iteration, with A held, makes one order of them right.
        """
        still = self.residual(z, y)
        if not still.requires_grad:
            return z
        factors = self._factors(z)
        for residual in (lambda z: still, lambda z: self.residual(z, y)):
            value = residual(z)
            z = z - torch.linalg.lu_solve(*factors, (value - value.detach())[..., None])[..., 0]
        return z

    def _change(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.residual(z)
        change = torch.linalg.lu_solve(*self._factors(z), -value.detach()[..., None])[..., 0]
        if not bool(torch.isfinite(change).all()):
            self._refuse()
        return change

    def _factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The decomposition of A at y + Z z."""
        with torch.enable_grad():
            at = (self.y + z.detach() @ self.right.mT).requires_grad_()
            value = self.f(at)
            rows = []
            for row in self.left:
                seed, found = row.expand(value.shape), None
                if value.requires_grad:
                    (found,) = torch.autograd.grad(value, at, seed, retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(at) if found is None else found.detach())
        matrix = torch.stack(rows, -2) @ self.right
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        pivot = lu.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
        size = matrix.abs().amax((-2, -1))
        if not bool((pivot > len(self.left) * torch.finfo(matrix.dtype).eps * size).all()):
            self._refuse()
        return lu, pivots

    def _refuse(self) -> None:
        raise ValueError(
            f"{self.what} at t={self.t:.6g} does not fulfil the algebraic equations of mass, and they do not determine its "
            f"algebraic part there (their derivative in it is singular, or not finite): the index is above 1, or the state "
            f"is far from a solution. Differentiate algebraic equations until the index is 1, or give a consistent state"
        )
