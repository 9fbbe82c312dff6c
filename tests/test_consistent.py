"""Consistent states of differential-algebraic equations: found, differentiated, or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import At, Dense, Event, Implicit, check

D = torch.float64
LAST = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=D))


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=D, requires_grad=True)


def cubic(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """y_0' = y_1 - y_0, 0 = y_1 + y_1^3 - p y_0 - t"""
    return torch.stack((y[..., 1] - y[..., 0], y[..., 1] + y[..., 1] ** 3 - p * y[..., 0] - t), -1)


def robertson(t: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    rates = logs.exp()
    slow, fast, back = rates[0] * y[0], rates[1] * y[1] ** 2, rates[2] * y[1] * y[2]
    return torch.stack((back - slow, slow - back - fast, y.sum() - 1))


def solved(f: Any, y0: Tensor, t: Any, mass: Tensor, *args: Any, name: str = "radau5", **how: Any) -> adjoint.Solution:
    method = Implicit(name, mass=mass, consistent=how.pop("consistent", "solve"), linear=how.pop("linear", Dense()))
    return adjoint.solve(f, y0, t, args=args, method=method, **{"rtol": 1e-6, "atol": 1e-10} | how)


def test_the_algebraic_part_is_a_root_with_the_derivatives_of_one() -> None:
    """Of first and second order, in y0, in parameters and in the first time."""
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))

    def first(y0: Tensor, p: Tensor, t0: Tensor) -> Tensor:
        return solved(cubic, y0, torch.stack((t0, t0 + 0.1)), mass, p, rtol=1e-2).ys[0]

    inputs = number([2.0, 7.0]), number(1.5), number(0.3)
    found = first(*inputs)
    root = found[1]
    assert found[0] == 2.0 and abs((root + root**3 - 1.5 * 2.0 - 0.3).item()) < 1e-14
    slope = 1 / (1 + 3 * root.detach() ** 2)
    of_y0, of_p, of_t = torch.autograd.grad(root, inputs)
    torch.testing.assert_close(of_y0, torch.stack((1.5 * slope, torch.zeros((), dtype=D))), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(torch.stack((of_p, of_t)), torch.stack((2 * slope, slope)), rtol=1e-14, atol=0.0)
    assert torch.autograd.gradcheck(first, inputs) and torch.autograd.gradgradcheck(first, inputs)


@pytest.mark.parametrize("name", ["radau5", "rodas4", "sdirk2"])
def test_a_mass_matrix_in_other_coordinates_has_the_same_solution_and_gradient(name: str) -> None:
    """P M Q^-1 x' = P f(t, Q^-1 x) for x = Q y: the null spaces are no unit vectors. An inconsistent y_2 plays no part."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 3, dtype=D, generator=generator) for _ in range(2))
    back = torch.linalg.inv(q)
    found = []
    straight = LAST, torch.eye(3, dtype=D), torch.eye(3, dtype=D)
    with adjoint.frozen_steps() as steps:
        for mass, forth, turn in (straight, (p @ LAST @ back, q, p)):
            y0, logs = number([1.0, 0.0, 0.4]), number([math.log(x) for x in (0.04, 3e7, 1e4)])
            inverse = torch.linalg.inv(forth)

            def f(t: Tensor, x: Tensor, logs: Tensor, inverse: Tensor = inverse, turn: Tensor = turn) -> Tensor:
                return turn @ robertson(t, inverse @ x, logs)

            how: dict[str, Any] = {} if name != "sdirk2" else {"dt": 0.01}
            ys = solved(f, forth @ y0, [0.0, 0.4], mass, logs, name=name, **how).ys @ inverse.mT
            assert abs(float(ys[0, 2].detach())) < 1e-14 and abs(float(ys[-1].sum().detach()) - 1) < 1e-12
            found.append([ys[-1, [0, 2]], *torch.autograd.grad(ys[-1, 2], (y0, logs))])
            steps.rewind()
    for a, b in zip(*found, strict=True):  # as far as Newton's iterations go: a hundredth of the tolerance, in either
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-11)
    assert abs(float(found[0][1][2])) < 1e-12


def test_memory_changes_no_bit_and_the_gradient_is_that_of_the_frozen_steps() -> None:
    logs, y0 = number([math.log(x) for x in (0.04, 3e7, 1e4)]), number([1.0, 0.0, 0.4])

    def loss(logs: Tensor, y0: Tensor, **how: Any) -> Tensor:
        dose = At([0.2], lambda t, y, logs: y + torch.tensor([0.1, 0.0, 0.0], dtype=D) * logs[0])
        s = solved(robertson, y0, [0.0, 0.4], LAST, logs, events=[dose], rtol=1e-7, atol=1e-12, **how)
        return s.ys.square().sum() + s.events[0].after.sum()

    everything = torch.autograd.grad(loss(logs, y0, slots="all"), (logs, y0))
    for memory in ({"slots": 3}, {"slots": 8}):
        assert all(map(torch.equal, torch.autograd.grad(loss(logs, y0, **memory), (logs, y0)), everything))
    for gradient in ("backprop", "tangent"):
        for a, b in zip(torch.autograd.grad(loss(logs, y0, gradient=gradient), (logs, y0)), everything, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    first = torch.tensor([1.0, 1e-4, 0.4], dtype=D)
    inputs = [logs.detach(), torch.zeros(3, dtype=D)]
    assert abs(check.taylor_test(lambda p, s: loss(p, first * s.exp()), inputs, h=1e-2, halvings=4).slope - 2) < 0.1


@pytest.mark.parametrize("name", ["radau5", "rodas5p"])
def test_behind_a_reset_the_algebraic_part_follows(name: str) -> None:
    """y' = -k y with z = c y, from 1: z falls to w at log(c/w)/k, where y is doubled, and again log(2)/k later."""
    k, c, w = number(0.7), number(3.0), number(1.2)
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((-k * y[0], y[1] - c * y[0]))

    doubled = Event(lambda t, y: y[1] - w, lambda t, y: torch.stack((2 * y[0], y[1])), direction=-1)
    y0 = torch.tensor([1.0, 0.0], dtype=D)
    s = solved(f, y0, [0.0, 3.0], mass, name=name, events=[doubled], rtol=1e-9, atol=1e-11)
    first = torch.log(c / w) / k
    times = torch.stack((first, first + math.log(2) / k))
    torch.testing.assert_close(s.events[0].ts, times, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(s.events[0].after[:, 1], torch.stack((2 * w, 2 * w)), rtol=1e-8, atol=0.0)
    last = 4 * torch.exp(-3 * k)
    torch.testing.assert_close(s.ys[-1], torch.stack((last, c * last)), rtol=1e-8, atol=0.0)
    found = torch.autograd.grad(s.events[0].ts[-1] + s.ys[-1, 1], (k, c, w))
    for a, b in zip(found, torch.autograd.grad(times[-1] + c * last, (k, c, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"the state behind events\[0\] does not fulfil the algebraic equations"):
        solved(f, torch.stack((y0[0], c)), [0.0, 3.0], mass, name=name, events=[doubled], consistent="check")


def test_an_input_that_jumps_in_an_algebraic_equation_takes_the_state_along() -> None:
    """y' = z, z = 1 before s and 3 behind it: y(T) = s + 3 (T - s)."""
    when = number([0.4])
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], y[1] - torch.where(t < when.detach()[0], 1.0, 3.0)))

    s = solved(f, torch.zeros(2, dtype=D), [0.0, 1.0], mass, events=[At(when)])
    assert s.events[0].before[0].tolist() == pytest.approx([0.4, 1.0])
    assert s.events[0].after[0].tolist() == pytest.approx([0.4, 3.0])
    assert s.ys[-1].tolist() == pytest.approx([0.4 + 1.8, 3.0])
    assert torch.autograd.grad(s.ys[-1, 0], when)[0].item() == pytest.approx(-2.0)


def test_members_are_settled_each_on_its_own() -> None:
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))
    y0, p = number([[2.0, 0.0], [1.0, 5.0], [0.5, -1.0]]), number([1.5, 0.5, 2.0])
    both = solved(cubic, y0, [0.0, 0.1], mass, p, linear=Dense(members=True)).ys[0]
    found = torch.autograd.grad(both[:, 1].sum(), (y0, p))
    for i in range(3):
        y, q = y0[i].detach().requires_grad_(), p[i].detach().requires_grad_()
        one = solved(cubic, y, [0.0, 0.1], mass, q).ys[0]
        torch.testing.assert_close(both[i], one, rtol=1e-14, atol=1e-15)
        for a, b in zip(torch.autograd.grad(one[1], (y, q)), found, strict=True):
            torch.testing.assert_close(a, b[i], rtol=1e-13, atol=1e-15)


def test_steps_begin_at_a_consistent_state() -> None:
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))
    p = number(1.5)
    method = Implicit("radau5", mass=mass, consistent="solve")
    step = next(iter(adjoint.steps(cubic, torch.tensor([2.0, 9.0], dtype=D), (0.0, 1.0), args=(p,), method=method)))
    start = step.at(0.0)
    assert abs((start[1] + start[1] ** 3 - 3.0).item()) < 1e-13
    slope = 1 / (1 + 3 * start[1].item() ** 2)
    assert torch.autograd.grad(start[1], p)[0].item() == pytest.approx(2 * slope)


def test_an_inconsistent_state_is_refused_unless_the_tolerances_allow_it() -> None:
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))
    y0, p = torch.tensor([2.0, 1.2134116627622296], dtype=D), torch.tensor(1.5, dtype=D)
    for change, allowed in ((0.0, True), (1e-8, True), (1e-4, False)):
        off = y0 + torch.tensor([0.0, change], dtype=D)
        if allowed:
            assert torch.equal(solved(cubic, off, [0.0, 1.0], mass, p, consistent="check").ys[0], off)
        else:
            with pytest.raises(ValueError, match=r"y0 does not fulfil .* component \(1,\) is .* consistent='solve'"):
                solved(cubic, off, [0.0, 1.0], mass, p, consistent="check")
    with pytest.raises(ValueError, match="the index is above 1"):
        solved(lambda t, y: torch.stack((y[1], y[0] - 1)), y0, [0.0, 1.0], mass)
    with pytest.raises(adjoint.SolveError, match="does not find a consistent state from y0 at t=0"):
        solved(lambda t, y: torch.stack((y[1], y[1] ** 2 + 1)), y0, [0.0, 1.0], mass)
    with pytest.raises(ValueError, match="consistent='mend'"):
        Implicit("radau5", mass=mass, consistent="mend")


@pytest.mark.parametrize("gradient", ["backsolve", "interpolating", "quadrature", "gauss"])
def test_continuous_adjoints_know_no_mass_matrix(gradient: str) -> None:
    y0, p = number([2.0, 1.2134116627622296]), number(1.5)
    for mass in (torch.diag(torch.tensor([1.0, 0.0], dtype=D)), 2 * torch.eye(2, dtype=D)):
        with pytest.raises(ValueError, match=f"gradient='{gradient}' knows no mass matrix"):
            solved(cubic, y0, [0.0, 1.0], mass, p, gradient=gradient, name="radau5")
