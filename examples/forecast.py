"""A forecast that has to choose what to remember: a selective model on a signal whose size is told now and then.

The signal is a wave with noise. At rare moments, which are marked, it tells the size that the wave has from then on. To
foretell the next value, a model does well to take in that number when the mark is there, hold it until the next, and
multiply it by the wave. A linear filter cannot choose: the best one of 40 rows, by least squares over 20,000 rows, mixes
sizes old and new. A selective model (`state_space.Selective`, the recurrence of Mamba) learns from the error of its
forecast over 512 rows when to write, with gradients in the memory of a few chunks, and does better over 20,000 rows that
it never saw, by a seventh. The noise of the signal, which is known here, bounds what any forecast can do; it would take
more rounds to come near it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from adjoint.state_space import Selective

torch.set_num_threads(1)
NOISE, PERIOD, BETWEEN, LAGS = 0.1, 16, 20, 40


class Signal(NamedTuple):
    """Rows of (value, mark, the wave one row ahead: sine and cosine), the values one row ahead, and which count."""

    rows: Tensor
    ahead: Tensor
    counts: Tensor


def signal(length: int, seed: int) -> Signal:
    random = np.random.default_rng(seed)
    mark = random.random(length) < 1 / BETWEEN
    mark[0] = True
    told = random.uniform(-1.5, 1.5, length)
    size = told[np.maximum.accumulate(np.where(mark, np.arange(length), 0))]
    angle = 2 * np.pi * np.arange(length + 1) / PERIOD
    noise = NOISE * random.standard_normal(length + 1)
    value = np.where(mark, told, size * np.sin(angle[:-1]) + noise[:-1])
    rows = np.stack((value, mark, np.sin(angle[1:]), np.cos(angle[1:])), 1)
    ahead = size * np.sin(angle[1:]) + noise[1:]
    return Signal(*map(torch.tensor, (rows, ahead, ~np.append(mark[1:], True))))


class Forecaster(nn.Module):
    """A selective model, and a number from what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.last = Selective(4, 4), nn.Linear(4, 1)

    def forward(self, rows: Tensor, **memory: int) -> Tensor:
        return self.last(self.memory(rows[None], chunk=128, **memory)[0])[0, :, 0]


def error(found: Tensor, s: Signal) -> Tensor:
    return (found - s.ahead)[s.counts].square().mean()


def learn(model: Forecaster, s: Signal, rounds: int) -> list[float]:
    """Adam, with a rate that fades."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    fading = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, rounds)
    errors = []
    for _ in range(rounds):
        loss = error(model(s.rows, slots=4), s)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        fading.step()
        errors.append(float(loss.detach().sqrt()))
    return errors


def linear(train: Signal, test: Signal) -> Tensor:
    """The best linear forecast from the last rows, a constant included."""

    def history(s: Signal) -> Tensor:
        padded = torch.cat((s.rows.new_zeros(LAGS - 1, 4), s.rows))
        rows = torch.cat([padded[k : k + len(s.rows)] for k in range(LAGS)], 1)
        return torch.cat((rows, torch.ones(len(rows), 1, dtype=rows.dtype)), 1)

    weights = torch.linalg.lstsq(history(train)[train.counts], train.ahead[train.counts, None], driver="gelsd").solution
    return (history(test) @ weights)[:, 0]


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    torch.manual_seed(0)
    train, test = signal(512, seed=0), signal(20_000, seed=1)
    model = Forecaster().double()
    errors = learn(model, train, 150)
    with torch.no_grad():
        found = model(test.rows)
    filtered = linear(signal(20_000, seed=2), test)
    of_model, of_filter = (float(error(x, test).sqrt()) for x in (found, filtered))
    results = {
        "error, of the linear filter's": Recovered(of_model / of_filter, 0.85, 0.1),
        "error, of the noise": Recovered(of_model / NOISE, 2.4, 0.4),
    }
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    draw_forecasts(left, test, found, filtered)
    right.semilogy(errors, color=BLUE, label="while it learns")
    for value, colour, label in (
        (of_model, BLUE, "on 20,000 new rows"),
        (of_filter, GREY, "linear"),
        (NOISE, ORANGE, "noise"),
    ):
        right.axhline(value, color=colour, linestyle="--", label=label)
    right.legend(frameon=False, fontsize=8)
    tidy(right, "Error of the forecast", "round", "root of the mean square")
    save(figure, out, "forecast")
    return confirm(results)


def draw_forecasts(axes: Axes, s: Signal, found: Tensor, filtered: Tensor) -> None:
    shown = slice(400, 640)
    t = np.arange(401, 641)
    axes.plot(t, s.ahead[shown], ".", color="0.6", markersize=3, label="what came")
    axes.plot(t, filtered[shown], color=GREY, linewidth=0.8, label="linear, of 40 rows")
    axes.plot(t, found[shown], color=BLUE, label="selective")
    for k in np.flatnonzero(s.rows[shown, 1].numpy()):
        axes.axvline(t[k] - 1, color=ORANGE, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    tidy(axes, "One row ahead; the size is told at the orange lines", "row", "signal")


if __name__ == "__main__":
    command_line(main)
