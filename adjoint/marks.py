"""Is a recorded step the step that was computed? A few of the first sweep's states and outputs, or some of
their numbers and sums of all, are compared."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NoReturn

import torch
from torch import Tensor

from adjoint.tensors import State, differentiable

SMALL = 1024
"""Leaves up to so many bytes are kept whole; of others a few times as many, so that the notes take no memory to speak of."""


class Marks:
    """Notes of the states at a few steps: all of the first 16, and 8 or more between a power of two and the next.

    The same step gives the same bits, unless kernels are not deterministic: half the digits are compared.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self.notes: dict[int, list[Tensor]] = {}
        self.shown: dict[int, list[Tensor]] = {}
        """The same of the outputs of a step, which what a caller looks at may change alone."""
        self._shows = 0

    def note(self, step: int, state: State) -> None:
        """Remember the state at this step, if it is one of the few."""
        if _few(step):
            self.notes[step] = _notes(state)

    def compare(self, step: int, state: State) -> None:
        """RuntimeError if the state at this step was another when it was noted."""
        noted = self.notes.get(step)
        if noted is not None and not all(map(agree, noted, _notes(state))):
            self._refuse(step)

    def note_shown(self, step: int, values: Sequence[Tensor]) -> None:
        """Remember what the caller sees of the step that ends here, if it is one of the few that show something."""
        if _few(self._shows):
            self.shown[step] = _notes(values)
        self._shows += 1

    def compare_shown(self, step: int, values: Sequence[Tensor]) -> None:
        """RuntimeError if the outputs of this step were others when they were noted."""
        noted = self.shown.get(step)
        if noted is not None and not all(map(agree, noted, _notes(values))):
            self._refuse(step)

    def _refuse(self, step: int) -> NoReturn:
        raise RuntimeError(
            f"{self._label} gives other values when it is called again (step {step - 1} was computed again); the "
            f"gradient would be wrong. It must depend on nothing but its arguments and tensors that stay as they are: "
            f"no counters, no memory of earlier calls"
        )


def _few(number: int) -> bool:
    return number & ((1 << max(0, number.bit_length() - 4)) - 1) == 0


def _notes(state: Sequence[Tensor]) -> list[Tensor]:
    return [part for x in state for part in _note(x.detach().reshape(-1))]


def _note(line: Tensor) -> tuple[Tensor, ...]:
    """The leaf itself if it is small; else some of its numbers, and sums (with a rest) in which each number counts."""
    count, size = line.numel(), line.numel() * line.element_size()
    if size <= SMALL:
        return (line.clone(),)
    width, stride = SMALL // line.element_size(), -(-size // SMALL)
    while gcd(stride, count) > 1:
        stride += 1
    wide = torch.promote_types(line.dtype, torch.float32) if differentiable(line) else None
    whole = count - count % width
    return line[::stride].clone(), line[:whole].view(-1, width).sum(0, dtype=wide), line[whole:].clone()


def agree(old: Tensor, new: Tensor) -> bool:
    """Whether half the digits are the same."""
    if old.is_meta or not old.numel() or torch.equal(old, new):
        return True
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = (torch.nan_to_num(x.to(wide), nan=0.0, posinf=0.0, neginf=0.0) for x in (old, new))
    return bool((b - a).abs().max() <= 1e-4 * torch.maximum(a.abs().max(), b.abs().max()))
