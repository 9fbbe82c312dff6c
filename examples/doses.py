"""Doses: the rates of a drug from a few samples, and then the best times and sizes of its next doses.

A tablet dissolves in the gut and passes into the blood, from where it is cleared:

    gut' = -a gut,      blood' = a gut - k blood,      gut jumps by d_i at s_i

First a, k and the volume of the blood are fitted to eight noisy samples of a patient who took four tablets. Then four
doses a day are to hold the level near 10 mg/l: sizes *and* times are chosen by the gradient of a running cost, which
goes through every jump of the state and to the times at which they happen. The levels are held against the closed form (a sum
of Bateman functions), and so are the derivatives in the times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _fitting import least_squares_in_rows, minimise
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

TRUTH = torch.tensor([1.1, 0.17, 12.0], dtype=torch.float64)
"""Per hour into the blood, per hour out of it, litres."""
START = torch.tensor([0.5, 0.3, 20.0], dtype=torch.float64)
NOISE = 0.03
TARGET = 10.0
CLINIC = torch.tensor([0.0, 6.0, 12.0, 18.0], dtype=torch.float64)
HOURS = torch.tensor([0.0, 1.0, 2.5, 5.0, 7.0, 11.0, 14.0, 20.0, 24.0], dtype=torch.float64)


def levels(law: Tensor, sizes: Tensor, times: Tensor, hours: Tensor, **how: Any) -> adjoint.Solution:
    """mg in gut and blood at these hours; the running cost is the squared distance of the level from the target."""
    a, k, volume = law

    def change(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((-a * y[0], a * y[0] - k * y[1]))

    def price(t: Tensor, y: Tensor) -> Tensor:
        return (y[1] / volume - TARGET) ** 2

    fixed = times.detach()

    def swallow(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[0] + (sizes * (fixed == t)).sum(), y[1]))

    return adjoint.solve(
        change,
        torch.zeros(2, dtype=torch.float64),
        hours,
        events=[adjoint.At(times, swallow)],
        cost=price,
        **{"rtol": 1e-5, "atol": 1e-4} | how,
    )


def bateman(law: Tensor, sizes: Tensor, times: Tensor, hour: Tensor) -> Tensor:
    """mg in the blood, in closed form."""
    a, k, _ = law
    since = (hour - times).clamp(min=0)
    return (sizes * a / (a - k) * (torch.exp(-k * since) - torch.exp(-a * since))).sum()


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    taken = torch.full((4,), 100.0, dtype=torch.float64)
    exact = torch.stack([bateman(TRUTH, taken, CLINIC, h) for h in HOURS[1:]]) / TRUTH[2]
    draw = torch.Generator().manual_seed(5)
    seen = exact.log() + NOISE * torch.randn(exact.shape, generator=draw, dtype=torch.float64)

    def residuals(logarithms: Tensor) -> Tensor:
        law = logarithms.exp()
        found = levels(law, taken, CLINIC, HOURS, gradient="tangent").ys[1:, 1] / law[2]
        return (found.log() - seen) / NOISE

    law = torch.tensor(least_squares_in_rows(residuals, START.log(), xtol=1e-5).x).exp()

    def plan(x: Tensor) -> tuple[Tensor, Tensor]:
        """Four sizes and four times in turn, from numbers near 1: the logarithms of gaps keep the times apart."""
        return 100 * x[:4], 6 * (x[4:].exp().cumsum(0) - 1) + 0.1

    def cost(x: Tensor) -> Tensor:
        return levels(law, *plan(x), torch.tensor([0.0, 24.0], dtype=torch.float64)).costs[-1]

    first = torch.cat((torch.ones(4), torch.zeros(4))).double()
    bounds = [(0.0, 4.0)] * 4 + [(0.0, 0.5)] + [(-2.0, 0.3)] * 3
    best = torch.tensor(minimise(cost, first, iterations=5 if quick else 30, bounds=bounds, tolerance=1e-7).x)
    sizes, times = plan(best)

    inputs = [x.clone().requires_grad_() for x in (law, sizes, times)]
    hours = torch.tensor([0.0, 23.0], dtype=torch.float64)
    by_steps = levels(*inputs, hours, method="dopri8", rtol=1e-11, atol=1e-11).ys[-1, 1]
    by_formula = bateman(*inputs, hours[-1])
    pairs = zip(torch.autograd.grad(by_steps, inputs), torch.autograd.grad(by_formula, inputs), strict=True)
    apart = max(float(((a - b).abs() / (1e-6 + b.abs().max())).max()) for a, b in pairs)
    names = ("into the blood, 1/h", "out of it, 1/h", "volume, l")
    results = {
        name: Recovered(float(x), float(truth), 0.1 * float(truth))
        for name, x, truth in zip(names, law, TRUTH, strict=True)
    }
    results["derivatives in rates, sizes and times: largest relative distance from the closed form"] = Recovered(
        apart, 0.0, 1e-7
    )
    price = [float(cost(x)) for x in (first, best)]
    results["price of the planned day over that of the clinic's"] = Recovered(price[1] / price[0], 0.0, 0.6)

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = torch.linspace(0, 24, 241, dtype=torch.float64)
    before = torch.stack([bateman(law, taken, CLINIC, h) for h in grid]) / law[2]
    left.plot(grid, before, color=BLUE)
    left.plot(HOURS[1:], seen.exp(), "o", color=ORANGE, markersize=5)
    tidy(left, "Four tablets of 100 mg, eight samples, and the fit", "hour", "mg/l")
    after = torch.stack([bateman(law, sizes, times, h) for h in grid]) / law[2]
    right.plot(grid, before, color=GREY, linewidth=1)
    right.plot(grid, after, color=GREEN)
    right.axhline(TARGET, color=GREY, linestyle=":", linewidth=1)
    for size, time in zip(sizes.tolist(), times.tolist(), strict=True):
        right.annotate(f"{size:.0f} mg", (time, 0.4), ha="left", fontsize=9, color=ORANGE)
        right.plot([time, time], [0, size / 50], color=ORANGE, linewidth=3)
    tidy(right, f"Sizes and times by gradient: {price[1] / price[0]:.0%} of the price", "hour", "mg/l")
    save(figure, out, "doses")
    return confirm(results)


if __name__ == "__main__":
    command_line(main)
