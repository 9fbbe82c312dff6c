"""Coefficients of implicit methods meet the order conditions, those of both parts together too."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from test_tableaus import EPS, Tree, defects, density, order_of, trees, weights

from adjoint import IMPLICIT, ImplicitTableau, theta_method

tableaus = pytest.mark.parametrize("tableau", IMPLICIT.values(), ids=IMPLICIT)


@tableaus
def test_the_solution_has_exactly_the_order_that_the_tableau_says(tableau: ImplicitTableau) -> None:
    assert order_of(np.array(tableau.b), np.array(tableau.a), tableau.order + 1) == tableau.order


@tableaus
def test_the_embedded_solution_has_its_order_and_differs(tableau: ImplicitTableau) -> None:
    if tableau.error is None:
        assert tableau.error_order == 0 and tableau.filtered == 0
        return
    assert any(tableau.error)
    b, a, error = np.array(tableau.b), np.array(tableau.a), np.array(tableau.error)
    if tableau.filtered:  # f at the start is one more stage
        a = np.pad(a, ((1, 0), (1, 0)))
        b, error = np.array([0, *b]), np.array([-tableau.filtered, *-error])
    assert order_of(b - error, a, tableau.error_order) == tableau.error_order
    assert order_of(error, a, 1) == 0, "an error that is no solution starts with weights that sum to zero"
    assert abs(error.sum()) <= 4 * EPS * np.abs(error).sum()


@tableaus
def test_the_interpolant_has_its_order_inside_the_step_and_ends_at_the_new_state(tableau: ImplicitTableau) -> None:
    assert tableau.dense is not None
    a = np.array(tableau.a)
    for theta, order in product((0.1, 0.35, 0.5, 0.82, 1.0), range(1, tableau.dense_order + 1)):
        b = np.array([sum(x * theta ** (m + 1) for m, x in enumerate(row)) for row in tableau.dense])
        size = np.array([sum(abs(x) * theta ** (m + 1) for m, x in enumerate(row)) for row in tableau.dense])
        for tree, (missed, _) in zip(trees(order), defects(b, a, order, theta), strict=True):
            assert missed <= 4 * order * EPS * float(size @ weights(tree, np.abs(a)))
    for row, b_i in zip(tableau.dense, tableau.b, strict=True):
        assert abs(sum(row) - b_i) <= 32 * EPS * sum(map(abs, row))


def coloured(tree: Tree, matrices: tuple[np.ndarray, ...]) -> Iterator[np.ndarray]:
    """The weights of a tree for every way to give each of its branches one of the matrices."""
    for inner in product(*([m @ w for m in matrices for w in coloured(branch, matrices)] for branch in tree)):
        result = np.ones(len(matrices[0]))
        for branch in inner:
            result = result * branch
        yield result


@pytest.mark.parametrize("name", ["kencarp3", "kencarp4", "kencarp5"])
def test_both_parts_of_an_additive_method_meet_the_order_conditions_together(name: str) -> None:
    """Kennedy & Carpenter (2003), section 2.1: b and c are common, so each branch may take either matrix."""
    tableau = IMPLICIT[name]
    assert tableau.explicit is not None
    both = np.array(tableau.a), np.array(tableau.explicit)
    sizes = tuple(map(np.abs, both))
    b = np.array(tableau.b)
    for order in range(1, tableau.order + 1):
        for tree in trees(order):
            for vector, size in zip(coloured(tree, both), coloured(tree, sizes), strict=True):
                assert abs(b @ vector - 1 / density(tree)) <= 2 * order * EPS * float(np.abs(b) @ size)


@tableaus
def test_a_slope_is_carried_on_only_if_it_is_that_of_the_new_state(tableau: ImplicitTableau) -> None:
    if tableau.carries:
        assert tableau.a[-1] == tableau.b and tableau.c[-1] == 1
    if tableau.starts_explicitly:
        assert tableau.carries and tableau.c[0] == 0
    assert tableau.coupled == bool(np.triu(np.array(tableau.a), 1).any())


def test_theta_methods_are_of_order_two_in_the_middle_and_of_order_one_elsewhere() -> None:
    for theta in (0.5, 0.6, 1.0):
        tableau = theta_method(theta)
        assert order_of(np.array(tableau.b), np.array(tableau.a), 3) == (2 if theta == 0.5 else 1) == tableau.order
    for theta in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=f"theta={theta}"):
            theta_method(theta)
