"""A spiking neuron: its threshold, membrane and adaptation from nothing but the times of its spikes.

A leaky integrate-and-fire neuron with an adaptation current w, driven by a current u(t) that everybody knows:

    tau v' = -v + u(t) - w,      tau_w w' = -w,      at v = threshold: v becomes 0, and w grows by b

Only the times of its spikes were seen, each off by a tenth of a millisecond. Every spike is an event: its time is a
function of all four numbers, with an exact derivative that goes through each reset to all later spikes; so the times
themselves are fitted, by least squares, with no surrogate in place of the spike. Without adaptation and with a constant
current, the interval between spikes is tau log(u / (u - threshold)): times and derivatives are held against that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from _fitting import least_squares_in_rows
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

NAMES = ("membrane, ms", "adaptation, ms", "threshold, mV", "growth of the adaptation, mV")
TRUTH = torch.tensor([20.0, 90.0, 15.0, 2.5], dtype=torch.float64)
START = torch.tensor([26.0, 60.0, 16.5, 1.5], dtype=torch.float64)
JITTER = 0.1
REST = torch.zeros(2, dtype=torch.float64)


def current(t: Tensor) -> Tensor:
    """mV; slow waves on a constant."""
    return 26 + 4 * torch.sin(0.05 * t) + 3 * torch.sin(0.021 * t + 1)


def fire(
    numbers: Tensor, u: Callable[[Tensor], Tensor], spikes: int, times: list[float], tolerance: float = 1e-5
) -> adjoint.Solution:
    """Voltage and adaptation at these times, up to so many spikes."""
    tau, tau_w, threshold, growth = numbers

    def change(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack(((-y[0] + u(t) - y[1]) / tau, -y[1] / tau_w))

    def reset(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((torch.zeros_like(y[0]), y[1] + growth))

    spike = adjoint.Event(lambda t, y: y[0] - threshold, reset, terminal=spikes, direction=1)
    return adjoint.solve(change, REST, times, events=[spike], rtol=tolerance, atol=tolerance, gradient="tangent")


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    spikes = 8 if quick else 16
    far = [0.0, 1e4]
    exact = fire(TRUTH, current, spikes, far).events[0].ts
    draw = torch.Generator().manual_seed(2)
    seen = exact + JITTER * torch.randn(exact.shape, generator=draw, dtype=torch.float64)

    def residuals(logarithms: Tensor) -> Tensor:
        return (fire(logarithms.exp() * START, current, spikes, far).events[0].ts - seen) / JITTER

    fit = least_squares_in_rows(residuals, torch.zeros(4, dtype=torch.float64), xtol=1e-6)
    found, jacobian = torch.tensor(fit.x), torch.tensor(fit.jac)
    spread = torch.linalg.inv(jacobian.T @ jacobian).diagonal().sqrt()
    numbers = found.exp() * START
    results = {
        name: Recovered(float(x), float(truth), 4 * float(s * x))
        for name, x, truth, s in zip(NAMES, numbers, TRUTH, spread, strict=True)
    }
    misfit = 2 * fit.cost / (spikes - 4)
    results["mean square of a residual"] = Recovered(misfit, 1.0, 4 * math.sqrt(2 / (spikes - 4)))
    alone = torch.tensor([20.0, 90.0, 15.0, 0.0], dtype=torch.float64).requires_grad_()
    last = fire(alone, lambda t: 26 + 0 * t, 5, far, 1e-10).events[0].ts[-1]
    formula = 5 * alone[0] * torch.log(26 / (26 - alone[2]))
    results["fifth spike under a constant current, ms"] = Recovered(last.item(), formula.item(), 1e-6)
    pair = (torch.autograd.grad(x, alone)[0][[0, 2]] for x in (last, formula))
    for name, a, b in zip(("membrane", "threshold"), *(x.tolist() for x in pair), strict=True):
        results[f"its derivative in the {name}"] = Recovered(a, b, 1e-6)

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.8, 1))
    end = float(seen[-1]) - 0.5
    times = torch.linspace(0, end, 300 if quick else 1200, dtype=torch.float64).tolist()
    for values, colour, label in ((START, GREY, "first guess"), (numbers, BLUE, "fitted")):
        with torch.no_grad():
            drawn = fire(values, current, 10**6, times)
        left.plot(drawn.ts, drawn.ys[:, 0], color=colour, linewidth=1, label=f"voltage, {label}")
    left.plot(drawn.ts, drawn.ys[:, 1], color=GREEN, linewidth=1, label="adaptation, never seen")
    left.plot(seen, torch.full_like(seen, 20.0), "|", color=ORANGE, markersize=12, label="spikes seen")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    tidy(left, "Fitted to the times of spikes alone", "ms", "mV")
    for column, (name, colour) in enumerate(zip(NAMES, (BLUE, GREEN, ORANGE, GREY), strict=True)):
        right.plot(range(1, spikes + 1), JITTER * jacobian[:, column], "o-", color=colour, markersize=3, label=name)
    right.legend(frameon=False, fontsize=8)
    tidy(right, "What each spike says of each number", "spike", "ms for one e-fold")
    save(figure, out, "spiking_neuron")
    return confirm(results)


if __name__ == "__main__":
    command_line(main)
