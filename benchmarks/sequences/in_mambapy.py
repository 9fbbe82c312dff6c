"""mambapy: its parallel scan, (batch, length, channels, states), at the next power of two."""

from __future__ import annotations

import torch
from mambapy.pscan import pscan
from torch import Tensor

from benchmarks.sequences.in_torch import Gradient, gradient


def parallel(length: int) -> Gradient:
    def outputs(u: Tensor, w: Tensor, c: Tensor, v: Tensor, r: Tensor) -> Tensor:
        gate = torch.sigmoid(u[:, None] * w + c)
        return pscan(gate[None, :, None], ((1 - gate) * v * u[:, None])[None, :, None])[0, :, 0] @ r

    return gradient(length, outputs)
