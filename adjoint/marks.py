"""Is a recorded step the step that was computed? A few of the first sweep's states, or sums of them, are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from adjoint.tensors import State, differentiable

SMALL = 1024
"""Leaves up to so many bytes are kept whole; of others two sums are, so that the notes take no memory to speak of."""


class Marks:
    """Notes of the states at a few steps: all of the first 16, and 8 or more between a power of two and the next.

    The same step gives the same bits, unless kernels are not deterministic: half the digits are compared.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self.notes: dict[int, list[Tensor]] = {}

    def note(self, step: int, state: State) -> None:
        """Remember the state at this step, if it is one of the few."""
        if step & ((1 << max(0, step.bit_length() - 4)) - 1) == 0:
            self.notes[step] = [_note(x) for x in state]

    def compare(self, step: int, state: State) -> None:
        """RuntimeError if the state at this step was another when it was noted."""
        noted = self.notes.get(step)
        if noted is not None and not all(agree(old, _note(x)) for old, x in zip(noted, state, strict=True)):
            raise RuntimeError(
                f"{self._label} gives other values when it is called again (step {step - 1} was computed again); the "
                f"gradient would be wrong. It must depend on nothing but its arguments and tensors that stay as they are: "
                f"no counters, no memory of earlier calls"
            )


def _note(x: Tensor) -> Tensor:
    """The leaf itself if it is small; else the sum of its sizes, and a sum in which places count."""
    x = x.detach()
    if x.numel() * x.element_size() <= SMALL:
        return x.clone()
    sizes = torch.nan_to_num((x.abs() if differentiable(x) else x).double(), posinf=0.0).reshape(-1)
    return torch.stack((sizes.sum(), sizes[::2].sum()))


def agree(old: Tensor, new: Tensor) -> bool:
    """Whether half the digits are the same."""
    if old.is_meta or not old.numel() or torch.equal(old, new):
        return True
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = (torch.nan_to_num(x.to(wide), nan=0.0, posinf=0.0, neginf=0.0) for x in (old, new))
    return bool((b - a).abs().max() <= 1e-4 * torch.maximum(a.abs().max(), b.abs().max()))
