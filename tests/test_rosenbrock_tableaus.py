"""Rosenbrock coefficients meet their order conditions: those of Runge-Kutta trees with two matrices."""

from __future__ import annotations

import numpy as np
import pytest
from test_tableaus import EPS, Tree, density, trees

from adjoint import ROSENBROCK, RosenbrockTableau

tableaus = pytest.mark.parametrize("tableau", ROSENBROCK.values(), ids=ROSENBROCK)


def matrices(tableau: RosenbrockTableau) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, beta = alpha + Gamma, and Gamma."""
    n = tableau.stages
    a, gamma = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        a[i, :i], gamma[i, : i + 1] = tableau.a[i], tableau.inverse[i]
    return a @ gamma, a @ gamma + gamma, gamma


def weights(tree: Tree, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Hairer & Wanner II, section IV.7: a vertex with one branch takes beta, with several alpha."""
    result = np.ones(len(alpha))
    for branch in tree:
        result = result * ((beta if len(tree) == 1 else alpha) @ weights(branch, alpha, beta))
    return result


def order_of(tableau: RosenbrockTableau, b: np.ndarray, most: int, theta: float = 1.0) -> int:
    alpha, beta, gamma = matrices(tableau)
    own = b @ gamma
    sizes = np.abs(tableau_weights(b, gamma)), np.abs(alpha), np.abs(beta)
    for order in range(1, most + 1):
        for tree in trees(order):
            missed = abs(own @ weights(tree, alpha, beta) - theta**order / density(tree))
            if missed > 16 * order * EPS * float(sizes[0] @ weights(tree, *sizes[1:])):
                return order - 1
    return most


def tableau_weights(b: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """How large the terms of b Gamma are, before they cancel."""
    return np.abs(b) @ np.abs(gamma)


@tableaus
def test_solution_and_embedded_solution_have_exactly_their_orders(tableau: RosenbrockTableau) -> None:
    b, error = np.array(tableau.b), np.array(tableau.error)
    assert order_of(tableau, b, tableau.order + 1) == tableau.order
    assert order_of(tableau, b - error, tableau.order) == tableau.error_order == tableau.order - 1


@tableaus
def test_the_interpolant_has_its_order_and_ends_at_the_new_state(tableau: RosenbrockTableau) -> None:
    for theta in (0.1, 0.35, 0.5, 0.82, 1.0):
        b = np.array([sum(x * theta ** (m + 1) for m, x in enumerate(row)) for row in tableau.dense])
        assert order_of(tableau, b, tableau.dense_order, theta) == tableau.dense_order
    for row, b_i in zip(tableau.dense, tableau.b, strict=True):
        assert abs(sum(row) - b_i) <= 32 * EPS * sum(map(abs, row))


@tableaus
def test_the_other_form_of_the_coefficients_is_the_inverse(tableau: RosenbrockTableau) -> None:
    c = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.coupling):
        c[i, :i] = row
    gamma = matrices(tableau)[2]
    product = gamma @ (np.eye(tableau.stages) / tableau.gamma - c)
    sizes = np.abs(gamma) @ (np.eye(tableau.stages) / tableau.gamma + np.abs(c))
    assert (np.abs(product - np.eye(tableau.stages)) <= 32 * EPS * np.maximum(sizes, 1)).all()
