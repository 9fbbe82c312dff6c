"""Kept states made smaller by zfp, for fields on grids: pip install 'adjoint-revolve[zfp]'.

Source: Lindstrom (2014), IEEE Trans. Vis. Comput. Graph. 20(12), Fixed-rate compressed floating-point arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zfpy

MOST_AXES = 4
BLOCK = 4


@dataclass(frozen=True, repr=False)
class Zfp:
    """Smooth fields in fewer bits; without an argument nothing is lost.

    ``tolerance``: the largest absolute error; ``rate``: bits for each number; ``precision``: bits of each number that
    count. One of them, or none. Arrays of float32 and float64 are compressed (complex ones as pairs of these), with up
    to four axes as the grid; others stay as they are, and so does an array with a NaN or an infinity.
    """

    tolerance: float | None = None
    rate: float | None = None
    precision: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())}: give one of them, or none")
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"{name}={value} keeps nothing; give a positive number")

    def __repr__(self) -> str:
        return f"Zfp({', '.join(f'{name}={value}' for name, value in vars(self).items() if value is not None)})"

    @property
    def lossless(self) -> bool:
        return self.tolerance is self.rate is self.precision is None

    def encode(self, array: np.ndarray) -> np.ndarray | None:
        if array.dtype.kind not in "fc" or not array.dtype.isnative or array.size == 0:
            return None
        parts = _parts(array)
        order = _order(parts.shape)
        grid = parts.transpose(order).reshape(_grid(parts.shape))
        if grid.dtype not in (np.float32, np.float64) or not np.isfinite(grid).all():
            return None
        wishes = {name: value for name, value in vars(self).items() if value is not None}
        small = zfpy.compress_numpy(np.ascontiguousarray(grid), write_header=True, **wishes)
        return np.frombuffer(small, np.uint8)

    def decode(self, data: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        grid: np.ndarray = zfpy.decompress_numpy(data.tobytes())
        whole = _parts(np.empty(shape, dtype)).shape
        order = _order(whole)
        parts = grid.reshape([whole[i] for i in order]).transpose(np.argsort(order))
        return np.ascontiguousarray(parts).reshape(-1).view(dtype).reshape(shape)


def _parts(array: np.ndarray) -> np.ndarray:
    """Real numbers; the real and imaginary parts of complex ones on one more axis."""
    line = np.ascontiguousarray(array)
    return line.view(line.real.dtype).reshape(*array.shape, 2) if line.dtype.kind == "c" else line.reshape(array.shape)


def _order(shape: tuple[int, ...]) -> list[int]:
    """Axes shorter than a block (4 to a side, filled up with zeros) come first, to be merged into longer ones."""
    return sorted(range(len(shape)), key=lambda i: shape[i] >= BLOCK)


def _grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """At most four axes; all but the longer ones, and of these all but the last four, are one with the next."""
    return (-1, *[n for n in shape if n >= BLOCK][1:][-(MOST_AXES - 1) :])
