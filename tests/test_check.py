"""A check that cannot fail proves nothing: each one passes a right gradient and disproves a wrong one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from adjoint_cases import TIMES, loss_of, numbers, steps_of
from torch import Tensor

from adjoint import METHODS, check, frozen_steps, scan, solve

every_method = pytest.mark.parametrize("method", METHODS)


class Wrong(torch.autograd.Function):
    """The identity, with a gradient that is a thousandth too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.001 * gradient


def smooth(x: Tensor, z: Tensor) -> Tensor:
    return (torch.sin(x) * z.abs() ** 2).sum().exp()


def inputs() -> tuple[Tensor, Tensor]:
    return numbers(4, seed=1), numbers(4, seed=2, dtype=torch.complex128)


def test_remainders_of_a_right_gradient_fall_with_the_square() -> None:
    found = check.taylor_test(smooth, inputs())
    assert found.slope == pytest.approx(2, abs=0.05)
    assert all(a > b for a, b in zip(found.remainders, found.remainders[1:], strict=False))
    assert len(found.h) == len(found.remainders) == len(found.slopes) + 1
    assert found.value == pytest.approx(float(smooth(*inputs())))


def test_remainders_of_a_gradient_wrong_by_a_thousandth_do_not() -> None:
    found = check.taylor_test(lambda x, z: smooth(Wrong.apply(x), z), inputs(), h=1e-2, halvings=12)
    assert found.slope == pytest.approx(1, abs=0.1)


def test_remainders_of_a_missing_gradient_do_not() -> None:
    found = check.taylor_test(lambda x, z: smooth(x, z.detach()), inputs())
    assert found.slope == pytest.approx(1, abs=0.1)


def test_an_unused_input_is_no_harm() -> None:
    assert check.taylor_test(lambda x, unused: x.sin().sum(), inputs()).slope == pytest.approx(2, abs=0.05)


def test_a_linear_loss_leaves_rounding_only_and_no_slope() -> None:
    found = check.taylor_test(lambda x: x.sum(), (numbers(3),))
    assert math.isnan(found.slope)


def test_another_seed_is_another_direction() -> None:
    assert check.taylor_test(smooth, inputs(), seed=1).derivative != check.taylor_test(smooth, inputs()).derivative


@every_method
def test_a_solve_passes_in_parameters_states_and_times(method: str) -> None:
    how = steps_of(method) | ({"rtol": 1e-4} if METHODS[method].adaptive else {})

    def loss(p: Tensor, y0: Tensor, t: Tensor) -> Tensor:
        return loss_of(solve(lambda t, y: p * torch.sin(y) + t, y0, t, slots=2, **how).ys)

    times = torch.tensor(TIMES, dtype=torch.float64)
    assert check.taylor_test(loss, (numbers(2, seed=1), numbers(2, seed=2), times)).slope == pytest.approx(2, abs=0.05)


@every_method
def test_times_may_lie_where_another_step_would_begin(method: str) -> None:
    """Intervals of exactly two steps: a hair more would take three, were their number not frozen."""

    def loss(t: Tensor) -> Tensor:
        return loss_of(solve(lambda t, y: torch.sin(y) + t, numbers(2), t, method=method, dt=0.25).ys)

    assert check.taylor_test(loss, (torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64),)).slope == pytest.approx(
        2, abs=0.05
    )


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_a_solve_whose_gradient_is_cut_fails(gradient: str) -> None:
    def loss(p: Tensor) -> Tensor:
        return loss_of(solve(lambda t, y: (p + p.detach()) * y, numbers(2), TIMES, method="rk4", gradient=gradient).ys)

    assert check.taylor_test(loss, (numbers(2, seed=1),)).slope == pytest.approx(1, abs=0.1)


def test_a_scan_passes() -> None:
    def loss(c: Tensor, x: Tensor) -> Tensor:
        return loss_of(scan(lambda c, x: (torch.tanh(c * x), c), c, x, slots=1))

    assert check.taylor_test(loss, (numbers(3), numbers(5, 3, seed=1))).slope == pytest.approx(2, abs=0.05)


@every_method
def test_a_difference_along_a_direction_is_the_gradient_in_it(method: str) -> None:
    how = steps_of(method) | ({"rtol": 1e-4} if METHODS[method].adaptive else {})
    p, y0 = numbers(2, seed=1), numbers(2, seed=2)

    def loss(p: Tensor, y0: Tensor) -> Tensor:
        return loss_of(solve(lambda t, y: p * torch.sin(y), y0, TIMES, slots=2, **how).ys)

    directions = (numbers(2, seed=3), numbers(2, seed=4))
    found = torch.autograd.grad(loss(p.requires_grad_(), y0.requires_grad_()), (p, y0))
    along = sum(float((g * v).sum()) for g, v in zip(found, directions, strict=True))
    difference = check.directional_difference(loss, (p.detach(), y0.detach()), directions, h=1e-5)
    assert along == pytest.approx(difference, rel=1e-8)  # h^2 and eps / h are 1e-10
    assert 1.001 * along != pytest.approx(difference, rel=1e-8)


def test_a_transpose_passes_the_dot_test_and_anything_else_fails() -> None:
    a = numbers(3, 4)
    v, w = numbers(4, seed=1), numbers(3, seed=2)
    assert check.dot_test(lambda x: a @ x, lambda y: a.T @ y, v, w) < 1e-14
    assert check.dot_test(lambda x: a @ x, lambda y: 1.001 * a.T @ y, v, w) == pytest.approx(1e-3, rel=1e-2)
    assert check.dot_test(lambda x: 0 * x, lambda y: 0 * y, v, v) == 0


def test_the_dot_test_takes_arrays_and_complex_numbers() -> None:
    a = numbers(3, 3, dtype=torch.complex128)
    v, w = numbers(3, seed=1, dtype=torch.complex128), numbers(3, seed=2, dtype=torch.complex128)
    assert check.dot_test(lambda x: a @ x, lambda y: a.mH @ y, v, w) < 1e-14
    assert check.dot_test(lambda x: a @ x, lambda y: a.T @ y, v, w) > 1e-2
    matrix, one = np.arange(9.0).reshape(3, 3), np.ones(3)
    assert check.dot_test(lambda x: matrix @ x, lambda y: matrix.T @ y, one, one * 2) < 1e-14


def pulled(p: Tensor, **how: Any) -> Any:
    """y' = p (cos t - y): the faster, the shorter the steps."""
    y0 = torch.zeros(1, dtype=torch.float64)
    return solve(lambda t, y: p * (torch.cos(t) - y), y0, (0.0, 0.4, 1.0), **({"rtol": 1e-4} | how))


@pytest.mark.parametrize("method", [name for name, tableau in METHODS.items() if tableau.adaptive])
def test_frozen_steps_are_taken_again_whatever_the_parameter(method: str) -> None:
    first, second = (torch.tensor(x, dtype=torch.float64) for x in (1.0, 60.0))
    free = [pulled(p, method=method).stats for p in (first, second)]
    assert free[0].steps != free[1].steps
    with frozen_steps() as replay:
        noted = pulled(first, method=method)
        replay.rewind()
        same = pulled(first, method=method)
        assert torch.equal(noted.ys, same.ys) and same.stats.rejected == 0
        replay.rewind()
        other = pulled(second, method=method)
        assert other.stats.steps == noted.stats.steps == free[0].steps
        assert not torch.equal(other.ys, noted.ys)
    assert pulled(second, method=method).stats.steps == free[1].steps


@pytest.mark.parametrize("gradient", ["discrete", "backprop", "backsolve"])
def test_frozen_steps_have_the_same_gradient(gradient: str) -> None:
    p = torch.tensor(0.5, dtype=torch.float64).requires_grad_()
    with frozen_steps() as replay:
        (free,) = torch.autograd.grad(pulled(p, gradient=gradient).ys.sum(), p)
        replay.rewind()
        (frozen,) = torch.autograd.grad(pulled(p, gradient=gradient).ys.sum(), p)
    assert float(frozen) == pytest.approx(float(free), rel=1e-12)


def test_a_replay_of_more_solves_than_were_noted_is_refused() -> None:
    p = torch.tensor(0.5, dtype=torch.float64)
    with frozen_steps() as replay:
        pulled(p)
        replay.rewind()
        pulled(p)
        with pytest.raises(RuntimeError, match="only 1 solves were noted; a replay must make as many"):
            pulled(p)


def test_a_replay_of_another_kind_of_solve_is_refused() -> None:
    with frozen_steps() as replay:
        pulled(torch.tensor(0.5, dtype=torch.float64))
        replay.rewind()
        with pytest.raises(RuntimeError, match="fixed steps"):
            solve(lambda t, y: y, torch.ones(1), (0.0, 1.0), method="rk4")
