"""Kept states made smaller: a lower precision. What is lost shows in the gradient, so it is never done unasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cast:
    """Real and complex numbers in a lower precision: "float32", "float16", or "bfloat16" (for torch tensors only).

    Numbers that are no more precise than that stay as they are, and so do integers. A number too large for the lower
    precision raises OverflowError.
    """

    precision: str

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; known are {', '.join(map(repr, PRECISIONS))}")

    def encode(self, array: np.ndarray) -> np.ndarray | None:
        if array.dtype.kind not in "fc":
            return None
        if self.precision == "bfloat16":
            raise ValueError("numpy has no bfloat16; give 'float16' or 'float32'")
        kind, parts = np.dtype(self.precision), real_parts(array)
        if parts.dtype.itemsize <= kind.itemsize:
            return None
        with np.errstate(over="ignore"):
            small = parts.astype(kind)
        if np.isinf(small).any() and not np.isinf(parts).any():
            raise OverflowError(
                f"a state holds {np.abs(parts).max():.3g}, too large for {self.precision}; keep it in a higher precision"
            )
        return small.view(np.uint8)

    def decode(self, data: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        real = np.empty(0, dtype).real.dtype
        return data.view(self.precision).astype(real).view(dtype).reshape(shape)


def real_parts(array: np.ndarray) -> np.ndarray:
    """A real or complex array as one line of real numbers."""
    line = np.ascontiguousarray(array).reshape(-1)
    return line.view(line.real.dtype)
