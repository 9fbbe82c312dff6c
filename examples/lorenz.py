"""Lorenz's attractor: when gradients stop meaning anything.

    x' = sigma (y - x),     y' = x (rho - z) - y,     z' = x y - beta z

How does the average of z over a window answer to rho? The climate's answer is about 1. The gradient of one run's
average grows like exp(0.9 T) with the window, at the rate of the largest Lyapunov exponent (0.9056: Sprott 2003,
Chaos and Time-Series Analysis), and soon says nothing about the climate. It is no error of the gradient: the discrete
adjoint and a complex step through the same time steps (which knows no cancellation) differ by rounding alone, though
rounding grows at that rate too; a finite difference fails as soon as its two runs have parted. In a short window, on
the other hand, sigma, rho and beta are found from noisy data with ease.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from _fitting import least_squares
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

DT, LYAPUNOV = 0.01, 0.9056
CLASSIC = torch.tensor([10.0, 28.0, 8 / 3], dtype=torch.float64)


def run(y0: Tensor, parameters: Tensor, t: Tensor) -> Tensor:
    """States at the times t, (times, ..., 3), from y0 and parameters (sigma, rho, beta) of shape (..., 3)."""
    sigma, rho, beta = parameters.unbind(-1)

    def change(t: Tensor, state: Tensor) -> Tensor:
        x, y, z = state.unbind(-1)
        return torch.stack((sigma * (y - x), x * (rho - z) - y, x * y - beta * z), -1)

    return adjoint.solve(change, y0, t, method="rk4", dt=DT).ys


def with_rho(rho: Tensor) -> Tensor:
    """The classic parameters with another rho, (..., 3)."""
    sigma, beta = torch.full_like(rho, 10.0), torch.full_like(rho, 8 / 3)
    return torch.stack((sigma, rho, beta), -1)


def window_averages(y0: Tensor, rho: Tensor, windows: Tensor) -> Tensor:
    """The averages of z from 0 to each of the windows' ends, (windows, ...)."""
    step = float(windows[0])
    t = torch.arange(0, round(float(windows[-1]) / step) + 1, dtype=torch.float64) * step
    z = run(y0, with_rho(rho), t)[..., 2]
    return torch.stack([z[1 : round(float(end) / step) + 1].mean(0) for end in windows])


def gradients(y0: Tensor, windows: Tensor) -> Tensor:
    """d(average of z)/d(rho) for every window and member: one reverse sweep over a copy of the members per window."""
    rho = torch.full((len(windows), len(y0)), 28.0, dtype=torch.float64, requires_grad=True)
    averages = window_averages(y0.expand(len(windows), -1, -1), rho, windows)
    own = averages.diagonal().sum()  # window w of copy w
    (gradient,) = torch.autograd.grad(own, rho)
    return gradient


def by_finite_difference(y0: Tensor, windows: Tensor, h: float) -> Tensor:
    rho = torch.full((2, len(y0)), 28.0, dtype=torch.float64) + torch.tensor([[h], [-h]], dtype=torch.float64)
    up, down = window_averages(y0.expand(2, -1, -1), rho, windows).unbind(1)
    return (up - down) / (2 * h)


def by_complex_step(y0: Tensor, windows: Tensor) -> Tensor:
    """Im L(rho + i h) / h with h so small that its square vanishes: exact, and no difference is taken."""
    h = 1e-30
    rho = torch.full((len(y0),), complex(28.0, h), dtype=torch.complex128)
    return window_averages(y0.to(rho.dtype), rho, windows).imag / h


def climate(members: Tensor, half: float = 1.0) -> float:
    """The change of the average of z with rho, from long runs on both sides of 28."""
    rho = torch.full((2, len(members)), 28.0, dtype=torch.float64)
    rho += torch.tensor([[half], [-half]], dtype=torch.float64)
    t = torch.arange(0, 40.1, 0.2, dtype=torch.float64)
    up, down = run(members.expand(2, -1, -1), with_rho(rho), t)[50:, ..., 2].mean((0, 2))
    return float(up - down) / (2 * half)


def fit(first: Tensor, t: Tensor, seen: Tensor, start: Tensor) -> Tensor:
    """The parameters whose run from this first state comes closest to what was seen."""

    def residuals(parameters: Tensor) -> Tensor:
        states = run(first.expand(len(parameters), 3), parameters, t)
        return (states - seen[:, None]).transpose(0, 1).flatten(1)

    return torch.tensor(least_squares(residuals, start, bounds=([1, 1, 0.1], [20, 60, 10])).x)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(128 if quick else 256, 3, generator=generator, dtype=torch.float64) + 20
    many = run(many, CLASSIC, torch.tensor([0.0, 10.0], dtype=torch.float64))[-1]  # onto the attractor
    members = many[:64]
    windows = torch.arange(1, 18 if quick else 25, dtype=torch.float64)

    own = gradients(members, windows)
    growth = (own.abs() * windows[:, None]).log().mean(1)
    late = windows >= 5
    rate = float(np.polyfit(windows[late], growth[late], 1)[0])
    results = {"growth rate of the gradient": Recovered(rate, LYAPUNOV, 0.06)}

    exact, differences = by_complex_step(members, windows), by_finite_difference(members, windows, 1e-5)
    wrong = [((other - own) / own).abs().median(1).values for other in (exact, differences)]
    results["adjoint against complex step, window 1"] = Recovered(float(wrong[0][0]), 0, 1e-13)
    results["adjoint against complex step, last window"] = Recovered(float(wrong[0][-1]), 0, 1e-4)
    results["adjoint against differences, window 1"] = Recovered(float(wrong[1][0]), 0, 1e-8)
    results["digits that differences keep, last window"] = Recovered(-float(wrong[1][-1].log10()), 0, 0.5)
    slope = climate(many)
    results["the climate's answer"] = Recovered(slope, 1.0, 0.15)

    t = torch.arange(0, 15.05, 0.1, dtype=torch.float64)
    noise = 0.1 * torch.randn(21, 3, generator=generator, dtype=torch.float64)
    truth = run(members[0], CLASSIC, t)
    seen = truth[:21] + noise

    found = torch.tensor([8.0, 25.0, 2.0], dtype=torch.float64)
    for length in (9, 21):  # the first eight tenths of the window lead into the whole
        found = fit(members[0], t[:length], seen[:length], found)
    for name, value, true in zip(("sigma", "rho", "beta"), found.tolist(), CLASSIC.tolist(), strict=True):
        results[name] = Recovered(value, true, 0.01 * true)
    rho = torch.linspace(25, 31, 601, dtype=torch.float64)
    misfits = (run(members[0].expand(601, 3), with_rho(rho), t) - truth[:, None]).square().sum(-1)
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_growth(left, windows, own, rate, slope)
    draw_errors(middle, windows, wrong)
    draw_misfits(right, rho, {end: misfits[: 10 * end + 1].mean(0).sqrt() for end in (2, 6, 15)})
    save(figure, out, "lorenz")
    return confirm(results)


def draw_growth(axes: Axes, windows: Tensor, found: Tensor, rate: float, slope: float) -> None:
    low, middle, high = torch.quantile(found.abs(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1)
    axes.fill_between(windows, low, high, color=BLUE, alpha=0.15, linewidth=0, label="80 % of 64 runs")
    axes.plot(windows, middle, "o-", color=BLUE, markersize=3, label="their median")
    expected = torch.exp(LYAPUNOV * windows) / windows
    axes.plot(windows, expected * middle[-1] / expected[-1], "--", color=ORANGE, label="exp(0.906 T) / T")
    axes.axhline(slope, color=GREEN, label=f"the climate's answer, {slope:.2f}")
    axes.set_yscale("log")
    axes.legend(frameon=False, loc="upper left")
    tidy(axes, f"Gradient of the average of z: like exp({rate:.2f} T)", "window T", "|d(average of z) / d(rho)|")


def draw_errors(axes: Axes, windows: Tensor, wrong: list[Tensor]) -> None:
    names = ("complex step", "finite difference, h = 0.00001")
    for error, name, color in zip(wrong, names, (GREEN, ORANGE), strict=True):
        axes.plot(windows, error, "o-", color=color, markersize=3, label=name)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.annotate("nothing left", (float(windows[0]), 1), (0, 4), textcoords="offset points", color=GREY, fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(1e-17, 1e4)
    axes.legend(frameon=False, loc="upper left")
    tidy(axes, "The same derivative, made otherwise", "window T", "relative difference from the adjoint")


def draw_misfits(axes: Axes, rho: Tensor, misfits: dict[int, Tensor]) -> None:
    for (end, misfit), color in zip(misfits.items(), (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(rho, misfit, color=color, linewidth=1, label=f"window {end}")
    axes.axvline(28, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.25 * float(misfits[15].max()))
    axes.legend(framealpha=1, edgecolor="none", loc="upper left", ncols=3, columnspacing=1.2)
    tidy(axes, "What a fit of rho has to descend (true: 28)", "rho", "root mean square misfit of the run")


if __name__ == "__main__":
    command_line(main)
