"""Continuous adjoints along the dense solution: they converge, where backsolve is lost too, and checkpoints do not matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import Backsolve, Gauss, Interpolating, Quadrature
from adjoint.interpolating import DEEPEST, gauss, kronrod

D = torch.float64
ALONG = ["interpolating", "quadrature", "gauss"]


def gradients(gradient: Any, tolerance: float = 1e-6, **how: Any) -> Tensor:
    """Of a stiffly damped oscillator: backwards its fast mode grows by exp(40 t)."""
    p = torch.tensor([1.5, 40.0, 0.3], dtype=D, requires_grad=True)
    y0 = torch.tensor([1.0, 0.2, 0.5], dtype=D, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 1.0, 2.5], dtype=D, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], -p[0] * torch.sin(y[0]) - p[2] * y[1] * t, p[1] * (torch.cos(y[0] + t) - y[2])))

    s = adjoint.solve(f, y0, t, gradient=gradient, **{"rtol": tolerance, "atol": tolerance} | how)
    weights = torch.arange(1.0, 13.0, dtype=D).reshape(4, 3).cos()
    return torch.cat(torch.autograd.grad((weights * s.ys).sum(), (p, y0, t)))


TRUTH = gradients("discrete", 1e-11, method="dopri8")


def error(gradient: Any, tolerance: float = 1e-6, **how: Any) -> float:
    return float((gradients(gradient, tolerance, **how) - TRUTH).norm() / TRUTH.norm())


@pytest.mark.parametrize("gradient", ALONG)
def test_the_error_follows_the_tolerance(gradient: str) -> None:
    for tolerance in (1e-4, 1e-7):
        assert error(gradient, tolerance) < 30 * tolerance  # that of the forward solve: equal in all three


def test_backsolve_has_no_digit_left_there() -> None:
    found = {}
    for gradient in ("discrete", "backsolve", *ALONG):
        k = torch.tensor(10.0, dtype=D, requires_grad=True)
        f = lambda t, y, k=k: torch.stack((k * (torch.cos(t) - y[0]), y[0]))  # noqa: E731
        s = adjoint.solve(f, torch.tensor([1.0, 0.0], dtype=D), [0.0, 4.0], gradient=gradient)
        found[gradient] = torch.autograd.grad(s.ys[-1, 1], k)[0].item()
    for gradient in ALONG:
        assert found[gradient] == pytest.approx(found["discrete"], rel=1e-3)
    assert not abs(found["backsolve"] / found["discrete"] - 1) < 1


@pytest.mark.parametrize("gradient", ALONG)
def test_fixed_steps_converge(gradient: str) -> None:
    errors = [error(gradient, method="rk4", dt=dt) for dt in (0.05, 0.025)]
    assert errors[1] < errors[0] / 8 and errors[1] < 1e-3


@pytest.mark.parametrize("kind", [Interpolating, Quadrature, Gauss])
def test_few_checkpoints_or_many(kind: Any) -> None:
    """The steps taken again have the bits of the first ones; what differs is where the backward solve starts anew."""
    few, many = (gradients(kind(checkpoints=n), 1e-6) for n in (1, 100))
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)


def test_a_backward_solve_of_its_own() -> None:
    """Its tolerances and its method are its own; with a good forward solve they decide."""
    errors = [error(Interpolating(rtol=x, atol=x, method="dopri5"), 1e-9) for x in (1e-2, 1e-5)]
    assert errors[0] > 100 * errors[1]
    assert error(Interpolating(norm="seminorm"), 1e-6) < 1e-4
    assert error(Gauss(nodes=1), 1e-8) > 10 * error(Gauss(nodes=3), 1e-8)


def test_a_loss_between_the_ends_alone_and_one_that_is_constant() -> None:
    rate = torch.tensor(0.7, dtype=D, requires_grad=True)
    for gradient in ALONG:
        s = adjoint.solve(lambda t, y: -rate * y, torch.ones(2, dtype=D), [0.0, 1.0, 9.0], gradient=gradient, rtol=1e-9)
        found = torch.autograd.grad(s.ys[1].sum(), rate, retain_graph=True)[0]
        assert found.item() == pytest.approx(-2 * math.exp(-0.7), rel=1e-7)
        assert torch.autograd.grad(s.ys[1].sum() * 0, rate)[0].item() == 0


def test_other_doors_and_trees() -> None:
    rate = torch.tensor(0.7, dtype=D, requires_grad=True)
    y0 = {"a": torch.ones(2, dtype=torch.complex128), "b": torch.ones((), dtype=D)}
    f = lambda t, y: {"a": 1j * rate * y["a"], "b": -rate * y["b"]}  # noqa: E731
    expected = torch.autograd.grad(2 * torch.cos(2 * rate) + torch.exp(-2 * rate), rate)[0].item()
    t = torch.tensor([0.0, 2.0], dtype=D)
    for gradient in ALONG:
        for how in ({"method": "dopri5"}, {"method": "explicit_adams", "options": {"step_size": 0.02, "max_order": 5}}):
            ys = adjoint.odeint_adjoint(f, y0, t, gradient=gradient, rtol=1e-8, atol=1e-8, **how)
            value = ys["a"][-1].real.sum() + ys["b"][-1]
            assert torch.autograd.grad(value, rate)[0].item() == pytest.approx(expected, abs=2e-6)


def test_quadrature_rules() -> None:
    """Gauss with n nodes is exact to degree 2n - 1, Kronrod's 15 nodes to 22; halving finds a kink."""
    for nodes in range(1, 6):
        places, weights = gauss(nodes)
        for degree in range(2 * nodes):
            found = sum(w * x**degree for w, x in zip(weights, places, strict=True))
            assert found == pytest.approx(0 if degree % 2 else 2 / (degree + 1), abs=1e-14)

    calls = [0]

    def power(degree: int) -> Any:
        def integrand(t: float) -> tuple[Tensor, ...]:
            calls[0] += 1
            return (torch.tensor(t, dtype=D) ** degree,)

        return integrand

    for degree in range(23):
        assert kronrod(power(degree), 0.0, 1.0, 1.0, 1.0)[0].item() == pytest.approx(1 / (degree + 1), abs=1e-15)
    calls[0] = 0
    kink = kronrod(
        lambda t: (calls.__setitem__(0, calls[0] + 1), (torch.tensor(abs(t - 0.3), dtype=D),))[1], 0, 1, 0, 1e-6
    )
    assert kink[0].item() == pytest.approx(0.29, abs=1e-6) and 15 < calls[0] <= 30 * DEEPEST + 15


def test_wrong_calls_get_a_sentence() -> None:
    for wrong, sentence in (
        (lambda: Interpolating(norm="semi"), "norm='semi' of a backward solve is unknown"),
        (lambda: Gauss(nodes=0), "nodes=0 integrates nothing"),
        (lambda: gradients(Quadrature(checkpoints=0)), "checkpoints=0 keeps not even the first state"),
        (lambda: gradients(Interpolating(rtol=(1e-3, 1e-4))), "2 tolerances for 1 leaves"),
        (lambda: gradients("gauss", check=True), "gradient='gauss' does not do that"),
        (lambda: gradients("gauss", events=[adjoint.At([0.5])]), "events= and gradient='gauss'"),
        (lambda: gradients(Backsolve(norm=3)), "norm=3 of a backward solve is unknown"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=sentence):
            wrong()
