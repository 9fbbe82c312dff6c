"""Sparse and Krylov solves are those of dense matrices, forwards and transposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from adjoint_cases import assert_close, assert_same_bits
from torch import Tensor

from adjoint import Dense, Implicit, Krylov, Newton, SolveError, Sparse, solve

D = torch.float64
N = 12
PATTERN = sp.diags([np.ones(N)] * 3, [-1, 0, 1], shape=(N, N))
MASS = torch.diag(torch.linspace(1, 2, N, dtype=D)) + torch.diag(torch.full((N - 1,), 0.1, dtype=D), 1)


def diffusion(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """One-sided, so that its transpose is another matrix."""
    padded = torch.nn.functional.pad(y, (1, 1))
    return p[0] * (padded[2:] - 2 * y + 0.5 * padded[:-2]) + p[1] * torch.sin(y) * y + t * 0.1


LOOSE = Newton()


def gradient(linear: Any, method: str, mass: Tensor | None = None, newton: Newton = LOOSE, **how: Any) -> list[Tensor]:
    p = torch.tensor([40.0, 0.7], dtype=D, requires_grad=True)
    y0 = torch.linspace(0.2, 1.0, N, dtype=D).requires_grad_()
    own = Implicit(method, linear=linear, mass=mass, newton=newton)
    y = solve(diffusion, y0, [0.0, 0.03], args=(p,), method=own, rtol=1e-4, atol=1e-6, **how).ys[-1]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, p))]


@pytest.mark.parametrize(
    ("linear", "method", "mass"),
    [
        (Sparse(PATTERN), "kvaerno3", None),
        (Sparse(PATTERN), "radau5", MASS),
        (Sparse(PATTERN), "rodas4", None),
        (Krylov(rtol=1e-13), "rodas4", MASS),
    ],
)
def test_the_gradient_is_that_of_dense_matrices_and_has_the_same_bits_in_any_memory(
    linear: Any, mass: Tensor | None, method: str
) -> None:
    """Other matrices serve several steps: stages are the same once Newton's method goes on to rounding."""
    far = Newton(kappa=1e-9, most=40)
    expected = gradient(Dense(), method, mass, far)
    found = gradient(linear, method, mass, far, slots="all")
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    for newton in (LOOSE, far):
        assert_same_bits(gradient(linear, method, mass, newton, slots=2), gradient(linear, method, mass, newton))


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("mass", [None, MASS])
def test_solves_are_inverse_to_the_dense_system(stages: int, mass: Tensor | None) -> None:
    p = torch.tensor([40.0, 0.7], dtype=D)
    weights = tuple(tuple(0.1 * (i + 1) - 0.05 * j for j in range(stages)) for i in range(stages))
    b = torch.randn(stages, N, dtype=D, generator=torch.Generator().manual_seed(0))
    found = []
    for linear in (Dense(), Sparse(PATTERN), Krylov(rtol=1e-13)):
        jacobians = []
        for i in range(stages):
            at = torch.linspace(0.1, 1 + i, N, dtype=D).requires_grad_()
            jacobians.append(linear.jacobian(diffusion(torch.zeros((), dtype=D), at, p), at))
        factors = linear.factored(jacobians, weights, mass)  # type: ignore[arg-type]
        found.append([factors.solve(b), factors.solve_transposed(b)])
    for others in found[1:]:
        assert_close(others, found[0], places=1e5)


def test_a_tridiagonal_matrix_has_three_colours_and_an_arrow_one_for_each_row() -> None:
    assert Sparse(PATTERN).colours == 3
    arrow = np.eye(N)
    arrow[:, 0] = arrow[0, :] = 1
    assert Sparse(torch.tensor(arrow)).colours == N


def test_a_preconditioner_is_used_both_ways() -> None:
    asked: set[bool] = set()

    def inverse(b: Tensor, w: float, transposed: bool) -> Tensor:
        asked.add(transposed)
        dense = -80 * torch.eye(N, dtype=D) + torch.diag(torch.full((N - 1,), 40.0, dtype=D), 1)
        matrix = torch.eye(N, dtype=D) - w * (dense + torch.diag(torch.full((N - 1,), 20.0, dtype=D), -1))
        return torch.linalg.solve(matrix.T if transposed else matrix, b)

    expected = gradient(Dense(), "rodas4")
    for a, b in zip(gradient(Krylov(preconditioner=inverse), "rodas4"), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    assert asked == {True, False}


def test_a_transposed_system_that_is_not_solved_raises() -> None:
    loose, strict = Krylov(rtol=1e-13), Krylov(rtol=1e-13, restart=1, most=1)
    at = torch.linspace(0.1, 1, N, dtype=D).requires_grad_()
    products = loose.jacobian(diffusion(torch.zeros((), dtype=D), at, torch.tensor([40.0, 0.7], dtype=D)), at)
    with pytest.raises(ArithmeticError, match="GMRES does not solve the transposed system"):
        strict.factored([products], ((1.0,),), None).solve_transposed(torch.ones(1, N, dtype=D))
    with pytest.raises((SolveError, ArithmeticError)):  # that of the first step, tried before all others
        gradient(strict, "rodas4", max_steps=20)


def test_a_jacobian_that_is_not_that_of_f_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of pattern"):
        gradient(Sparse(np.eye(N)), "kvaerno3")
    mixing = lambda t, y: -y * y.sum()  # noqa: E731
    with pytest.raises(ValueError, match="f mixes members"):
        solve(mixing, torch.ones(3, 2, dtype=D), [0.0, 1.0], method=Implicit("rodas4", linear=Dense(members=True)))


def test_wrong_calls_are_told() -> None:
    with pytest.raises(ValueError, match="pattern has shape"):
        Sparse(np.ones((2, 3)))
    with pytest.raises(ValueError, match="pattern has 3 rows, and y 12 numbers"):
        gradient(Sparse(np.eye(3)), "kvaerno3")
    with pytest.raises(ValueError, match="rtol=0"):
        Krylov(rtol=0)
