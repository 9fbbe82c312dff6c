"""The problems, written once for torch and for jax.numpy: the same right-hand side, numbers and steps for everyone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import revolve

Slope = Callable[[Any, Any, Any], Any]
"""dy/dt from (torch or jax.numpy, y, parameters)."""


@dataclass(frozen=True)
class Problem:
    """dy/dt = f(y, p) for ``steps`` steps of length ``h`` by the classic Runge-Kutta method; the loss is |y(T)|^2."""

    name: str
    f: Slope
    y0: np.ndarray
    parameters: tuple[np.ndarray, ...]
    steps: int
    h: float
    """A power of two, so that sums of steps are exact and everyone takes the same number."""

    @property
    def end(self) -> float:
        return self.steps * self.h

    @property
    def slots(self) -> int:
        """The fewest in which no step runs plainly more than twice."""
        return revolve.fewest_slots(steps=self.steps, repetitions=2)

    @property
    def segments(self) -> int:
        """Near the square root of the steps, for those who checkpoint at equal distances; it divides the steps."""
        return 2 ** round(math.log2(self.steps) / 2)

    def short(self) -> Problem:
        """A few steps, to warm up."""
        return replace(self, steps=4)


def lotka_volterra(xp: Any, y: Any, p: Any) -> Any:
    a, b, c, d = p[0]
    prey, predator = xp.moveaxis(y, -1, 0)
    eaten = prey * predator
    return xp.stack((a * prey - b * eaten, d * eaten - c * predator), -1)


def lorenz96(xp: Any, y: Any, p: Any) -> Any:
    return (xp.roll(y, -1, 0) - xp.roll(y, 2, 0)) * xp.roll(y, 1, 0) - y + p[0]


def network(xp: Any, y: Any, p: Any) -> Any:
    return xp.tanh(y @ p[0] + p[1]) @ p[2] + p[3]


def gray_scott(xp: Any, y: Any, p: Any) -> Any:
    feed, kill = p[0]
    u, v = y
    eaten = u * v * v
    spread_u, spread_v = xp.roll(y, 1, 1) + xp.roll(y, -1, 1) + xp.roll(y, 1, 2) + xp.roll(y, -1, 2) - 4 * y
    return xp.stack((0.16 * spread_u - eaten + feed * (1 - u), 0.08 * spread_v + eaten - (feed + kill) * v))


def squares(cells: int) -> np.ndarray:
    """u = 1 and v = 0 but for some squares, (2, cells, cells)."""
    y = np.zeros((2, cells, cells))
    y[0] = 1
    for row, column in np.random.default_rng(0).integers(0, cells - 8, (cells // 8, 2)):
        y[0, row : row + 8, column : column + 8] = 0.5
        y[1, row : row + 8, column : column + 8] = 0.25
    return y


def problems() -> dict[str, Problem]:
    random = np.random.default_rng(0)
    rates = (np.array([1.1, 0.4, 0.4, 0.1]),)
    weights = (random.normal(size=(64, 64)) / 8, np.zeros(64), random.normal(size=(64, 64)) / 8, np.zeros(64))
    patterns = (np.array([0.0545, 0.062]),)
    many = 5 + random.random((1000, 2))
    members = [
        Problem("Lotka-Volterra", lotka_volterra, np.array([10.0, 5.0]), rates, 512, 2**-6),
        Problem("Lotka-Volterra, 1000 at once", lotka_volterra, many, rates, 512, 2**-6),
        Problem("Lorenz-96, 40 places", lorenz96, 8 + random.normal(size=40), (np.array([8.0]),), 512, 2**-8),
        Problem("MLP 64-64-64, batch 64", network, random.normal(size=(64, 64)), weights, 256, 2**-8),
        Problem("Gray-Scott, 128 x 128", gray_scott, squares(128), patterns, 256, 1.0),
        Problem("Gray-Scott, 1024 x 1024", gray_scott, squares(1024), patterns, 8, 1.0),
    ]
    return {problem.name: problem for problem in members}
