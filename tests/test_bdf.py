"""BDF: the laws of its gradient, and that this converges."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import BDF, At, Event, check
from adjoint.bdf import ALPHA, ERROR, GAMMA, HIGHEST, INTERPOLANTS, KAPPA
from adjoint.steppers.bdf import _resampled

D = torch.float64


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=D, requires_grad=True)


def robertson(t: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    rates = logs.exp()
    slow, fast, back = rates[0] * y[0], rates[1] * y[1] ** 2, rates[2] * y[1] * y[2]
    return torch.stack((back - slow, slow - back - fast, fast))


def van_der_pol(t: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    mu = logs[0].exp()
    return torch.stack((y[1], mu * ((1 - y[0] ** 2) * y[1] - logs[1].exp() * y[0])))


PROBLEMS: dict[str, tuple[Any, list[float], list[float], float]] = {
    "Robertson": (robertson, [1.0, 0.0, 0.0], [math.log(x) for x in (0.04, 3e7, 1e4)], 4.0),
    "van der Pol": (van_der_pol, [2.0, -0.66], [math.log(1000.0), 0.0], 0.5),
}


def gradient(problem: str, method: Any, rtol: float, **how: Any) -> tuple[Tensor, Tensor, adjoint.Solution]:
    """The last state, the gradient of its first component in y0 and in the logarithms of parameters, and the solution."""
    f, start, logs, stop = PROBLEMS[problem]
    y0, p = number(start), number(logs)
    s = adjoint.solve(f, y0, [0.0, stop], args=(p,), method=method, rtol=rtol, atol=rtol * 1e-4, **how)
    return s.ys[-1].detach(), torch.cat(torch.autograd.grad(s.ys[-1, 0], (y0, p))), s


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_gradient_at_the_first_time_converges(problem: str) -> None:
    """A hundredth of the tolerance: the error falls by ten at least, in y0 and in every parameter."""
    state, known, _ = gradient(problem, "radau5", 1e-9)
    errors = []
    for rtol in (1e-4, 1e-6, 1e-8):
        last, found, s = gradient(problem, BDF(), rtol)
        errors.append([float((x - y).abs().max() / y.abs().max()) for x, y in ((last, state), (found, known))])
        assert s.stats.steps < 500
    for (coarse_y, coarse), (fine_y, fine) in pairwise(errors):
        assert fine_y < 0.1 * coarse_y and fine < 0.1 * coarse, errors
    assert errors[-1][1] < 1e-5


def test_coefficients_make_polynomials_exact() -> None:
    """Of degree q, from any grid to any other; u at theta = 0 and 1 are the last two states."""
    for q in range(1, HIGHEST + 1):
        assert ALPHA[q] == pytest.approx((1 - KAPPA[q]) * GAMMA[q])
        assert ERROR[q] == pytest.approx(KAPPA[q] * GAMMA[q] + 1 / (q + 1))
        for factor in (0.3, 1.0, 2.5):
            grids = [torch.arange(q + 1, dtype=D) * -h for h in (1.0, factor)]
            differences = []
            for grid in grids:
                values, rows = (grid - 0.4) ** q, []
                for _ in range(q + 1):
                    rows.append(values[0])
                    values = values[:-1] - values[1:]
                differences.append(torch.stack(rows))
            found = _resampled(q, torch.tensor(factor, dtype=D)) @ differences[0]
            torch.testing.assert_close(found, differences[1], rtol=1e-11, atol=1e-11)
        weights = torch.from_numpy(INTERPOLANTS.weights[q])
        values = torch.linspace(0.3, 1.7, 5, dtype=D)
        for theta in values.tolist():  # D_j of the grid with step 1 whose newest point is theta = 1
            rows, at = [], (1 - 0.4 - torch.arange(q + 1, dtype=D)) ** q
            for _ in range(q + 1):
                rows.append(at[0])
                at = at[:-1] - at[1:]
            powers = theta ** torch.arange(HIGHEST + 1, dtype=D)
            assert float(powers @ (weights @ torch.stack(rows))) == pytest.approx((theta - 0.4) ** q, abs=1e-10)


def everything(memory: dict[str, Any], **how: Any) -> list[Tensor]:
    """Of a solve with outputs between steps, doses, an event that ends it, and a state of a real and a complex leaf."""
    y0 = (number([1.0, 0.5]), torch.tensor([1.0 + 0.5j], dtype=torch.complex128, requires_grad=True))
    k, dose, t = number(30.0), number(0.7), [0.0, 0.07, 0.2, 0.4, 1.0]

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, z = y
        return torch.stack((-k * (x[0] - torch.cos(3 * t)), x[0] - x[1] ** 2)), 1j * k * z / 10 - z * x[0]

    events = [
        At([0.11], lambda t, y: (y[0] + dose * t, y[1])),
        Event(lambda t, y: y[1].real.sum() - 0.5),
        Event(lambda t, y: y[1].real.sum() - 0.2 * dose, lambda t, y: (y[0], y[1] + 0.1 * y[0].sum()), terminal=True),
    ]
    s = adjoint.solve(f, y0, t, method=BDF(), rtol=1e-4, atol=1e-5, events=events, **memory, **how)
    assert len(s.events[1]) == len(s.events[2]) == 1 and s.status == "event" and s.stats.steps > 15
    loss = (
        s.ys[0].square().sum()
        + s.ys[1].abs().square().sum()
        + s.events[1].ts.sin().sum()
        + s.events[2].ts.sin().sum()
        + s.events[2].after[0].sum()
    )
    return list(torch.autograd.grad(loss, [*y0, k, dose]))


def test_no_schedule_changes_a_bit_and_all_gradients_are_one() -> None:
    kept = everything({"slots": "all"})
    for memory in ({"slots": 4}, {"budget": "300 KiB"}):
        assert all(map(torch.equal, everything(memory), kept)), memory
    for how in ("backprop", "tangent"):
        for a, b in zip(everything({}, gradient=how), kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_gradient_is_that_of_the_frozen_steps_and_orders(problem: str) -> None:
    f, start, logs, stop = PROBLEMS[problem]
    orders: set[int] = set()

    def loss(scale: Tensor, p: Tensor) -> Tensor:
        y0 = torch.tensor(start, dtype=D) * scale.exp()
        times = [0.0, 0.3 * stop, stop]
        s = adjoint.solve(f, y0, times, args=(p,), method=BDF(), rtol=1e-7, atol=1e-11, slots=6)
        orders.update(s.stats.program.orders.taken)  # type: ignore[attr-defined]
        return s.ys.square().sum() + s.ys[1, 0]

    inputs = [torch.zeros(len(start), dtype=D), torch.tensor(logs, dtype=D)]
    assert abs(check.taylor_test(loss, inputs, h=1e-3, halvings=4).slope - 2) < 0.1
    assert orders >= {1, 2, 3, 4}


def test_doses_at_known_times_and_events_that_end_the_solve_have_closed_forms() -> None:
    """y' = -k y with a dose d at t=0.5, until y = w: at (log(e^(k/2) d + 1) - log w) / k."""
    k, d, w = number(0.6), number(0.7), number(0.3)
    events = [At([0.5], lambda t, y: y + d), Event(lambda t, y: y[0] - w, terminal=True)]
    y0 = torch.ones(1, dtype=D)
    s = adjoint.solve(lambda t, y: -k * y, y0, [0.0, 9.0], method=BDF(), events=events, rtol=1e-8, atol=1e-11)
    expected = (torch.log(1 + d * torch.exp(k / 2)) - torch.log(w)) / k
    torch.testing.assert_close(s.events[1].ts[0], expected, rtol=1e-6, atol=0.0)
    found = torch.autograd.grad(s.events[1].ts[0], (k, d, w))
    for a, b in zip(found, torch.autograd.grad(expected, (k, d, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0.0)


def test_times_at_which_it_would_begin_again_do_not_move() -> None:
    y0, f = torch.ones(2, dtype=D), lambda t, y: -y
    again = Event(lambda t, y: y[0] - 0.5, lambda t, y: y + 1)
    wrong: list[tuple[Any, Any, str]] = [
        (number([0.0, 1.0]), (), "t requires grad, and BDF begins with order 1"),
        (number([0.0, 1.0]), [At([0.5])], "t requires grad"),
        ([0.0, 1.0], [At(number([0.5]))], r"events\[0\].times requires grad"),
        ([0.0, 1.0], [again], r"events\[0\] happens where the solution says"),
    ]
    for t, events, said in wrong:
        with pytest.raises(ValueError, match=said):
            adjoint.solve(f, y0, t, method=BDF(), events=events)
    with torch.no_grad():
        s = adjoint.solve(f, y0, [0.0, 1.0], method=BDF(), events=[again], rtol=1e-8, atol=1e-10)
    assert s.events[0].ts.tolist() == pytest.approx([math.log(2)])


def test_a_regular_mass_matrix_pairs_and_precision() -> None:
    mass = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=D)
    y0 = torch.tensor([1.0, 2.0], dtype=D)
    a = torch.tensor([[-3.0, 1.0], [0.5, -40.0]], dtype=D)
    y = adjoint.solve(lambda t, y: a @ y, y0, [0.0, 0.5], method=BDF(mass=mass), rtol=1e-9, atol=1e-11).ys[-1]
    expected = torch.linalg.matrix_exp(0.5 * torch.linalg.solve(mass, a)) @ y0
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-8)
    small = adjoint.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method=BDF(), rtol=1e-4, atol=1e-6).ys[-1]
    assert small.dtype is torch.float32 and small[0].item() == pytest.approx(math.exp(-1), rel=1e-3)
    back = adjoint.solve(lambda t, y: y, torch.ones(2), [1.0, 0.0], method=BDF(max_order=2), rtol=1e-6).ys[-1]
    assert back[0].item() == pytest.approx(math.exp(-1), rel=1e-4)


def test_wrong_calls_get_a_sentence() -> None:
    for order in (0, 6, 2.5):
        with pytest.raises(ValueError, match=f"max_order={order} of BDF must be a whole number from 1 to 5"):
            BDF(order)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mass is singular, and method='bdf'"):
        BDF(mass=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="method='bdf' has no explicit part"):
        adjoint.solve((torch.sin, torch.cos), torch.ones(2), [0.0, 1.0], method=BDF())
    with pytest.raises(adjoint.SolveError, match="the step size fell"):
        adjoint.solve(lambda t, y: y**2, torch.ones(2, dtype=D), [0.0, 2.0], method=BDF())
