"""A buried lens: sound through a slab, sixteen receivers on its rim, and a picture of what lies inside.

    p' = q,     q' = c(x)^2 (laplace p + source) - 2 damping q - damping^2 p

is the acoustic wave equation (c in mm per microsecond, cells of 1 mm), with a damping frame that swallows what
leaves. Four shots from the middles of the sides are simulated at once, and ``observe`` keeps what the receivers hear in
place of the fields. c is found cell by cell by L-BFGS-B from a uniform start, through a Gaussian blur that keeps out
what is finer than the waves can see. All tapes of a gradient would take 77 MiB, and twice that for twice the time.
Here each gets 4 MiB; the solver chooses how many states to keep.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _fitting import minimise
from _workbench import BLUE, GREEN, GREY, ORANGE, PINK, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import conv2d, pad

import adjoint
import revolve
from adjoint.memory import Meter

CELLS, FRAME, RIM = 60, 8, 10
SPEED, LENS = 1.5, 1.75  # mm per microsecond
FREQUENCY, DT, END, SAMPLE = 0.15, 0.4, 48.0, 1.6  # megahertz, microseconds
BUDGET, ALL = "4 MiB", "1 GiB"

SIDE = torch.tensor([14, 24, 35, 45])
NEAR, FAR = torch.full((4,), RIM), torch.full((4,), CELLS - 1 - RIM)
RECEIVERS = torch.cat((SIDE, SIDE, NEAR, FAR)), torch.cat((NEAR, FAR, SIDE, SIDE))  # rows, columns
SOURCES = torch.tensor([30, 30, RIM, CELLS - 1 - RIM]), torch.tensor([RIM, CELLS - 1 - RIM, 30, 30])
TIMES = torch.arange(0, END + DT / 2, SAMPLE, dtype=torch.float64)
ROWS, COLUMNS = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")


def lens() -> Tensor:
    """The true speed: a lens of two arcs, tilted, in a uniform slab."""
    x, y = 0.8 * (COLUMNS - 31.0) - 0.6 * (ROWS - 27.0), 0.6 * (COLUMNS - 31.0) + 0.8 * (ROWS - 27.0)
    depth = torch.minimum(15 - torch.hypot(x - 9, y), 15 - torch.hypot(x + 9, y))  # mm inside the rim of the lens
    return SPEED + (LENS - SPEED) * torch.sigmoid(2 * depth)


def frame() -> Tensor:
    """Damping per microsecond: zero inside, rising towards the edges."""
    edge = torch.minimum(torch.minimum(ROWS, CELLS - 1 - ROWS), torch.minimum(COLUMNS, CELLS - 1 - COLUMNS))
    return 0.6 * ((FRAME - edge).clamp(min=0) / FRAME) ** 2


DAMPING = frame()


def shots(speed: Tensor, t: Tensor = TIMES, budget: str = BUDGET) -> adjoint.Solution:
    """Four shots at once: the pressure at the receivers, ``observed`` of shape (times, shots, 16), and the last p, q."""
    squared, friction, pull = speed**2, 2 * DAMPING, DAMPING**2
    place = torch.zeros(4, CELLS, CELLS)
    place[torch.arange(4), SOURCES[0], SOURCES[1]] = 1

    def change(t: Tensor, y: Tensor) -> Tensor:
        p, q = y
        phase = (torch.pi * FREQUENCY * (t - 1.2 / FREQUENCY)) ** 2
        ricker = (1 - 2 * phase) * torch.exp(-phase)
        laplace = pad(p[:, 1:] - p[:, :-1], (0, 0, 1, 1)).diff(dim=1)
        laplace = laplace + pad(p[..., 1:] - p[..., :-1], (1, 1)).diff(dim=2)
        force = squared * (laplace + ricker * place)
        return torch.stack((q, force - friction * q - pull * p))

    def hear(t: Tensor, y: Tensor) -> Tensor:
        return y[0][:, RECEIVERS[0], RECEIVERS[1]]

    silence = torch.zeros(2, 4, CELLS, CELLS)
    return adjoint.solve(change, silence, t, method="rk4", dt=DT, budget=budget, observe=hear)


def blurred(field: Tensor, width: float = 1.5) -> Tensor:
    """A field convolved with a Gaussian (width in cells), its edges repeated."""
    reach = torch.arange(-5, 6)
    bell = torch.exp(-0.5 * (reach / width) ** 2)
    bell = bell / bell.sum()
    wide = pad(field[None, None], (5, 5, 5, 5), mode="replicate")
    return conv2d(conv2d(wide, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))[0, 0]


def speed_of(x: Tensor) -> Tensor:
    """The speed from one free number for each cell; the frame stays as it is."""
    return SPEED * (1 + 0.1 * blurred(x) * (DAMPING == 0))


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    generator = torch.Generator().manual_seed(0)
    truth = lens()
    clean = shots(truth).observed
    seen = clean + 0.02 * clean.std() * torch.randn(clean.shape, generator=generator)
    misfits: list[float] = []

    def loss(x: Tensor) -> Tensor:
        value = ((shots(speed_of(x)).observed - seen) / seen.std()).square().sum()
        misfits.append(float(value.detach()))
        return value

    start = torch.zeros(CELLS, CELLS)
    fit = minimise(loss, start, iterations=12 if quick else 30)
    found = speed_of(torch.tensor(fit.x, dtype=torch.float32).reshape(CELLS, CELLS))
    off = (found - truth).norm() / (truth - SPEED).norm()
    core, weight = truth > 0.99 * LENS, (found - SPEED - 0.1).clamp(min=0)
    expected = (truth - SPEED - 0.1).clamp(min=0)
    results = {
        "speed, error relative to the lens": Recovered(float(off), 0, 0.25 if quick else 0.15),
        "speed in the lens (mm/us)": Recovered(float(found[core].mean()), LENS, 0.02),
    }
    for name, place in (("row", ROWS), ("column", COLUMNS)):
        centre, true = (float((place * w).sum() / w.sum()) for w in (weight, expected))
        results[f"{name} of its centre (mm)"] = Recovered(centre, true, 0.5)
    prices = what_memory_buys(truth, (BUDGET, ALL) if quick else ("2 MiB", BUDGET, "16 MiB", ALL))
    peaks = [
        measured(truth, budget, steps) for budget in (BUDGET, ALL) for steps in ((60,) if quick else (60, 120, 240))
    ]
    save(picture(truth, found, seen, misfits, prices, peaks), out, "wave_lens")
    return confirm(results)


class Price(NamedTuple):
    """One gradient."""

    budget: str
    plan: revolve.Plan
    seconds: float


def what_memory_buys(speed: Tensor, budgets: Sequence[str]) -> list[Price]:
    """The same gradient, bit for bit, within different budgets."""
    prices, gradients = [], []
    for budget in budgets:
        c = speed.clone().requires_grad_()
        begin = time.perf_counter()
        solution = shots(c, budget=budget)
        gradients.append(torch.autograd.grad(solution.observed.square().sum(), c)[0])
        prices.append(Price(budget, solution.plan, time.perf_counter() - begin))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients), "a gradient depends on its budget"
    return prices


class Peak(NamedTuple):
    """The bytes of tensors that one gradient through so many steps held at once."""

    budget: str
    steps: int
    bytes: int


def measured(speed: Tensor, budget: str, steps: int) -> Peak:
    c = speed.clone().requires_grad_()
    with Meter() as meter:
        heard = shots(c, torch.arange(0, steps * DT + DT, SAMPLE, dtype=torch.float64), budget).observed
        torch.autograd.grad(heard.square().sum(), c)
    return Peak(budget, steps, meter.peak)


def picture(
    truth: Tensor, found: Tensor, seen: Tensor, misfits: list[float], prices: list[Price], peaks: list[Peak]
) -> Figure:
    start = torch.full_like(truth, SPEED)
    figure = Figure(figsize=(13.5, 8.2), layout="constrained")
    upper, lower = figure.subplots(2, 3, height_ratios=[1.25, 1])
    draw_speeds(upper, (truth, start, found), f"Recovered: {len(misfits)} gradients, {BUDGET} each")
    draw_traces(lower[0], (start, truth, found), seen)
    draw_memory(lower[1], prices, peaks)
    draw_prices(lower[2], prices)
    return figure


def draw_speeds(row: Sequence[Axes], speeds: tuple[Tensor, ...], recovered: str) -> None:
    names = ("The lens, and sixteen receivers", "First guess, and a wave on its way", recovered)
    for axes, speed, name in zip(row, speeds, names, strict=True):
        image = axes.imshow(speed.numpy(), vmin=1.4, vmax=1.8, cmap="viridis", origin="lower")
        axes.plot(RECEIVERS[1], RECEIVERS[0], "v", color="white", markersize=6, label="receivers")
        axes.plot(SOURCES[1], SOURCES[0], "*", color=ORANGE, markersize=11, label="sources")
        tidy(axes, name, "x (mm)", "y (mm)")
        axes.grid(False)
    legend = row[0].legend(loc="lower left", ncols=2, frameon=False, labelcolor="white")
    legend.set_zorder(5)
    row[0].figure.colorbar(image, ax=row, label="speed of sound (mm per microsecond)", shrink=0.85)
    wave = shots(speeds[1], TIMES[:17]).ys[-1, 0, 0]
    top = float(wave.abs().max())
    for sign, color in ((1, "white"), (-1, "black")):
        row[1].contour(sign * wave.numpy(), [0.15 * top, 0.5 * top], colors=color, linewidths=0.8)


def draw_traces(axes: Axes, speeds: tuple[Tensor, ...], seen: Tensor) -> None:
    fine = torch.arange(0, END + DT / 2, DT, dtype=torch.float64)
    looks = (
        {"color": GREY, "linestyle": ":", "label": "first guess"},
        {"color": ORANGE, "alpha": 0.4, "linewidth": 5, "label": "true"},
        {"color": BLUE, "linewidth": 1.2, "label": "recovered"},
    )
    shot, receiver = 0, 5  # from the left to the right
    for speed, look in zip(speeds, looks, strict=True):
        axes.plot(fine, shots(speed, fine).observed[:, shot, receiver], **look)
    axes.plot(TIMES, seen[:, shot, receiver], "o", color="black", markersize=3, label="received")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    tidy(axes, "One receiver behind the lens", "time (microseconds)", "pressure")


def draw_memory(axes: Axes, prices: list[Price], peaks: list[Peak]) -> None:
    """The memory of one gradient against its steps, within each budget: as planned (lines), as measured (dots)."""
    lengths = np.unique(np.geomspace(15, 2000, 40).round().astype(int)).tolist()
    colors = dict(zip([price.budget for price in prices], (GREEN, ORANGE, PINK, BLUE)[-len(prices) :], strict=True))
    for budget, color in colors.items():
        plan = prices[0].plan
        sizes = {"state_bytes": plan.state_bytes, "tape_bytes": plan.tape_bytes, "working_bytes": plan.working_bytes}
        plans = [revolve.plan(steps=n, budget=budget, given=True, **sizes) for n in lengths]
        if budget == ALL:
            plans = [replace(p, schedule=revolve.StoreAll()) for p in plans]
        axes.plot(lengths, [p.bytes / 2**20 for p in plans], color=color)
        words = "all tapes" if budget == ALL else f"{budget}, {plans[-1].report.runs / lengths[-1]:.1f} runs a step"
        axes.annotate(words, (lengths[-1], plans[-1].bytes / 2**20), (0, 5), textcoords="offset points", ha="right")
    for peak in peaks:
        axes.plot(peak.steps, peak.bytes / 2**20, "o", color=colors[peak.budget])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1, 5000)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    tidy(axes, "Memory: planned (lines) and measured", "steps", "MiB")


def draw_prices(axes: Axes, prices: list[Price]) -> None:
    *bounded, everything = prices
    plan = bounded[0].plan
    curve = [replace(plan, schedule=revolve.Binomial(slots)) for slots in range(2, plan.steps)]
    axes.plot([p.bytes / 2**20 for p in curve], [p.report.runs / p.steps for p in curve], color=GREY)
    for price in prices:
        size, runs = price.plan.bytes / 2**20, price.plan.report.runs / price.plan.steps
        axes.plot(size, runs, "o", color=ORANGE if price.budget == BUDGET else BLUE)
        words = "all tapes" if price is everything else price.budget
        axes.annotate(f"{words}: {price.seconds:.2f} s", (size, runs), (6, 5), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1.2, 600)
    axes.set_xticks([2, 5, 10, 20, 50, 100])
    axes.set_yticks([1, 2, 3, 5, 10])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    tidy(axes, f"The same gradient of {plan.steps} steps", "memory (MiB)", "runs of each step")


if __name__ == "__main__":
    command_line(main)
