"""Fewer bits: how wrong a gradient gets when its kept states are compressed.

A drop spreads on a pond with a shallow shore, u'' = div(c^2 grad u) on 64 x 64 cells, and the gradient of the energy at
the end by the squared speed c^2 of every cell is wanted. Twelve of 200 states lie in a file: as they are, cast to a
lower precision, or compressed by zfp (``pip install '.[zfp]'``). For each, the error of the gradient is measured
against the bytes of the file. Lossless compression changes no bit. float32 leaves an error of 2e-8 for half the bytes,
zfp, which knows that neighbours are alike, one of 1e-10 or less; for a quarter it is 1e-4 against 1e-6.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint
from adjoint import Device, Files
from revolve import Cast, Multistage
from revolve.zfp import Zfp

SLOTS = 12
CASTS = [Cast("float32"), Cast("bfloat16"), Cast("float16")]
RATES = [Zfp(rate=rate) for rate in (4, 8, 12, 16, 20, 24, 28, 32)]
TOLERANCES = [Zfp(tolerance=10.0**-digits) for digits in range(2, 14, 2)]


def pond(cells: int) -> tuple[Tensor, Tensor]:
    """The squared speed in every cell, and the surface and its velocity at the start: (cells, cells), (2, cells, cells)."""
    x = torch.linspace(0, 1, cells, dtype=torch.float64)
    depth = 0.2 + 0.8 * torch.sigmoid(12 * (x[None, :] - 0.35)) * torch.ones_like(x)[:, None]
    drop = torch.exp(-((x[:, None] - 0.5) ** 2 + (x[None, :] - 0.65) ** 2) / 0.005)
    return depth, torch.stack((drop, torch.zeros_like(drop)))


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    cells, steps = (32, 100) if quick else (64, 200)
    depth, start = pond(cells)
    speed = depth.requires_grad_()

    def waves(t: Tensor, y: Tensor) -> Tensor:
        u, velocity = y
        along, across = (0.5 * (speed + speed.roll(-1, i)) * (u.roll(-1, i) - u) for i in (0, 1))
        return torch.stack((velocity, (along - along.roll(1, 0) + across - across.roll(1, 1)) * 4))

    def solve(codec: Any) -> adjoint.Solution:
        tiers = [Device(), Files(folder=folder, codec=codec)]
        schedule = Multistage(memory=0, disk=SLOTS)
        return adjoint.solve(waves, start, [0.0, 0.15 * steps], method="rk4", dt=0.15, schedule=schedule, tiers=tiers)

    def misfit(solution: adjoint.Solution) -> Tensor:
        return solution.ys[-1, 0].square().sum()

    with tempfile.TemporaryDirectory() as folder:
        rows = adjoint.check.lossy(solve, misfit, [speed], [Zfp(), *CASTS, *RATES, *TOLERANCES])
    found = {row.codec: row for row in rows}
    exact, single = found[None], found[CASTS[0]]
    print_table(rows)
    results = {
        "error of lossless zfp": Recovered(found[Zfp()].error, 0, 0),
        "bytes of float32 / exact": Recovered(single.bytes / exact.bytes, 0.5, 0.01),
        "digits lost by float32": Recovered(16 + math.log10(single.error), 8.5, 1.5),
        "digits that 8 more bits of zfp bring": Recovered(
            math.log10(found[RATES[3]].error / found[RATES[5]].error), math.log10(2**8), 1
        ),
    }
    save(picture(rows, exact.bytes), out, "fewer_bits")
    return confirm(results)


def print_table(rows: list[adjoint.check.Lossy]) -> None:
    print(f"{'kept as':24} {'bytes':>10} {'of exact':>9} {'error of the gradient':>22}")
    for row in rows:
        share = row.bytes / rows[0].bytes
        print(f"{row.codec!s:24} {row.bytes:10,} {share:9.1%} {row.error:22.1e}".replace("None  ", "exact "))


def picture(rows: list[adjoint.check.Lossy], exact: int) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    groups = {
        "zfp, bits for each number": (RATES, BLUE, "o-"),
        "zfp, largest error of a state": (TOLERANCES, GREEN, "s-"),
        "cast": (CASTS, ORANGE, "D"),
    }
    found = {row.codec: row for row in rows}
    for label, (codecs, color, style) in groups.items():
        places = [(found[codec].bytes / exact, found[codec].error) for codec in codecs]
        axes.plot(*zip(*places, strict=True), style, color=color, label=label, markersize=5)
    for codec in CASTS:
        axes.annotate(
            codec.precision, (found[codec].bytes / exact, found[codec].error), (7, 3), textcoords="offset points"
        )
    lossless = found[Zfp()].bytes / exact
    axes.axvline(lossless, color=GREY, linestyle=":", linewidth=1)
    axes.text(
        lossless - 0.01,
        0.05,
        f"zfp, lossless: {lossless:.0%}",
        transform=axes.get_xaxis_transform(),
        rotation=90,
        ha="right",
    )
    axes.set_yscale("log")
    axes.legend(frameon=False)
    tidy(
        axes,
        "What compressed states do to a gradient",
        "bytes of the file / bytes of the states",
        "error of the gradient",
    )
    return figure


if __name__ == "__main__":
    command_line(main)
