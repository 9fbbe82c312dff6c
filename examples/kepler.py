"""Kepler: a planet lost and found, as Ceres was in 1801.

Piazzi watched Ceres for 41 days before it was lost behind the sun; Gauss computed its orbit from these bearings, and
on the last day of the year it was found again within half a degree of where he had said (Teets & Whitehead 1999,
Mathematics Magazine 72, 83). Here the bearings are made up from today's elements of Ceres and a circular orbit of the
earth, with errors of 3 seconds of arc. Nothing but directions is known: the distance is in the earth's own motion.
From a circular orbit as first guess the six numbers of the orbit are fitted through

    r'' = -4 pi^2 r / |r|^3      (astronomical units and years)

and the planet is looked up on 31 December.
"""

from __future__ import annotations

from math import pi
from pathlib import Path

import numpy as np
import torch
from _fitting import least_squares
from _workbench import BLUE, GREY, ORANGE, SKY, YELLOW, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MultipleLocator
from torch import Tensor

import adjoint

SUN = 4 * pi**2
AXIS, ECCENTRICITY, INCLINATION = 2.767, 0.0785, 10.6
SECOND = pi / 180 / 3600
NIGHTS = torch.linspace(0, 41, 21, dtype=torch.float64) / 365.25
NEW_YEAR = 364 / 365.25


def orbit(first: Tensor, t: Tensor) -> Tensor:
    """Positions at the times t, (times, copies, 3), from positions and velocities (copies, 6) at t[0]."""

    def change(t: Tensor, y: Tensor) -> Tensor:
        r, v = y.split(3, -1)
        return torch.cat((v, -SUN * r / r.square().sum(-1, keepdim=True) ** 1.5), -1)

    return adjoint.solve(change, first, t, method="tsit5", rtol=1e-9, atol=1e-12).ys[..., :3]


def earth(t: Tensor) -> Tensor:
    """The earth's position, (times, 3); on 1 January it stands at 100.5 degrees."""
    angle = 2 * pi * t + 100.5 * pi / 180
    return torch.stack((angle.cos(), angle.sin(), torch.zeros_like(angle)), -1)


def bearings(positions: Tensor, t: Tensor) -> Tensor:
    """Ecliptic longitude and latitude as seen from the earth, (times, copies, 2), in radians."""
    x, y, z = (positions - earth(t)[:, None]).unbind(-1)
    return torch.stack((torch.atan2(y, x), torch.atan2(z, torch.hypot(x, y))), -1)


def from_elements() -> Tensor:
    """Position and velocity of Ceres on 1 January 1801, from its elements (angles in degrees)."""
    node, perihelion, anomaly, inclination = (x * pi / 180 for x in (80.3, 73.5, -77.0, INCLINATION))
    eccentric = torch.tensor(anomaly, dtype=torch.float64)
    for _ in range(20):
        eccentric = anomaly + ECCENTRICITY * eccentric.sin()
    flat = (1 - ECCENTRICITY**2) ** 0.5
    speed = SUN**0.5 * AXIS**-0.5 / (1 - ECCENTRICITY * eccentric.cos())
    nothing = torch.zeros_like(eccentric)
    place = AXIS * torch.stack((eccentric.cos() - ECCENTRICITY, flat * eccentric.sin(), nothing))
    motion = speed * torch.stack((-eccentric.sin(), flat * eccentric.cos(), nothing))
    turn = about("z", node) @ about("x", inclination) @ about("z", perihelion)
    return torch.cat((turn @ place, turn @ motion))


def about(axis: str, angle: float) -> Tensor:
    c, s = torch.cos(torch.tensor(angle)).item(), torch.sin(torch.tensor(angle)).item()
    rows = [[c, -s, 0], [s, c, 0], [0, 0, 1]] if axis == "z" else [[1, 0, 0], [0, c, -s], [0, s, c]]
    return torch.tensor(rows, dtype=torch.float64)


def elements(state: Tensor) -> tuple[float, float, float]:
    """Semi-major axis, eccentricity, and inclination in degrees."""
    r, v = state[:3], state[3:]
    spin = torch.linalg.cross(r, v)
    axis = 1 / (2 / r.norm() - v @ v / SUN)
    eccentricity = (torch.linalg.cross(v, spin) / SUN - r / r.norm()).norm()
    return float(axis), float(eccentricity), float(torch.rad2deg(torch.acos(spin[2] / spin.norm())))


def circular_guess(seen: Tensor, distance: float = 2.5) -> Tensor:
    """A circular orbit in the plane of the earth's, this far from the sun, under the first bearing."""
    here, longitude = earth(NIGHTS[:1])[0], seen[0, 0]
    sight = torch.stack((longitude.cos(), longitude.sin(), torch.zeros_like(longitude)))
    along = -(here @ sight) + ((here @ sight) ** 2 + distance**2 - here @ here).sqrt()
    place = here + along * sight
    across = torch.stack((-place[1], place[0], place[2])) / distance
    return torch.cat((place, across * (SUN / distance) ** 0.5))


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    truth = from_elements()
    generator = torch.Generator().manual_seed(0)
    seen = bearings(orbit(truth[None], NIGHTS), NIGHTS)[:, 0]
    seen = seen + 3 * SECOND * torch.randn(21, 2, generator=generator, dtype=torch.float64)

    def residuals(first: Tensor) -> Tensor:
        return ((bearings(orbit(first, NIGHTS), NIGHTS) - seen[:, None]) / SECOND).transpose(0, 1).flatten(1)

    guess = circular_guess(seen)
    fit = least_squares(residuals, guess)
    found = torch.tensor(fit.x)
    spread = torch.linalg.cholesky(9 * torch.linalg.inv(torch.tensor(fit.jac.T @ fit.jac)))  # residuals count seconds
    others = found + torch.randn(200, 6, generator=generator, dtype=torch.float64) @ spread.T
    axis, eccentricity, inclination = elements(found)
    year = torch.linspace(0, NEW_YEAR, 92, dtype=torch.float64)
    tracks = bearings(orbit(torch.cat((torch.stack((truth, found, guess)), others)), year), year)
    tracks = torch.tensor(np.unwrap(tracks, axis=0)).rad2deg()
    results = {
        "semi-major axis (au)": Recovered(axis, AXIS, 0.03),
        "eccentricity": Recovered(eccentricity, ECCENTRICITY, 0.01),
        "inclination (degrees)": Recovered(inclination, INCLINATION, 0.05),
        "off on 31 December (degrees)": Recovered(float((tracks[-1, 1] - tracks[-1, 0]).norm()), 0, 0.5),
    }
    figure = Figure(figsize=(14, 4.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.2, 1])
    draw_plane(left, truth, found, guess)
    draw_sky(middle, tracks, seen.rad2deg())
    draw_new_year(right, tracks[-1])
    save(figure, out, "kepler")
    return confirm(results)


def draw_plane(axes: Axes, truth: Tensor, found: Tensor, guess: Tensor) -> None:
    whole = torch.linspace(0, 4.7, 400, dtype=torch.float64)
    tracks = orbit(torch.stack((truth, found, guess)), whole)
    axes.plot(0, 0, "o", color=YELLOW, markersize=11, label="sun")
    axes.plot(*earth(whole[:90]).T[:2], color=SKY, linewidth=1, label="earth, first year")
    axes.plot(*tracks[:, 2].T[:2], ":", color=GREY, label="first guess")
    axes.plot(*tracks[:, 0].T[:2], color=ORANGE, alpha=0.4, linewidth=5, label="Ceres, true")
    axes.plot(*tracks[:, 1].T[:2], color=BLUE, linewidth=1.2, label="Ceres, recovered")
    for begin, end in zip(earth(NIGHTS[::5]), orbit(truth[None], NIGHTS)[::5, 0], strict=True):
        axes.plot(*torch.stack((begin, end)).T[:2], color=GREY, linewidth=0.6)
    axes.set_aspect("equal")
    axes.set_xlim(-3.4, 3.4)
    axes.set_ylim(-3.2, 4.8)
    axes.legend(frameon=False, ncols=2, loc="upper center", fontsize=9)
    tidy(axes, "From above: orbits and lines of sight", "x (au)", "y (au)")


def draw_sky(axes: Axes, tracks: Tensor, seen: Tensor) -> None:
    axes.plot(*tracks[:, 2].T, ":", color=GREY, label="first guess")
    axes.plot(*tracks[:, 0].T, color=ORANGE, alpha=0.4, linewidth=5, label="true")
    axes.plot(*tracks[:, 1].T, color=BLUE, linewidth=1.2, label="recovered")
    axes.plot(*seen.T, "o", color="black", markersize=3, label="bearings, 41 days")
    places = ((11, "11 February", (8, -4), "left"), (45, "July: behind the sun", (8, -10), "left"))
    for k, name, offset, side in (*places, (91, "31 December", (-8, -2), "right")):
        axes.annotate(name, tracks[k, 0], offset, textcoords="offset points", ha=side, fontsize=9)
        axes.plot(*tracks[k, 0], "o", color=ORANGE, markersize=5)
    axes.legend(frameon=False, loc="upper left")
    tidy(axes, "In the sky, January to December 1801", "ecliptic longitude (degrees)", "latitude (degrees)")


def draw_new_year(axes: Axes, places: Tensor) -> None:
    axes.plot(*places[3:].T, ".", color=BLUE, markersize=3, alpha=0.5, label="orbits as likely")
    axes.plot(*places[1], "o", color=BLUE, markersize=7, label="recovered")
    axes.plot(*places[0], "o", color=ORANGE, markersize=9, label="true")
    axes.add_patch(Circle(places[0].tolist(), 0.5, fill=False, color=GREY, linestyle="--", label="half a degree"))
    x, y = places[0].tolist()
    axes.set_xlim(x - 1.2, x + 0.8)
    axes.set_ylim(y - 0.9, y + 1.1)
    axes.set_aspect("equal")
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.yaxis.set_major_locator(MultipleLocator(0.5))
    axes.legend(frameon=False, ncols=2, loc="upper center", fontsize=9)
    tidy(axes, "Where to look on 31 December", "ecliptic longitude (degrees)", "latitude (degrees)")


if __name__ == "__main__":
    command_line(main)
