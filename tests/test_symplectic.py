"""Symplectic methods and splitting: orders, laws of every gradient, and states that come back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import SPLITTINGS, Flows, Reversible, Splitting, check

D = torch.float64


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=D, requires_grad=True)


def pendulum(strength: Tensor, push: Tensor) -> tuple[Any, Any]:
    """Of time too, in both halves."""

    def dq(t: Tensor, p: Tensor) -> Tensor:
        return p * (1 + 0.3 * torch.sin(t))

    def dp(t: Tensor, q: Tensor) -> Tensor:
        return -strength * torch.sin(q) + push * torch.cos(2 * t)

    return dq, dp


def inputs() -> list[Tensor]:
    return [number(x) for x in ([1.2, -0.4], [0.1, 0.5], 1.7, 0.3)]


def solved(q: Tensor, p: Tensor, strength: Tensor, push: Tensor, t: Any = (0.0, 1.0, 3.0), **how: Any) -> Tensor:
    qs, ps = adjoint.solve(pendulum(strength, push), (q, p), t, **{"dt": 0.1} | how).ys
    return torch.cat((qs, ps), 1)


def exactly(t: Any) -> Tensor:
    dq, dp = pendulum(*(x.detach() for x in inputs()[2:]))
    f = lambda t, y: (dq(t, y[1]), dp(t, y[0]))  # noqa: E731
    y0 = tuple(x.detach() for x in inputs()[:2])
    return torch.cat(adjoint.solve(f, y0, t, method="dopri8", rtol=1e-13, atol=1e-13).ys, 1)


@pytest.mark.parametrize("method", SPLITTINGS)
def test_the_error_falls_with_the_order_also_where_f_depends_on_time(method: str) -> None:
    truth = exactly([0.0, 2.0])
    with torch.no_grad():
        errors = [
            float((solved(*inputs(), t=[0.0, 2.0], method=method, dt=dt) - truth)[-1].norm()) for dt in (0.04, 0.02)
        ]
    assert abs(math.log2(errors[0] / errors[1]) - SPLITTINGS[method].order) < 0.15


@pytest.mark.parametrize("method", SPLITTINGS)
def test_flows_are_split_with_the_same_order(method: str) -> None:
    """A complex amplitude turns, and its phase is shifted by its size: neither flow alone is the solution."""
    mixing = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.complex128)

    def mixed(t: Tensor, h: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        angle = torch.cos(t + h) - torch.cos(t) - h
        return torch.matrix_exp(1j * angle * mixing) @ y

    def shifted(t: Tensor, h: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        return y * torch.exp(-1j * h * strength * y.abs() ** 2)

    def f(t: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        return -1j * (1 + torch.sin(t)) * (mixing @ y) - 1j * strength * y.abs() ** 2 * y

    y0, strength = torch.tensor([1.0, 0.3j], dtype=torch.complex128), number(0.8)
    truth = adjoint.solve(f, y0, [0.0, 2.0], args=(strength,), method="dopri8", rtol=1e-13, atol=1e-13).ys[-1]
    (true_gradient,) = torch.autograd.grad(truth[0].real, strength)
    errors, wrong = [], []
    for dt in (0.08, 0.04):
        y = adjoint.solve(Flows(mixed, shifted), y0, [0.0, 2.0], args=(strength,), method=method, dt=dt, slots=3).ys[-1]
        errors.append(float((y - truth).detach().abs().max()))
        wrong.append(float((torch.autograd.grad(y[0].real, strength)[0] - true_gradient).abs()))
    assert abs(math.log2(errors[0] / errors[1]) - SPLITTINGS[method].order) < 0.15
    assert abs(math.log2(wrong[0] / wrong[1]) - SPLITTINGS[method].order) < 0.3


@pytest.mark.parametrize("method", SPLITTINGS)
def test_a_step_is_symplectic(method: str) -> None:
    """J^T Omega J = Omega: the law by which areas in the phase plane are kept."""
    strength, push = inputs()[2:]

    def step(y: Tensor) -> Tensor:
        t = [0.3, 0.8]
        q, p = adjoint.solve(pendulum(strength, push), (y[:2], y[2:]), t, method=method, gradient="backprop").ys
        return torch.cat((q[-1], p[-1]))

    jacobian = torch.autograd.functional.jacobian(step, torch.cat([x.detach() for x in inputs()[:2]]))
    zero, one = torch.zeros(2, 2, dtype=D), torch.eye(2, dtype=D)
    omega = torch.cat((torch.cat((zero, one), 1), torch.cat((-one, zero), 1)))
    torch.testing.assert_close(jacobian.T @ omega @ jacobian, omega, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("method", SPLITTINGS)
def test_no_schedule_changes_a_bit_and_all_gradients_are_one(method: str) -> None:
    def gradients(**how: Any) -> list[Tensor]:
        given, t = inputs(), number([0.0, 1.0, 3.0])
        return list(torch.autograd.grad(solved(*given, t=t, method=method, **how).square().sum(), [*given, t]))

    everything = gradients(slots="all")
    for memory in ({"slots": 2}, {"slots": 5}, {"budget": "200 KiB"}):
        assert all(map(torch.equal, gradients(**memory), everything))
    for gradient in ("backprop", "tangent", Reversible()):
        for a, b in zip(gradients(gradient=gradient), everything, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(gradient=adjoint.Backsolve(method="tsit5"), dt=0.01), gradients(dt=0.01), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", SPLITTINGS)
@pytest.mark.parametrize("gradient", ["discrete", Reversible()])
def test_the_gradient_passes_the_taylor_test(method: str, gradient: Any) -> None:
    loss = lambda *given: solved(*given, method=method, gradient=gradient).square().sum()  # noqa: E731
    assert abs(check.taylor_test(loss, inputs()).slope - 2) < 0.05


def test_the_energy_stays_where_that_of_rk4_drifts() -> None:
    strength = torch.tensor(1.0, dtype=D)
    dq, dp = (lambda t, p: p), (lambda t, q: -strength * torch.sin(q))
    y0 = (torch.tensor(1.5, dtype=D), torch.tensor(0.0, dtype=D))
    t = torch.linspace(0, 1000, 401, dtype=D)
    with torch.no_grad():
        found = {
            "leapfrog": adjoint.solve((dq, dp), y0, t, method="leapfrog", dt=0.25).ys,
            "rk4": adjoint.solve(lambda t, y: (dq(t, y[1]), dp(t, y[0])), y0, t, method="rk4", dt=0.5).ys,
        }
    off = {name: (p**2 / 2 - strength * torch.cos(q) + math.cos(1.5)).abs() for name, (q, p) in found.items()}
    assert off["leapfrog"][200:].max() < 1.1 * off["leapfrog"][:200].max() < 0.02
    assert off["rk4"][-1] > 10 * off["rk4"][20]


def test_nothing_is_kept_and_states_come_back_to_rounding() -> None:
    """A regular orbit: the first state comes back to some rounding errors for each step, and gradients agree so far."""
    far, errors = 1000, []
    q, p = number([1.0, 0.0]), number([0.0, 0.9])
    dp = lambda t, q: -q / q.norm() ** 3  # noqa: E731
    for gradient in ("discrete", Reversible()):
        s = adjoint.solve(
            (lambda t, p: p, dp), (q, p), [0.0, 0.02 * far], method="leapfrog", dt=0.02, gradient=gradient
        )
        errors.append(torch.autograd.grad(s.ys[0][-1].sum(), (q, p)))
        if gradient != "discrete":
            assert s.stats.steps == far and s.stats.tier_bytes == {} and s.stats.recorded_runs == far
    for a, b in zip(*errors, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-9


def test_a_solve_that_cannot_be_undone_says_so() -> None:
    """The standard map: by each kick two orbits part by a factor of two or more."""
    kicked = (lambda t, p: p, lambda t, q: 5 * torch.sin(q))
    how: dict[str, Any] = {"method": "semi_implicit_euler", "dt": 1.0, "gradient": Reversible()}
    s = adjoint.solve(kicked, (number([0.3]), number([0.5])), [0.0, 60.0], **how)
    with pytest.raises(RuntimeError, match=r"the first state came back .* off, of a size of"):
        s.ys[0].sum().backward()
    lossy = Flows(lambda t, h, y: y * torch.exp(-h.abs()), lambda t, h, y: y + h)
    s = adjoint.solve(lossy, number([1.0]), [0.0, 2.0], method="strang", dt=0.1, gradient=Reversible())
    with pytest.raises(RuntimeError, match="a flow is not the inverse of its own with -h"):
        s.ys.sum().backward()


def test_trees_steps_observations_and_what_both_halves_hold() -> None:
    spring = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=D))
    y0 = ({"a": torch.ones(2, dtype=D)}, {"a": torch.zeros(2, dtype=D)})
    f = (lambda t, p: {"a": p["a"]}, lambda t, q: {"a": -spring * q["a"]})
    seen = adjoint.solve(
        f, y0, [0.0, 1.0, 2.0], method="yoshida4", dt=0.05, observe=lambda t, y: y[0]["a"].sum()
    ).observed
    expected = torch.cos(spring.sqrt() * 2).sum()
    assert seen[-1].item() == pytest.approx(expected.item(), abs=1e-5)
    found, known = (torch.autograd.grad(x, spring)[0] for x in (seen[-1], expected))
    torch.testing.assert_close(found, known, rtol=1e-4, atol=0.0)
    *_, last = adjoint.steps(f, y0, [0.0, 2.0], method="yoshida4", dt=0.05)
    assert last.y[0]["a"].sum().item() == pytest.approx(seen[-1].item(), abs=1e-14)
    middle = last.at(1.975)[0]["a"]
    torch.testing.assert_close(middle, torch.cos(spring.sqrt() * 1.975), rtol=1e-5, atol=1e-5)


HALVES = (lambda t, p: p, lambda t, q: -q)
WRONG: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "one function": (lambda t, y: y, None, {}, TypeError, r"give f=\(dq, dp\)"),
    "no pair": (HALVES, torch.ones(2), {}, TypeError, r"it is a pair \(q, p\)"),
    "shapes": ((lambda t, p: p[:1], HALVES[1]), None, {}, ValueError, r"the value of f\[0\] has shape \(1,\)"),
    "in place": ((lambda t, p: p.mul_(2), HALVES[1]), None, {}, RuntimeError, r"f\[0\] changed its state in place"),
    "a cost": (HALVES, None, {"cost": lambda t, y: y[0].sum()}, ValueError, "cost= is one more part"),
    "a batch": (HALVES, None, {"batched": True}, ValueError, "solves one state at a time"),
    "backsolve": (HALVES, None, {"gradient": "backsolve"}, ValueError, "cannot take steps in parts"),
    "reversible rk4": (
        lambda t, y: y,
        torch.ones(2),
        {"method": "rk4", "gradient": Reversible()},
        ValueError,
        "only those of a splitting method",
    ),
    "reversible in slots": (HALVES, None, {"gradient": Reversible(), "slots": 3}, ValueError, "keeps no states"),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_get_a_sentence(call: str) -> None:
    f, y0, how, kind, sentence = WRONG[call]
    y0 = (torch.ones(2, requires_grad=True), torch.ones(2)) if y0 is None else y0.requires_grad_()
    with pytest.raises(kind, match=sentence):
        adjoint.solve(f, y0, [0.0, 1.0], **{"method": "leapfrog", "dt": 0.5} | how)


def test_wrong_parts_get_a_sentence() -> None:
    with pytest.raises(TypeError, match=r"second=3 of Flows must be a function of \(t, h, y, \*args\)"):
        Flows(lambda t, h, y: y, 3)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="do not make a step"):
        Splitting("half", 1, ((0, 0.5), (1, 1.0)), "nowhere")
    lagging = Flows(lambda t, h, y: y[:1], lambda t, h, y: y)
    with pytest.raises(ValueError, match=r"Flows.first has shape \(1,\)"):
        adjoint.solve(lagging, torch.ones(2, dtype=D), [0.0, 1.0], method="strang")
