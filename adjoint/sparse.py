"""Linear algebra for large implicit steps: sparse direct solves, and Krylov solves that need no matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, gmres, splu
from torch import Tensor

from adjoint.linear import Weights, check_product, trial_cotangent

Preconditioner = Callable[[Tensor, float, bool], Tensor]


@dataclass(frozen=True, eq=False)
class Sparse:
    """LU of sparse matrices (SuperLU, through scipy) on the CPU; for discretised partial differential equations.

    ``pattern`` says where df/dy may differ from zero: anything that scipy.sparse takes for a matrix, (n, n), y flattened.
    Rows that share no column are found by one vector-Jacobian product together (Curtis, Powell & Reid 1974, IMA J. Appl.
    Math. 13): so many products as there are ``colours``, whatever n.
    """

    pattern: Any

    members = False
    reusable = True
    drift = 0.2

    def __post_init__(self) -> None:
        shape = self._pattern.shape
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"pattern has shape {shape}; give a square one with a row for each number of y")

    @cached_property
    def _pattern(self) -> Any:
        found = self.pattern
        found = sp.csr_matrix(found.numpy() if isinstance(found, Tensor) else found, copy=True)
        found.sum_duplicates()
        return found

    @cached_property
    def _colours(self) -> np.ndarray:
        """For each row its colour: greedily, the first that no row with a column in common has."""
        columns: list[set[int]] = [set() for _ in range(self._pattern.shape[1])]
        colours = np.zeros(self._pattern.shape[0], dtype=np.int64)
        pointers, indices = self._pattern.indptr, self._pattern.indices.tolist()
        for row in range(len(colours)):
            own = indices[pointers[row] : pointers[row + 1]]
            taken = set().union(*(columns[j] for j in own)) if own else set()
            colours[row] = next(c for c in range(len(taken) + 1) if c not in taken)
            for j in own:
                columns[j].add(int(colours[row]))
        return colours

    @property
    def colours(self) -> int:
        """How many vector-Jacobian products a Jacobian takes."""
        return int(self._colours.max()) + 1

    def jacobian(self, value: Tensor, at: Tensor) -> Any:
        pattern, colours = self._pattern, self._colours
        if pattern.shape[0] != len(at):
            raise ValueError(f"pattern has {pattern.shape[0]} rows, and y {len(at)} numbers; give as many")
        if at.device.type != "cpu" or at.dtype not in (torch.float64, torch.float32):
            raise ValueError(f"Sparse() solves on the CPU in double or single precision, not {at.dtype} on {at.device}")
        found = np.zeros((self.colours, len(at)), dtype=at.detach().numpy().dtype)
        for colour in range(self.colours if value.requires_grad else 0):
            seed = torch.from_numpy((colours == colour).astype(found.dtype))
            (row,) = torch.autograd.grad(value, at, seed, retain_graph=True, allow_unused=True)
            if row is not None:
                found[colour] = row.detach().numpy()
        rows = np.repeat(np.arange(len(at)), np.diff(pattern.indptr))
        made = sp.csr_matrix((found[colours[rows], pattern.indices], pattern.indices, pattern.indptr), pattern.shape)
        if value.requires_grad:
            seed = trial_cotangent(value)
            product, most = (torch.from_numpy(m.T @ seed.numpy()) for m in (made, abs(made)))
            check_product(
                value, at, seed, product, most, "df/dy differs from zero outside of pattern; give a wider one"
            )
        return made

    def factored(self, jacobians: Sequence[Any], weights: Weights, mass: Tensor | None) -> SparseFactors:
        size, stages = jacobians[0].shape[0], len(weights)
        eye = sp.identity(size, format="csr") if mass is None else sp.csr_matrix(mass.numpy())
        own = [jacobians[i if len(jacobians) > 1 else 0] for i in range(stages)]
        blocks = [[eye * float(i == j) - w * own[i] for j, w in enumerate(row)] for i, row in enumerate(weights)]
        matrix = blocks[0][0] if stages == 1 else sp.bmat(blocks)
        matrix = matrix.tocsc()
        try:
            return SparseFactors(splu(matrix) if np.isfinite(matrix.data).all() else None)
        except RuntimeError:  # singular: the step is rejected
            return SparseFactors(None)


@dataclass(frozen=True)
class SparseFactors:
    """An LU decomposition of all stages together; None of a matrix that has none."""

    lu: Any

    def solve(self, b: Tensor) -> Tensor:
        return self._solved(b, "N")

    def solve_transposed(self, b: Tensor) -> Tensor:
        return self._solved(b, "T")

    def _solved(self, b: Tensor, which: str) -> Tensor:
        if self.lu is None:
            return torch.full_like(b, torch.nan)
        flat = b.detach().reshape(-1).numpy()
        return torch.from_numpy(np.asarray(self.lu.solve(flat.astype(self.lu.L.dtype), which))).to(b).reshape(b.shape)


@dataclass(frozen=True, eq=False)
class Krylov:
    """GMRES with products alone: no matrix is made. Source: Saad & Schultz (1986), SIAM J. Sci. Stat. Comput. 7(3).

    ``preconditioner(b, w, transposed)`` is about (M - w J)^-1 b, or the transpose's; J may be that of an earlier step.
    A solve that does not reach ``rtol`` rejects the step; in a transpose it raises ArithmeticError.
    """

    rtol: float = 1e-11
    restart: int = 50
    most: int = 20
    """Restarts."""
    preconditioner: Preconditioner | None = None

    members = reusable = False
    drift = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol={self.rtol} of the Krylov solves must be above 0 and below 1, such as 1e-11")

    def jacobian(self, value: Tensor, at: Tensor) -> Products:
        return Products(value, at)

    def factored(self, jacobians: Sequence[Products], weights: Weights, mass: Tensor | None) -> KrylovSystem:
        return KrylovSystem(self, jacobians, weights, mass)


class Products:
    """J v and J^T w from the graph of ``value = f(at)``."""

    def __init__(self, value: Tensor, at: Tensor) -> None:
        self._value, self._at = value, at
        self._forward: tuple[Tensor, Tensor | None] | None = None

    def transposed(self, w: Tensor) -> Tensor:
        if not self._value.requires_grad:
            return torch.zeros_like(w)
        (found,) = torch.autograd.grad(self._value, self._at, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if found is None else found.detach()

    def along(self, v: Tensor) -> Tensor:
        if self._forward is None:
            with torch.enable_grad():
                seed = torch.zeros_like(self._value).requires_grad_()
                back: Tensor | None = None
                if self._value.requires_grad:
                    (back,) = torch.autograd.grad(self._value, self._at, seed, create_graph=True, allow_unused=True)
            self._forward = seed, back
        seed, back = self._forward
        if back is None or not back.requires_grad:
            return torch.zeros_like(v)
        (found,) = torch.autograd.grad(back, seed, v, retain_graph=True)
        return found.detach()


@dataclass(frozen=True)
class KrylovSystem:
    """All stages together, as products."""

    how: Krylov
    jacobians: Sequence[Products]
    weights: Weights
    mass: Tensor | None

    def solve(self, b: Tensor) -> Tensor:
        found, left = self._solved(b, False)
        return found if left == 0 else torch.full_like(b, torch.nan)

    def solve_transposed(self, b: Tensor) -> Tensor:
        found, left = self._solved(b, True)
        if left:
            raise ArithmeticError(
                f"GMRES does not solve the transposed system to rtol={self.how.rtol:g} in {self.how.most} restarts; give "
                f"Krylov(preconditioner=...), a larger most= or a larger rtol="
            )
        return found

    def _apply(self, x: Tensor, transposed: bool) -> Tensor:
        own = [self.jacobians[i if len(self.jacobians) > 1 else 0] for i in range(len(x))]
        mass = self.mass
        held = x if mass is None else x @ (mass if transposed else mass.T).to(x)
        if transposed:
            pulled = [j.transposed(row) for j, row in zip(own, x, strict=True)]
            sums = [sum(self.weights[i][j] * pulled[i] for i in range(len(x))) for j in range(len(x))]
            return held - torch.stack([s for s in sums if isinstance(s, Tensor)])
        moved = []
        for j, row in zip(own, self.weights, strict=True):
            total = torch.zeros_like(x[0])
            for w, y in zip(row, x, strict=True):
                total = total + w * y
            moved.append(j.along(total))
        return held - torch.stack(moved)

    def _solved(self, b: Tensor, transposed: bool) -> tuple[Tensor, int]:
        how = self.how

        def about(x: Tensor) -> Tensor:
            assert how.preconditioner is not None
            found = [how.preconditioner(row, float(self.weights[i][i]), transposed) for i, row in enumerate(x)]
            return torch.stack(found)

        inverse = about if how.preconditioner is not None else None
        return iterated(lambda x: self._apply(x, transposed), b, how.rtol, how.restart, how.most, inverse)


def iterated(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    rtol: float,
    restart: int,
    most: int,
    inverse: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, int]:
    """What ``product`` turns into b, by GMRES through scipy, and 0 if it was found to ``rtol``; shaped like b."""
    right = b.detach().cpu().reshape(-1).numpy()
    if not np.isfinite(right).all():
        return torch.full_like(b, torch.nan), 1

    def operator(of: Callable[[Tensor], Tensor]) -> LinearOperator:
        def on_arrays(x: np.ndarray) -> np.ndarray:
            there = torch.from_numpy(x.astype(right.dtype)).to(b).reshape(b.shape)
            return of(there).detach().cpu().reshape(-1).numpy()

        return LinearOperator((len(right),) * 2, matvec=on_arrays, dtype=right.dtype)

    about = None if inverse is None else operator(inverse)
    found, left = gmres(operator(product), right, rtol=rtol, atol=0.0, restart=restart, maxiter=most, M=about)
    return torch.from_numpy(found).to(b).reshape(b.shape), int(left)
