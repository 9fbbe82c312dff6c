"""The Kalman filter: the likelihood of a linear Gaussian model, with gradients to all of its matrices."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.scan import scan


class Filtered(NamedTuple):
    """What a filter finds."""

    log_likelihood: Tensor
    """log p(y), (batch,), or a number."""
    mean: Tensor
    """Of the state given all rows so far, (batch, length, states)."""
    covariance: Tensor
    """(batch, length, states, states)."""


def kalman_filter(
    y: Tensor,
    *,
    transition: Tensor,
    observation: Tensor,
    process_noise: Tensor,
    observation_noise: Tensor,
    mean: Tensor,
    covariance: Tensor,
    **memory: Any,
) -> Filtered:
    """Filter rows y_k = H x_k + v_k with x_{k+1} = F x_k + w_k, w ~ N(0, Q), v ~ N(0, R), x_0 ~ N(mean, covariance).

    x_0 is the state of the first row. NaN is an entry that was not observed: it takes no part, and the gradient knows
    nothing of it. Gradients reach y and all matrices.

    Args:
        y: (length, outputs), or (batch, length, outputs).
        transition: F, (states, states), or (batch, states, states), as all of them.
        observation: H, (outputs, states).
        process_noise: Q, (states, states).
        observation_noise: R, (outputs, outputs).
        memory: slots, budget, chunk and so on of :func:`adjoint.scan`.

    Raises torch.linalg.LinAlgError where the covariance of a row is not positive. Source: Kalman (1960), J. Basic Eng.
    82; the likelihood by prediction errors is Schweppe (1965), IEEE Trans. Inf. Theory 11; Durbin & Koopman (2012), Time
    Series Analysis by State Space Methods, sections 4.3, 4.10 (missing rows) and 7.2.
    """
    single = y.ndim == 2
    rows = y.unsqueeze(0) if single else y
    _check(rows, transition, observation, process_noise, observation_noise, mean, covariance)
    batch, states = len(rows), mean.shape[-1]
    seen = ~rows.isnan()
    first = (
        mean.expand(batch, states),
        _symmetric(covariance).expand(batch, states, states),
        rows.new_zeros(batch),
    )

    def step(carry: tuple[Tensor, ...], row: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        m, p, total = carry
        m, p, gained = _updated(m, p, *row, observation, observation_noise)
        ahead = transition @ p @ transition.mT + process_noise
        return ((transition @ m.unsqueeze(-1)).squeeze(-1), _symmetric(ahead), total + gained), (m, p)

    inputs = (torch.where(seen, rows, 0), seen)
    (_, _, total), (means, covariances) = scan(step, first, inputs, batch_first=True, **memory)
    found = Filtered(total, means, covariances)
    return Filtered(*(x[0] for x in found)) if single else found


def _updated(m: Tensor, p: Tensor, y: Tensor, seen: Tensor, h: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance given one more row, and the logarithm of its density."""
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    h = torch.where(seen.unsqueeze(-1), h, 0)
    r = torch.where(both, r, torch.eye(y.shape[-1], dtype=r.dtype, device=r.device))  # an entry of its own, of error 0
    error = torch.where(seen, y - (h @ m.unsqueeze(-1)).squeeze(-1), 0)
    cross = p @ h.mT
    root = torch.linalg.cholesky(_symmetric(h @ cross + r))
    white = torch.linalg.solve_triangular(root, torch.cat((error.unsqueeze(-1), cross.mT), -1), upper=False)
    error, cross = white[..., :1], white[..., 1:]
    gained = -0.5 * error.square().sum((-2, -1)) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    gained = gained - 0.5 * math.log(2 * math.pi) * seen.to(y.dtype).sum(-1)
    return m + (cross.mT @ error).squeeze(-1), _symmetric(p - cross.mT @ cross), gained


def _symmetric(p: Tensor) -> Tensor:
    return (p + p.mT) / 2


def _check(y: Tensor, f: Tensor, h: Tensor, q: Tensor, r: Tensor, m: Tensor, p: Tensor) -> None:
    if y.ndim != 3:
        raise ValueError(f"y has the shape {tuple(y.shape)}; give (length, outputs) or (batch, length, outputs)")
    if m.ndim not in (1, 2) or (m.ndim == 2 and len(m) not in (1, len(y))):
        raise ValueError(
            f"mean has the shape {tuple(m.shape)}; give (states,) or (batch, states), with a batch of {len(y)}"
        )
    n, d = m.shape[-1], y.shape[-1]
    shapes = {
        "transition": (f, (n, n)),
        "observation": (h, (d, n)),
        "process_noise": (q, (n, n)),
        "observation_noise": (r, (d, d)),
        "covariance": (p, (n, n)),
    }
    for name, (x, shape) in shapes.items():
        if x.shape[-2:] != shape or x.ndim > 3 or (x.ndim == 3 and len(x) not in (1, len(y))):
            raise ValueError(f"{name} has the shape {tuple(x.shape)}; with {n} states and {d} outputs give {shape}")
    for name, x in {"mean": m, **{name: x for name, (x, _) in shapes.items()}}.items():
        if x.dtype != y.dtype:
            raise TypeError(f"{name} is of {x.dtype} and y of {y.dtype}; give all of one dtype")
