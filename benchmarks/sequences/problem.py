"""a_k = sigmoid(w u_k + c), h_k = a_k h_{k-1} + (1 - a_k) v u_k, y_k = r h_k; the loss is half the sum of squares of y."""

from __future__ import annotations

from math import isqrt

import numpy as np

STATES = 64


def numbers(length: int) -> tuple[np.ndarray, ...]:
    """u (length,), and w, c, v, r of 64 numbers each, in double precision."""
    random = np.random.default_rng(0)
    u = np.sin(np.arange(length) / 50) + 0.3 * random.standard_normal(length)
    w, c, v, r = random.standard_normal((4, STATES))
    return u, 0.5 * w, c + 3.0, v, r / STATES


def segment(length: int) -> int:
    """The largest divisor of the length up to its square root."""
    return next(m for m in range(isqrt(length), 0, -1) if length % m == 0)


def thirds(length: int) -> int:
    """The divisor nearest to the cube root."""
    divisors = [m for m in range(1, isqrt(length) + 1) if length % m == 0]
    return min(divisors, key=lambda m: abs(m - length ** (1 / 3)))
