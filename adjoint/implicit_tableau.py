"""What an implicit Runge-Kutta method is, as data that checks itself, and ways to make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction as F
from functools import cached_property

from adjoint.tableaus import hermite

Row = tuple[float, ...]
DIGITS = 40
"""In which coefficients that are no fractions are computed, before they are rounded."""

WILD = 6.0
"""A slope is extrapolated from earlier ones with weights whose sizes add up to so much at most."""


@dataclass(frozen=True)
class ImplicitTableau:
    """k_i = f(t + c_i h, y + h sum_j a_ij k_j), y_new = y + h sum_i b_i k_i, with any entry of ``a``.

    ``error`` (b minus the embedded weights) makes it adaptive. ``dense[i]`` are the coefficients of
    b_i(theta) = sum_m dense[i][m] theta^(m+1) of the interpolant y + h sum_i b_i(theta) k_i.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    source: str
    error: Row | None = None
    error_order: int = 0
    """The step is controlled with exponent 1 / (error_order + 1): the lesser of the orders of both solutions."""
    dense: tuple[Row, ...] | None = None
    dense_order: int = 0
    explicit: tuple[Row, ...] | None = None
    """The matrix of the explicit method for the first part of f = (explicit, implicit); same b, c, error, dense."""
    filtered: float = 0.0
    """gamma_0: the error is (I - h gamma_0 J)^-1 h (gamma_0 f(t, y) + sum_i error_i k_i), J at the step's start."""

    def __post_init__(self) -> None:
        stages = len(self.b)
        assert len(self.c) == len(self.a) == stages, self.name
        assert all(len(row) == stages for row in self.a), self.name
        for rows in (self.error, self.dense, self.explicit):
            assert rows is None or len(rows) == stages, self.name
        for matrix in (self.a, self.explicit or self.a):
            for c, row in zip(self.c, matrix, strict=True):
                assert abs(c - sum(row)) < 1e-12, f"{self.name}: c is not the row sum of a"
        assert abs(sum(self.b) - 1) < 1e-12, f"{self.name}: b does not sum to one"

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def adaptive(self) -> bool:
        return self.error is not None

    weighted = interpolated = stages
    first_same_as_last = False
    """The last slope is a part of the chain's state instead (see ``carries``)."""

    @cached_property
    def coupled(self) -> bool:
        """Whether all stages are one system of equations; if not, they are solved one after the other."""
        return any(any(row[i + 1 :]) for i, row in enumerate(self.a))

    @cached_property
    def starts_explicitly(self) -> bool:
        """Whether the first stage is f at the state before the step."""
        return not any(self.a[0])

    @cached_property
    def ends_at_last(self) -> bool:
        """Whether the last stage is the new state (stiffly accurate)."""
        return self.a[-1] == self.b and self.c[-1] == 1

    @cached_property
    def carries(self) -> bool:
        """Whether the last slope goes on to the next step, whose first one it is.

        f itself there would take the Newton error of the state times the stiffness.
        """
        return self.ends_at_last and (self.starts_explicitly or self.filtered != 0)

    @cached_property
    def predictors(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """For each stage (an earlier stage, a weight) ..: the polynomial through earlier slopes, at its own time.

        The iteration begins there. Of earlier stages at the same time the last one counts.
        """
        found = []
        for i, c in enumerate(self.c):
            known = sorted({self.c[j]: j for j in range(i)}.values())
            weights: list[tuple[int, float]] = []
            for first in range(len(known)):
                nodes = known[first:]
                trial = [(j, _cardinal(c, self.c[j], [self.c[k] for k in nodes if k != j])) for j in nodes]
                if sum(abs(w) for _, w in trial) <= WILD:
                    weights = [(j, w) for j, w in trial if w]
                    break
            found.append(tuple(weights))
        return tuple(found)


def _cardinal(c: float, own: float, others: Sequence[float]) -> float:
    """At c, the polynomial that is 1 at one node and 0 at the others."""
    value = 1.0
    for x in others:
        value *= (c - x) / (own - x)
    return value


def exact(b: Sequence[float | F | Decimal]) -> Row:
    return tuple(float(x) for x in b)


def square(rows: Sequence[Sequence[float | F | Decimal]]) -> tuple[Row, ...]:
    return tuple(exact([*row, *[0.0] * (len(rows) - len(row))]) for row in rows)


def _sums(rows: Sequence[Sequence[float | F | Decimal]]) -> Row:
    return tuple(float(sum((F(x) for x in row), F(0))) for row in rows)


def _lagrange(nodes: Sequence[Decimal]) -> list[list[Decimal]]:
    """The integral from 0 to theta of each Lagrange polynomial: coefficients of theta, theta^2, .."""
    found = []
    for own in nodes:
        polynomial = [Decimal(1)]
        for other in nodes:
            if other != own:
                lower = [-other * x for x in polynomial] + [Decimal(0)]
                raised = [Decimal(0), *polynomial]
                polynomial = [(x + y) / (own - other) for x, y in zip(lower, raised, strict=True)]
        found.append([x / (power + 1) for power, x in enumerate(polynomial)])
    return found


def _at(polynomial: Sequence[Decimal], theta: Decimal) -> Decimal:
    return sum((x * theta ** (power + 1) for power, x in enumerate(polynomial)), Decimal(0))


def collocation(name: str, order: int, nodes: Sequence[Decimal], source: str) -> ImplicitTableau:
    """The polynomial of degree s whose slope is f at the nodes; it is its own interpolant."""
    integrals = _lagrange(nodes)
    a = [[_at(p, c) for p in integrals] for c in nodes]
    b = [_at(p, Decimal(1)) for p in integrals]
    dense = tuple(exact(p) for p in integrals)
    rows = [exact(row) for row in a]
    if nodes[-1] == 1:
        rows[-1] = exact(b)
    return ImplicitTableau(
        name, order, exact(nodes), tuple(rows), exact(b), source, dense=dense, dense_order=len(nodes)
    )


def with_slopes(
    name: str,
    order: int,
    rows: Sequence[Sequence[float | F | Decimal]],
    source: str,
    embedded: Sequence[float | F | Decimal] | None = None,
    explicit: Sequence[Sequence[float | F]] | None = None,
    error_order: int | None = None,
) -> ImplicitTableau:
    """A method whose first and last stages are f at both ends of a step: its interpolant is the cubic through these."""
    a, b = square(rows), exact(rows[-1])
    error = None if embedded is None else tuple(float(F(x) - F(y)) for x, y in zip(rows[-1], embedded, strict=True))
    return ImplicitTableau(
        name,
        order,
        _sums(rows),
        a,
        b,
        source,
        error=error,
        error_order=0 if error is None else order - 1 if error_order is None else error_order,
        dense=hermite(b),
        dense_order=min(order, 3),
        explicit=None if explicit is None else square(explicit),
    )


def theta_method(theta: float, name: str = "") -> ImplicitTableau:
    """y_new = y + h ((1 - theta) f(t, y) + theta f(t_new, y_new)), 0 < theta <= 1; order 2 for theta = 1/2, else 1."""
    if not 0 < theta <= 1:
        raise ValueError(f"theta={theta} makes no implicit method that is of use; give a number above 0 and at most 1")
    order = 2 if theta == 0.5 else 1
    rows = [[F(0)], [1 - F(theta), F(theta)]]
    return with_slopes(name or f"theta({theta:g})", order, rows, "Hairer & Wanner, Solving ODEs II, section IV.3")
