"""States as single vectors, as linear algebra wants them: all numbers of all leaves in a row, complex ones as pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.steppers.control import Tolerance
from adjoint.tensors import State

LEAST = 1e-4
"""Rounding of a number is measured against its own size, and at least against this part of the largest one's."""


class Vectors:
    """(n,), or (members, n) where the first dimension of every leaf counts members."""

    def __init__(self, like: State, members: bool) -> None:
        kinds = {x.real.dtype for x in like}
        if len(kinds) > 1:
            raise TypeError(f"y0 has leaves of {', '.join(map(str, kinds))}; an implicit method needs one precision")
        if members and any(x.ndim == 0 or len(x) != len(like[0]) for x in like):
            shapes = ", ".join(str(tuple(x.shape)) for x in like)
            raise ValueError(
                f"y0 has leaves of shape {shapes}; with members=True the first dimension of each counts them"
            )
        self._like = [(x.shape, x.is_complex()) for x in like]
        self._lead = like[0].shape[:1] if members else ()
        self._plain = len(like) == 1 and like[0].ndim == 1 + members and not like[0].is_complex()
        counts = [(2 if x.is_complex() else 1) * x[0].numel() if members else _count(x) for x in like]
        self._counts = counts
        self._zeros = torch.zeros((*self._lead, sum(counts)), dtype=like[0].real.dtype, device=like[0].device)
        self._root = max(sum(counts), 1) ** 0.5
        self.size = sum(counts)
        """n"""

    def zeros(self) -> Tensor:
        return self._zeros

    def pack(self, leaves: State) -> Tensor:
        if self._plain:
            return leaves[0]
        real = [torch.stack((x.real, x.imag), -1) if x.is_complex() else x for x in leaves]
        flat = [x.reshape(*self._lead, -1) for x in real]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def unpack(self, vector: Tensor) -> State:
        if self._plain:
            return (vector,)
        found = []
        for part, (shape, is_complex) in zip(vector.split(self._counts, -1), self._like, strict=True):
            x = part.reshape(*shape, 2) if is_complex else part.reshape(shape)
            found.append(torch.complex(*x.unbind(-1)) if is_complex else x)  # of numbers that may lie anywhere
        return tuple(found)

    def allowed(self, tolerance: Tolerance, state: State) -> Tensor:
        """By what a change of each number is multiplied to be measured by a tolerance."""
        state = tuple(x.detach() for x in state)
        scaled = tolerance.scaled(tuple(torch.ones_like(x) for x in state), state, state)
        return self.pack(
            tuple(torch.complex(s, s) if x.is_complex() else s for s, x in zip(scaled, state, strict=True))
        )

    def rounding(self, state: State) -> Tensor:
        """What rounding may do to each number of a state, in a few operations."""
        sizes = tuple(x.detach().abs() for x in state)
        return self.rounding_of(
            self.pack(tuple(torch.complex(s, s) if x.is_complex() else s for s, x in zip(sizes, state, strict=True)))
        )

    @staticmethod
    def rounding_of(size: Tensor) -> Tensor:
        """The same of numbers of these sizes."""
        kind = torch.finfo(size.dtype)
        return 16 * kind.eps * (size + LEAST * size.amax(-1, keepdim=True)) + kind.tiny

    def size_of(self, change: Tensor, scale: Tensor) -> float:
        """The root mean square of a scaled change of stages; of members, that of the one with the largest."""
        norms = torch.linalg.vector_norm(change * scale, dim=-1)
        return float(norms if norms.numel() == 1 else norms.max()) / self._root

    def sizes_of(self, change: Tensor, scale: Tensor) -> Tensor:
        """That of each member; the largest of its stages."""
        return torch.linalg.vector_norm(change * scale, dim=-1).amax(0) / self._root


def _count(x: Tensor) -> int:
    return (2 if x.is_complex() else 1) * x.numel()
