"""From dx/dt = A x + B u, u held over a step of length dt, to x_{k+1} = A' x_k + B' u_k; and where A may start.

A is diagonal, of shape (..., states), or a matrix; dt broadcasts against the diagonal, and is a number for a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Discrete = tuple[Tensor, Tensor]


def zero_order_hold(a: Tensor, b: Tensor, dt: Tensor) -> Discrete:
    """A' = exp(dt A), B' = (A' - 1) A^{-1} B, for a diagonal A: the exact solution while u stays.

    Source: Smith, Warrington & Linderman (2023), arXiv:2208.04933, equation 6.
    """
    z = dt * a
    return torch.exp(z), dt * _mean_growth(z) * b


def _mean_growth(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z; near zero, where the derivative of that would lose digits, by its series."""
    small = z.abs() < 0.1
    near, far = torch.where(small, z, 0), torch.where(small, 1, z)
    series = torch.ones_like(z)
    for k in range(10, 1, -1):
        series = 1 + near * series / k
    return torch.where(small, series, torch.expm1(far) / far)


def bilinear(a: Tensor, b: Tensor, dt: Tensor) -> Discrete:
    """A' = (1 - dt A/2)^{-1} (1 + dt A/2), B' = (1 - dt A/2)^{-1} dt B, for a diagonal A: the trapezoidal rule.

    Source: Gu, Goel & Ré (2022), arXiv:2111.00396, equation 3.
    """
    half = dt * a / 2
    return (1 + half) / (1 - half), dt * b / (1 - half)


def zero_order_hold_of_matrices(a: Tensor, b: Tensor, dt: Tensor) -> Discrete:
    """The same for matrices (states, states) and (states, inputs), singular A included.

    Both come from the exponential of [[A, B], [0, 0]] dt (Van Loan 1978, IEEE TAC 23(3), theorem 1).
    """
    n, m = b.shape
    block = torch.cat((torch.cat((a, b), 1), a.new_zeros(m, n + m)))
    whole = torch.linalg.matrix_exp(block * dt)
    return whole[:n, :n], whole[:n, n:]


def bilinear_of_matrices(a: Tensor, b: Tensor, dt: Tensor) -> Discrete:
    """The same for matrices (states, states) and (states, inputs)."""
    one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    found = torch.linalg.solve(one - dt * a / 2, torch.cat((one + dt * a / 2, dt * b), 1))
    return found[:, : len(a)], found[:, len(a) :]


RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Discrete]] = {
    "zero_order_hold": zero_order_hold,
    "bilinear": bilinear,
}


def hippo_legs(states: int) -> tuple[Tensor, Tensor]:
    """A (states, states) and B (states,) of HiPPO-LegS, in double precision: states that remember Legendre polynomials.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 above; B_n = sqrt(2n+1).
    Source: Gu, Goel & Ré (2022), arXiv:2111.00396, equation 2; Gu et al. (2020), arXiv:2008.07669, theorem 2.
    """
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    return -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1), root


def hippo_normal(states: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (states,), by their imaginary parts, and eigenvectors of the normal part of HiPPO-LegS, complex.

    The normal part is A + P P^T with P_n = sqrt(n + 1/2), which is -1/2 and a skew-symmetric matrix: the eigenvalues
    have the real part -1/2 and come in conjugate pairs. Source: Gu, Goel & Ré (2022), appendix C.3.
    """
    a, _ = hippo_legs(states)
    p = (torch.arange(states, dtype=torch.float64) + 0.5).sqrt()
    skew = a + torch.outer(p, p) + 0.5 * torch.eye(states, dtype=torch.float64)
    frequencies, vectors = torch.linalg.eigh(-1j * (skew - skew.T) / 2)
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies), vectors
