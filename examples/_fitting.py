"""scipy's optimisers over losses of torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

torch.set_num_threads(1)  # the tensors are small: threads that wait for each other cost more than they give


def minimise(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    iterations: int,
    bounds: Sequence[tuple[float, float]] | None = None,
    tolerance: float = 1e-12,
) -> OptimizeResult:
    """L-BFGS-B on ``loss(x)``, x shaped like ``start``; value and gradient from one solve and its reverse sweep."""

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(flat, dtype=start.dtype).reshape(start.shape).requires_grad_()
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient.double().numpy().ravel()

    flat = start.detach().double().numpy().ravel()
    options = {"maxiter": iterations, "ftol": tolerance, "gtol": 1e-9}
    return scipy.optimize.minimize(
        value_and_gradient, flat, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )


def least_squares(residuals: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> OptimizeResult:
    """scipy's least_squares, with the whole Jacobian from a single reverse sweep.

    ``residuals`` maps parameters (copies, parameters) to residuals (copies, residuals), each copy on its own. With as
    many copies as residuals, the gradient of r_1 of copy 1 + r_2 of copy 2 + ... is the Jacobian, row by row.
    """

    def values(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return residuals(torch.tensor(x)[None])[0].numpy()

    def jacobian(x: np.ndarray) -> np.ndarray:
        copies = torch.tensor(x).repeat(count, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(residuals(copies).diagonal().sum(), copies)
        return gradient.numpy()

    count = len(values(start.numpy()))
    return scipy.optimize.least_squares(values, start.numpy(), jacobian, x_scale="jac", **options)


def least_squares_in_rows(residuals: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> OptimizeResult:
    """scipy's least_squares, the Jacobian from one reverse sweep for each residual.

    For solves that cannot be made in copies: events happen at other times in each. With ``gradient="tangent"`` inside, a
    row costs next to nothing.
    """

    def values(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return residuals(torch.tensor(x)).numpy()

    def jacobian(x: np.ndarray) -> np.ndarray:
        point = torch.tensor(x).requires_grad_()
        rows = residuals(point).unbind()
        return np.stack([torch.autograd.grad(r, point, retain_graph=True)[0].numpy() for r in rows])

    return scipy.optimize.least_squares(values, start.numpy(), jacobian, **options)
