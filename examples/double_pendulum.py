"""The double pendulum: masses and lengths from a film of its angles, and how far ahead they can tell.

Two rods and two bobs; with d = theta_1 - theta_2, mu = m_2 / m_1 and M = 1 + mu sin^2 d,

    l_1 M theta_1'' = mu (g sin theta_2 cos d - sin d (l_2 w_2^2 + l_1 w_1^2 cos d)) - (1 + mu) g sin theta_1
    l_2 M theta_2'' = (1 + mu) (l_1 w_1^2 sin d - g sin theta_2 + g sin theta_1 cos d) + mu l_2 w_2^2 sin d cos d.

A film of three seconds, twenty pictures a second, gives the angles to a hundredth of a radian. Both lengths, the
ratio of the masses and the first angular velocities are recovered. The motion is chaotic: what the film could not say
about them grows, and after some seconds the forecast is lost, however good the fit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _fitting import least_squares
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

GRAVITY, NOISE, RATE, FRAMES = 9.81, 0.01, 20, 60
NAMES = ("length 1 (m)", "length 2 (m)", "mass 2 / mass 1", "velocity 1 (1/s)", "velocity 2 (1/s)")
TRUTH = torch.tensor([1.0, 0.8, 0.6, 0.0, 1.0], dtype=torch.float64)
START = torch.tensor([0.9, 0.9, 0.8, 0.2, 0.7], dtype=torch.float64)
ANGLES = torch.tensor([2.0, 2.4], dtype=torch.float64)


def swing(parameters: Tensor, t: Tensor) -> Tensor:
    """Both angles and angular velocities at the times t, (times, copies, 4), for parameters (copies, 5)."""
    l1, l2, mu = parameters[:, :3].T

    def change(t: Tensor, y: Tensor) -> Tensor:
        angles, velocities = y[:, :2], y[:, 2:]
        s1, s2 = angles.sin().T
        d = angles[:, 0] - angles[:, 1]
        s, c = d.sin(), d.cos()
        q1, q2 = l1 * velocities[:, 0] ** 2, l2 * velocities[:, 1] ** 2
        m = 1 + mu * s * s
        first = mu * (GRAVITY * s2 * c - s * (q2 + q1 * c)) - (1 + mu) * GRAVITY * s1
        second = (1 + mu) * (q1 * s - GRAVITY * s2 + GRAVITY * s1 * c) + mu * q2 * s * c
        return torch.cat((velocities, torch.stack((first / (l1 * m), second / (l2 * m)), 1)), 1)

    first = torch.cat((ANGLES.expand(len(parameters), 2), parameters[:, 3:]), 1)
    return adjoint.solve(change, first, t, method="tsit5", rtol=1e-6).ys


def energy(parameters: Tensor, y: Tensor) -> Tensor:
    """Of one run, in joules for a first bob of 1 kg, (times,)."""
    l1, l2, mu = parameters[:3]
    a1, a2, w1, w2 = y.unbind(-1)
    motion = (1 + mu) / 2 * (l1 * w1) ** 2 + mu / 2 * (l2 * w2) ** 2 + mu * l1 * l2 * w1 * w2 * (a1 - a2).cos()
    return motion - (1 + mu) * GRAVITY * l1 * a1.cos() - mu * GRAVITY * l2 * a2.cos()


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    t = torch.arange(FRAMES + 1, dtype=torch.float64) / RATE
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(len(t), 2, generator=generator, dtype=torch.float64)
    seen = swing(TRUTH[None], t)[:, 0, :2] + noise

    def residuals(parameters: Tensor, length: int) -> Tensor:
        return (swing(parameters, t[:length])[..., :2] - seen[:length, None]).transpose(0, 1).flatten(1)

    found = START
    for length in (21, len(t)):  # a second of the film leads into the whole
        limits = ([0.1, 0.1, 0.05, -9, -9], [3, 3, 5, 9, 9])
        fit = least_squares(lambda p, n=length: residuals(p, n), found, bounds=limits, xtol=1e-3 if quick else 1e-5)
        found = torch.tensor(fit.x)
    results = {
        name: Recovered(value, true, 0.02)
        for name, value, true in zip(NAMES, found.tolist(), TRUTH.tolist(), strict=True)
    }
    later = torch.arange(481, dtype=torch.float64) / 60
    runs = swing(torch.stack((TRUTH, found, START)), later)
    off = (runs[:, 1, :2] - runs[:, 0, :2]).abs().amax(1)
    results["forecast 2 s after the film (rad)"] = Recovered(float(off[later == 5]), 0, 0.2)
    total = energy(TRUTH, runs[:, 0])
    results["energy, relative change in 8 s"] = Recovered(float((total[-1] - total[0]) / total[0].abs()), 0, 1e-4)
    save(picture(t, seen, later, runs, off, found), out, "double_pendulum")
    return confirm(results)


def second_bob(parameters: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in metres, (times,) each."""
    l1, l2 = parameters[:2]
    first, second = angles.T
    return l1 * first.sin() + l2 * second.sin(), -l1 * first.cos() - l2 * second.cos()


def picture(t: Tensor, seen: Tensor, later: Tensor, runs: Tensor, off: Tensor, found: Tensor) -> Figure:
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    left, grid = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    space = left.subplots()
    upper, lower = grid.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    film = later <= 3
    styles = (
        (0, TRUTH, {"color": ORANGE, "alpha": 0.4, "linewidth": 5, "label": "true"}),
        (2, START, {"color": GREY, "linestyle": ":", "label": "first guess"}),
        (1, found, {"color": BLUE, "linewidth": 1.2, "label": "recovered"}),
    )
    for k, parameters, style in styles:
        space.plot(*second_bob(parameters, runs[film, k, :2]), **style)
        upper.plot(later, runs[:, k, 1], **style)
    x, y = second_bob(TRUTH, ANGLES[None])
    elbow = TRUTH[0] * ANGLES[0].sin(), -TRUTH[0] * ANGLES[0].cos()
    space.plot([0, elbow[0], x[0]], [0, elbow[1], y[0]], "o-", color="black", markersize=7, label="start")
    space.set_aspect("equal")
    space.legend(frameon=False, ncols=2, loc="upper center")
    space.set_ylim(-2, 2.6)
    tidy(space, "Path of the second bob, during the film", "x (m)", "y (m)")
    upper.plot(t, seen[:, 1], ".", color="black", markersize=4, label="film")
    upper.legend(frameon=False, ncols=4, loc="lower left", fontsize=9)
    tidy(upper, "Second angle: three seconds of film (grey), then a forecast", "", "angle (rad)")
    lower.plot(later, off.clamp(min=1e-4), color=BLUE)
    lower.axhline(NOISE, color=GREY, linestyle=":", linewidth=1)
    lower.annotate(
        "noise of the film", (8, NOISE), (0, 4), textcoords="offset points", ha="right", color=GREY, fontsize=9
    )
    lower.set_yscale("log")
    tidy(lower, "The larger error of the two angles", "time (s)", "error (rad)")
    for axes in (upper, lower):
        axes.axvspan(0, 3, color="0.5", alpha=0.12, linewidth=0)
    lower.set_xlim(0, 8)
    return figure


if __name__ == "__main__":
    command_line(main)
