"""Steady states, by both methods and both kinds of linear algebra, and their derivatives against closed forms."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import check

D = torch.float64
WAYS = [(m, linear) for m in ("pseudo_transient", "newton") for linear in ("dense", "krylov")]
every_way = pytest.mark.parametrize(("method", "linear"), WAYS)


def reactor(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    """Inflow k_0, a reaction of both species, outflow k_1."""
    return torch.stack((k[0] - y[0] * y[1] - y[0], y[0] - k[1] * y[1]))


def exactly(k: Tensor) -> Tensor:
    first = (-1 + (1 + 4 * k[0] / k[1]).sqrt()) * k[1] / 2
    return torch.stack((first, first / k[1]))


@every_way
def test_a_reactor_has_its_closed_form(method: str, linear: str) -> None:
    k = torch.tensor([2.0, 0.5], dtype=D, requires_grad=True)
    found = adjoint.steady_state(reactor, torch.ones(2, dtype=D), args=(k,), method=method, linear=linear)
    torch.testing.assert_close(found.y, exactly(k), rtol=1e-13, atol=0.0)
    assert found.residual < 1e-14 and found.iterations < 20
    for i in range(2):
        mine, known = (torch.autograd.grad(y[i], k, retain_graph=True)[0] for y in (found.y, exactly(k)))
        torch.testing.assert_close(mine, known, rtol=1e-12, atol=0.0)
    assert (found.growth is None) is (linear == "krylov") and (found.growth or -1) < 0


@every_way
def test_the_gradient_passes_the_taylor_test(method: str, linear: str) -> None:
    """Of a tree, some of it complex; what f depends on stands in its closure."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
            z, x = y["z"], y["x"]
            return {
                "z": (1j - 1) * z + a[0] - 0.1 * z * z.abs() ** 2,
                "x": -x + torch.sin(a[1] * x.flip(0)) + b * z.real,
            }

        y0 = {"z": torch.zeros(1, dtype=torch.complex128), "x": torch.zeros(2, dtype=D)}
        y = adjoint.steady_state(f, y0, method=method, linear=linear).y
        return (y["z"] * (1 + 2j)).real.sum() + y["x"].square().sum()

    inputs = [torch.tensor([0.7, 0.4], dtype=D), torch.tensor(0.3, dtype=D)]
    assert abs(check.taylor_test(loss, inputs).slope - 2) < 0.05


def test_many_unknowns_without_a_matrix() -> None:
    """u'' + lam exp(u) = 0 on [0, 1]: Bratu's problem, u(1/2) = 2 log cosh(a), a = sqrt(lam / 8) cosh(a)."""
    cells, lam = 59, torch.tensor(1.0, dtype=D, requires_grad=True)

    def f(t: Tensor, u: Tensor) -> Tensor:
        v = torch.nn.functional.pad(u, (1, 1))
        return (v[2:] - 2 * u + v[:-2]) * (cells + 1) ** 2 + lam * torch.exp(u)

    found = [adjoint.steady_state(f, torch.zeros(cells, dtype=D), linear=linear) for linear in ("dense", "krylov")]
    middles = [s.y[cells // 2] for s in found]
    slopes = [torch.autograd.grad(x, lam)[0].item() for x in middles]
    a = 0.0
    for _ in range(200):
        a = math.sqrt(1 / 8) * math.cosh(a)
    assert all(x.item() == pytest.approx(2 * math.log(math.cosh(a)), rel=3e-4) for x in middles)
    known = 2 * math.tanh(a) * (math.cosh(a) / math.sqrt(8) / 2) / (1 - math.sinh(a) / math.sqrt(8))
    assert slopes == pytest.approx([known] * 2, rel=1e-3) and slopes[0] == pytest.approx(slopes[1], rel=1e-8)


def test_pseudo_time_follows_the_solution_and_newton_takes_the_nearest() -> None:
    f = lambda t, y: y - y**3  # noqa: E731
    y0 = torch.tensor([0.2], dtype=D)
    assert adjoint.steady_state(f, y0).y.item() == pytest.approx(1.0)
    found = adjoint.steady_state(f, y0, method="newton")
    assert found.y.item() == pytest.approx(0.0, abs=1e-12) and found.growth == pytest.approx(1.0)


def test_a_long_solve_tends_to_it_with_its_gradient() -> None:
    k = torch.tensor([2.0, 0.5], dtype=D, requires_grad=True)
    late = adjoint.solve(reactor, torch.ones(2, dtype=D), [0.0, 60.0], args=(k,), rtol=1e-10, atol=1e-12).ys[-1]
    y = adjoint.steady_state(reactor, torch.ones(2, dtype=D), args=(k,)).y
    torch.testing.assert_close(late, y, rtol=1e-8, atol=0.0)
    for a, b in zip(torch.autograd.grad(late.prod(), k), torch.autograd.grad(y.prod(), k), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0.0)


def test_nothing_of_it_lives_on() -> None:
    k = torch.tensor([2.0, 0.5], dtype=D, requires_grad=True)
    held: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        for linear in ("dense", "krylov"):
            f = lambda t, y: (held.append(weakref.ref(y)), reactor(t, y, k))[1]  # noqa: E731
            adjoint.steady_state(f, torch.ones(2, dtype=D), linear=linear).y.sum().backward()
        del f
        assert not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()


def test_wrong_calls_get_a_sentence() -> None:
    one = torch.ones(2, dtype=D)
    k = torch.tensor(1.0, dtype=D, requires_grad=True)
    moved = lambda t, y: torch.stack((-k * y[0] + y[1], k * y[0] - y[1]))  # noqa: E731 (the sum is conserved)
    for wrong, kind, sentence in (
        (lambda: adjoint.steady_state(reactor, one, method="euler"), ValueError, "method='euler' is unknown"),
        (lambda: adjoint.steady_state(reactor, one, linear="sparse"), ValueError, "linear='sparse' is unknown"),
        (lambda: adjoint.steady_state(reactor, one, args=k), TypeError, "must be a tuple"),
        (lambda: adjoint.steady_state(lambda t, y: y[0], one), ValueError, r"f returned shape \(\)"),
        (lambda: adjoint.steady_state(lambda t, y: y.mul_(2), one), RuntimeError, "f changed its state in place"),
        (lambda: adjoint.steady_state(lambda t, y: 1 + 0 * y, one), adjoint.SolveError, "no steady state found"),
        (
            lambda: adjoint.steady_state(lambda t, y: 1 + y**2, one, method="newton"),
            adjoint.SolveError,
            "no steady state",
        ),
        (lambda: adjoint.steady_state(moved, one), adjoint.SolveError, "the Jacobian is singular at the steady state"),
        (lambda: adjoint.steady_state(lambda t, y: -k * y, one * math.nan), ValueError, "y0 holds a NaN"),
        (lambda: adjoint.steady_state(lambda t, y: -y, one, rtol=0, atol=0), ValueError, "give positive tolerances"),
        (
            lambda: torch.func.grad(lambda k: adjoint.steady_state(reactor, k).y.sum())(one),
            NotImplementedError,
            "torch.func",
        ),
    ):
        with pytest.raises(kind, match=sentence):
            wrong()
    y = adjoint.steady_state(reactor, one, args=(one * k,)).y
    (first,) = torch.autograd.grad(y.sum(), k, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no derivative itself"):
        torch.autograd.grad(first, k)
