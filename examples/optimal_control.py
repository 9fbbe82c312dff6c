"""Optimal control: the van der Pol oscillator brought to rest at the least price.

    x' = (1 - y^2) x - y + u,      y' = x,      minimise the integral of x^2 + y^2 + u^2 over 0 <= t <= 6,

with -0.2 <= u <= 0.8, from x = 0, y = 1. The control is linear between 61 values, which scipy's L-BFGS-B chooses
within the bounds; the discrete adjoint gives it all 61 derivatives of the running cost in one reverse sweep. What comes
out is held against Pontryagin's principle: at the optimum u = -lambda_x / 2, cut off at the bounds, where the costates
lambda solve a boundary value problem (by scipy's solve_bvp).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.integrate
import torch
from _fitting import minimise
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

END, PIECES = 6.0, 60
LOWEST, HIGHEST = -0.2, 0.8
T = torch.linspace(0, END, PIECES + 1, dtype=torch.float64)


def oscillate(control: Tensor) -> tuple[Tensor, Tensor]:
    """x and y at the times T, (times, 2), and the price up to them, (times,)."""
    u = adjoint.Signal(T, control, "linear")

    def change(t: Tensor, state: Tensor) -> Tensor:
        x, y = state
        return torch.stack(((1 - y * y) * x - y + u(t), x))

    def price(t: Tensor, state: Tensor) -> Tensor:
        return state.square().sum() + u(t) ** 2

    start = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = adjoint.solve(change, start, T, method="rk4", cost=price)
    return solution.ys, solution.costs


def by_pontryagin() -> tuple[np.ndarray, float]:
    """The optimal control at the times T, and its price."""

    def control(costate: np.ndarray) -> np.ndarray:
        return np.clip(-costate / 2, LOWEST, HIGHEST)

    def change(t: np.ndarray, z: np.ndarray) -> np.ndarray:
        x, y, a, b, _ = z
        u = control(a)
        price = x * x + y * y + u * u
        return np.stack(((1 - y * y) * x - y + u, x, -2 * x - a * (1 - y * y) - b, -2 * y + a * (2 * x * y + 1), price))

    def ends(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.array([first[0], first[1] - 1, last[2], last[3], first[4]])

    t = T.numpy()
    run = scipy.integrate.solve_bvp(change, ends, t, np.zeros((5, len(t))), tol=1e-6, max_nodes=20_000)
    assert run.success, run.message
    return control(run.sol(t)[2]), float(run.y[4, -1])


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    nothing = torch.zeros(PIECES + 1, dtype=torch.float64)
    bounds = [(LOWEST, HIGHEST)] * (PIECES + 1)
    fit = minimise(lambda u: oscillate(u)[1][-1], nothing, iterations=40 if quick else 100, bounds=bounds)
    control = torch.tensor(fit.x)
    expected, price = by_pontryagin()
    off = float(np.sqrt(np.mean((fit.x - expected) ** 2)))  # largest at the kinks, which straight pieces cut off
    results = {
        "price": Recovered(fit.fun, price, 1e-3 * price),
        "control, difference from Pontryagin's": Recovered(off, 0, 0.02),
        "values at the upper bound": Recovered(int((fit.x == HIGHEST).sum()), int((expected == HIGHEST).sum()), 1),
    }
    save(picture(control, torch.tensor(expected), oscillate(control), oscillate(nothing)), out, "optimal_control")
    return confirm(results)


def picture(
    control: Tensor, expected: Tensor, controlled: tuple[Tensor, Tensor], left_alone: tuple[Tensor, Tensor]
) -> Figure:
    (run, price), (free, price_of_none) = controlled, left_alone
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1.15, 1])
    left.axhspan(LOWEST, HIGHEST, color="0.5", alpha=0.1, linewidth=0, label="allowed")
    left.plot(T, expected, color=ORANGE, alpha=0.4, linewidth=5, label="Pontryagin")
    left.plot(T, control, color=BLUE, linewidth=1.2, label="L-BFGS-B with the adjoint")
    left.legend(frameon=False, loc="upper right")
    left.set_ylim(-0.3, 1.25)
    tidy(left, "The control", "time", "u")
    for k, (name, color) in enumerate((("x", BLUE), ("y", GREEN))):
        middle.plot(T, free[:, k], ":", color=color, linewidth=1, label=f"{name}, left alone")
        middle.plot(T, run[:, k], color=color, label=f"{name}, controlled")
    middle.set_ylim(-3, 4.4)
    middle.legend(frameon=False, ncols=2, loc="upper center")
    tidy(middle, "The motion", "time", "x, y")
    right.plot(free[:, 1], free[:, 0], ":", color=GREY, label=f"left alone: price {float(price_of_none[-1]):.1f}")
    right.plot(run[:, 1], run[:, 0], color=BLUE, label=f"controlled: price {float(price[-1]):.2f}")
    right.plot(1, 0, "o", color="black", label="start")
    right.set_ylim(-3, 4.4)
    right.legend(frameon=False, loc="upper left")
    tidy(right, "Phase plane", "y", "x")
    return figure


if __name__ == "__main__":
    command_line(main)
