"""Jacobians and factorisations that serve several steps: fewer of them, the same bits in any memory, exact gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adjoint_cases import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adjoint import Dense, Implicit, Newton, SolveError, Sparse, check, frozen_steps, solve

D = torch.float64
METHODS = ("kvaerno3", "kvaerno5", "radau5", "trbdf2", "kencarp4")


def system(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Rates from 1 to 1e4 in random directions, and where to begin."""
    source = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, dtype=D, generator=source))[0]
    matrix = turn @ torch.diag(-torch.logspace(0, 4, size, dtype=D)) @ turn.T
    return matrix, torch.randn(size, dtype=D, generator=source)


def forced(t: Tensor, y: Tensor, matrix: Tensor, p: Tensor) -> Tensor:
    """Stiff, not linear, and with another Jacobian at every time."""
    return matrix @ (y - torch.cos(p[0] * t)) * (1 + 0.5 * torch.sin(3 * t)) + p[1] * torch.tanh(y) ** 2


def value(p: Tensor, y0: Tensor, matrix: Tensor, method: Any, **how: Any) -> Tensor:
    solution = solve(forced, y0, [0.0, 0.1, 0.15], args=(matrix, p), method=method, rtol=1e-3, atol=1e-5, **how)
    return solution.ys[1:].square().sum()


@settings(max_examples=5, deadline=None)
@given(
    name=st.sampled_from(METHODS),
    size=st.integers(1, 4),
    seed=st.integers(0, 1000),
    reuse=st.sampled_from((0.01, 0.3)),
    drift=st.booleans(),
)
def test_the_gradient_has_the_same_bits_in_any_memory_and_is_that_of_the_tangents(
    name: str, size: int, seed: int, reuse: float, drift: bool
) -> None:
    matrix, start = system(seed, size)
    linear = Sparse(np.ones((size, size))) if drift else Dense()
    method = Implicit(name, newton=Newton(reuse=reuse), linear=linear)

    def gradient(**how: Any) -> list[Tensor]:
        p, y0 = torch.tensor([2.0, 0.3], dtype=D).requires_grad_(), start.clone().requires_grad_()
        return list(torch.autograd.grad(value(p, y0, matrix, method, **how), (p, y0)))

    with frozen_steps() as replay:
        expected = gradient(slots="all")
        replay.rewind()
        tangent = gradient(gradient="tangent", slots="all")
    assert_same_bits(gradient(slots=4), expected)
    for a, b in zip(tangent, expected, strict=True):
        assert float((a - b).norm()) <= 1e-10 * float(b.norm()) + 1e-13


@pytest.mark.parametrize("name", ["kvaerno5", "radau5"])
def test_few_jacobians_serve_many_steps_without_a_loss_of_accuracy(name: str) -> None:
    matrix, y0 = system(1, 3)
    p = torch.tensor([2.0, 0.3], dtype=D)
    found = {}
    for reuse in (0.0, 0.05):
        method = Implicit(name, newton=Newton(reuse=reuse))
        found[reuse] = solve(forced, y0, [0.0, 1.0], args=(matrix, p), method=method, rtol=1e-4, atol=1e-7)
    every, few = found[0.0].stats, found[0.05].stats
    assert every.jacobians == every.steps
    assert few.jacobians < every.jacobians / 2 and few.steps <= 1.1 * every.steps
    exact = solve(forced, y0, [0.0, 1.0], args=(matrix, p), method="rodas5p", rtol=1e-7, atol=1e-9).ys[-1]
    errors = [float((x.ys[-1] - exact).norm()) for x in found.values()]
    assert max(errors) < 1e-3


def test_sparse_factorisations_serve_steps_of_other_lengths() -> None:
    matrix, y0 = system(1, 3)
    p = torch.tensor([2.0, 0.3], dtype=D)
    how: dict[str, Any] = {"args": (matrix, p), "rtol": 1e-4, "atol": 1e-7}
    sparse = Implicit("kvaerno5", linear=Sparse(np.ones((3, 3))), newton=Newton(reuse=0.05))
    stats = solve(forced, y0, [0.0, 1.0], method=sparse, **how).stats
    assert stats.factorisations < stats.steps


@pytest.mark.parametrize("name", ["kvaerno5", "radau5"])
def test_a_kept_jacobian_leaves_the_taylor_remainder_quadratic(name: str) -> None:
    matrix, y0 = system(3, 3)
    method = Implicit(name, newton=Newton(kappa=1e-5, reuse=0.3))
    taylor = check.taylor_test(
        lambda p: value(p, y0, matrix, method), [torch.tensor([2.0, 0.3], dtype=D)], h=1e-2, halvings=2
    )
    assert taylor.slopes[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", ["kvaerno3", "radau5"])
def test_a_jacobian_ends_at_a_jump(name: str) -> None:
    """After the jump the equation is a thousand times stiffer."""
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    f = lambda t, y: -rate * torch.where(t < 0.5, 1.0, 1000.0) * y  # noqa: E731
    y0 = torch.ones(1, dtype=D)
    found = []
    for slots in ("all", 4):
        y = solve(f, y0, [0.0, 0.5, 0.502], method=name, rtol=1e-5, atol=1e-8, jumps=[0.5], slots=slots).ys
        found.append([y.detach(), *torch.autograd.grad(y[-1].sum(), rate)])
    assert_same_bits(*found)
    exact = torch.exp(torch.tensor([-0.5, -2.5], dtype=D))
    assert torch.allclose(found[0][0][1:, 0], exact, rtol=1e-4)
    assert torch.allclose(found[0][1], -2.5 * exact[1], rtol=1e-4)


def test_steps_that_were_rejected_leave_no_trace_in_those_computed_again() -> None:
    """Radau's first node lies inside the step: a Jacobian made there would be that of the step tried first."""
    p = torch.tensor(30.0, dtype=D)
    f = lambda t, y, p: -p * (1 + 0.9 * torch.sin(40 * t * t)) * (y - torch.cos(3 * t))  # noqa: E731
    found = []
    for slots in ("all", 5):
        own = p.clone().requires_grad_()
        solution = solve(f, torch.zeros(2, dtype=D), [0.0, 1.0], args=(own,), method="radau5", rtol=1e-4, slots=slots)
        found.append([solution.ys.detach(), *torch.autograd.grad(solution.ys[-1].sum(), own)])
    assert solution.stats.rejected > 0
    assert_same_bits(*found)


def test_a_fixed_step_that_newton_does_not_find_ends_the_solve_with_a_status_and_the_last_good_state() -> None:
    """y' = -1 above zero and 1 below: the third step of 0.75 has no solution."""
    slope = torch.tensor(1.0, dtype=D, requires_grad=True)
    f = lambda t, y: torch.where(y > 0, -slope, slope) * torch.ones_like(y)  # noqa: E731
    how: dict[str, Any] = {"method": "backward_euler", "dt": 0.75}
    y0, times = torch.tensor([1.0], dtype=D), [0.0, 0.75, 3.0]
    with pytest.raises(SolveError, match=r"stages of step 1, from t=0.75 to 1.5 .*component \(0,\) moves most"):
        solve(f, y0, times, **how)
    for slots in ("all", 1):
        found = solve(f, y0, times, throw=False, slots=slots, **how)
        assert found.status == "newton" and found.last_t == 0.75
        assert found.last_y.tolist() == [0.25] and found.ys[1].tolist() == [0.25] and found.ys[2].isnan().all()
        assert found.stats.newton_failures >= 1
        (of_slope,) = torch.autograd.grad(found.ys[1].sum(), slope)
        assert float(of_slope) == -0.75
