"""The repressilator: the rates of a gene network from its proteins alone.

Three genes in a ring, each protein shutting down the next gene, oscillate in living cells (Elowitz & Leibler 2000,
Nature 403, 335). With m the messenger RNAs and p the proteins, time in messenger lifetimes,

    dm_i/dt = -m_i + leak + promoter / (1 + p_{i-1}^n),      dp_i/dt = -decay (p_i - m_i),

where p is counted in the number that half shuts a gene. Only the proteins are seen, with 5 % noise. From 102 numbers
the four rates and the three first proteins come back (the leak, a thousandth of the promoter, only roughly), and with
them the messengers that nobody measured. Each Gauss-Newton step takes its Jacobian from one reverse sweep.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _fitting import least_squares
from _workbench import BLUE, GREEN, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

NAMES = ("promoter", "leak", "decay", "Hill coefficient")
TRUTH = torch.tensor([216.0, 0.216, 0.2, 2.0, 20.0, 40.0, 5.0], dtype=torch.float64)
START = torch.tensor([180.0, 0.3, 0.22, 1.9], dtype=torch.float64)  # the proteins start where they were first seen
NOISE = 0.05


def network(parameters: Tensor, t: Tensor) -> Tensor:
    """The six states at the times t, (times, copies, 6): messengers, proteins; from parameters of shape (copies, 7)."""
    promoter, leak, decay, hill = parameters[:, :4, None].unbind(1)
    first = torch.cat((torch.zeros_like(parameters[:, 4:]), parameters[:, 4:]), 1)

    def change(t: Tensor, y: Tensor) -> Tensor:
        messenger, protein = y[:, :3], y[:, 3:]
        made = leak + promoter / (1 + protein.roll(1, 1) ** hill)
        return torch.cat((made - messenger, decay * (messenger - protein)), 1)

    return adjoint.solve(change, first, t, method="tsit5", rtol=1e-5).ys


def fit(t: Tensor, seen: Tensor, start: Tensor, precision: float) -> Tensor:
    """The seven parameters that bring the logarithms of the proteins closest."""

    def residuals(logarithms: Tensor) -> Tensor:
        proteins = network(logarithms.exp(), t)[..., 3:]
        return (proteins.log() - seen.log()[:, None]).transpose(0, 1).flatten(1)

    return torch.tensor(least_squares(residuals, start.log(), xtol=precision).x).exp()


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    t = torch.linspace(0, 100, 34, dtype=torch.float64)
    noise = NOISE * torch.randn(34, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = network(TRUTH[None], t)[:, 0, 3:] * noise.exp()

    found = torch.cat((START, seen[0]))
    for length in (18, 34):  # from a rough start half the window is easier, and leads into the whole
        found = fit(t[:length], seen[:length], found, 1e-3 if quick else 1e-5)
    within = (0.08, 0.6, 0.03, 0.05)  # three standard errors, and hardly less of the leak would do as well
    results = {
        name: Recovered(value, truth, error * truth)
        for name, value, truth, error in zip(NAMES, found.tolist(), TRUTH.tolist(), within, strict=False)
    }
    fine = torch.linspace(0, 100, 401, dtype=torch.float64)
    runs = network(torch.stack((TRUTH, found)), fine)
    hidden = (runs[:, 1, :3] - runs[:, 0, :3]).square().mean().sqrt() / runs[:, 0, :3].square().mean().sqrt()
    results["messengers, relative error"] = Recovered(float(hidden), 0, 0.05)
    save(picture(t, seen, fine, runs, results), out, "repressilator")
    return confirm(results)


def picture(t: Tensor, seen: Tensor, fine: Tensor, runs: Tensor, results: Results) -> Figure:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for i, (gene, color) in enumerate((("lacI", BLUE), ("tetR", ORANGE), ("cI", GREEN))):
        upper.plot(t, seen[:, i], "o", color=color, markersize=4)
        upper.plot(fine, runs[:, 1, 3 + i], color=color, label=gene)
        lower.plot(fine, runs[:, 0, i], color=color, alpha=0.35, linewidth=4)
        lower.plot(fine, runs[:, 1, i], color=color, linewidth=1.2)
    numbers = ", ".join(f"{name} {results[name].value:.3g} ({results[name].truth:.3g})" for name in NAMES)
    tidy(upper, f"Proteins: seen (dots) and fitted. Recovered (true): {numbers}", "", "proteins / half-shutting number")
    tidy(
        lower, "Messenger RNA, never seen: true (broad) and inferred (thin)", "time (messenger lifetimes)", "messengers"
    )
    upper.legend(ncols=3, frameon=False, loc="upper right")
    upper.set_ylim(0, 1.25 * float(seen.max()))
    lower.set_ylim(0)
    lower.set_xlim(0, 100)
    return figure


if __name__ == "__main__":
    command_line(main)
