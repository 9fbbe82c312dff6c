"""Influenza in a boarding school, 1978: how many boys one boy infected, and how sure that is.

In January 1978 influenza went through a school of 763 boys (British Medical Journal, 4 March 1978, page 587). Known
is how many lay in bed on each of 14 days. The model is Kermack and McKendrick's,

    dS/dt = -contact S I / 763,      dI/dt = contact S I / 763 - recovery I,

from one sick boy on day 0. Two rates are fitted by Gauss and Newton's method, with the Jacobian from one reverse
sweep, and held against scipy's own fit and against Murray (Mathematical Biology I, 3rd edition, section 10.2):
contact 1.66, recovery 0.44 a day. The contour is drawn from 6561 pairs of rates at once, in one solve.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.integrate
import scipy.optimize
import torch
from _fitting import least_squares
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

BOYS = 763.0
IN_BED = torch.tensor([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4], dtype=torch.float64)
DAYS = torch.arange(0, 15, dtype=torch.float64)


def epidemic(contact: Tensor, recovery: Tensor, t: Tensor) -> Tensor:
    """Susceptible and sick at the times t, (times, copies, 2), for rates of shape (copies,)."""

    def change(t: Tensor, y: Tensor) -> Tensor:
        well, sick = y.T
        infected = contact * well * sick / BOYS
        return torch.stack((-infected, infected - recovery * sick), 1)

    first = torch.tensor([BOYS - 1, 1.0], dtype=torch.float64).expand(len(contact), 2)
    return adjoint.solve(change, first, t, method="tsit5", rtol=1e-6).ys


def residuals(rates: Tensor) -> Tensor:
    """Sick minus in bed on days 1-14, (copies, 14); the rates are given by their logarithms, (copies, 2)."""
    contact, recovery = rates.exp().T
    return (epidemic(contact, recovery, DAYS)[1:, :, 1] - IN_BED[:, None]).T


def fit_by_scipy(start: np.ndarray) -> np.ndarray:
    """The same fit with nothing of this library."""

    def misfit(rates: np.ndarray) -> np.ndarray:
        contact, recovery = np.exp(rates)

        def change(t: float, y: np.ndarray) -> list[float]:
            infected = contact * y[0] * y[1] / BOYS
            return [-infected, infected - recovery * y[1]]

        run = scipy.integrate.solve_ivp(change, (0, 14), (BOYS - 1, 1), "LSODA", DAYS.numpy(), rtol=1e-9, atol=1e-9)
        return run.y[1, 1:] - IN_BED.numpy()

    return np.exp(scipy.optimize.least_squares(misfit, start).x)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    start = torch.tensor([1.2, 0.6], dtype=torch.float64).log()
    fit = least_squares(residuals, start)
    contact, recovery = np.exp(fit.x).tolist()
    others = fit_by_scipy(start.numpy()).tolist()
    first = contact / recovery
    variance = 2 * fit.cost / (len(IN_BED) - 2)

    number = torch.linspace(3.0, 4.6, 41 if quick else 81, dtype=torch.float64)
    days = torch.linspace(1.9, 2.7, len(number), dtype=torch.float64)
    numbers, lengths = torch.meshgrid(number, days, indexing="xy")
    grid = residuals(torch.stack(((numbers / lengths).log(), -lengths.log()), -1).flatten(0, 1))
    drop = (grid.square().sum(1).reshape(numbers.shape) - 2 * fit.cost) / (2 * variance)
    sure = number[drop.min(0).values <= 1.92]  # 95 % by the profile of the likelihood
    covariance = variance * np.linalg.inv(fit.jac.T @ fit.jac)
    deviation = first * float(np.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1])))

    results = {
        "contact, by scipy": Recovered(contact, others[0], 1e-3 * others[0]),
        "recovery, by scipy": Recovered(recovery, others[1], 1e-3 * others[1]),
        "contact, published": Recovered(contact, 1.66, 0.05),
        "recovery, published": Recovered(recovery, 0.44, 0.02),
        "infected by the first boy (R0), published": Recovered(first, 3.77, 0.15),
        "half its 95 % interval, contour against Jacobian": Recovered(
            float(sure[-1] - sure[0]) / 2, 1.96 * deviation, 0.05
        ),
    }
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_epidemic(left, contact, recovery)
    draw_likelihood(right, numbers, lengths, drop)
    right.plot(first, 1 / recovery, "o", color=ORANGE, label="best fit")
    right.plot(3.77, 1 / 0.44, "x", color="black", label="Murray")
    right.legend(frameon=False)
    tidy(
        right, f"R0 = {first:.2f}, 95 %: {sure[0]:.2f} to {sure[-1]:.2f}", "infected by the first boy (R0)", "days ill"
    )
    save(figure, out, "influenza")
    return confirm(results)


def draw_epidemic(axes: Axes, contact: float, recovery: float) -> None:
    fine = torch.linspace(0, 14, 281, dtype=torch.float64)
    rates = torch.tensor([[contact], [recovery]], dtype=torch.float64)
    well, sick = epidemic(*rates, fine)[:, 0].T
    axes.plot(fine, well, color=GREEN, label="not yet ill")
    axes.plot(fine, sick, color=ORANGE, label="ill")
    axes.plot(fine, BOYS - well - sick, color=GREY, label="recovered")
    axes.plot(DAYS[1:], IN_BED, "o", color=ORANGE, label="seen in bed")
    axes.set_ylim(0, 800)
    axes.legend(frameon=False, loc="center right")
    tidy(axes, f"Contact {contact:.2f} a day, recovery {recovery:.3f} a day", "day", "boys")


def draw_likelihood(axes: Axes, numbers: Tensor, lengths: Tensor, drop: Tensor) -> None:
    """Where the logarithm of the likelihood has dropped by chi-squared's 68, 95 and 99 % for two numbers, halved."""
    levels = {1.15: "68 %", 3.0: "95 %", 4.61: "99 %"}
    for level, alpha in zip(levels, (0.45, 0.25, 0.15), strict=True):
        axes.contourf(numbers, lengths, drop, [0, level], colors=[BLUE], alpha=alpha)
        axes.fill([], [], color=BLUE, alpha=alpha, label=f"{levels[level]} sure")
    axes.contour(numbers, lengths, drop, list(levels), colors=[BLUE], linewidths=0.8)


if __name__ == "__main__":
    command_line(main)
