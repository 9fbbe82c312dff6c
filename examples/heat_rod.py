"""A heated rod: its conductivity, place by place, from four thermometers.

A rod of 40 cm, insulated along its sides, is heated at the left end for ten minutes and kept at 20 degrees at the
right:

    c dT/dt = d/dx (k(x) dT/dx),      k dT/dx = -flux at the left,      T = 20 at the right.

Its conductivity rises and falls along it, as in a rod of two alloys that ran into each other. Four thermometers are
read once a minute for half an hour, to a twentieth of a degree. The logarithm of k at seven places, linear in
between, is found by Gauss and Newton's method; one reverse sweep through 720 time steps gives the 124 rows of the
Jacobian, here with only 40 states kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from _fitting import least_squares
from _workbench import BLUE, GREEN, GREY, ORANGE, PINK, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

LENGTH, CELLS, CAPACITY, FLUX, ROOM = 0.4, 24, 2.4e6, 20e3, 20.0  # m, -, J/m^3 K, W/m^2, degrees Celsius
DX = LENGTH / CELLS
FACES = DX * torch.arange(1, CELLS + 1, dtype=torch.float64)
KNOTS = torch.linspace(0, LENGTH, 7, dtype=torch.float64)
THERMOMETERS = [3, 9, 14, 20]
MINUTES = torch.arange(0, 31, dtype=torch.float64)
NOISE = 0.05
TRUTH = torch.tensor([150.0, 140.0, 105.0, 70.0, 60.0, 80.0, 110.0], dtype=torch.float64)


def between(values: Tensor, x: Tensor) -> Tensor:
    """Values at the knots, (..., 7), interpolated linearly to x."""
    place = x / KNOTS[1]
    k = place.long().clamp(max=len(KNOTS) - 2)
    share = place - k
    return values[..., k] * (1 - share) + values[..., k + 1] * share


def temperatures(logarithms: Tensor, t: Tensor) -> Tensor:
    """Degrees in every cell at the times t (minutes), (times, copies, cells); logarithms of k of shape (copies, 7)."""
    conductance = between(logarithms, FACES).exp() / DX
    conductance = torch.cat((conductance[:, :-1], 2 * conductance[:, -1:]), 1)  # the last face is half a cell away

    def change(t: Tensor, y: Tensor) -> Tensor:
        right = torch.cat((y[:, 1:], torch.full_like(y[:, :1], ROOM)), 1)
        flow = conductance * (y - right)
        heating = torch.full_like(y[:, :1], FLUX) * (t < 10)
        return (torch.cat((heating, flow[:, :-1]), 1) - flow) * (60 / (CAPACITY * DX))

    first = torch.full((len(logarithms), CELLS), ROOM, dtype=torch.float64)
    return adjoint.solve(change, first, t, method="rk4", dt=2.5 / 60, slots=40, jumps=(10.0,)).ys


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    generator = torch.Generator().manual_seed(0)
    clean = temperatures(TRUTH.log()[None], MINUTES)[:, 0, THERMOMETERS]
    seen = clean + NOISE * torch.randn(clean.shape, generator=generator, dtype=torch.float64)

    def residuals(logarithms: Tensor) -> Tensor:
        error = temperatures(logarithms, MINUTES)[..., THERMOMETERS] - seen[:, None]
        return (error / NOISE).transpose(0, 1).flatten(1)

    start = torch.full_like(TRUTH, 100.0).log()
    fit = least_squares(residuals, start, xtol=1e-3 if quick else 1e-6)
    found = torch.tensor(fit.x)
    deviation = np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac)))
    results = {
        f"k at {100 * x:.0f} cm (W/m K)": Recovered(value, true, 0.1 * true)
        for x, value, true in zip(KNOTS.tolist(), found.exp().tolist(), TRUTH.tolist(), strict=True)
    }
    save(picture(seen, torch.stack((TRUTH.log(), found, start)), deviation), out, "heat_rod")
    return confirm(results)


def picture(seen: Tensor, logarithms: Tensor, deviation: np.ndarray) -> Figure:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    fine = torch.linspace(0, 30, 241, dtype=torch.float64)
    runs = temperatures(logarithms, fine)
    for n, (cell, color) in enumerate(zip(THERMOMETERS, (ORANGE, PINK, GREEN, BLUE), strict=True)):
        left.plot(MINUTES, seen[:, n], "o", color=color, markersize=3.5)
        left.plot(fine, runs[:, 1, cell], color=color, linewidth=1.2, label=f"{100 * (cell + 0.5) * DX:.1f} cm")
        left.plot(fine, runs[:, 2, cell], ":", color=color, linewidth=1)
    left.axvspan(0, 10, color="0.5", alpha=0.1, linewidth=0)
    left.legend(frameon=False, title="thermometer at", loc="upper right")
    tidy(left, "Read (dots), fitted, first guess (dotted); heated in grey", "time (minutes)", "degrees Celsius")
    x = torch.linspace(0, LENGTH, 200, dtype=torch.float64)
    true, found, start = between(logarithms, x).exp()
    right.plot(100 * x, start, ":", color=GREY, label="first guess")
    right.plot(100 * x, true, color=ORANGE, alpha=0.4, linewidth=5, label="true")
    right.plot(100 * x, found, color=BLUE, linewidth=1.2, label="recovered")
    low, high = (logarithms[1] - 2 * torch.tensor(deviation)).exp(), (logarithms[1] + 2 * torch.tensor(deviation)).exp()
    right.vlines(100 * KNOTS, low, high, color=BLUE, linewidth=2, label="two standard errors")
    for n, cell in enumerate(THERMOMETERS):
        right.axvline(
            100 * (cell + 0.5) * DX, color=GREY, linewidth=0.8, linestyle="--", label=None if n else "thermometers"
        )
    right.set_ylim(0, 185)
    right.legend(edgecolor="none", framealpha=1, loc="lower left", ncols=2)
    tidy(right, "Conductivity along the rod", "distance from the heated end (cm)", "k (W/m K)")
    return figure


if __name__ == "__main__":
    command_line(main)
