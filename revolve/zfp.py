"""Kept states made smaller by zfp, for fields on grids: pip install 'adjoint-revolve[zfp]'.

Source: Lindstrom (2014), IEEE Trans. Vis. Comput. Graph. 20(12), Fixed-rate compressed floating-point arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zfpy

MOST_AXES = 4


@dataclass(frozen=True)
class Zfp:
    """Smooth fields in fewer bits; without an argument nothing is lost.

    ``tolerance``: the largest absolute error; ``rate``: bits for each number; ``precision``: bits of each number that
    count. One of them, or none. Arrays of float32 and float64 are compressed (complex ones as pairs of these), each with
    its last four axes as the grid; others stay as they are, and so does an array with a NaN or an infinity.
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

    @property
    def lossless(self) -> bool:
        return self.tolerance is self.rate is self.precision is None

    def encode(self, array: np.ndarray) -> np.ndarray | None:
        if array.dtype.kind not in "fc" or not array.dtype.isnative or array.size == 0:
            return None
        grid = _grid(array)
        if grid.dtype not in (np.float32, np.float64) or not np.isfinite(grid).all():
            return None
        wishes = {name: value for name, value in vars(self).items() if value is not None}
        small = zfpy.compress_numpy(grid, write_header=True, **wishes)
        return np.frombuffer(small, np.uint8)

    def decode(self, data: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        grid: np.ndarray = zfpy.decompress_numpy(data.tobytes())
        return grid.reshape(-1).view(dtype).reshape(shape)


def _grid(array: np.ndarray) -> np.ndarray:
    """Real numbers on at most four axes, the first ones as one; real and imaginary parts side by side are an axis."""
    line = np.ascontiguousarray(array)
    if line.dtype.kind == "c":
        line = line.view(line.real.dtype).reshape(*array.shape, 2)
    if line.ndim == 0:
        return line.reshape(1)
    return line.reshape(-1, *line.shape[line.ndim - MOST_AXES + 1 :]) if line.ndim > MOST_AXES else line
