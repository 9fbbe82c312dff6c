"""FitzHugh and Nagumo's nerve: four constants from the voltage alone.

    dv/dt = v - v^3 / 3 - w + current,      dw/dt = (v + a - b w) / slowness

is the simplest nerve that fires: the voltage v jumps, the recovery w follows slowly (FitzHugh 1961, Biophysical
Journal 1, 445). Only v is seen, 80 times, through noise of a twentieth of its swing. The constants a, b, the slowness
and the current are recovered by Gauss and Newton's method, and with them the recovery variable that nobody measured,
and its nullcline.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _fitting import least_squares
from _workbench import BLUE, GREEN, GREY, ORANGE, PINK, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

NAMES = ("a", "b", "slowness", "current")
TRUTH = torch.tensor([0.7, 0.8, 12.5, 0.5], dtype=torch.float64)
START = torch.tensor([0.5, 0.6, 9.0, 0.6], dtype=torch.float64)


def nerve(parameters: Tensor, t: Tensor) -> Tensor:
    """Voltage and recovery at the times t, (times, copies, 2), for parameters of shape (copies, 4)."""
    a, b, slowness, current = parameters.T

    def change(t: Tensor, y: Tensor) -> Tensor:
        v, w = y.T
        return torch.stack((v - v * v * v / 3 - w + current, (v + a - b * w) / slowness), 1)

    first = torch.tensor([-1.0, -0.5], dtype=torch.float64).expand(len(parameters), 2)
    return adjoint.solve(change, first, t, method="tsit5", rtol=1e-5).ys


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    t = torch.linspace(0, 100, 81, dtype=torch.float64)
    noise = 0.2 * torch.randn(81, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = nerve(TRUTH[None], t)[:, 0, 0] + noise

    def residuals(parameters: Tensor, length: int) -> Tensor:
        return (nerve(parameters, t[:length])[..., 0] - seen[:length, None]).T

    found = START
    for length in (33, 81):  # one pulse first: later ones only then fall into step
        fit = least_squares(lambda p, n=length: residuals(p, n), found, xtol=1e-3 if quick else 1e-6)
        found = torch.tensor(fit.x)
    results = {
        name: Recovered(value, true, 0.1 * true)
        for name, value, true in zip(NAMES, found.tolist(), TRUTH.tolist(), strict=True)
    }
    fine = torch.linspace(0, 100, 801, dtype=torch.float64)
    runs = nerve(torch.stack((TRUTH, found, START)), fine)
    hidden = (runs[:, 1, 1] - runs[:, 0, 1]).square().mean().sqrt() / runs[:, 0, 1].std()
    results["recovery variable, relative error"] = Recovered(float(hidden), 0, 0.1)
    save(picture(t, seen, fine, runs, found), out, "fitzhugh_nagumo")
    return confirm(results)


def picture(t: Tensor, seen: Tensor, fine: Tensor, runs: Tensor, found: Tensor) -> Figure:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    left.plot(t, seen, "o", color=GREY, markersize=3.5, label="v, seen")
    left.plot(fine, runs[:, 2, 0], ":", color=GREY, linewidth=1, label="v, first guess")
    for k, (name, color) in enumerate((("v", BLUE), ("w", ORANGE))):
        left.plot(fine, runs[:, 0, k], color=color, alpha=0.3, linewidth=5, label=f"{name}, true")
        left.plot(fine, runs[:, 1, k], color=color, linewidth=1.2, label=f"{name}, recovered")
    left.set_ylim(-3, 3.9)
    left.legend(frameon=False, ncols=3, loc="upper center")
    tidy(left, "Voltage v (seen) and recovery w (not seen)", "time", "v, w")
    v = torch.linspace(-2.3, 2.3, 400, dtype=torch.float64)
    right.plot(runs[:, 0, 0], runs[:, 0, 1], color=BLUE, alpha=0.3, linewidth=5, label="true orbit")
    right.plot(runs[:, 1, 0], runs[:, 1, 1], color=BLUE, linewidth=1.2, label="recovered orbit")
    for p, style in ((TRUTH, {"alpha": 0.3, "linewidth": 5}), (found, {"linewidth": 1.2})):
        for w, color, name in ((v - v**3 / 3 + p[3], GREEN, "dv/dt = 0"), ((v + p[0]) / p[1], PINK, "dw/dt = 0")):
            shown = (w > -1) & (w < 1.9)
            right.plot(v[shown], w[shown], color=color, **style, label=name if p is found else None)
    right.set_ylim(-1.1, 2.6)
    right.legend(frameon=False, ncols=2, loc="upper center")
    tidy(right, "Phase plane: true (broad) and recovered (thin)", "v", "w")
    return figure


if __name__ == "__main__":
    command_line(main)
