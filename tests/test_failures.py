"""A solve that fails says where, in which component and what to try, and hands over its last good state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjoint_cases import ADAPTIVE, FIXED, METHODS, assert_close, leaf, numbers
from torch import Tensor

from adjoint import GRADIENTS, MULTISTEP, SolveError, odeint, odeint_adjoint, solve

CPU = torch.device("cpu")
START = torch.tensor([[0.5, 1.0], [0.2, 0.1]], dtype=torch.float64)
TIMES = (0.0, 0.5, 2.0)


def explode(t: Tensor, y: Tensor) -> Tensor:
    """y' = y^2 is infinite at t = 1 / y0: here at t = 1, in component (0, 1)."""
    return y**2


def leave(t: Tensor, y: Tensor) -> Tensor:
    """Undefined from t = 1 on."""
    return -torch.sqrt(1 - t) * y


def steps(method: str) -> dict[str, Any]:
    adaptive = method in METHODS and METHODS[method].adaptive
    return {"method": method} | ({"rtol": 1e-3, "max_steps": 2000} if adaptive else {"dt": 0.05})


@pytest.mark.filterwarnings("ignore:.*corrector did not converge")
@pytest.mark.parametrize("f", [explode, leave])
@pytest.mark.parametrize("method", [*METHODS, *MULTISTEP])
def test_the_last_good_state_is_where_the_solve_stopped(method: str, f: Any) -> None:
    how = steps(method)
    with pytest.raises(SolveError, match=r"try a smaller dt|allow more|may blow up|keep y inside") as error:
        solve(f, START, TIMES, **how)
    failure = error.value
    assert "component (" in str(failure)
    assert 0 <= failure.t < 2 and failure.step > 0 and f"{failure.t:.6g}" in str(failure)
    assert failure.y.shape == START.shape and failure.y.isfinite().all()
    if method in FIXED:  # whoever goes on from there breaks down at once
        with pytest.raises(SolveError) as again:
            solve(f, failure.y, (failure.t, failure.t + 0.05), method=method)
        assert again.value.t == failure.t
    solution = solve(f, START, TIMES, throw=False, **how)
    assert solution.status == failure.status and solution.last_t == failure.t
    assert_close([solution.last_y], [failure.y])
    assert solution.ys[1].isfinite().all() and not solution.ys[2].isfinite().all()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("slots", ["all", 2])
@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_it_does_not_depend_on_the_gradient(gradient: str, slots: int | str, method: str) -> None:
    alone = solve(explode, START, TIMES, throw=False, **steps(method))
    y0 = START.clone().requires_grad_()
    found = solve(explode, y0, TIMES, throw=False, gradient=gradient, slots=slots, **steps(method))
    assert found.status == alone.status and found.last_t == pytest.approx(alone.last_t)
    assert_close([found.last_y], [alone.last_y], 1e-4 / torch.finfo(torch.float64).eps)  # near a pole
    assert not found.last_y.requires_grad


def test_a_solve_that_succeeds_has_none() -> None:
    solution = solve(explode, START, (0.0, 0.5))
    assert solution.last_y is None and solution.last_t is None


def test_trees_costs_and_observations_keep_their_shape() -> None:
    tree = {"a": [START], "b": START[0]}
    f = lambda t, y: {"a": [y["a"][0] ** 2], "b": -y["b"]}  # noqa: E731
    for extra in ({}, {"cost": lambda t, y: y["b"].sum()}, {"observe": lambda t, y: y["b"].sum()}):
        solution = solve(f, tree, TIMES, throw=False, **extra)
        assert solution.status == "underflow" and f"{solution.last_t:.2f}" == "1.00"
        assert solution.last_y["a"][0].shape == (2, 2) and solution.last_y["b"].shape == (2,)
        with pytest.raises(SolveError) as error:
            solve(f, tree, TIMES, **extra)
        assert_close([error.value.y["b"]], [solution.last_y["b"]])


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_each_member_of_a_batch_has_one(method: str) -> None:
    y0 = torch.tensor([[0.1], [1.0], [0.2]], dtype=torch.float64)
    solution = solve(explode, y0, TIMES, batched=True, throw=False, **steps(method))
    assert solution.status[1] != "success" == solution.status[0] and solution.last_y.shape == (3, 1)
    assert solution.last_y.isfinite().all() and solution.last_t.tolist()[0] == 2 and 0.5 < solution.last_t[1] < 2
    assert_close([solution.last_y[::2]], [solution.ys[-1, ::2]])
    with pytest.raises(SolveError) as error:
        solve(explode, y0, TIMES, batched=True, **steps(method))
    assert_close([error.value.y], [solution.last_y])


@pytest.mark.parametrize("door", [odeint, odeint_adjoint])
def test_the_drop_in_hands_it_over_too(door: Any) -> None:
    t = torch.tensor(TIMES, dtype=torch.float64)
    with pytest.raises(SolveError) as error:
        door(lambda t, y: (y[0] ** 2, -y[1]), (START, START), t, method="dopri5")
    assert isinstance(error.value.y, tuple) and error.value.y[1].shape == (2, 2)
    assert error.value.t == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", ADAPTIVE[:3])
def test_a_slope_that_ceases_to_be_a_number_is_named(method: str) -> None:
    with pytest.raises(SolveError, match=r"no number: f is not finite a little further on|f is not finite at t="):
        solve(leave, START, TIMES, **steps(method))
    with pytest.raises(SolveError, match=r"f is not finite at t=0, step 0.*keep y inside"):
        solve(lambda t, y: torch.log(-y), START, TIMES, **steps(method))


def test_the_gradient_of_what_was_reached_is_there() -> None:
    p = leaf(2, seed=1, on=CPU, scale=0.1)
    solution = solve(lambda t, y: torch.exp(p) * y**2, numbers(2).abs() + 0.5, (0.0, 0.1, 9.0), throw=False)
    (found,) = torch.autograd.grad(solution.ys[1].sum(), p)
    assert solution.last_t > 0.1 and found.isfinite().all() and found.all()
