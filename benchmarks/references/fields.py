"""The named problems once more, in numpy, for arrays of any precision, real or complex: f(y, p) with y (.., n)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Field(NamedTuple):
    """A right-hand side and, for each of its parameters in order, where the problem has it."""

    f: Callable[[Array, Array], Array]
    mass: tuple[float, ...] | None = None
    """The diagonal of the mass matrix."""


def _stack(*parts: Array) -> Array:
    return np.stack(np.broadcast_arrays(*parts), -1)


def robertson(y: Array, p: Array) -> Array:
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    first = -p[..., 0] * a + p[..., 2] * b * c
    third = p[..., 1] * b * b
    return _stack(first, -first - third, third)


def robertson_dae(y: Array, p: Array) -> Array:
    found = robertson(y, p)
    return _stack(found[..., 0], found[..., 1], y[..., 0] + y[..., 1] + y[..., 2] - 1)


def hires(y: Array, p: Array) -> Array:
    k1, k2, k3, k4, k5, k6, plus, minus, star, oks = (p[..., i] for i in range(10))
    y1, y2, y3, y4, y5, y6, y7, y8 = (y[..., i] for i in range(8))
    eighth = -plus * y6 * y8 + (k2 + minus + star) * y7
    return _stack(
        -k1 * y1 + k2 * y2 + k6 * y3 + oks,
        k1 * y1 - (k2 + k3) * y2,
        -(k1 + k6) * y3 + k2 * y4 + k5 * y5,
        k3 * y2 + k1 * y3 - (k2 + k4) * y4,
        -(k1 + k5) * y5 + k2 * y6 + k2 * y7,
        -plus * y6 * y8 + k4 * y4 + k1 * y5 - k2 * y6 + minus * y7,
        -eighth,
        eighth,
    )


def pollution(y: Array, k: Array) -> Array:
    """The equations of Verwer's table 2 by their speeds r_1 to r_25."""
    u = [None, *(y[..., i] for i in range(20))]
    pairs = "1 2,4 5,2 7 7 7,6 9 9,6 11,2 11,1 13 10,2 14 1,6 3 4 4 16 16 17,6 19 19 1,4 19,1 20".split()
    r: list[Any] = [None]
    for i, pair in enumerate(pairs):
        speed = k[..., i]
        for j in pair.split(","):
            speed = speed * u[int(j)]
        r.append(speed)
    return _stack(
        -r[1] - r[10] - r[14] - r[23] - r[24] + r[2] + r[3] + r[9] + r[11] + r[12] + r[22] + r[25],
        -r[2] - r[3] - r[9] - r[12] + r[1] + r[21],
        -r[15] + r[1] + r[17] + r[19] + r[22],
        -r[2] - r[16] - r[17] - r[23] + r[15],
        -r[3] + 2 * r[4] + r[6] + r[7] + r[13] + r[20],
        -r[6] - r[8] - r[14] - r[20] + r[3] + 2 * r[18],
        -r[4] - r[5] - r[6] + r[13],
        r[4] + r[5] + r[6] + r[7],
        -r[7] - r[8],
        -r[12] + r[7] + r[9],
        -r[9] - r[10] + r[8] + r[11],
        r[9],
        -r[11] + r[10],
        -r[13] + r[12],
        r[14],
        -r[18] - r[19] + r[16],
        -r[20],
        r[20],
        -r[21] - r[22] - r[24] + r[23] + r[25],
        -r[25] + r[24],
    )


def oregonator(y: Array, p: Array) -> Array:
    s, q, w = p[..., 0], p[..., 1], p[..., 2]
    y1, y2, y3 = y[..., 0], y[..., 1], y[..., 2]
    return _stack(s * (y2 - y1 * y2 + y1 - q * y1 * y1), (y3 - y2 - y1 * y2) / s, w * (y1 - y3))


def relaxation(y: Array, p: Array) -> Array:
    x, v = y[..., 0], y[..., 1]
    return _stack(v, p[..., 0] ** 2 * (v - x * x * v - x))


def brusselator(y: Array, p: Array) -> Array:
    a, b, d = p[..., 0], p[..., 1], p[..., 2]
    u, v = y[..., 0::2], y[..., 1::2]
    cells = u.shape[-1]
    a, b, d = a[..., None], b[..., None], d[..., None] * (cells + 1) ** 2

    def second(x: Array, edge: float) -> Array:
        ends = np.full((*x.shape[:-1], 1), edge, dtype=x.dtype)
        wide = np.concatenate((ends, x, ends), -1)
        return wide[..., 2:] + wide[..., :-2] - 2 * x

    du = a - (b + 1) * u + u**2 * v + d * second(u, 1.0)
    dv = b * u - u**2 * v + d * second(v, 3.0)
    return np.stack(np.broadcast_arrays(du, dv), -1).reshape(*du.shape[:-1], 2 * cells)


def hodgkin_huxley(y: Array, p: Array) -> Array:
    current, capacity, g_na, g_k, g_leak, e_na, e_k, e_leak = (p[..., i] for i in range(8))
    v, m, h, n = (y[..., i] for i in range(4))
    a_m = (v + 40) / (10 - 10 * np.exp(-(v + 40) / 10))
    a_h = np.exp(-(v + 65) / 20) * 7 / 100
    a_n = (v + 55) / (100 - 100 * np.exp(-(v + 55) / 10))
    b_m, b_h, b_n = 4 * np.exp(-(v + 65) / 18), 1 / (1 + np.exp(-(v + 35) / 10)), np.exp(-(v + 65) / 80) / 8
    sodium, potassium = g_na * m * m * m * h * (v - e_na), g_k * n * n * n * n * (v - e_k)
    return _stack(
        (current - sodium - potassium - g_leak * (v - e_leak)) / capacity,
        a_m - (a_m + b_m) * m,
        a_h - (a_h + b_h) * h,
        a_n - (a_n + b_n) * n,
    )


def pleiades(y: Array, p: Array) -> Array:
    """y: x, y, x', y' of seven bodies in turn."""
    x, z = y[..., :7], y[..., 7:14]
    dx, dz = x[..., None, :] - x[..., :, None], z[..., None, :] - z[..., :, None]
    apart = dx * dx + dz * dz + np.eye(7)
    cubes = apart * np.sqrt(apart)
    pull = p[..., None, :] / cubes
    return np.concatenate(np.broadcast_arrays(y[..., 14:21], y[..., 21:], (pull * dx).sum(-1), (pull * dz).sum(-1)), -1)


FIELDS = {
    "robertson": Field(robertson),
    "robertson_dae": Field(robertson_dae, (1.0, 1.0, 0.0)),
    "hires": Field(hires),
    "pollution": Field(pollution),
    "oregonator": Field(oregonator),
    "relaxation": Field(relaxation),
    "brusselator": Field(brusselator),
    "hodgkin_huxley": Field(hodgkin_huxley),
    "pleiades": Field(pleiades),
}
