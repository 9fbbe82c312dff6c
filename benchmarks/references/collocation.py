"""Collocation at many Radau points in extended precision, with forward sensitivities: slow, plain, and very exact.

    M (Y_i - y_n) = h sum_j a_ij f(t + c_j h, Y_j, p),    y_{n+1} = Y_s,    of order 2 s - 1 (Radau IIA)

and the same for S = dY/d(y_0, p), which is linear. Arrays hold numpy's ``longdouble`` (64 bits of mantissa on x86). The
Newton matrix is factored in double precision and used again for what is left, which is computed in full precision.
Derivatives of f come from complex steps. Nothing here is shared with the library or with torch.

Source: Hairer & Wanner (1996), Solving ODEs II, sections IV.5 and IV.8; Squire & Trapp (1998), SIAM Rev. 40, 110-112
(complex steps).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import numpy as np
import scipy.linalg

Array = np.ndarray[Any, Any]
REAL, COMPLEX = np.longdouble, np.clongdouble
STEP = REAL("1e-60")
"""Of a complex step: no difference is taken, so it may be as small as it likes."""

Field = Callable[[Array, Array], Array]
"""f(y, p) for y (.., n) and p (m,) or (.., m), real or complex; (.., n)."""


class Reached(NamedTuple):
    """The state at the end, its derivatives in (y_0, p), (n, n + m), and how it came to be."""

    y: Array
    sensitivity: Array
    steps: int


def radau(stages: int) -> tuple[Array, Array]:
    """c and A of Radau IIA, rounded from 60 digits."""
    with mpmath.workdps(60):
        x = mpmath.mpf
        polynomial = [x(1)]  # of P_{s-1} - P_s on [0, 1], by coefficients of Legendre's recurrence
        before, polynomial = [x(0)], [x(1)]
        series = [polynomial]
        for k in range(stages):
            shifted = _times(polynomial, [x(-1), x(2)])
            after = [
                ((2 * k + 1) * a - k * b) / (k + 1)
                for a, b in zip(shifted, [*before, *[x(0)] * (len(shifted) - len(before))], strict=True)
            ]
            before, polynomial = polynomial, after
            series.append(after)
        last, previous = series[stages], series[stages - 1]
        difference = [a - b for a, b in zip(last, [*previous, x(0)], strict=True)]
        roots = mpmath.polyroots(difference[::-1], maxsteps=500, extraprec=400)
        c = sorted(mpmath.re(root) for root in roots)
        c[-1] = x(1)
        rows = []
        powers = mpmath.matrix([[node**k for k in range(stages)] for node in c])
        inverse = powers**-1
        for node in c:
            integrals = [node ** (k + 1) / (k + 1) for k in range(stages)]
            rows.append([mpmath.fsum(integrals[k] * inverse[k, j] for k in range(stages)) for j in range(stages)])
        text = [[mpmath.nstr(v, 30) for v in row] for row in rows]
        return np.array([REAL(mpmath.nstr(v, 30)) for v in c]), np.array([[REAL(v) for v in row] for row in text])


def _times(a: list[Any], b: list[Any]) -> list[Any]:
    found = [mpmath.mpf(0)] * (len(a) + len(b) - 1)
    for i, u in enumerate(a):
        for j, v in enumerate(b):
            found[i + j] += u * v
    return found


def derivatives(f: Field, y: Array, p: Array) -> tuple[Array, Array]:
    """df/dy (.., n, n) and df/dp (.., n, m) at each y (.., n)."""
    n, m = y.shape[-1], len(p)
    turned = 1j * np.eye(n + m, dtype=COMPLEX) * STEP
    found = f(y[..., None, :] + turned[:, :n], p + turned[:, n:]).imag / STEP  # (.., n + m, n)
    found = np.swapaxes(found, -1, -2)
    return found[..., :n], found[..., n:]


def solve(
    f: Field,
    y0: Array,
    p: Array,
    end: float,
    mass: Array | None = None,
    stages: int = 9,
    tolerance: float = 1e-10,
    first: float = 1e-4,
) -> Reached:
    """y(end) from y(0) = y0 of M y' = f(y, p).

    ``tolerance`` is what the last stage may be off from the polynomial through all others (relative to each number,
    or 1e-6 of the largest): the error is about its square, since the order is twice as high.
    """
    y, p = y0.astype(REAL), p.astype(REAL)
    n, m = len(y), len(p)
    weights = np.eye(n, dtype=REAL) if mass is None else mass.astype(REAL)
    s = np.concatenate((np.eye(n, dtype=REAL), np.zeros((n, m), dtype=REAL)), 1)
    c, a = radau(stages)
    nodes = np.concatenate(([REAL(0)], c))
    outside = np.array(
        [np.prod((1 - np.delete(nodes[:-1], j)) / (x - np.delete(nodes[:-1], j))) for j, x in enumerate(nodes[:-1])]
    )
    t, h, steps = REAL(0), REAL(first), 0
    end_ = REAL(end)
    while t < end_:
        h = min(h, end_ - t)
        found = _stages(f, y, p, h, a, weights, c)
        if found is None:
            h = h / 4
            continue
        z, matrix, jacobians, slopes = found
        values = np.concatenate((np.zeros((1, n), dtype=REAL), z))
        off = np.abs(outside @ values[:-1] - values[-1])
        size = np.abs(y + z[-1])
        error = float(np.max(off / (size + REAL(1e-6) * np.max(size))) / tolerance)
        factor = min(5.0, max(0.1, 0.8 * max(error, 1e-30) ** (-1 / stages)))
        if error > 1:
            h = h * REAL(factor)
            continue
        s = _sensitivities(s, h, a, weights, matrix, jacobians, slopes)
        y, t, steps = y + z[-1], t + h, steps + 1
        h = h * REAL(factor)
    return Reached(y, s, steps)


def _stages(
    f: Field, y: Array, p: Array, h: Any, a: Array, mass: Array, c: Array
) -> tuple[Array, Any, Array, Array] | None:
    """Z with M Z_i = h sum_j a_ij f(y + Z_j), the factored matrix there, and the derivatives of f; None: not found."""
    stages, n = len(c), len(y)
    z = np.zeros((stages, n), dtype=REAL)
    scale = np.abs(y) + REAL(1e-12) * np.max(np.abs(y)) + REAL(1e-300)
    before = np.inf
    for _ in range(40):
        points = y + z
        jacobians, slopes = derivatives(f, points, p)
        matrix = _factored(h, a, mass, jacobians)
        rest = h * (a @ f(points, p)) - z @ mass.T
        change = scipy.linalg.lu_solve(matrix, rest.astype(float).ravel()).reshape(stages, n).astype(REAL)
        if not np.all(np.isfinite(change.astype(float))):
            return None
        z = z + change
        size = float(np.max(np.abs(change) / scale))
        if size < 1e-15 or (before < 1e-11 and size > before / 4):
            return z, matrix, *derivatives(f, y + z, p)
        if size > 1e3 * before or size > 1e12:
            return None
        before = size
    return None


def _factored(h: Any, a: Array, mass: Array, jacobians: Array) -> Any:
    stages, n = jacobians.shape[:2]
    blocks = -(h * a)[:, :, None, None] * jacobians[None]  # of row i, column j: -h a_ij J_j
    blocks[range(stages), range(stages)] += mass
    return scipy.linalg.lu_factor(blocks.transpose(0, 2, 1, 3).reshape(stages * n, stages * n).astype(float))


def _sensitivities(s: Array, h: Any, a: Array, mass: Array, matrix: Any, jacobians: Array, slopes: Array) -> Array:
    """dy_{n+1}/d(y_0, p) from dy_n/d(y_0, p)."""
    stages, n = jacobians.shape[:2]
    direct = np.concatenate((np.zeros((stages, n, n), dtype=REAL), slopes), -1)

    def moved(x: Array) -> Array:
        return np.einsum("jkl,jlq->jkq", jacobians, x)

    right = h * np.einsum("ij,jkq->ikq", a, moved(np.broadcast_to(s, (stages, *s.shape))) + direct)
    z = np.zeros_like(right)
    for _ in range(6):
        rest = right + h * np.einsum("ij,jkq->ikq", a, moved(z)) - np.einsum("kl,ilq->ikq", mass, z)
        columns = rest.reshape(stages * n, -1)
        scale = np.max(np.abs(columns), 0) + REAL(1e-300)
        change = scipy.linalg.lu_solve(matrix, (columns / scale).astype(float)).astype(REAL) * scale
        z = z + change.reshape(z.shape)
    return s + z[-1]
