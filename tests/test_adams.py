"""Adams methods: their coefficients, their order, and the laws that every step keeps."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import MULTISTEP, Adams, check, frozen_steps, solve
from adjoint.steppers.adams import HIGHEST, bashforth, moulton

every_method = pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
D = torch.float64


def pendulum(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    return torch.stack((y[1], -rates[0] * torch.sin(y[0]) - rates[1] * y[1] + 0.1 * torch.cos(t)))


def setting() -> tuple[Tensor, Tensor, Tensor]:
    y0 = torch.tensor([1.0, 0.3], dtype=D, requires_grad=True)
    rates = torch.tensor([1.3, 0.2], dtype=D, requires_grad=True)
    return y0, rates, torch.linspace(0, 1.2, 4, dtype=D).requires_grad_()


def gradients(method: str | Adams, **how: Any) -> list[Tensor]:
    y0, rates, t = setting()
    ys = solve(pendulum, y0, t, args=(rates,), method=method, dt=0.07, **how).ys
    return [ys.detach(), *torch.autograd.grad((ys**2).sum(), (y0, rates, t))]


def test_known_coefficients() -> None:
    assert bashforth(1) == (1.0,)
    assert bashforth(4) == pytest.approx([float(Fraction(n, 24)) for n in (55, -59, 37, -9)], rel=1e-15)
    assert moulton(4) == pytest.approx([float(Fraction(n, 24)) for n in (9, 19, -5, 1)], rel=1e-15)


@pytest.mark.parametrize("order", range(1, HIGHEST + 1))
def test_a_method_of_an_order_integrates_polynomials_below_it_exactly(order: int) -> None:
    for power in range(order):
        old = sum(b * float(-j) ** power for j, b in enumerate(bashforth(order)))
        new = sum(m * float(1 - j) ** power for j, m in enumerate(moulton(order)))
        scale = sum(abs(b) * float(j + 1) ** power for j, b in enumerate(bashforth(order)))
        assert abs(old - 1 / (power + 1)) <= 1e-15 * scale
        assert abs(new - 1 / (power + 1)) <= 1e-15 * scale


@every_method
def test_the_gradient_does_not_depend_on_the_slots(method: str) -> None:
    everything = gradients(method, slots="all")
    for slots in (1, 2, 3, 7):
        assert all(map(torch.equal, gradients(method, slots=slots), everything))
    graph = gradients(method, gradient="backprop")
    for a, b in zip(everything, graph, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@every_method
def test_a_budget_holds_the_history(method: str) -> None:
    everything = gradients(method, slots="all")
    y0, rates, t = setting()
    solution = solve(pendulum, y0, t, args=(rates,), method=method, dt=0.01, budget="150 KiB")
    assert solution.plan is not None
    assert solution.plan.bytes <= 150 * 1024
    assert all(map(torch.equal, gradients(method, budget="150 KiB"), everything))


def error(method: str, dt: float, t: tuple[float, ...] = (0.0, 1.0), restart: bool = True) -> float:
    own = Adams(method, MULTISTEP[method].implicit, max_order=5, restart=restart)
    start, how = torch.ones((), dtype=D), {"rtol": 1e-8, "atol": 1e-10}
    y = solve(lambda t, y: torch.cos(t) * y, start, list(t), method=own, dt=dt, **how).ys[-1]  # type: ignore[arg-type]
    return abs(float(y) - math.exp(math.sin(1.0)))


@every_method
def test_order_four_from_the_start_on(method: str) -> None:
    errors = [error(method, dt) for dt in (0.1, 0.05, 0.025)]
    assert errors[0] / errors[1] > 14
    assert errors[1] / errors[2] > 14


@every_method
def test_a_step_of_another_length_starts_afresh(method: str) -> None:
    """Coefficients are those of equal steps."""
    uneven = (0.0, 0.5, 0.52, 1.0)
    assert 5 * error(method, 0.05, uneven) < error(method, 0.05, uneven, restart=False)


def test_iterations_are_frozen_with_the_steps() -> None:
    """A finite difference must take the iterations that the gradient is of, whatever the tolerance says."""
    y0, rates, t = setting()
    how: dict[str, Any] = {"method": "implicit_adams", "dt": 0.07, "rtol": 1e-3, "atol": 1e-3}

    def loss(rates: Tensor) -> Tensor:
        return (solve(pendulum, y0.detach(), t.detach(), args=(rates,), **how).ys ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(rates), rates)
    along = torch.tensor([0.3, -0.8], dtype=D)
    assert check.directional_difference(loss, [rates.detach()], [along], h=1e-5) == pytest.approx(
        float(gradient @ along), rel=1e-8
    )
    with frozen_steps() as replay:
        first = loss(rates)
        replay.rewind()
        assert torch.equal(first, loss(rates))


@every_method
@pytest.mark.parametrize(
    "how", [{}, {"observe_at": "steps"}, {"cost": lambda t, y, rates: (y**2).sum() * rates[0] + t}]
)
def test_observations_and_costs(method: str, how: dict[str, Any]) -> None:
    def found(**memory: Any) -> list[Tensor]:
        y0, rates, t = setting()
        how.setdefault("observe", lambda t, y: y * rates.detach()[0] * t)
        solution = solve(pendulum, y0, t, args=(rates,), method=method, dt=0.1, **how, **memory)
        loss = solution.observed.pow(2).sum() + (solution.costs.sum() if "cost" in how else 0.0)
        return [loss.detach(), *torch.autograd.grad(loss, (y0, rates, t))]

    everything = found(slots="all")
    assert all(map(torch.equal, found(slots=2), everything))
    for other in ({"gradient": "backprop"}, {"gradient": "tangent"}):
        for a, b in zip(found(**other), everything, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@every_method
def test_second_derivatives_within_slots(method: str) -> None:
    found = []
    for how in ({"gradient": "backprop"}, {"slots": 2}):
        y0, rates, t = setting()
        ys = solve(pendulum, y0, t, args=(rates,), method=method, dt=0.07, **how).ys  # type: ignore[arg-type]
        first = torch.autograd.grad((ys**3).sum(), (y0, rates, t), create_graph=True)
        found.append(torch.autograd.grad(sum(x.sum() ** 2 for x in first), (y0, rates, t)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_corrector_that_does_not_converge_is_warned_of_and_differentiated_as_it_is() -> None:
    def stiff(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * y

    rate = torch.tensor(30.0, dtype=D, requires_grad=True)
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    found = []
    for how in ({"slots": "all"}, {"slots": 2}, {"gradient": "backprop"}):
        with pytest.warns(UserWarning, match="did not converge in 4 iterations at t=.*max_iters"):
            ys = solve(stiff, y0, [0.0, 0.5], args=(rate,), method="implicit_adams", dt=0.05, **how).ys  # type: ignore[arg-type]
        found.append(torch.autograd.grad(ys[-1].sum(), (y0, rate)))
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)


@every_method
def test_trees_complex_numbers_and_second_derivatives(method: str) -> None:
    def f(t: Tensor, y: dict[str, Any], p: Tensor) -> dict[str, Any]:
        return {"a": 1j * p * y["a"], "b": [y["a"].abs() - t * y["b"][0] * p]}

    a = torch.tensor([0.5 + 0.2j], dtype=torch.complex128)
    b = torch.tensor([[0.1], [0.7]], dtype=D)

    def loss(p: Tensor) -> Tensor:
        ys = solve(f, {"a": a, "b": [b]}, [0.0, 0.6], args=(p,), method=method, dt=0.1, gradient="backprop").ys
        return ys["a"].abs().sum() + ys["b"][0].square().sum()

    p = torch.tensor(0.8, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(loss, p)
    assert torch.autograd.gradgradcheck(loss, p)
    exact = torch.autograd.grad(loss(p), p)[0]
    ys = solve(f, {"a": a, "b": [b]}, [0.0, 0.6], args=(p,), method=method, dt=0.1, slots=2).ys
    torch.testing.assert_close(torch.autograd.grad(ys["a"].abs().sum() + ys["b"][0].square().sum(), p)[0], exact)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_below_order_four_every_step_is_one_of_the_three_eighths_rule(order: int) -> None:
    how: dict[str, Any] = {"slots": 2}
    for a, b in zip(gradients(Adams("a", True, max_order=order), **how), gradients("rk4_38", **how), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_wrong_orders_get_a_sentence() -> None:
    for order in (0, 13):
        with pytest.raises(ValueError, match=f"max_order={order} .* give 4 to 12"):
            Adams("a", False, max_order=order)
    with pytest.raises(ValueError, match="max_iters=0"):
        Adams("a", True, max_iters=0)


def test_nothing_is_warned_of_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients("implicit_adams", slots=3)
    assert set(MULTISTEP) == {"explicit_adams", "implicit_adams", "fixed_adams"}
    assert adjoint.MULTISTEP is MULTISTEP
