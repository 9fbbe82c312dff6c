"""Coefficients meet the order conditions of Butcher, and the order shows in solutions and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
from torch import Tensor

from adjoint import METHODS, Tableau, solve
from adjoint.adaptive_timeline import AdaptiveTimeline

Tree = tuple["Tree", ...]
"""A rooted tree is the tuple of the trees that hang from its root."""

EPS = float(np.finfo(np.float64).eps)
tableaus = pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)


def partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Ways to write a number as a falling sum of positive ones."""
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        yield from ((first, *rest) for rest in partitions(total - first, first))


@lru_cache
def trees(order: int) -> tuple[Tree, ...]:
    """The rooted trees with so many vertices: 1, 1, 2, 4, 9, 20, 48, 115 ..."""
    found: list[Tree] = []
    for parts in partitions(order - 1, order - 1):
        sizes = [(size, parts.count(size)) for size in sorted(set(parts))]
        choices = [list(combinations_with_replacement(trees(size), count)) for size, count in sizes]
        found += (tuple(tree for group in choice for tree in group) for choice in product(*choices))
    return tuple(found)


def vertices(tree: Tree) -> int:
    return 1 + sum(map(vertices, tree))


def density(tree: Tree) -> int:
    """gamma of Hairer, Norsett & Wanner I, section II.2."""
    return vertices(tree) * math.prod(map(density, tree))


def weights(tree: Tree, a: np.ndarray) -> np.ndarray:
    """The product of the row sums that belong to the tree's branches, for each stage."""
    result = np.ones(len(a))
    for branch in tree:
        result = result * (a @ weights(branch, a))
    return result


def matrix(tableau: Tableau) -> np.ndarray:
    a = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        a[i, :i] = row
    return a


def defects(b: np.ndarray, a: np.ndarray, order: int, theta: float = 1.0) -> Iterator[tuple[float, float]]:
    """For each tree of this order: by how much the condition is missed, and what rounding may do to it.

    A published coefficient is right to half an epsilon, and a product holds at most ``order`` of them.
    """
    for tree in trees(order):
        missed = b @ weights(tree, a) - theta**order / density(tree)
        yield abs(missed), 2 * order * EPS * float(np.abs(b) @ weights(tree, np.abs(a)))


def order_of(b: np.ndarray, a: np.ndarray, most: int) -> int:
    """The order of the weights b, as far as ``most``."""
    for order in range(1, most + 1):
        if any(missed > rounding for missed, rounding in defects(b, a, order)):
            return order - 1
    return most


def test_there_are_as_many_trees_as_there_should_be() -> None:
    assert [len(trees(order)) for order in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]  # Cayley (1857)


@tableaus
def test_the_solution_has_exactly_the_order_that_the_tableau_says(tableau: Tableau) -> None:
    assert order_of(np.array(tableau.b), matrix(tableau), tableau.order + 1) == tableau.order


@tableaus
def test_the_embedded_solution_has_its_order_and_differs(tableau: Tableau) -> None:
    if tableau.error is None:
        assert tableau.error_order == 0
    else:
        embedded = np.array(tableau.b) - np.array(tableau.error)
        assert any(tableau.error)
        assert tableau.error_order < tableau.order
        assert order_of(embedded, matrix(tableau), tableau.error_order) == tableau.error_order


@tableaus
def test_the_interpolant_has_its_order_inside_the_step(tableau: Tableau) -> None:
    if tableau.dense is None:
        assert not tableau.adaptive, "an adaptive method needs an interpolant"
        return
    for theta, order in product((0.1, 0.35, 0.5, 0.82, 1.0), range(1, tableau.dense_order + 1)):
        b = np.array([sum(x * theta ** (m + 1) for m, x in enumerate(row)) for row in tableau.dense])
        size = np.array([sum(abs(x) * theta ** (m + 1) for m, x in enumerate(row)) for row in tableau.dense])
        for tree, (missed, _) in zip(trees(order), defects(b, matrix(tableau), order, theta), strict=True):
            assert missed <= 4 * order * EPS * float(size @ weights(tree, np.abs(matrix(tableau))))


@tableaus
def test_the_interpolant_starts_at_the_old_state_and_ends_at_the_new_one(tableau: Tableau) -> None:
    for row, b in zip(tableau.dense or (), tableau.b, strict=False):
        assert abs(sum(row) - b) <= 32 * EPS * sum(map(abs, row))  # and at theta = 0 there is no constant term


@tableaus
def test_nodes_are_row_sums(tableau: Tableau) -> None:
    assert tableau.c[0] == 0 and tableau.a[0] == ()
    for c, row in zip(tableau.c, tableau.a, strict=True):
        assert abs(c - sum(row)) <= 4 * EPS * sum(map(abs, row))


@tableaus
def test_a_last_stage_that_serves_the_next_step_is_the_slope_at_the_new_state(tableau: Tableau) -> None:
    same = tableau.a[-1] == tableau.b[:-1] and tableau.b[-1] == 0 and tableau.c[-1] == 1
    assert tableau.first_same_as_last == same
    assert tableau.weighted == max(i for i, b in enumerate(tableau.b) if b) + 1
    if same:
        assert tableau.weighted < tableau.stages


@tableaus
def test_every_tableau_names_its_source(tableau: Tableau) -> None:
    assert tableau.name in METHODS and "(1" in tableau.source + "(1" * ("(2" in tableau.source)


def errors(tableau: Tableau, steps: int, at: float = 2.0) -> tuple[float, float]:
    """Of a driven pendulum at this time, and of the gradient, after so many equal steps up to t = 2."""
    found, expected = pendulum(tableau, steps, at), reference(at)
    return tuple(float((a - b).norm()) for a, b in zip(found, expected, strict=True))  # type: ignore[return-value]


def pendulum(tableau: Tableau, steps: int, at: float) -> tuple[Tensor, Tensor]:
    """phi'' = -4 p sin phi - 0.3 phi' + q cos 3t, and the gradient in p, q and the first state."""
    p = torch.tensor([1.0, 0.7], dtype=torch.float64).requires_grad_()
    y0 = torch.tensor([1.2, -0.6], dtype=torch.float64).requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], -4 * p[0] * torch.sin(y[0]) - 0.3 * y[1] + p[1] * torch.cos(3 * t)))

    t = (0.0, 2.0) if at == 2 else (0.0, at, 2.0)
    y = solve(f, y0, t, method=tableau, dt=2 / steps).ys[1]
    return y.detach(), torch.cat(torch.autograd.grad(y[0] + 0.7 * y[1], (p, y0)))


def fixed(tableau: Tableau) -> Tableau:
    """The same method with steps of one length."""
    return replace(tableau, error=None, dense=None)


FINE = fixed(max(METHODS.values(), key=lambda tableau: tableau.order))


@lru_cache
def reference(at: float) -> tuple[Tensor, Tensor]:
    return pendulum(FINE, 64, at)  # at order 8 right to 1e-15


def halvings(tableau: Tableau) -> list[int]:
    return [2**k for k in range(2, 7 if tableau.order < 4 else 8)]


def observed_order(errors: tuple[float, ...]) -> float:
    clean = [error for error in errors if error > 1e-13]  # below, rounding shows
    return math.log2(clean[-2] / clean[-1])


@tableaus
def test_halving_the_step_divides_errors_of_solution_and_gradient_by_two_to_the_order(tableau: Tableau) -> None:
    """Order p for the solution is order p for its discrete gradient (Sandu 2006)."""
    for kind in zip(*(errors(fixed(tableau), steps) for steps in halvings(tableau)), strict=True):
        assert observed_order(kind) == pytest.approx(tableau.order, abs=0.3)


@pytest.mark.parametrize("tableau", [x for x in METHODS.values() if x.adaptive], ids=lambda x: x.name)
def test_values_and_gradients_between_steps_have_the_order_of_the_interpolant(
    tableau: Tableau, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step's interpolation error, or that of the solution."""
    monkeypatch.setattr(AdaptiveTimeline, "judge", accept)
    least = min(tableau.order, tableau.dense_order + 1)
    for kind in zip(*(between(tableau, steps) for steps in halvings(tableau)), strict=True):
        assert observed_order(kind) > least - 0.3


def between(tableau: Tableau, steps: int) -> tuple[float, float]:
    """The errors at six tenths of the last step: those at one point alone might vanish by accident."""
    return errors(tableau, steps, 2 - 0.8 / steps)


def accept(timeline: AdaptiveTimeline, t_new: float, error: float) -> bool:
    """Take every step, and the next one just as long."""
    timeline._times.append(t_new)
    return True
