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
    rtol: float | None = None
    """Where steps are controlled, by Dormand and Prince's method of order 5: the tolerance, relative and absolute."""

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


def hodgkin_huxley(xp: Any, y: Any, p: Any) -> Any:
    """Membrane potential in mV and three gates; time in ms. Hodgkin & Huxley (1952), rates for a rest at -65 mV."""
    sodium, potassium, leak, current = p[0]
    v, m, h, n = xp.moveaxis(y, -1, 0)
    alpha_m = 0.1 * (v + 40) / (1 - xp.exp(-(v + 40) / 10))
    alpha_n = 0.01 * (v + 55) / (1 - xp.exp(-(v + 55) / 10))
    alpha_h, beta_h = 0.07 * xp.exp(-(v + 65) / 20), 1 / (1 + xp.exp(-(v + 35) / 10))
    beta_m, beta_n = 4 * xp.exp(-(v + 65) / 18), 0.125 * xp.exp(-(v + 65) / 80)
    flow = sodium * m * m * m * h * (v - 50) + potassium * n * n * n * n * (v + 77) + leak * (v + 54.387)
    return xp.stack(
        (
            current - flow,
            alpha_m * (1 - m) - beta_m * m,
            alpha_h * (1 - h) - beta_h * h,
            alpha_n * (1 - n) - beta_n * n,
        ),
        -1,
    )


def lorenz96_members(xp: Any, y: Any, p: Any) -> Any:
    return (xp.roll(y, -1, -1) - xp.roll(y, 2, -1)) * xp.roll(y, 1, -1) - y + p[0]


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


def small_problems() -> dict[str, Problem]:
    """Those of :mod:`benchmarks.engines`."""
    random = np.random.default_rng(0)
    rates, conductances = (np.array([1.1, 0.4, 0.4, 0.1]),), (np.array([120.0, 36.0, 0.3, 10.0]),)
    rest, animals = np.array([-65.0, 0.05, 0.6, 0.32]), np.array([10.0, 5.0])
    waves = random.standard_normal((1000, 40))

    def many(y: np.ndarray) -> np.ndarray:
        return y * (1 + 0.1 * random.random((1000, len(y))))

    force = (np.array([8.0]),)
    prey = Problem("Lotka-Volterra, one", lotka_volterra, animals, rates, 1024, 2.0**-7)
    axon = Problem("Hodgkin-Huxley, one", hodgkin_huxley, rest, conductances, 1024, 2.0**-7)
    ring = Problem("Lorenz-96 (40), one", lorenz96_members, waves[0], force, 1024, 2.0**-8)
    weights = (random.normal(size=(64, 64)) / 8, np.zeros(64), random.normal(size=(64, 64)) / 8, np.zeros(64))
    perceptron = Problem("MLP 64, batch 64", network, random.normal(size=(64, 64)), weights, 256, 2.0**-8)
    single = [x.astype(np.float32) for x in weights]
    members = [
        prey,
        replace(prey, name="Lotka-Volterra, 1000", y0=many(animals)),
        axon,
        replace(axon, name="Hodgkin-Huxley, 1000", y0=many(rest), steps=256),
        ring,
        replace(ring, name="Lorenz-96 (40), 1000", y0=waves, steps=128),
        replace(prey, name="Lotka-Volterra, dopri5", rtol=1e-8),
        replace(
            perceptron, name="MLP 64, batch 64, float32", y0=perceptron.y0.astype(np.float32), parameters=tuple(single)
        ),
        perceptron,
    ]
    return {problem.name: problem for problem in members}
