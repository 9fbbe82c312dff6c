"""scipy's solvers in the drop-in: torchdiffeq's values, and the gradients of the equation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import adjoint

D = torch.float64
SOLVERS = ["LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF"]
INTERFACES = [adjoint.odeint, adjoint.odeint_adjoint]


class Decay(nn.Module):
    """y' = -k y + sin(w t), y of two components."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.8, 1.3], dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.p[0] * y + torch.sin(self.p[1] * t)

    def solution(self, t: Tensor, y0: Tensor) -> Tensor:
        k, w = self.p
        t = t[:, None]
        particular = (k * torch.sin(w * t) - w * torch.cos(w * t)) / (k**2 + w**2)
        return particular + (y0 + w / (k**2 + w**2)) * torch.exp(-k * t)


def asked(solver: Any, **more: Any) -> dict[str, Any]:
    return {"method": "scipy_solver", "options": {"solver": solver, **more}, "rtol": 1e-8, "atol": 1e-10}


@pytest.mark.parametrize("solver", SOLVERS)
def test_values_are_torchdiffeqs_and_gradients_those_of_the_equation(solver: str) -> None:
    f, t = Decay(), torch.tensor([0.0, 0.7, 2.0], dtype=D)
    y0 = torch.tensor([1.0, -0.5], dtype=D, requires_grad=True)
    rough = 3e-5 if solver in ("BDF", "RK23", "LSODA") else 1e-6
    with torch.no_grad():
        theirs = torchdiffeq.odeint(f, y0, t, **asked(solver))
    for odeint in INTERFACES:
        ys = odeint(f, y0, t, **asked(solver))
        tight = {"rtol": rough, "atol": rough} if solver in ("LSODA", "BDF", "Radau") else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(ys, theirs, **tight)  # implicit ones have an exact Jacobian here
        found = torch.autograd.grad(ys.square().sum(), (y0, f.p))
        for a, b in zip(found, torch.autograd.grad(f.solution(t, y0).square().sum(), (y0, f.p)), strict=True):
            torch.testing.assert_close(a, b, rtol=rough, atol=rough)


def test_gradients_of_times_trees_complex_numbers_and_backwards_in_time() -> None:
    rate = torch.tensor(0.5, dtype=D, requires_grad=True)
    y0 = (
        torch.tensor([1.0 + 0j], dtype=torch.complex128, requires_grad=True),
        torch.ones(2, dtype=D, requires_grad=True),
    )
    t = torch.tensor([1.0, 0.2, -1.0], dtype=D, requires_grad=True)

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return 1j * rate * t * y[0], -rate * y[1]

    z, x = adjoint.odeint_adjoint(f, y0, t, **asked("DOP853"))
    expected_z = y0[0] * torch.exp(0.5j * rate * (t**2 - t[0] ** 2))[:, None]
    expected_x = y0[1] * torch.exp(-rate * (t - t[0]))[:, None]
    torch.testing.assert_close(z, expected_z, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(x, expected_x, rtol=1e-7, atol=1e-8)
    inputs = (*y0, rate, t)
    found = torch.autograd.grad((z.real + 2 * z.imag).sum() + x.square().sum(), inputs)
    expected = torch.autograd.grad((expected_z.real + 2 * expected_z.imag).sum() + expected_x.square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_stiff_gradient_is_stable_and_agrees_with_the_discrete_one() -> None:
    """Solved backwards, the state of this equation would grow by e^1000."""
    k = torch.tensor(1000.0, dtype=D, requires_grad=True)
    y0, t = torch.tensor([2.0], dtype=D), torch.tensor([0.0, 1.0], dtype=D)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -k * (y - torch.cos(t))

    for solver in ("LSODA", "Radau", "BDF"):
        y = adjoint.odeint(f, y0, t, **asked(solver))[-1]
        expected = (k**2 * math.cos(1.0) + k * math.sin(1.0)) / (k**2 + 1)
        torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=0.0)
        found, known = (torch.autograd.grad(x, k)[0] for x in (y[0], expected))
        torch.testing.assert_close(found, known, rtol=0.0, atol=1e-8)  # which is 8e-7: the tolerance of the solve


def test_single_precision_and_unused_parameters() -> None:
    unused = nn.Parameter(torch.ones(2))
    y0 = torch.ones(3, requires_grad=True)

    class F(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.k = unused, nn.Parameter(torch.tensor(0.5))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -self.k * y

    f = F()
    y = adjoint.odeint_adjoint(f, y0, torch.tensor([0.0, 1.0]), method="scipy_solver", rtol=1e-5, atol=1e-6)
    assert y.dtype is torch.float32
    y[-1].sum().backward()
    assert torch.equal(unused.grad, torch.zeros(2)) and y0.grad is not None
    torch.testing.assert_close(y0.grad, torch.full((3,), math.exp(-0.5)), rtol=1e-3, atol=1e-4)
    assert f.k.grad is not None and f.k.grad.item() == pytest.approx(-3 * math.exp(-0.5), rel=1e-3)


def test_what_it_cannot_do_is_refused_by_name() -> None:
    f, t = Decay(), torch.tensor([0.0, 0.7], dtype=D)
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    how = asked("LSODA")
    wrong: list[tuple[Any, str]] = [
        (lambda: adjoint.odeint_event(f, y0, 0.0, event_fn=lambda t, y: y[0] - 0.5, **how), "meets no events"),
        (lambda: adjoint.odeint_dense(f, y0, 0.0, 1.0, **how), "gives no function of time"),
        (lambda: adjoint.odeint(f, y0, t, slots=3, **how), "slots=3"),
        (lambda: adjoint.odeint(f, y0, t, gradient="tangent", **how), "gradient=Tangent"),
        (lambda: adjoint.odeint(f, y0, t, **asked("LSODE")), "solver='LSODE'"),
        (lambda: adjoint.odeint(f, y0, t, **asked("RK45", min_step=0.1)), "min_step=0.1"),
        (lambda: adjoint.odeint_adjoint(f, y0, t, adjoint_method="dopri5", **how), "adjoint_method='dopri5'"),
        (lambda: adjoint.odeint_adjoint(f, y0, t, adjoint_method="scipy_solver"), "goes with method='scipy_solver'"),
    ]
    for call, said in wrong:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(TypeError, match="is no solver of scipy"):
        adjoint.odeint(f, y0, t, **asked(3))
    with pytest.warns(UserWarning, match="takes no options"):
        adjoint.odeint(f, y0, t, **asked("LSODA", step_size=0.1))
    y = adjoint.odeint(f, y0, t, **how)[-1].sum()
    (first,) = torch.autograd.grad(y, y0, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), f.p)
    with pytest.raises(adjoint.SolveError, match="scipy's RK45 ended at t="):
        adjoint.odeint(lambda t, y: y**2, y0, torch.tensor([0.0, 2.0], dtype=D), **asked("RK45"))


class Foreign:
    level = torch.tensor(0.5, dtype=D, requires_grad=True)


def test_a_tensor_that_cannot_be_followed_is_refused() -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y * Foreign.level if t > 0.5 else -y

    with pytest.raises(adjoint.UntrackedTensorError):
        adjoint.odeint(
            f, torch.ones(2, dtype=D, requires_grad=True), torch.tensor([0.0, 1.0], dtype=D), **asked("RK45")
        )


def test_transforms_of_first_derivatives() -> None:
    t = torch.tensor([0.0, 1.0], dtype=D)

    def last(y0: Tensor, k: Tensor) -> Tensor:
        return adjoint.odeint(lambda t, y: -k * y, y0, t, **asked("DOP853"))[-1]

    one, two = torch.tensor(2.0, dtype=D), torch.tensor([0.5, 1.0], dtype=D)
    assert torch.func.grad(last, argnums=1)(one, two[0]).item() == pytest.approx(-2 * math.exp(-0.5))
    torch.testing.assert_close(torch.func.vmap(last, (None, 0))(one, two), 2 * torch.exp(-two), rtol=1e-7, atol=0.0)
