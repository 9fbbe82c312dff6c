"""Where numbers lie: a state as one trajectory, or as tiles of trajectories side by side in the lanes of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FEWEST = 4
"""Members from which on a batch is laid out in lanes."""


def lanes_of(dtype: torch.dtype) -> int:
    """Trajectories in a tile: 64 bytes of each number."""
    return 64 // dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Leaves of these shapes as an array (tiles, numbers, width).

    ``dim``: which dimension of every leaf, -1 or 0, counts the members; None: all of it is one trajectory.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    dim: int | None = None

    @cached_property
    def members(self) -> int:
        return 1 if self.dim is None or not self.shapes else self.shapes[0][self.dim]

    @cached_property
    def width(self) -> int:
        return 1 if self.dim is None else lanes_of(self.dtype)

    @cached_property
    def numbers(self) -> int:
        """Of one member."""
        total = sum(torch.Size(shape).numel() for shape in self.shapes)
        return total // self.members

    def tiles(self, members: int) -> int:
        return -(-members // self.width)

    def packed(self, rows: Sequence[Tensor], members: int, *, zeros: bool = False) -> Tensor:
        """Leaves (rows, *shape) as (tiles, rows, numbers, width). The last tile is filled up with its last member, or
        with zeros."""
        count = len(rows[0]) if rows else 1
        if self.dim is None:
            if len(rows) == 1:
                return rows[0].detach().resolve_neg().reshape(1, count, -1, 1).contiguous()
            flat = [x.detach().reshape(count, -1) for x in rows]
            whole = torch.cat(flat, 1) if flat else torch.empty(count, 0, dtype=self.dtype)
            return whole.view(1, count, -1, 1)
        if not rows:
            return torch.empty(self.tiles(members), count, 0, self.width, dtype=self.dtype)
        flat = [self._ahead(x.detach()).reshape(count, members, -1) for x in rows]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat, 2)
        missing = self.tiles(members) * self.width - members
        if missing:
            more = whole[:, -1:].expand(-1, missing, -1)
            whole = torch.cat((whole, torch.zeros_like(more) if zeros else more), 1)
        return whole.view(count, -1, self.width, whole.shape[2]).permute(1, 0, 3, 2).contiguous()

    def unpacked(self, packed: Tensor) -> list[Tensor]:
        """Leaves (rows, *shape) from (tiles, rows, numbers, width)."""
        if not self.shapes:
            return []
        count = packed.shape[1]
        if self.dim is None and len(self.shapes) == 1:
            return [packed.view(count, *self.shapes[0])]
        sizes = [torch.Size(shape).numel() // self.members for shape in self.shapes]
        if self.dim is None:
            parts = packed.view(count, -1).split(sizes, 1)
            return [x.reshape(count, *shape) for x, shape in zip(parts, self.shapes, strict=True)]
        whole = packed.permute(1, 0, 3, 2).reshape(count, -1, packed.shape[2])[:, : self.members]
        leaves = []
        for x, shape in zip(whole.split(sizes, 2), self.shapes, strict=True):
            if self.dim == 0:
                leaves.append(x.reshape(count, *shape))
            else:
                leaves.append(x.reshape(count, self.members, *shape[:-1]).movedim(1, -1).contiguous())
        return leaves

    def _ahead(self, x: Tensor) -> Tensor:
        """The members' dimension right after that of the rows."""
        return x if self.dim == 0 else x.movedim(-1, 1)


def layouts_for(state: Sequence[Tensor]) -> list[Layout]:
    """As lanes over the first dimension or the last, or as one trajectory: in the order in which to try them."""
    shapes, dtype = tuple(tuple(x.shape) for x in state), state[0].dtype
    found = []
    for dim in (0, -1):
        sizes = {shape[dim] if shape else 0 for shape in shapes}
        if len(sizes) == 1 and min(sizes) >= FEWEST and all(len(shape) > (dim == -1) for shape in shapes):
            found.append(Layout(shapes, dtype, dim))
    return [*found, Layout(shapes, dtype)]
