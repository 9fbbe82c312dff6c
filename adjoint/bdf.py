"""Backward differentiation formulas as data: what a step of each order does with the differences of earlier states.

    sum_m (1/m) D_m + kappa_q gamma_q (y_{n+1} - y_predicted) = h f(t_{n+1}, y_{n+1}),    gamma_q = sum_{m <= q} 1/m

D_m are backward differences of the solution on a grid of step h, m = 1 .. q; kappa_q are those of the numerical
differentiation formulas. Source: Shampine & Reichelt (1997), SIAM J. Sci. Comput. 18(1), 1-22, section 2, table 1; the
quasi-constant steps (differences are interpolated onto a grid of another step) are theirs too, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

HIGHEST = 5
KAPPA = (0.0, -0.1850, -1 / 9, -0.0823, -0.0415, 0.0)
GAMMA = tuple(sum(1 / m for m in range(1, q + 1)) for q in range(HIGHEST + 1))
ALPHA = tuple((1 - kappa) * gamma for kappa, gamma in zip(KAPPA, GAMMA, strict=True))
"""y_{n+1} = .. + (h / alpha_q) f(t_{n+1}, y_{n+1})."""
ERROR = tuple(kappa * gamma + 1 / (q + 1) for q, (kappa, gamma) in enumerate(zip(KAPPA, GAMMA, strict=True)))
"""The local error of order q is this times D_{q+1}."""
ROWS = HIGHEST + 2
"""Differences that are carried along: D_1 .. D_{q+2}, for the choice of the next order."""


@dataclass(frozen=True)
class DifferentiationFormulas:
    """Those up to ``max_order``; which one a step takes is found on the way. One implicit stage at the end of a step."""

    max_order: int = HIGHEST
    name: str = "bdf"

    def __post_init__(self) -> None:
        if not isinstance(self.max_order, int) or not 1 <= self.max_order <= HIGHEST:
            raise ValueError(f"max_order={self.max_order!r} of BDF must be a whole number from 1 to {HIGHEST}")

    @property
    def order(self) -> int:
        return self.max_order

    a = ((1.0,),)
    b = c = (1.0,)
    error = (1.0,)
    error_order = 1
    stages = weighted = interpolated = 1
    adaptive = True
    starts_explicitly = True  # its first difference is h f(t_0, y_0)
    coupled = carries = first_same_as_last = False
    filtered = 0.0
    explicit = dense = None
    dense_order = 1
    predictors = ((),)


class Interpolants:
    """For each order q the weights of D_0 .. D_q in the coefficients of 1, theta, .. theta^5 over the last step.

    u = sum_j D_j prod_{i < j} (theta - 1 + i) / (1 + i), the polynomial through the last q + 1 points.
    """

    @cached_property
    def weights(self) -> list[np.ndarray]:
        found = []
        for q in range(HIGHEST + 1):
            rows, polynomial = np.zeros((HIGHEST + 1, q + 1)), np.array([1.0])
            for j in range(q + 1):
                rows[: len(polynomial), j] = polynomial
                polynomial = np.convolve(polynomial, np.array([j - 1.0, 1.0])) / (1 + j)
            found.append(rows)
        return found


INTERPOLANTS = Interpolants()
