"""Hodgkin and Huxley's nerve: the conductances of its channels from a train of spikes.

    C v' = I(t) - g_Na m^3 h (v - 50) - g_K n^4 (v + 77) - g_leak (v + 54.4),     C = 1,

with v in mV, t in ms, currents in uA/cm^2, and gates m, h, n that open at rates a(v) and close at rates b(v)
(Hodgkin & Huxley 1952, Journal of Physiology 117, 500; here with rest at -65 mV), makes the spikes by which nerves
speak. A known current is sent in, and the voltage read through 2 mV of noise. The three conductances come back by
Gauss and Newton's method, whose Jacobian takes one reverse sweep: first from the first spike, since later ones are
hard to fit while they come at the wrong times. With them come the gates that no electrode sees, and the spikes under a
current that was never tried.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _fitting import least_squares
from _workbench import BLUE, GREEN, GREY, ORANGE, PINK, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

NAMES = ("sodium", "potassium", "leak")
TRUTH = torch.tensor([120.0, 36.0, 0.3], dtype=torch.float64)  # mS/cm^2
START = torch.tensor([80.0, 25.0, 0.5], dtype=torch.float64)
NOISE, WITHIN = 2.0, (0.05, 0.05, 0.15)  # mV; three standard errors

FALL = torch.tensor([18.0, 20.0, 80.0], dtype=torch.float64)[:, None]
SIZE = torch.tensor([4.0, 0.07, 0.125], dtype=torch.float64)[:, None]


def rates(v: Tensor) -> tuple[Tensor, Tensor]:
    """Opening and closing rates of m, h and n at v (copies,), each (3, copies), in 1/ms."""
    falling = SIZE * torch.exp(-(v + 65) / FALL)
    x = torch.stack((v + 40, v + 35, v + 55)) / 10
    rest = 1 - torch.exp(-x)
    opening = torch.stack((x[0] / rest[0], falling[1], 0.1 * x[2] / rest[2]))
    return opening, torch.stack((falling[0], 1 / (2 - rest[1]), falling[2]))


def tried(t: Tensor) -> Tensor:
    """The current that is sent in."""
    return 12 + 6 * torch.sin(0.35 * t) + 4 * torch.sin(0.9 * t + 1)


def untried(t: Tensor) -> Tensor:
    return 9 + 7 * torch.sin(0.23 * t + 2) - 5 * torch.cos(0.7 * t)


def nerve(conductances: Tensor, t: Tensor, current: Callable[[Tensor], Tensor] = tried) -> Tensor:
    """Voltage and gates at the times t, (times, 4, copies), for conductances of shape (copies, 3)."""
    sodium, potassium, leak = conductances.T

    def change(t: Tensor, y: Tensor) -> Tensor:
        v, gates = y[0], y[1:]
        m, h, n = gates
        opening, closing = rates(v)
        through = sodium * m**3 * h * (v - 50) + potassium * n**4 * (v + 77) + leak * (v + 54.4)
        return torch.cat(((current(t) - through)[None], opening - (opening + closing) * gates))

    rest = torch.full((1, len(conductances)), -65.0, dtype=torch.float64)
    opening, closing = rates(rest[0])
    first = torch.cat((rest, opening / (opening + closing)))
    return adjoint.solve(change, first, t, rtol=1e-4, atol=1e-6).ys


def spikes(t: Tensor, v: Tensor) -> Tensor:
    """When the voltage rises through zero."""
    up = ((v[:-1] < 0) & (v[1:] >= 0)).nonzero()[:, 0]
    return t[up] + (t[up + 1] - t[up]) * v[up] / (v[up] - v[up + 1])


def fit(t: Tensor, seen: Tensor, start: Tensor) -> tuple[Tensor, np.ndarray]:
    """The conductances whose voltage comes closest to what was seen, and their relative standard errors."""

    def residuals(logarithms: Tensor) -> Tensor:
        return (nerve(logarithms.exp(), t)[:, 0] - seen[:, None]).T / NOISE

    found = least_squares(residuals, start.log(), xtol=1e-2)
    return torch.tensor(found.x).exp(), np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    t = torch.arange(0, 18.1 if quick else 40.1, 0.4, dtype=torch.float64)
    noise = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[: len(t)]
    seen = nerve(TRUTH[None], t)[:, 0, 0] + NOISE * noise
    found = START
    for length in (len(t),) if quick else (20, len(t)):  # from this start the whole of 40 ms leads to wrong spikes
        found, errors = fit(t[:length], seen[:length], found)
    results = {
        f"{name} conductance (mS/cm^2)": Recovered(value, true, within * true * (2 if quick else 1))
        for name, value, true, within in zip(NAMES, found.tolist(), TRUTH.tolist(), WITHIN, strict=True)
    }
    fine = torch.linspace(0, float(t[-1]), 10 * len(t), dtype=torch.float64)
    runs = nerve(torch.stack((TRUTH, found, START)), fine)
    results["gates, root mean square error"] = Recovered(
        float((runs[:, 1:, 1] - runs[:, 1:, 0]).square().mean().sqrt()), 0, 0.02
    )
    new = nerve(torch.stack((TRUTH, found, START)), fine, untried)[:, 0]
    true, foretold = (spikes(fine, new[:, k]) for k in range(2))
    results["spikes under the untried current"] = Recovered(len(foretold), len(true), 0)
    results["their times, largest error (ms)"] = Recovered(float((foretold - true).abs().max()), 0, 0.2)
    save(picture(t, seen, fine, runs, new, found, errors), out, "hodgkin_huxley")
    return confirm(results)


def picture(
    t: Tensor, seen: Tensor, fine: Tensor, runs: Tensor, new: Tensor, found: Tensor, errors: np.ndarray
) -> Figure:
    figure = Figure(figsize=(13.5, 7.6), layout="constrained")
    places = [["seen", "seen", "gates"], ["in", "in", "gates"], ["new", "new", "found"]]
    axes = figure.subplot_mosaic(places, height_ratios=[1.5, 0.45, 1.2])
    draw_voltages(axes["seen"], fine, runs[:, 0])
    axes["seen"].plot(t, seen, "o", color="black", markersize=3, label="seen")
    axes["seen"].legend(frameon=False, ncols=4, loc="upper center", fontsize=9)
    tidy(axes["seen"], "The voltage, and the current that drives it", "", "mV")
    axes["in"].plot(fine, tried(fine), color=PINK)
    axes["in"].sharex(axes["seen"])
    tidy(axes["in"], "", "", "uA/cm\u00b2")
    draw_voltages(axes["new"], fine, new)
    tidy(axes["new"], "Foretold: the answer to another current, never tried", "time (ms)", "mV")
    for k, (name, color) in enumerate((("m (sodium)", ORANGE), ("h (sodium)", GREEN), ("n (potassium)", BLUE))):
        axes["gates"].plot(fine, runs[:, 1 + k, 0], color=color, alpha=0.3, linewidth=5)
        axes["gates"].plot(fine, runs[:, 1 + k, 1], color=color, linewidth=1.2, label=name)
    axes["gates"].legend(frameon=False, loc="upper center", fontsize=9, ncols=3, columnspacing=1, handlelength=1.2)
    axes["gates"].set_ylim(0, 1.15)
    tidy(axes["gates"], "Gates, not seen: true (broad), recovered (thin)", "time (ms)", "share open")
    draw_found(axes["found"], found, errors)
    return figure


def draw_voltages(axes: Axes, t: Tensor, voltages: Tensor) -> None:
    """True, recovered and first guess."""
    true, recovered, guess = voltages.T
    axes.plot(t, guess, ":", color=GREY, label="first guess")
    axes.plot(t, true, color=ORANGE, alpha=0.4, linewidth=5, label="true")
    axes.plot(t, recovered, color=BLUE, linewidth=1.2, label="recovered")
    axes.set_ylim(-85, 75)


def draw_found(axes: Axes, found: Tensor, errors: np.ndarray) -> None:
    y = np.arange(3)
    axes.axvline(1, color=ORANGE, alpha=0.4, linewidth=5, label="true")
    axes.plot(START / TRUTH, y, "o", color=GREY, markerfacecolor="none", label="first guess")
    ratio = (found / TRUTH).numpy()
    axes.errorbar(ratio, y, xerr=2 * ratio * errors, fmt="o", color=BLUE, capsize=3, label="recovered, two errors")
    axes.set_yticks(y, [f"{name}\n{value:.3g}" for name, value in zip(NAMES, found.tolist(), strict=True)])
    axes.set_ylim(2.6, -1.4)
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=3, columnspacing=1)
    tidy(axes, "Conductances", "recovered / true", "")


if __name__ == "__main__":
    command_line(main)
