"""Gray and Scott's reaction: feed and kill rates from a picture of its late pattern.

    du/dt = 0.16 laplace u - u v^2 + feed (1 - u),      dv/dt = 0.08 laplace v + u v^2 - (feed + kill) v

on a ring of 64 x 64 cells makes corals, spots or stripes, depending on two numbers (Pearson 1993, Science 261, 189).
They are recovered from one noisy picture of v after 3000 Euler steps. All tapes of these steps would take 620 MiB;
here each gradient gets 16 MiB, and no step runs more than three times.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _fitting import minimise
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint
import revolve

CELLS, NOISE, BUDGET = 64, 0.02, "16 MiB"
TRUTH = torch.tensor([0.0545, 0.062], dtype=torch.float64)
START = torch.tensor([0.0565, 0.0608], dtype=torch.float64)
SCALE = torch.tensor([0.015, 0.003], dtype=torch.float64)  # the pattern feels a change of the kill rate sooner


def seeds() -> Tensor:
    """u = 1, v = 0, but for eight squares, (2, cells, cells)."""
    generator = torch.Generator().manual_seed(3)
    y = torch.zeros(2, CELLS, CELLS, dtype=torch.float64)
    y[0] = 1
    for row, column in torch.randint(0, CELLS, (8, 2), generator=generator).tolist():
        rows, columns = (row + torch.arange(6)) % CELLS, (column + torch.arange(6)) % CELLS
        y[0, rows[:, None], columns] = 0.5
        y[1, rows[:, None], columns] = 0.25
    return y


def pattern(rates: Tensor, steps: int) -> adjoint.Solution:
    """The reaction at its end, ys[-1] of shape (2, cells, cells), from the feed and kill rates."""
    feed, kill = rates
    spread = torch.tensor([0.16, 0.08], dtype=torch.float64)[:, None, None]

    def change(t: Tensor, y: Tensor) -> Tensor:
        around = y.roll(1, 1) + y.roll(-1, 1) + y.roll(1, 2) + y.roll(-1, 2)
        u, v = y
        eaten = u * v * v
        return spread * (around - 4 * y) + torch.stack((feed * (1 - u) - eaten, eaten - (feed + kill) * v))

    return adjoint.solve(change, seeds(), [0.0, float(steps)], method="euler", dt=1.0, budget=BUDGET)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    steps = 500 if quick else 3000
    generator = torch.Generator().manual_seed(0)
    true = pattern(TRUTH, steps).ys[-1, 1]
    seen = true + NOISE * torch.randn(true.shape, generator=generator, dtype=torch.float64)
    path: list[tuple[float, float, float]] = []

    def loss(x: Tensor) -> Tensor:
        rates = START * torch.exp(x * SCALE)
        value = ((pattern(rates, steps).ys[-1, 1] - seen) / NOISE).square().mean()
        path.append((*rates.tolist(), float(value.detach())))
        return value

    fit = minimise(
        loss,
        torch.zeros(2, dtype=torch.float64),
        iterations=10 if quick else 20,
        bounds=[(-10, 10)] * 2,
        tolerance=1e-5,
    )
    found = START * torch.exp(torch.tensor(fit.x) * SCALE)
    results = {
        "feed rate": Recovered(float(found[0]), float(TRUTH[0]), 0.01 * float(TRUTH[0])),
        "kill rate": Recovered(float(found[1]), float(TRUTH[1]), 0.002 * float(TRUTH[1])),
        "misfit in units of the noise": Recovered(fit.fun**0.5, 1, 0.05),
    }
    starting, ended = pattern(START, steps).ys[-1, 1], pattern(found.requires_grad_(), steps)
    save(picture((seen, starting, ended.ys[-1, 1]), np.array(path), ended.plan), out, "gray_scott")
    return confirm(results)


def picture(patterns: tuple[Tensor, ...], path: np.ndarray, price: revolve.Plan) -> Figure:
    figure = Figure(figsize=(15.5, 3.9), layout="constrained")
    *fields, right = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.25])
    names = (f"Seen after {price.steps} steps", "First guess", "Recovered")
    for axes, field, name in zip(fields, patterns, names, strict=True):
        image = axes.imshow(field.detach().numpy(), cmap="magma", vmin=0, vmax=0.42)
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=fields, label="v", shrink=0.75)
    feed, kill, misfit = path.T
    right.plot(feed, kill, "-", color=GREY, linewidth=0.8)
    dots = right.scatter(feed, kill, c=misfit, norm="log", cmap="viridis", zorder=2)
    figure.colorbar(dots, ax=right, label="mean square misfit / noise")
    right.plot(*TRUTH, "x", color=ORANGE, markersize=12, markeredgewidth=2, label="true")
    right.plot(*START, "o", markerfacecolor="none", color=BLUE, markersize=11, label="first guess")
    right.legend(frameon=False, loc="lower left")
    right.ticklabel_format(useOffset=False)
    everything = replace(price, schedule=revolve.StoreAll())
    one, all_tapes = (revolve.format_bytes(plan.bytes) for plan in (price, everything))
    tidy(right, f"{len(path)} gradients, {one} each (all tapes: {all_tapes})", "feed rate", "kill rate")
    return figure


if __name__ == "__main__":
    command_line(main)
