"""Is this gradient right? Laws that any gradient must meet, for any function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Any

import torch
from torch import Tensor

from adjoint.frozen import frozen_steps

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Taylor:
    """Remainders |L(x + h v) - L(x) - h L'(x) v| for falling h; with a right gradient they fall as h^2."""

    h: tuple[float, ...]
    remainders: tuple[float, ...]
    value: float
    """L(x)."""
    derivative: float
    """L'(x) v."""

    @property
    def slopes(self) -> tuple[float, ...]:
        """log2 of the ratios of successive remainders: 2 where rounding does not show."""
        pairs = pairwise(self.remainders)
        return tuple(log2(a / b) if a > 0 and b > 0 else float("nan") for a, b in pairs)

    @property
    def slope(self) -> float:
        """The slope at the smallest h whose remainder is not yet spoilt by rounding; NaN if there is none."""
        rounding = 2**-52 * abs(self.value)
        clean = [s for s, r in zip(self.slopes, self.remainders[1:], strict=True) if r > 1e3 * rounding]
        return clean[-1] if clean else float("nan")


def taylor_test(loss: Loss, inputs: Sequence[Tensor], *, h: float = 1e-2, halvings: int = 8, seed: int = 0) -> Taylor:
    """The Taylor remainders of ``loss(*inputs)`` along a random direction, with the steps of adaptive solves frozen.

    ``inputs`` are real or complex floating-point tensors (give them in double precision); each is perturbed by h times
    a random direction of its own size. ``taylor_test(...).slope`` near 2 proves the gradient; near 1 disproves it.
    """
    points = [x.detach().requires_grad_() for x in inputs]
    directions = _directions(points, seed)
    with frozen_steps() as replay:
        result = loss(*points)
        derivative = _along(torch.autograd.grad(result, points, allow_unused=True), directions)
        value = float(result.detach())
        lengths = [h / 2**i for i in range(halvings)]
        remainders = []
        for length in lengths:
            replay.rewind()
            with torch.no_grad():
                moved = float(loss(*(x + length * v for x, v in zip(points, directions, strict=True))))
            remainders.append(abs(moved - value - length * derivative))
    return Taylor(tuple(lengths), tuple(remainders), value, derivative)


def directional_difference(loss: Loss, inputs: Sequence[Tensor], directions: Sequence[Tensor], *, h: float) -> float:
    """(L(x + h v) - L(x - h v)) / 2h, with the steps of adaptive solves frozen at those for x."""
    with torch.no_grad(), frozen_steps() as replay:
        loss(*inputs)
        values = []
        for sign in (1.0, -1.0):
            replay.rewind()
            values.append(float(loss(*(x + sign * h * v for x, v in zip(inputs, directions, strict=True)))))
    return (values[0] - values[1]) / (2 * h)


def dot_test(forward: Callable[[Any], Any], transpose: Callable[[Any], Any], v: Any, w: Any) -> float:
    """The relative difference of (J v, w) and (v, J^T w): rounding, if one map is the transpose of the other.

    ``forward`` and ``transpose`` are linear maps on tensors or numpy arrays: a step's derivative and its transpose.
    """
    left, right = _dot(forward(v), w), _dot(v, transpose(w))
    scale = max(abs(left), abs(right))
    return abs(left - right) / scale if scale > 0 else 0.0


@dataclass(frozen=True)
class Lossy:
    """What keeping states by this codec saves, and what it costs."""

    codec: Any
    """None: the states as they are."""
    bytes: int
    """The most that kept states took, in all tiers together."""
    error: float
    """Of the gradient: |g - g_exact| / |g_exact|, all inputs together."""


def lossy(
    solve: Callable[[Any], Any], loss: Callable[[Any], Tensor], inputs: Sequence[Tensor], codecs: Sequence[Any]
) -> list[Lossy]:
    """The error of the gradient against the bytes of kept states, for each way to keep them in fewer bits.

    ``solve(codec)`` returns a solution whose tiers keep states by that codec, as ``Device``, ``Host`` and ``Files`` do;
    it is called with None first, and the gradient of ``loss(solution)`` by ``inputs`` found then is the exact one.
    """
    rows: list[Lossy] = []
    exact: Sequence[Tensor] | None = None
    for codec in (None, *codecs):
        solution = solve(codec)
        found = torch.autograd.grad(loss(solution), inputs, allow_unused=True)
        gradient = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
        exact = exact or gradient
        away = sum(float(torch.linalg.vector_norm(a - b)) ** 2 for a, b in zip(gradient, exact, strict=True)) ** 0.5
        size = sum(float(torch.linalg.vector_norm(b)) ** 2 for b in exact) ** 0.5
        rows.append(Lossy(codec, sum(solution.stats.tier_bytes.values()), away / size if size else away))
    return rows


def _dot(a: Any, b: Any) -> float:
    return float((a.conj() * b).sum().real)


def _directions(points: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for x in points:
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        size = x.detach().abs().mean() if x.numel() else torch.ones(())
        found.append(v * torch.where(size > 0, size, torch.ones_like(size)))
    return found


def _along(gradients: Sequence[Tensor | None], directions: Sequence[Tensor]) -> float:
    return sum(_dot(g, v) for g, v in zip(gradients, directions, strict=True) if g is not None)
