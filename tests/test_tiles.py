"""Time x depth in tiles: every cell is reversed once and in order, and what is held is what was said."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits, leaf, loss_of

from adjoint import state_space
from adjoint.memory import Meter
from revolve import BudgetError, Grid, Tile

SIZES = [(1, 1), (1, 4), (5, 1), (4, 3), (7, 4)]
every_grid = pytest.mark.parametrize(("steps", "layers"), SIZES)


def carried_out(grid: Grid, tile: Tile) -> tuple[int, int]:
    """Runs of cells and the peak of bytes of a plan, by the rules: a cell needs the state beside and the activation below it.

    An edge of a state (k, d) is what cell (k, d) takes, one of an activation likewise. Edges at the borders are given.
    """
    states = {(0, d) for d in range(grid.layers)}
    activations = {(k, 0) for k in range(grid.steps)}
    starts = set(range(0, grid.steps, tile.steps))
    groups = set(range(0, grid.layers, tile.layers))
    tapes: set[tuple[int, int]] = set()
    undone = set(product(range(grid.steps), range(grid.layers)))
    runs = peak = 0
    for verb, start, stop, bottom, top in grid.sweeps(tile):
        cells = list(product(range(start, stop), range(bottom, top)))
        if verb == "reverse":
            for k, d in reversed(cells):
                tapes.remove((k, d))
                undone.remove((k, d))
                assert (k + 1, d) not in undone and (k, d + 1) not in undone
            activations -= {(k, bottom) for k in range(start, stop)} if bottom else set()
            if bottom == 0:
                states -= {(start, d) for d in range(grid.layers)} if start else set()
            continue
        assert all((start, d) in states for d in range(bottom, top))
        assert all((k, bottom) in activations for k in range(start, stop))
        runs += len(cells)
        if verb == "record":
            tapes |= set(cells)
        else:
            if start in starts and stop < grid.steps and bottom == 0 and top == grid.layers:
                states |= {(stop, d) for d in range(grid.layers)}
            if top in groups and top < grid.layers:
                activations |= {(k, top) for k in range(start, stop)}
        held = sum(k > 0 for k, _ in states) * grid.state_bytes
        held += sum(d > 0 for _, d in activations) * grid.activation_bytes
        peak = max(peak, held + len(tapes) * grid.tape_bytes)
    assert not undone and not tapes
    assert states == {(0, d) for d in range(grid.layers)} and activations == {(k, 0) for k in range(grid.steps)}
    return runs, peak


@every_grid
def test_a_plan_is_carried_out_by_the_rules_at_the_price_that_was_said(steps: int, layers: int) -> None:
    grid = Grid(steps, layers, state_bytes=7, activation_bytes=5, tape_bytes=11)
    for sizes in product(range(1, steps + 2), range(1, layers + 2)):
        tile = Tile(*sizes)
        assert carried_out(grid, tile) == (grid.runs(tile), grid.bytes(tile)), tile


@every_grid
@pytest.mark.parametrize("sizes", [(7, 5, 11), (100, 1, 1), (1, 100, 1), (1, 1, 100), (0, 0, 1)])
def test_the_best_tile_is_that_of_a_search_through_all(steps: int, layers: int, sizes: tuple[int, int, int]) -> None:
    grid = Grid(steps, layers, *sizes)
    tiles = [Tile(m, e) for m in range(1, steps + 1) for e in range(1, layers + 1)]
    least = min(map(grid.bytes, tiles))
    assert grid.bytes(grid.best()) == least
    for budget in {grid.bytes(tile) for tile in tiles}:
        found = grid.best(budget)
        assert grid.bytes(found) <= budget
        assert grid.runs(found) == min(grid.runs(tile) for tile in tiles if grid.bytes(tile) <= budget)
    if least:
        with pytest.raises(BudgetError, match="cells; give at least") as raised:
            grid.best(least - 1)
        assert raised.value.smallest == least


def test_a_wrong_grid_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="layers=0 is too small"):
        Grid(4, 0, 1, 1, 1)
    with pytest.raises(ValueError, match="steps=0 is too small"):
        Grid(4, 2, 1, 1, 1).bytes(Tile(0, 1))


CPU = torch.device("cpu")
LENGTH, DEPTH, FEATURES, STATES, BATCH = 96, 4, 16, 8, 2


def stack() -> tuple[state_space.Stack, torch.Tensor]:
    torch.manual_seed(0)
    models = (state_space.Selective(FEATURES, STATES) for _ in range(DEPTH))
    return state_space.Stack(models).double(), leaf(BATCH, LENGTH, FEATURES, seed=2, on=CPU)


def gradient(model: state_space.Stack, u: torch.Tensor, chunk: int, layers: int) -> list[torch.Tensor]:
    y, states = model(u, chunk=chunk, layers=layers, slots=LENGTH)
    return list(torch.autograd.grad(loss_of([y, states[-1]]), [u, *model.parameters()]))


def test_the_gradient_of_a_stack_does_not_depend_on_its_tiles() -> None:
    model, u = stack()
    whole = gradient(model, u, LENGTH, DEPTH)
    for chunk in (8, 40):
        found = [gradient(model, u, chunk, layers) for layers in (1, 3, DEPTH)]
        assert_close(found[0], whole)
        for other in found[1:]:
            assert_same_bits(other, found[0])


@pytest.mark.parametrize("how", [{"slots": 2, "random": True}, {"gradient": "backprop"}])
def test_what_tiles_draw_is_drawn_again(how: dict[str, Any]) -> None:
    """From torch's generator and from one of the caller's: a group that is run once more is the same group."""
    own = torch.Generator()

    def activation(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.3) * torch.rand(x.shape, generator=own, dtype=x.dtype)

    model, u = stack()
    model.activation = activation
    found = []
    for layers in (DEPTH, 3, 1):
        torch.manual_seed(3), own.manual_seed(4)
        y, _ = model(u, chunk=40, layers=layers, **how)
        drawn = torch.rand(3, dtype=torch.float64), torch.rand(3, generator=own, dtype=torch.float64)
        found.append([y.detach(), *drawn, *torch.autograd.grad(loss_of([y]), [u, *model.parameters()])])
    for other in found[1:]:
        assert_same_bits(other, found[0])


class Deep(state_space.Model):
    """A short memory, read through many operations: a tape that outweighs all else."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.leak = torch.nn.Parameter(torch.linspace(0.5, 0.9, features))

    def start(self, batch: int) -> torch.Tensor:
        return self.leak.new_zeros(batch, self.features)

    def coefficients(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.leak.expand(1, 1, -1), u

    def read(self, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        for _ in range(30):
            h = torch.tanh(h)
        return h


def test_memory_follows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tiles of many shapes add to the tensors of a reverse sweep, against what the plan says that they hold."""
    monkeypatch.setattr(sys.modules["adjoint.linear_scan"], "fastest_chunk", lambda *_: 1)
    torch.manual_seed(0)
    features, length, batch = 64, 120, 4
    model = state_space.Stack(Deep(features) for _ in range(DEPTH)).double()
    u = leaf(batch, length, features, seed=2, on=CPU)
    row = batch * features * 8

    def peak(tile: Tile) -> int:
        y, _ = model(u, chunk=tile.steps, layers=tile.layers, slots=length)
        torch.autograd.grad(y.square().sum(), u, retain_graph=True)  # from here on nothing is left of the first sweep
        with Meter() as meter:
            torch.autograd.grad(y.square().sum(), u)
        return meter.peak

    tiles = [Tile(*sizes) for sizes in product((12, 40), (1, 2, DEPTH))]
    grid = Grid(length, DEPTH, state_bytes=row, activation_bytes=row, tape_bytes=35 * row)
    measured = {tile: peak(tile) for tile in tiles}
    for tile, found in measured.items():
        beside = 2 * length * row + 10 * tile.steps * row  # u and its gradient, or y and its; an operation at work
        assert grid.bytes(tile) <= found <= grid.bytes(tile) + beside, tile
    assert min(tiles, key=lambda tile: measured[tile]) == min(tiles, key=grid.bytes)
