"""Controls and inputs as functions of time, interpolated between values that have gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adjoint.names import named

KINDS = {"constant": 1, "linear": 2, "cubic": 4}
"""Each kind of piece with the number of its coefficients."""


class Signal:
    """u(t) through ``values[i]`` at ``times[i]``, for use inside f; its gradient reaches ``values``.

    Args:
        times: n strictly increasing times, shape (n,).
        values: shape (n, ...), real or complex; may require grad.
        kind: "constant" (the value of the last time that has come), "linear", or "cubic" (the natural spline: twice
            continuously differentiable, no curvature at the ends; de Boor (1978), A Practical Guide to Splines, IV).

    Before the first time and after the last, u keeps the value there. Give ``jumps=u.jumps`` to the solve: its steps
    then end where u or its slope jumps, and lose no order.
    """

    def __init__(self, times: Tensor | Sequence[float], values: Tensor, kind: str = "linear") -> None:
        named("kind", kind, KINDS)
        if not isinstance(values, Tensor):
            raise TypeError(f"values={values!r} must be a tensor, such as torch.tensor(values)")
        real = torch.empty(0, dtype=values.dtype).real.dtype
        at = torch.as_tensor(times, dtype=real, device=values.device).detach()
        if at.ndim != 1 or len(at) != len(values):
            raise ValueError(
                f"times has shape {tuple(at.shape)} and values {tuple(values.shape)}; give one time for each values[i]"
            )
        if len(at) < 2 and kind != "constant":
            raise ValueError(f"kind={kind!r} needs at least two values, and got {len(at)}")
        if not bool((at.diff() > 0).all()):
            raise ValueError(f"times={at.tolist()} must strictly increase; sort them")
        self.kind = kind
        self._times = at
        self._pieces = _pieces(at, values, kind)

    @property
    def jumps(self) -> tuple[float, ...]:
        """The times at which u or its slope jumps: steps should end there."""
        return () if self.kind == "cubic" else tuple(self._times.tolist())

    def __call__(self, t: Tensor) -> Tensor:
        """u(t) for t of any shape: that shape, and that of one value behind it."""
        at = self._times
        t = t.to(at.dtype)
        piece = torch.searchsorted(at, t.detach().contiguous(), right=True) - 1
        if self.kind == "constant":
            return self._pieces[0][piece.clamp(0, len(at) - 1)]
        piece = piece.clamp(0, len(at) - 2)
        inside = torch.minimum(torch.maximum(t, at[0]), at[-1]) - at[piece]
        inside = inside.reshape(t.shape + (1,) * (self._pieces[0].ndim - 1))
        *lower, value = [c[piece] for c in reversed(self._pieces)]
        total = torch.zeros_like(value)
        for coefficient in lower:
            total = (total + coefficient) * inside
        return value + total


def _pieces(times: Tensor, values: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Coefficients of 1, s, s^2, s^3 with s = t - times[i], by piece."""
    if kind == "constant":
        return (values,)
    h = times.diff().reshape(-1, *(1,) * (values.ndim - 1))
    slope = values.diff(dim=0) / h
    if kind == "linear":
        return values[:-1], slope
    bend = _bends(times, slope)
    return values[:-1], slope - h * (2 * bend[:-1] + bend[1:]) / 6, bend[:-1] / 2, bend.diff(dim=0) / (6 * h)


def _bends(times: Tensor, slope: Tensor) -> Tensor:
    """Second derivatives of the natural spline at its times."""
    h = times.diff()
    if len(h) == 1:
        return torch.zeros(2, *slope.shape[1:], dtype=slope.dtype, device=slope.device)
    system = torch.diag(2 * (h[:-1] + h[1:])) + torch.diag(h[1:-1], 1) + torch.diag(h[1:-1], -1)
    wanted = 6 * slope.diff(dim=0).reshape(len(h) - 1, -1)
    inner = torch.linalg.solve(system.to(slope.dtype), wanted).reshape(-1, *slope.shape[1:])
    end = torch.zeros_like(inner[:1])
    return torch.cat((end, inner, end))
