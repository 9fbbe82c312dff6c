"""Lynx and hare: a predator-prey model fitted to the fur trade.

The Hudson's Bay Company counted the pelts it bought. For 1900-1920 they show hares and, two years behind them, the
lynx that eat them. The model is Lotka and Volterra's,

    dH/dt = birth H - hunting H L,      dL/dt = growth H L - death L,

with four rates and two first populations, fitted to the logarithms of the 42 numbers by Gauss and Newton's method;
the Jacobian comes from one reverse sweep. The result is held against the same fit made by scipy alone with finite
differences, against the published Bayesian analysis (Carpenter 2018, Stan case study "Predator-prey population
dynamics": posterior means and standard deviations), and, on made-up data, against the truth.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import scipy.integrate
import scipy.optimize
import torch
from _fitting import least_squares
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

NAMES = ("birth", "hunting", "death", "growth", "first hares", "first lynx")
START = torch.tensor([0.5, 0.025, 0.9, 0.025, 30.0, 4.0], dtype=torch.float64)
PUBLISHED = {"birth": (0.55, 0.06), "hunting": (0.028, 0.004), "death": (0.80, 0.09), "growth": (0.024, 0.004)}


def pelts() -> tuple[Tensor, Tensor]:
    """Years since 1900, and thousands of pelts of shape (years, 2): hare, lynx."""
    text = files("adjoint").joinpath("data/pelts.csv").read_text()
    table = torch.tensor(np.loadtxt(text.splitlines(), delimiter=",", skiprows=1))
    return table[:, 0] - table[0, 0], table[:, 1:]


def populations(parameters: Tensor, t: Tensor) -> Tensor:
    """Hares and lynx at the times t, shape (times, copies, 2), for parameters of shape (copies, 6)."""
    birth, hunting, death, growth = parameters[:, :4].T

    def change(t: Tensor, y: Tensor) -> Tensor:
        hares, lynx = y.T
        return torch.stack(((birth - hunting * lynx) * hares, (growth * hares - death) * lynx), 1)

    return adjoint.solve(change, parameters[:, 4:], t, method="tsit5", rtol=1e-6).ys


def fit(t: Tensor, counts: Tensor, start: Tensor) -> np.ndarray:
    """The six numbers that bring the logarithms closest."""

    def residuals(logarithms: Tensor) -> Tensor:
        return (populations(logarithms.exp(), t).log() - counts.log()[:, None]).transpose(0, 1).flatten(1)

    return np.exp(least_squares(residuals, start.log()).x)


def fit_by_scipy(t: np.ndarray, counts: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The same fit with nothing of this library: another integrator, and finite differences."""

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        birth, hunting, death, growth, hares, lynx = np.exp(logarithms)

        def change(t: float, y: np.ndarray) -> list[float]:
            return [(birth - hunting * y[1]) * y[0], (growth * y[0] - death) * y[1]]

        run = scipy.integrate.solve_ivp(change, (t[0], t[-1]), (hares, lynx), "LSODA", t, rtol=1e-8, atol=1e-8)
        return (np.log(run.y.T) - np.log(counts)).ravel()

    return np.exp(scipy.optimize.least_squares(residuals, np.log(start), x_scale="jac").x)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    t, counts = pelts()
    found = fit(t, counts, START)
    others = fit_by_scipy(t.numpy(), counts.numpy(), START.numpy())
    results = {
        f"{name}, by scipy": Recovered(x, y, 1e-3 * y)
        for name, x, y in zip(NAMES, found.tolist(), others.tolist(), strict=True)
    }
    for name, (mean, deviation) in PUBLISHED.items():
        results[f"{name}, published"] = Recovered(found.tolist()[NAMES.index(name)], mean, deviation)

    truth = torch.tensor(found)
    noise = 0.02 * torch.randn(counts.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made_up = populations(truth[None], t)[:, 0] * noise.exp()
    again = fit(t, made_up, START)
    for name, x, y in zip(NAMES, again.tolist(), found.tolist(), strict=True):
        results[f"{name}, made-up data"] = Recovered(x, y, 0.03 * y)

    fine = torch.linspace(0, 20, 401, dtype=torch.float64)
    curves = populations(truth[None], fine)[:, 0]
    misfit = float((populations(truth[None], t)[:, 0].log() - counts.log()).square().mean().sqrt())
    results["misfit of the logarithms"] = Recovered(misfit, 0.25, 0.05)  # sigma = 0.25 is published for both species
    save(picture(t + 1900, counts, fine + 1900, curves, misfit), out, "lynx_hare")
    return confirm(results)


def picture(years: Tensor, counts: Tensor, fine: Tensor, curves: Tensor, misfit: float) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    for species, (name, color) in enumerate((("hare", BLUE), ("lynx", ORANGE))):
        curve = curves[:, species]
        low, high = curve * np.exp(-misfit), curve * np.exp(misfit)
        left.fill_between(fine, low, high, color=color, alpha=0.13, linewidth=0)
        left.plot(fine, curve, color=color, label=f"{name}, model")
        left.plot(years, counts[:, species], "o", color=color, markersize=5, label=f"{name}, pelts bought")
    left.set_xticks(range(1900, 1921, 4))
    left.set_ylim(0)
    left.legend(ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    tidy(left, f"Pelts and the fitted model (band: {misfit:.2f} in the logarithm)", "year", "thousands of pelts")
    right.plot(counts[:, 0], counts[:, 1], "o-", color=GREY, markersize=4, linewidth=0.7, label="pelts, year by year")
    right.plot(curves[:, 0], curves[:, 1], color=BLUE, label="model")
    for k, place in ((0, (-8, -13)), (4, (6, 4)), (10, (0, 6)), (15, (6, 4))):
        right.annotate(f"{int(years[k])}", (counts[k, 0], counts[k, 1]), place, textcoords="offset points", fontsize=8)
    right.set_xlim(0)
    right.set_ylim(0)
    right.legend(ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    tidy(right, "The cycle", "hares (thousands)", "lynx (thousands)")
    return figure


if __name__ == "__main__":
    command_line(main)
