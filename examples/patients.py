"""Patients on a drip: one law of elimination for two hundred people with nothing else in common.

A drug is given in bags of an hour each and leaves the blood by an enzyme that can be busy (Michaelis and Menten),

    dA/dt = drip(t) - fastest weight^power C / (5 mg/l + C),      C = A / (volume weight).

Every patient has a weight, and bags and blood samples at times of his own, between four and eight samples. All are
solved in one batch, each with steps of its own that end where his bags do; the three constants that they share come from
all samples at once, each gradient from one reverse sweep. One patient's record is spoilt by a weight that is not a
number: his solve fails, and the others do not notice. The patients are made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from _fitting import minimise
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

NAMES = ("fastest, mg/h", "volume, l", "power of the weight")
TRUTH = torch.tensor([22.0, 52.0, 0.75], dtype=torch.float64)  # for 70 kg
START = torch.tensor([15.0, 40.0, 1.0], dtype=torch.float64)
HALF = 5.0  # mg/l, known from the test tube
NOISE = 0.1  # of the logarithm of a sample
BAGS, MOST = 3, 8


@dataclass(frozen=True)
class Patients:
    """Rows are patients; what a patient has fewer of than others is NaN at the end of his row."""

    weight: Tensor
    """In units of 70 kg."""
    edges: Tensor
    """When bags begin and end, in turn, in hours."""
    times: Tensor
    """0, and when blood was taken."""

    def solve(self, law: Tensor, times: Tensor) -> adjoint.Solution:
        """mg in the blood."""
        fastest, volume, power = law
        starts, stops = self.edges[:, ::2], self.edges[:, 1::2]

        def change(t: Tensor, amount: Tensor) -> Tensor:
            bags = ((t[:, None] > starts) & (t[:, None] < stops)).sum(1)
            level = amount / (volume * self.weight)
            return 380 * self.weight * bags - fastest * self.weight**power * level / (HALF + level)

        empty, how = torch.zeros_like(self.weight), {"rtol": 1e-5, "atol": 1e-5}
        return adjoint.solve(change, empty, times, batched=True, jumps=self.edges, throw=False, **how)

    def levels(self, law: Tensor, times: Tensor) -> Tensor:
        """mg/l, (times, patients)."""
        return self.solve(law, times).ys / (law[1] * self.weight)

    def only(self, rows: slice) -> Patients:
        return Patients(self.weight[rows], self.edges[rows], self.times[rows])


def admit(count: int) -> tuple[Patients, Tensor]:
    """Patients, and the logarithms of their samples."""
    draw = torch.Generator().manual_seed(8)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    weight = 0.7 + 0.6 * uniform(count)
    starts = (9 + 6 * uniform(count, BAGS)).cumsum(1) - 9
    edges = torch.stack((starts, starts + 1), 2).flatten(1)
    samples = (starts[:, :1] + 1.5 + 36 * uniform(count, MOST)).sort(1).values
    samples[torch.arange(MOST) >= 4 + (5 * uniform(count, 1)).floor()] = torch.nan
    patients = Patients(weight, edges, torch.cat((torch.zeros(count, 1).double(), samples), 1))
    levels = patients.levels(TRUTH, patients.times)[1:]
    return patients, levels.log() + NOISE * torch.randn(levels.shape, generator=draw, dtype=torch.float64)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    patients, seen = admit(60 if quick else 200)
    patients.weight[7] = torch.nan  # after the samples were taken
    known = torch.isfinite(seen) & torch.isfinite(patients.weight)

    def residuals(law: Tensor) -> Tensor:
        return (patients.levels(law, patients.times)[1:].log() - seen)[known] / NOISE

    def misfit(logarithms: Tensor) -> Tensor:
        """Samples are chosen before anything is computed from them: zero times the NaN of no sample would be NaN."""
        law = logarithms.exp()
        amounts = patients.solve(law, patients.times).ys[1:]
        levels = amounts[known] / (law[1] * patients.weight.expand_as(amounts)[known])
        return ((levels.log() - seen[known]) / NOISE).square().mean()

    law = torch.tensor(minimise(misfit, START.log(), iterations=20, tolerance=1e-8).x).exp()
    solved = patients.solve(law, patients.times)
    one = patients.only(slice(3, 4))
    apart = (solved.ys[:, 3] - one.solve(law, one.times).ys[:, 0]).abs().nan_to_num().max()
    results = {
        name: Recovered(float(value), float(truth), 0.05 * float(truth))
        for name, value, truth in zip(NAMES, law, TRUTH, strict=True)
    }
    results["mean square of a residual"] = Recovered(float(residuals(law).square().mean()), 1.0, 0.15)
    results["mg between patient 3 in the batch and alone"] = Recovered(float(apart), 0.0, 1e-6)
    results["patients that could not be solved"] = Recovered(float((~solved.stats.succeeded).sum()), 1.0, 0.0)

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    draw_patients(left, patients, law, seen)
    foretold = patients.levels(law, patients.times)[1:][known]
    middle.plot(foretold, foretold, color=GREY, linewidth=1)
    middle.plot(foretold, seen[known].exp(), ".", color=BLUE, markersize=3)
    tidy(middle, "Every sample", "by the fitted law, mg/l", "seen, mg/l")
    steps = solved.stats.steps[solved.stats.succeeded].numpy()
    right.hist(steps, bins=range(steps.min(), steps.max() + 2), color=GREEN, align="left")
    tidy(right, f"Each with own steps; {solved.stats.lockstep} of the batch", "steps of a patient", "patients")
    save(figure, out, "patients")
    return confirm(results)


def draw_patients(axes: Axes, patients: Patients, law: Tensor, seen: Tensor) -> None:
    """Four of them: samples, the fitted level, and when the bags hung."""
    hours = torch.linspace(0, 48, 241, dtype=torch.float64)
    levels = patients.only(slice(0, 4)).levels(law, hours)
    for i, colour in enumerate((BLUE, ORANGE, GREEN, GREY)):
        axes.plot(hours, levels[:, i], color=colour, linewidth=1)
        axes.plot(patients.times[i, 1:], seen[:, i].exp(), "o", color=colour, markersize=4)
        for begin, end in patients.edges[i].reshape(-1, 2).tolist():
            axes.plot([begin, end], [-0.5 - 0.35 * i] * 2, color=colour, linewidth=3)
    tidy(axes, "Four patients: bags, samples, fitted levels", "hour", "mg/l")


if __name__ == "__main__":
    command_line(main)
