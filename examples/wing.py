"""A wing in the wind: how drag and lift answer to every point of its surface.

A NACA 0012 section flies at Reynolds number 500 through a gas of populations f, which move to the neighbouring cells
and collide (D2Q9 lattice Boltzmann, two relaxation times, product equilibrium). A cell that the wing covers in part
mixes the fluid's collision with the wall's (Noble & Torczynski 1998, Int. J. Mod. Phys. C 9, 1189), so drag and lift
are smooth functions of the angle of attack and of the surface. A rim brings the gas back to the wind and swallows
sound.

One reverse sweep of ``adjoint.scan`` gives the derivatives of drag by the angle and by the surface at 24 places, a
second one those of lift, with 40 states kept. They pass a Taylor test, agree with differences, and find the angle of a
wing of which only the lift is known. The tunnel is narrow, which costs drag; with ``--height 8`` it comes within a
tenth of that in open air.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

import adjoint
import revolve

WIND, REYNOLDS, RIM = 0.1, 500, 8  # cells a step; by the chord; cells
KNOTS, BETWEEN = 24, 4  # places where the surface can move, and points of the outline from one to the next
ANGLE, HIDDEN = 6.0, 7.5  # degrees: where the gradients are taken, and what is to be found
SLOTS = 40
PUBLISHED = 0.1762  # drag at 0 degrees in open air: Lockard, Luo, Milder & Singer 2002, J. Stat. Phys. 107, 423
DOUBLE = torch.float64


def shares(u: Tensor) -> Tensor:
    """How much of a gas with this mean velocity moves by -1, 0 and 1 cells along one axis, (3, ...)."""
    energy = u * u + 1 / 3
    return torch.stack(((energy - u) / 2, 1 - energy, (energy + u) / 2))


@dataclass(frozen=True)
class Tunnel:
    """A wind tunnel, ``height`` chords high and half as long again, in which the wind blows over ``passes`` chords."""

    chord: int = 36
    height: float = 2.5
    passes: float = 2.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return round(self.height * self.chord), round(1.5 * self.height * self.chord)

    @property
    def steps(self) -> int:
        return round(self.passes * self.chord / WIND)

    def cells(self) -> Tensor:
        """Where the cells are, in chords from the point around which the wing turns, (rows, columns, 2)."""
        rows, columns = (torch.arange(n, dtype=DOUBLE) for n in self.shape)
        x, y = columns - 0.4 * len(columns), rows - (len(rows) - 1) / 2
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) / self.chord

    def rim(self) -> Tensor:
        """The share of the wind that every step mixes into a cell: none inside, more towards the edges."""
        rows, columns = (torch.arange(n, dtype=DOUBLE) for n in self.shape)
        rows, columns = torch.minimum(rows, rows.flip(0)), torch.minimum(columns, columns.flip(0))
        inwards = torch.minimum(rows[:, None], columns)
        return 0.3 * ((RIM - inwards).clamp(min=0) / RIM) ** 2

    def covered(self, outline: Tensor) -> Tensor:
        """The share of each cell inside a closed line (points, 2), smeared over two cells."""
        share = (0.5 - self.chord * distance(self.cells(), outline) / 2).clamp(0, 1)
        return share**3 * (10 + share * (6 * share - 15))

    def blow(self, angle: Tensor, surface: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of drag and lift at every step, (steps, 2), and the last f, (3, 3, rows, columns)."""
        late = 3 * WIND * self.chord / REYNOLDS  # the relaxation time beyond a half, three times the viscosity
        even, odd = 1 / (0.5 + late), 1 / (0.5 + 0.25 / late)
        covered = self.covered(section(angle, surface))
        solid = covered * late / (1 - covered + late)
        none = shares(torch.zeros(1, 1, dtype=DOUBLE))
        rest, rim = none[:, None] * none, self.rim()

        def step(f: Tensor, wind: Tensor) -> tuple[Tensor, Tensor]:
            down, level, up = f.unbind(0)
            f = torch.stack((down.roll(-1, -2), level, up.roll(1, -2)))
            left, level, right = f.unbind(1)
            f = torch.stack((left.roll(-1, -1), level, right.roll(1, -1)), 1)
            (down, level, up), (left, _, right) = f.sum(1).unbind(0), f.sum(0).unbind(0)
            density, momentum = down + level + up, torch.stack((right - left, up - down))
            u, v = momentum / density
            missing = (density * shares(v))[:, None] * shares(u) - f  # in equilibrium
            mirrored = missing.flip(0, 1)
            fluid = f + (even + odd) / 2 * missing + (even - odd) / 2 * mirrored
            f = torch.lerp(fluid, density * rest - mirrored, solid)
            outside = none[:, None] * shares(wind.reshape(1, 1))
            return torch.lerp(f, outside.expand_as(f), rim), (solid * momentum).sum((1, 2))

        wind = torch.full((self.steps,), WIND, dtype=DOUBLE)
        first = (none[:, None] * shares(wind[0].reshape(1, 1))).expand(3, 3, *self.shape)
        f, lost = adjoint.scan(step, first, wind, slots=SLOTS)
        return lost * (2 / (WIND**2 * self.chord)), f

    def forces(self, angle: float | Tensor, surface: Tensor | None = None) -> Tensor:
        """Drag and lift, averaged over the last tenth of the steps."""
        surface = torch.zeros(KNOTS, dtype=DOUBLE) if surface is None else surface
        return self.blow(torch.as_tensor(angle, dtype=DOUBLE), surface)[0][-(self.steps // 10) :].mean(0)


def profile(count: int) -> tuple[Tensor, Tensor]:
    """Points of the section from its trailing edge over the top, and outward normals, (count, 2)."""
    turn = torch.arange(count, dtype=DOUBLE) * (2 * math.pi / count)
    x = (1 + torch.cos(turn)) / 2
    half = 0.6 * (0.2969 * x.sqrt() - 0.1260 * x - 0.3516 * x**2 + 0.2843 * x**3 - 0.1036 * x**4)
    points = torch.stack((x, torch.where(turn <= math.pi, half, -half)), 1)
    along = points.roll(-1, 0) - points.roll(1, 0)
    return points, torch.stack((along[:, 1], -along[:, 0]), 1) / along.norm(dim=1, keepdim=True)


def between(values: Tensor) -> Tensor:
    """Values at the knots, joined by straight lines around the outline."""
    share = torch.arange(BETWEEN, dtype=DOUBLE) / BETWEEN
    return (values[:, None] * (1 - share) + values.roll(-1)[:, None] * share).flatten()


def section(angle: Tensor, surface: Tensor) -> Tensor:
    """The outline at this angle (degrees) around a quarter of the chord, moved outwards by ``surface`` (chords)."""
    points, normals = profile(KNOTS * BETWEEN)
    x, y = (points + between(surface)[:, None] * normals).unbind(1)
    cosine, sine = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    return torch.stack((cosine * (x - 0.25) + sine * y, cosine * y - sine * (x - 0.25)), 1)


def distance(places: Tensor, outline: Tensor) -> Tensor:
    """How far places (..., 2) are from a closed line (points, 2), negative inside."""
    side, away = outline.roll(-1, 0) - outline, places[..., None, :] - outline
    along = ((away * side).sum(-1) / side.square().sum(-1)).clamp(0, 1)
    nearest = (away - along[..., None] * side).square().sum(-1).min(-1).values.sqrt()
    (x, y), (width, height) = away.detach().unbind(-1), side.detach().unbind(-1)
    crossed = ((y < 0) != (y < height)) & (x < y * width / height)
    return torch.where(crossed.sum(-1) % 2 == 1, -nearest, nearest)


class Sensitivity(NamedTuple):
    """A force, and its derivatives by the angle and by the surface at the knots."""

    value: float
    angle: Tensor
    surface: Tensor


def sensitivities(tunnel: Tunnel) -> list[Sensitivity]:
    """Those of drag and of lift at ANGLE: one sweep forwards, two back."""
    angle = torch.tensor(ANGLE, dtype=DOUBLE, requires_grad=True)
    surface = torch.zeros(KNOTS, dtype=DOUBLE, requires_grad=True)
    forces = tunnel.forces(angle, surface)
    found = [torch.autograd.grad(force, (angle, surface), retain_graph=True) for force in forces]
    return [Sensitivity(float(force.detach()), *pair) for force, pair in zip(forces, found, strict=True)]


class Remainders(NamedTuple):
    """|F(x + h v) - F(x)|, and the same less h F'(x) v, for drag and lift, (lengths, 2); differences at the least h."""

    lengths: Tensor
    plain: Tensor
    less_slope: Tensor
    off: Tensor


def taylor(tunnel: Tunnel, found: list[Sensitivity]) -> Remainders:
    """Along a turn by two degrees and a random change of the surface by a hundredth of the chord."""
    change = 0.002 * torch.randn(KNOTS, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    slopes = torch.stack([0.5 * force.angle + force.surface @ change for force in found])
    values = torch.tensor([force.value for force in found], dtype=DOUBLE)
    lengths = 0.25 ** torch.arange(4, dtype=DOUBLE)
    moved = torch.stack([tunnel.forces(ANGLE + 0.5 * h, h * change) for h in lengths])
    up, down = (tunnel.forces(ANGLE + 0.5 * h, h * change) for h in (1e-5, -1e-5))
    off = ((up - down) / 2e-5 - slopes) / slopes
    return Remainders(lengths, (moved - values).abs(), (moved - values - lengths[:, None] * slopes).abs(), off.abs())


class Search(NamedTuple):
    """Angles tried, and their lifts; the lift that was asked for."""

    angles: list[float]
    lifts: list[float]
    target: float


def found_by_lift(tunnel: Tunnel, lift: Sensitivity) -> Search:
    """The hidden wing's angle by its lift: Newton's step with the adjoint's slope, then two of the secant's."""
    search = Search([ANGLE], [lift.value], float(tunnel.forces(HIDDEN)[1]))
    slope = float(lift.angle)
    for _ in range(3):
        search.angles.append(search.angles[-1] + (search.target - search.lifts[-1]) / slope)
        search.lifts.append(float(tunnel.forces(search.angles[-1])[1]))
        slope = (search.lifts[-1] - search.lifts[-2]) / (search.angles[-1] - search.angles[-2])
    return search


def main(out: Path | str | None = None, quick: bool = False, chord: int = 36, height: float = 2.5) -> Results:
    tunnel = Tunnel(24, 2.0, 1.0) if quick else Tunnel(chord, height)
    level = tunnel.forces(0.0)
    found = sensitivities(tunnel)
    test = taylor(tunnel, found)
    search = found_by_lift(tunnel, found[1])
    orders = torch.log2(test.less_slope[:-1] / test.less_slope[1:]) / 2
    results = {
        "drag at 0 degrees, in open air": Recovered(float(level[0]), PUBLISHED, 0.1 if quick else 0.04),
        "lift at 0 degrees": Recovered(float(level[1]), 0, 1e-9),
        "drag, adjoint against differences": Recovered(float(test.off[0]), 0, 1e-6),
        "lift, adjoint against differences": Recovered(float(test.off[1]), 0, 1e-6),
        "drag, order of the Taylor remainder": Recovered(float(orders[-1, 0]), 2, 0.1),
        "lift, order of the Taylor remainder": Recovered(float(orders[-1, 1]), 2, 0.1),
        "angle found by its lift (degrees)": Recovered(search.angles[-1], HIDDEN, 0.01),
    }
    save(picture(tunnel, found, test, search), out, "wing")
    return confirm(results)


def picture(tunnel: Tunnel, found: list[Sensitivity], test: Remainders, search: Search) -> Figure:
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    places = [["flow", "flow", "drag"], ["found", "taylor", "lift"]]
    axes = figure.subplot_mosaic(places, width_ratios=[1, 1, 1.25], height_ratios=[1.15, 1])
    draw_flow(axes["flow"], tunnel)
    for name, force in zip(("drag", "lift"), found, strict=True):
        draw_sensitivity(axes[name], name, force)
    draw_search(axes["found"], search, found[1])
    draw_remainders(axes["taylor"], test)
    return figure


def draw_flow(axes: Axes, tunnel: Tunnel) -> None:
    angle = torch.tensor(ANGLE, dtype=DOUBLE)
    f = tunnel.blow(angle, torch.zeros(KNOTS, dtype=DOUBLE))[1]
    velocity = torch.stack((f[:, 2] - f[:, 0], f[2] - f[0])).sum(1) / f.sum((0, 1))
    velocity = velocity.numpy() / WIND
    x, y = tunnel.cells().permute(2, 0, 1).numpy()
    image = axes.pcolormesh(x, y, np.hypot(*velocity), cmap="viridis", vmin=0, shading="gouraud")
    axes.figure.colorbar(image, ax=axes, label="speed / wind", shrink=0.85, pad=0.01)
    lines = {"color": "white", "linewidth": 0.5, "arrowsize": 0.6, "density": 1.3}
    axes.streamplot(x[0], y[:, 0], *velocity, **lines)
    axes.fill(*section(angle, torch.zeros(KNOTS, dtype=DOUBLE)).T.numpy(), color="black", zorder=3)
    axes.set_aspect("equal")
    axes.set_xlim(-0.9, x.max())
    axes.set_ylim(-0.68, 0.68)
    runs = revolve.Binomial(SLOTS).price(tunnel.steps).runs / tunnel.steps
    title = f"Air after {tunnel.steps} steps. A gradient keeps {SLOTS} states and runs each step {runs:.1f} times"
    tidy(axes, title, "x / chord", "y / chord")
    axes.grid(False)


def draw_sensitivity(axes: Axes, name: str, force: Sensitivity) -> None:
    """Bars on the surface, as long as the force's derivative by a bulge there."""
    points, normals = profile(KNOTS * BETWEEN)
    bulge = between(force.surface) / 100
    tops = points + 0.2 * (bulge / bulge.abs().max()).abs()[:, None] * normals
    bars = torch.stack((points, points.roll(-1, 0), tops.roll(-1, 0), tops), 1)
    colours = np.where(bulge + bulge.roll(-1) > 0, ORANGE, BLUE).tolist()
    axes.add_collection(PolyCollection(list(bars.numpy()), facecolors=colours, edgecolors=colours, linewidths=0.4))
    axes.fill(*points.T.numpy(), color="0.2")
    for colour, effect in ((ORANGE, "more"), (BLUE, "less")):
        axes.fill([], [], color=colour, label=f"bulge here: {effect} {name}")
    axes.legend(frameon=False, loc="upper center", fontsize=9, ncols=2)
    axes.set_aspect("equal")
    axes.set_xlim(-0.2, 1.15)
    axes.set_ylim(-0.34, 0.4)
    longest = f"longest bar: {float(bulge.abs().max()):.2g} for a bulge of 1 % of the chord"
    axes.annotate(longest, (0.5, 0.02), xycoords="axes fraction", ha="center", fontsize=9, color=GREY)
    tidy(axes, f"{name.capitalize()}: {force.value:.3f}, and {float(force.angle):+.4f} for each degree", "", "")
    axes.set_axis_off()


def draw_search(axes: Axes, search: Search, lift: Sensitivity) -> None:
    axes.axhline(search.target, color=GREY, linewidth=0.8, linestyle="--", label="lift of the hidden wing")
    ends = np.array([ANGLE - 0.3, max(search.angles)])
    axes.plot(ends, lift.value + float(lift.angle) * (ends - ANGLE), color=BLUE, label="the adjoint's slope")
    axes.plot(search.angles, search.lifts, "o", color=BLUE, label="tried")
    axes.plot(HIDDEN, search.target, "x", color=ORANGE, markersize=12, markeredgewidth=2, label="hidden")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.margins(y=0.3)
    tidy(axes, f"The wing found by its lift: {search.angles[-1]:.3f} degrees", "angle of attack (degrees)", "lift")


def draw_remainders(axes: Axes, test: Remainders) -> None:
    for k, (name, colour) in enumerate((("drag", ORANGE), ("lift", BLUE))):
        axes.plot(test.lengths, test.plain[:, k], "o--", color=colour, markerfacecolor="none", label=f"{name}, change")
        axes.plot(test.lengths, test.less_slope[:, k], "o-", color=colour, label=f"{name}, less the slope")
    for order, y in ((1, test.plain), (2, test.less_slope)):
        axes.plot(test.lengths, 3 * y.max() * test.lengths**order, ":", color=GREY, linewidth=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    tidy(axes, "Taylor test: orders 1 and 2 (dotted)", "h: a turn and a random bulge", "remainder")


if __name__ == "__main__":
    command_line(main)
