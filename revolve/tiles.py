"""Stacked recurrences: a grid of steps x layers, reversed tile by tile.

Cell (k, d) takes the state of layer d from step k-1 and the activation of step k from layer d-1. A strip of ``steps``
steps through all layers is one link of a chain; its start, a state of each layer, is kept. To reverse a strip it is run
again, group of layers by group, and the activations between the groups are kept; then each tile, so many steps of so
many layers, is recorded and reversed, from the last group down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from revolve import binomial
from revolve.budget import BudgetError, parse_bytes


class Tile(NamedTuple):
    """How many steps and layers are recorded together."""

    steps: int
    layers: int


class Patch(NamedTuple):
    """Cells of the steps start .. stop-1 and the layers bottom .. top-1, and what is done with them."""

    verb: Literal["run", "record", "reverse"]
    start: int
    stop: int
    bottom: int
    top: int


@dataclass(frozen=True)
class Grid:
    """Steps x layers cells; bytes of a state, of an activation between two layers, and of the tape of one cell."""

    steps: int
    layers: int
    state_bytes: int
    activation_bytes: int
    tape_bytes: int

    def __post_init__(self) -> None:
        for name in ("steps", "layers"):
            binomial.whole(name, getattr(self, name), least=1)
        for name in ("state_bytes", "activation_bytes", "tape_bytes"):
            binomial.whole(name, getattr(self, name))

    def sweeps(self, tile: Tile) -> Iterator[Patch]:
        """All that is done, in order: the first sweep, and the reverse sweep."""
        tile = self._checked(tile)
        strips, groups = _cut(self.steps, tile.steps), _cut(self.layers, tile.layers)
        for start, stop in strips[:-1]:
            yield Patch("run", start, stop, 0, self.layers)
        for start, stop in reversed(strips):
            for bottom, top in groups[:-1]:
                yield Patch("run", start, stop, bottom, top)
            for bottom, top in reversed(groups):
                yield Patch("record", start, stop, bottom, top)
                yield Patch("reverse", start, stop, bottom, top)

    def bytes(self, tile: Tile) -> int:
        """The most that is held: the starts of strips (the first is given), activations between groups, one tape."""
        tile = self._checked(tile)
        return max(
            strip * self.layers * self.state_bytes
            + group * steps * self.activation_bytes
            + steps * layers * self.tape_bytes
            for strip, steps in _last_two(self.steps, tile.steps)
            for group, layers in _last_two(self.layers, tile.layers)
        )

    def runs(self, tile: Tile) -> int:
        """Cells run, recorded ones included; the grid has steps x layers."""
        tile = self._checked(tile)
        (_, last_strip), *_ = _last_two(self.steps, tile.steps)
        (_, last_group), *_ = _last_two(self.layers, tile.layers)
        again = (self.steps - last_strip) * self.layers + self.steps * (self.layers - last_group)
        return again + self.steps * self.layers

    def best(self, budget: int | str | None = None) -> Tile:
        """The tile of least memory; within a budget, the one of fewest runs, and of least memory among those."""
        tiles = [Tile(*sizes) for sizes in product(_sizes(self.steps), _sizes(self.layers))]
        least = min(tiles, key=lambda tile: (self.bytes(tile), self.runs(tile)))
        if budget is None:
            return least
        room = parse_bytes(budget, "budget")
        fitting = [tile for tile in tiles if self.bytes(tile) <= room]
        if not fitting:
            raise BudgetError(f"budget={budget!r} cannot reverse {self.steps} x {self.layers} cells", self.bytes(least))
        return min(fitting, key=lambda tile: (self.runs(tile), self.bytes(tile)))

    def _checked(self, tile: Tile) -> Tile:
        steps, layers = binomial.whole("steps", tile[0], least=1), binomial.whole("layers", tile[1], least=1)
        return Tile(min(steps, self.steps), min(layers, self.layers))


def _cut(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _last_two(count: int, size: int) -> list[tuple[int, int]]:
    """Number and size of the last piece, which may be smaller, and of the one before."""
    last = (count - 1) // size
    return [(last, count - last * size), *([(last - 1, size)] if last else [])]


def _sizes(count: int) -> list[int]:
    """The least size for each number of pieces: any other holds more and saves nothing."""
    return sorted({-(-count // pieces) for pieces in range(1, count + 1)})
