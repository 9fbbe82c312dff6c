"""Linear algebra for implicit steps: Jacobians, and solves with them and with their transposes.

One system stands for all methods: of s stages x_i, with J_i = df/dy at stage i, weights w and a mass matrix M,

    M x_i - sum_j w_ij J_i x_j = b_i        (one stage: M x - w J x = b)

A *linear algebra* is a small frozen object: ``jacobian`` makes J from torch's graph of f, ``factored`` prepares solves.
States come as one tensor, ``(n,)``, or ``(members, n)`` where members do not mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

ROWS = 8
"""Up to so many rows of a Jacobian are made one by one; more of them at once, where torch can do that."""

Weights = tuple[tuple[float | Tensor, ...], ...]
"""Numbers, or tensors with one for each member."""


class Factored(Protocol):
    """What solves the system; ``b`` and the result have shape (stages, *state)."""

    def solve(self, b: Tensor) -> Tensor: ...

    def solve_transposed(self, b: Tensor) -> Tensor: ...


class LinearAlgebra(Protocol):
    """How the linear systems of an implicit step are solved."""

    @property
    def members(self) -> bool:
        """Whether the first dimension of y counts members that f does not mix."""
        ...

    @property
    def reusable(self) -> bool:
        """Whether a Jacobian, once made, can serve later steps."""
        ...

    @property
    def drift(self) -> float:
        """Steps whose lengths differ by this share at most may have a factorisation in common."""
        ...

    def jacobian(self, value: Tensor, at: Tensor) -> Any:
        """df/dy from the graph of ``value = f(at)``, which is left as it is."""
        ...

    def factored(self, jacobians: Sequence[Any], weights: Weights, mass: Tensor | None) -> Factored:
        """The system with these Jacobians: one for each stage, or a single one for all."""
        ...


@dataclass(frozen=True)
class Dense:
    """LU of full matrices; for states of up to a few hundred numbers.

    With ``members=True`` the first dimension of y counts members that f does not mix (a batch of one problem, say): each
    has a matrix of its own, and all are factored at once. Steps are common to all.
    """

    members: bool = False

    reusable = True
    drift = 0.0

    def jacobian(self, value: Tensor, at: Tensor) -> Tensor:
        """(n, n), or (members, n, n)."""
        size = at.shape[-1]
        if not value.requires_grad:
            return value.new_zeros((*at.shape, size))
        found = torch.stack(_rows(value, at, _units(value, size)), -2)
        if self.members:
            seed = trial_cotangent(value)
            made, most = ((x.mT @ w[..., None])[..., 0] for x, w in ((found, seed), (found.abs(), seed.abs())))
            check_product(value, at, seed, made, most, "members=True, and f mixes members: it must treat them apart")
        return found

    def factored(self, jacobians: Sequence[Tensor], weights: Weights, mass: Tensor | None) -> DenseFactors:
        return factors_of(self.matrix(jacobians, weights, mass), len(weights))

    def matrix(self, jacobians: Sequence[Tensor], weights: Weights, mass: Tensor | None) -> Tensor:
        """Of all stages together."""
        first, stages = jacobians[0], len(weights)
        size = first.shape[-1]
        eye = torch.eye(size, dtype=first.dtype, device=first.device) if mass is None else mass.to(first)
        if stages == 1:
            return eye - _times(weights[0][0], first)
        blocks = []
        for i, row in enumerate(weights):
            own = jacobians[i] if len(jacobians) > 1 else first
            blocks.append(torch.cat([eye * float(i == j) - _times(w, own) for j, w in enumerate(row)], -1))
        return torch.cat(blocks, -2)


def _times(w: float | Tensor, jacobian: Tensor) -> Tensor:
    return w[..., None, None].to(jacobian) * jacobian if isinstance(w, Tensor) else w * jacobian


@dataclass(frozen=True)
class DenseFactors:
    """An LU decomposition of all stages together."""

    lu: Tensor
    pivots: Tensor
    stages: int

    def solve(self, b: Tensor) -> Tensor:
        return self._solved(b, False)

    def solve_transposed(self, b: Tensor) -> Tensor:
        return self._solved(b, True)

    def _solved(self, b: Tensor, transposed: bool) -> Tensor:
        if b.ndim == 2 and self.stages == 1:
            return torch.linalg.lu_solve(self.lu, self.pivots, b.mT, adjoint=transposed).mT
        # stages come first, and inside of the members
        columns = torch.cat(b.unbind(0), -1)[..., None] if self.stages > 1 else b[0][..., None]
        found = torch.linalg.lu_solve(self.lu, self.pivots, columns, adjoint=transposed)[..., 0]
        return torch.stack(found.chunk(self.stages, -1)) if self.stages > 1 else found[None]


def trial_cotangent(value: Tensor) -> Tensor:
    """Numbers between 1 and 2 in no order, always the same."""
    steps = torch.arange(value.numel(), dtype=torch.float64, device=value.device)
    return (1 + (steps * 0.6180339887498949).frac()).to(value.dtype).reshape(value.shape)


def check_product(value: Tensor, at: Tensor, seed: Tensor, made: Tensor, most: Tensor, what: str) -> None:
    """Raise ValueError unless a Jacobian has the product that the graph has: else gradients would be silently wrong."""
    (true,) = torch.autograd.grad(value, at, seed, retain_graph=True, allow_unused=True)
    true = torch.zeros_like(made) if true is None else true.detach()
    allowed = 1e3 * torch.finfo(made.dtype).eps * most.max()
    if (
        bool(torch.isfinite(made).all())
        and bool(torch.isfinite(true).all())
        and bool(((true - made).abs() > allowed).any())
    ):
        raise ValueError(what)


def factors_of(matrix: Tensor, stages: int) -> DenseFactors:
    """A singular matrix gives infinities, and so a step that is rejected."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return DenseFactors(lu, pivots, stages)


def _units(value: Tensor, size: int) -> list[Tensor]:
    """For each component a cotangent that selects it, of every member."""
    eye = torch.eye(size, dtype=value.dtype, device=value.device)
    return [row if value.ndim == 1 else row.expand(value.shape) for row in eye]


def _rows(value: Tensor, at: Tensor, seeds: list[Tensor]) -> list[Tensor]:
    """The transposed Jacobian times each seed."""
    if len(seeds) > ROWS:
        try:
            (found,) = torch.autograd.grad(
                value, at, torch.stack(seeds), retain_graph=True, is_grads_batched=True, allow_unused=True
            )
        except RuntimeError:  # an operation that vmap does not know
            pass
        else:
            return list(found.detach().unbind(0)) if found is not None else [torch.zeros_like(at) for _ in seeds]
    rows = [torch.autograd.grad(value, at, seed, retain_graph=True, allow_unused=True)[0] for seed in seeds]
    return [torch.zeros_like(at) if row is None else row.detach() for row in rows]
