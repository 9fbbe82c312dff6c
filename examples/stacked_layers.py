"""Stacked layers: a grid of time x depth is reversed tile by tile, and the best tile is a matter of arithmetic.

Eight selective layers stand on top of each other. A strip of steps through all layers is reversed in groups of layers, so
that the tape of one tile, so many steps of so many layers, is all that is held beside the starts of strips and the
activations between groups. `revolve.Grid` prices every tile from the bytes of a state, an activation and the tape of one
cell, which are weighed here; its best one is marked. Run with different tiles, the gradient is the same: bit for bit
between groupings of layers, to rounding between lengths of strips. Rows that the layers computed are counted, and are
those of the plan.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from adjoint.state_space import Selective, Stack
from revolve import Grid, Tile, format_bytes

LAYERS, FEATURES, STATES, STEPS = 8, 16, 8, 16_384


class Counting(Selective):
    """A selective model that counts its rows."""

    rows_run = 0

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        Counting.rows_run += len(u)
        return super().coefficients(u)


def weighed() -> Grid:
    """The grid, with the bytes that autograd keeps for one cell: of its own tensors, not of parameters."""
    model, rows, kept = Selective(FEATURES, STATES).double(), 256, {}
    norm = nn.LayerNorm(FEATURES).double()
    own = {p.data_ptr() for p in (*model.parameters(), *norm.parameters())}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    u = torch.randn(rows, 1, FEATURES, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _, y = model.rows(model.start(1), norm(u))
        y = u + nn.functional.gelu(y)
    tape = sum(size for size, _ in kept.values()) // rows
    return Grid(STEPS, LAYERS, FEATURES * STATES * 8, FEATURES * 8, tape)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    torch.manual_seed(0)
    grid = weighed()
    best, in_room = grid.best(), grid.best("4 MiB")
    length = 256 if quick else 2048
    model = Stack(Counting(FEATURES, STATES) for _ in range(LAYERS)).double()
    u = torch.randn(1, length, FEATURES, dtype=torch.float64)

    def gradient(tile: Tile) -> tuple[Tensor, int]:
        """Of the parameters, and the rows that the reverse sweep computed."""
        y, _ = model(u, chunk=tile.steps, layers=tile.layers, slots=length)
        Counting.rows_run = 0
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        return torch.cat([x.flatten() for x in found]), Counting.rows_run

    small = Grid(length, LAYERS, grid.state_bytes, grid.activation_bytes, grid.tape_bytes)
    whole, _ = gradient(Tile(64, LAYERS))
    results: Results = {}
    for tile in (Tile(64, 1), Tile(64, 3), Tile(100, 2)):
        found, counted = gradient(tile)
        off = float((found - whole).abs().max() / whole.abs().max())
        name = f"{tile.steps} x {tile.layers}"
        results[f"gradient off by, {name}"] = Recovered(off, 0.0, 0.0 if tile.steps == 64 else 1e-12)
        first = length * LAYERS  # cells of the sweep before
        results[f"rows computed again, {name}"] = Recovered(counted, small.runs(tile) - first, 0)
    least = min(grid.bytes(Tile(int(m), e)) for m in range(1, 1000) for e in range(1, LAYERS + 1))
    results["bytes of the best tile, by trying all"] = Recovered(grid.bytes(best), least, 0)

    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_map(figure, left, grid, best)
    draw_runs(right, grid, best, in_room)
    save(figure, out, "stacked_layers")
    return confirm(results)


def sizes() -> np.ndarray:
    return np.unique(np.logspace(0.5, 4, 60).astype(int))


def draw_map(figure: Figure, axes: Axes, grid: Grid, best: Tile) -> None:
    layers = range(1, LAYERS + 1)
    bytes_of = np.array([[grid.bytes(Tile(int(m), e)) for m in sizes()] for e in layers])
    image = axes.pcolormesh(sizes(), np.arange(0.5, LAYERS + 1), np.log10(bytes_of / 2**20)[:, :-1], cmap="cividis")
    figure.colorbar(image, ax=axes, label="log10 of MiB held")
    axes.set_xscale("log")
    axes.plot(*best, "*", color=ORANGE, markersize=16)
    tidy(axes, f"Best: {best.steps} steps x {best.layers} layers, {format_bytes(grid.bytes(best))}", "steps", "layers")
    axes.grid(False)


def draw_runs(axes: Axes, grid: Grid, best: Tile, in_room: Tile) -> None:
    """Memory against recomputation, of all tiles."""
    cells = grid.steps * grid.layers
    for e, colour in ((1, BLUE), (2, GREY), (LAYERS, "0.75")):
        tiles = [Tile(int(m), e) for m in sizes()]
        runs = [grid.runs(tile) / cells for tile in tiles]
        axes.plot(
            [grid.bytes(tile) / 2**20 for tile in tiles], runs, ".", color=colour, label=f"{e} of {LAYERS} layers"
        )
    for tile, marker, label in ((best, "*", "least memory"), (in_room, "P", "fewest runs in 4 MiB")):
        axes.plot(grid.bytes(tile) / 2**20, grid.runs(tile) / cells, marker, color=ORANGE, markersize=12, label=label)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, f"What {grid.steps} steps of {LAYERS} layers cost", "MiB held", "runs of a cell")


if __name__ == "__main__":
    command_line(main)
