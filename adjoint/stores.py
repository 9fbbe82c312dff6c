"""Slots for states of torch tensors on their own device."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Slots:
    """A tier on the states' device: each slot is allocated once, on first use, and used again.

    ``load`` hands out the slot itself; steps never write to their state, and a slot is given back only when the
    working state has moved on.
    """

    def __init__(self, like: State) -> None:
        self._like = like
        self._free: list[State] = []
        self._used: dict[int, State] = {}
        self.peak = 0

    @property
    def leaves(self) -> int:
        return len(self._like)

    def save(self, step: int, state: State) -> None:
        for x, like in zip(state, self._like, strict=True):
            if x.shape != like.shape or x.dtype != like.dtype:
                raise ValueError(
                    f"the state at step {step} has shape {tuple(x.shape)} and {x.dtype}, "
                    f"the first one {tuple(like.shape)} and {like.dtype}"
                )
        slot = self._free.pop() if self._free else tuple(map(_empty, self._like))
        with torch.no_grad():
            for kept, x in zip(slot, state, strict=True):
                kept.copy_(x)
        self._used[step] = slot
        self.peak = max(self.peak, len(self._used))

    def load(self, step: int) -> State:
        return self._used[step]

    def drop(self, step: int) -> None:
        self._free.append(self._used.pop(step))

    def release(self) -> None:
        """Give the memory of unused slots back."""
        self._free.clear()


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
