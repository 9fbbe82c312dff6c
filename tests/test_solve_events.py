"""Events in ``solve``: closed forms, the laws of every gradient, and what is refused."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import At, Event, check
from revolve import Periodic

D = torch.float64
STEPS: dict[str, dict[str, Any]] = {
    "euler": {"dt": 0.07},
    "rk4": {"dt": 0.17},
    "bosh3": {"rtol": 1e-4},
    "tsit5": {},
    "dopri5": {"rtol": 1e-4},
    "dopri8": {},
    "gauss4": {"dt": 0.17},
    "kvaerno3": {"rtol": 1e-4},
    "radau5": {"rtol": 1e-4},
    "rodas4": {"rtol": 1e-4},
}
ROUGH: dict[str, dict[str, Any]] = {  # where many solves are made
    name: how if name in ("euler", "rk4", "bosh3", "tsit5", "dopri5", "dopri8") else {"rtol": 1e-2, "atol": 1e-3}
    for name, how in STEPS.items()
    if name != "gauss4"
}
MEMORY: list[dict[str, Any]] = [{"slots": 3}, {"budget": "300 KiB"}, {"schedule": Periodic(3)}]


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=D, requires_grad=True)


def ball(y0: Tensor, gravity: Tensor, keeps: Tensor, drag: Tensor, floor: Tensor, **how: Any) -> adjoint.Solution:
    """A ball with drag bounces from a floor that rises, and is kicked at times of the caller's."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], -gravity - drag * y[1] * (1 + y[1] ** 2).sqrt() + 0.1 * torch.sin(t)))

    lands = Event(
        lambda t, y: y[0] - floor * (1 + 0.1 * t), lambda t, y: torch.stack((y[0], -keeps * y[1])), direction=-1
    )
    top = Event(lambda t, y: y[1], direction=-1)
    return adjoint.solve(f, y0, **{"t": [0.0, 1.7, 3.5], "events": [lands, top]} | how)


def numbers() -> list[Tensor]:
    return [number(x) for x in ([4.0, 1.0], 9.8, 0.8, 0.02, 0.3)]


def seen(solution: adjoint.Solution) -> Tensor:
    """Everything that a solution shows, in one number."""
    happened = [x.ts.sin().sum() + (x.before + 0.3 * x.after**2).sum() for x in solution.events]
    return solution.ys.square().sum() + sum(happened)


def test_a_bouncing_ball_has_its_closed_form_with_every_derivative() -> None:
    """From height h with restitution e: landings at sqrt(2h/g) (1 + 2e + 2e^2 + ..)."""
    h, g, e = number(5.0), number(10.0), number(0.8)
    expected_time = (2 * h / g).sqrt() * (1 + 2 * e + 2 * e**2)
    expected = torch.autograd.grad(expected_time, (h, g, e))
    bounce = Event(lambda t, y: y[0], lambda t, y: torch.stack((y[0], -e * y[1])), terminal=3)
    for method, how in STEPS.items():
        if method != "euler":  # the others solve parabolas exactly
            y0 = torch.stack((h, torch.zeros_like(h)))
            s = adjoint.solve(
                lambda t, y: torch.stack((y[1], -g)), y0, [0.0, 2.0, 9.0], events=[bounce], method=method, **how
            )
            assert s.status == "event" and s.ts.tolist() == [0.0, 2.0] and len(s.events[0]) == 3
            torch.testing.assert_close(s.events[0].ts[-1], expected_time, rtol=1e-9, atol=0.0)
            found = torch.autograd.grad(s.events[0].ts[-1], (h, g, e))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=0.0)


def test_an_integrate_and_fire_neuron_has_its_closed_form() -> None:
    """tau v' = I - v from 0 to the threshold w, then 0 again: every interval is tau log(I / (I - w))."""
    tau, current, threshold = number(0.7), number(1.5), number(1.0)
    spike = Event(lambda t, v: v - threshold, lambda t, v: torch.zeros_like(v), direction=1)
    s = adjoint.solve(
        lambda t, v: (current - v) / tau, torch.zeros((), dtype=D), [0.0, 5.0], events=[spike], rtol=1e-10, atol=1e-12
    )
    interval = tau * torch.log(current / (current - threshold))
    expected = interval * torch.arange(1, 7, dtype=D)
    torch.testing.assert_close(s.events[0].ts, expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(s.events[0].before, torch.ones(6, dtype=D), rtol=1e-9, atol=0.0)
    assert s.events[0].after.tolist() == [0.0] * 6
    inputs = (tau, current, threshold)
    for a, b in zip(
        torch.autograd.grad(s.events[0].ts[-1] + s.ys[-1], inputs),
        torch.autograd.grad(6 * interval + current * (1 - torch.exp((6 * interval - 5) / tau)), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("method", STEPS)
def test_repeated_doses_add_up_and_their_times_have_gradients(method: str) -> None:
    """One compartment, doses d_i at s_i: c(t) = sum_i d_i exp(-k (t - s_i)). One at t[0] and one at t[-1]."""
    k, doses = number(0.6), number([1.0, 0.8, 1.2])
    inner = number([1.0, 2.5])
    ends = At([0.0, 4.0], lambda t, c: c + 0.5)

    def dose(t: Tensor, c: Tensor) -> Tensor:
        return c + (doses[:2] * (inner.detach() == t)).sum()

    how = {**STEPS[method], "rtol": 1e-10, "atol": 1e-12} if method in ("tsit5", "dopri8") else STEPS[method]
    times = [0.0, 0.5, 2.5, 4.0]
    s = adjoint.solve(
        lambda t, c: -k * c, torch.ones((), dtype=D), times, events=[ends, At(inner, dose)], method=method, **how
    )
    given = [(1.5, torch.zeros((), dtype=D)), (doses[0], inner[0]), (doses[1], inner[1])]
    expected = [sum(d * torch.exp(-k * (t - at)) for d, at in given if t > at.item()) for t in times[1:]]
    controlled = 1e-3 if STEPS[method].get("rtol") == 1e-4 else 1e-8
    tolerance = {"euler": 3e-2, "rk4": 1e-4, "gauss4": 1e-4}.get(method, controlled)
    assert s.ys[0].item() == 1.0 and s.events[0].before[0].item() == 1.0 and s.events[0].after[0].item() == 1.5
    torch.testing.assert_close(s.ys[1:], torch.stack(expected), rtol=tolerance, atol=0.0)
    assert s.events[0].after[1].item() == pytest.approx(s.ys[-1].item() + 0.5)
    assert s.events[1].ts.tolist() == [1.0, 2.5]
    inputs = (k, doses, inner)
    found = torch.autograd.grad(s.ys[-1], inputs)
    for a, b in zip(found, torch.autograd.grad(expected[-1], inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=5 * tolerance, atol=0.0)


def test_the_switching_time_of_an_input_has_a_gradient() -> None:
    """y' = a before s, b after it: y(T) = a s + b (T - s), so that dy/ds = a - b."""
    a, b, s = number(2.0), number(-0.5), number([0.37])
    f = lambda t, y: torch.where(t < s[0].detach(), a, b) + 0 * y  # noqa: E731
    for method, how in STEPS.items():
        y = adjoint.solve(f, torch.zeros((), dtype=D), [0.0, 1.0], events=[At(s)], method=method, **how).ys[-1]
        assert y.item() == pytest.approx(2 * 0.37 - 0.5 * 0.63, abs=1e-12)
        found = torch.autograd.grad(y, (a, b, s))
        assert [float(x) for x in found] == pytest.approx([0.37, 0.63, 2.5], abs=1e-12)


@pytest.mark.parametrize("method", ROUGH)
def test_no_schedule_changes_a_bit_and_all_gradients_are_one(method: str) -> None:
    inputs, times = numbers(), number([0.0, 1.7, 3.5])
    kick, when = number(0.4), number([0.9, 1.7, 2.2])

    def gradients(**how: Any) -> list[Tensor]:
        lands = Event(
            lambda t, y: y[0] - inputs[4] * (1 + 0.1 * t),
            lambda t, y: torch.stack((y[0], -inputs[2] * y[1])),
            direction=-1,
        )
        events = [At(when, lambda t, y: torch.stack((y[0], y[1] + kick * t))), lands, Event(lambda t, y: y[1])]
        solution = ball(*inputs, t=times, events=events, method=method, **ROUGH[method], **how)
        assert len(solution.events[1]) >= 2 and len(solution.events[2]) >= 1
        return list(torch.autograd.grad(seen(solution), [*inputs, times, kick, when]))

    everything = gradients(slots="all")
    for memory in MEMORY:
        assert all(map(torch.equal, gradients(**memory), everything)), memory
    for gradient in ("backprop", "tangent"):
        for a, b in zip(gradients(gradient=gradient), everything, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", STEPS)
def test_the_gradient_is_that_of_the_frozen_steps(method: str) -> None:
    """Where Newton's method goes on until its own error is below the remainders."""
    when = torch.tensor([0.9, 2.2], dtype=D)
    own = adjoint.Implicit(method, newton=adjoint.Newton(kappa=1e-6)) if method in adjoint.IMPLICIT else method

    def loss(*given: Tensor) -> Tensor:
        *inputs, times, when = given
        lands = Event(
            lambda t, y: y[0] - inputs[4] * (1 + 0.1 * t),
            lambda t, y: torch.stack((y[0], -inputs[2] * y[1])),
            direction=-1,
        )
        events = [lands, At(when, lambda t, y: y * torch.cos(t)), Event(lambda t, y: y[1])]
        return seen(ball(*inputs, t=times, events=events, method=own, **STEPS[method], slots=5))

    inputs = [*(x.detach() for x in numbers()), torch.tensor([0.0, 1.7, 3.5], dtype=D), when]
    assert abs(check.taylor_test(loss, inputs, h=1e-4, halvings=5).slope - 2) < 0.1


def test_the_memory_of_a_gradient_is_given_back() -> None:
    """Nothing of a solve lives on in a reference cycle."""
    held: list[Any] = []
    inputs = numbers()

    def f(t: Tensor, y: Tensor) -> Tensor:
        held.append(weakref.ref(y))
        return torch.stack((y[1], -inputs[1]))

    bounce = Event(lambda t, y: y[0], lambda t, y: torch.stack((y[0], -0.8 * y[1])))
    gc.collect()
    gc.disable()
    try:
        loss = seen(adjoint.solve(f, inputs[0], [0.0, 3.0], events=[bounce, At([1.0])], slots=2))
        torch.autograd.grad(loss, inputs[:2])
        del loss
        alive = [ref for ref in held if ref() is not None and ref() is not inputs[0]]
    finally:
        gc.enable()
    assert not alive


def test_derivatives_of_derivatives() -> None:
    def loss(h: Tensor, e: Tensor, how: str = "backprop") -> Tensor:
        bounce = Event(lambda t, y: y[0], lambda t, y: torch.stack((y[0], -e * y[1])))
        s = adjoint.solve(
            lambda t, y: torch.stack((y[1], -9.8 - 0.1 * y[1])), h, [0.0, 2.5], events=[bounce], gradient=how, rtol=1e-5
        )
        return s.events[0].ts.square().sum() + s.ys[-1].sum()

    inputs = [number([4.0, 0.0]), number(0.7)]
    found = []
    for how in ("backprop", "discrete"):
        first = torch.autograd.grad(loss(*inputs, how), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1] ** 2, inputs)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with adjoint.frozen_steps() as replay:
        loss(*inputs)

        def again(*given: Tensor) -> Tensor:
            replay.rewind()
            return loss(*given)

        assert torch.autograd.gradcheck(again, inputs)
        assert torch.autograd.gradgradcheck(again, inputs)


def test_trees_complex_numbers_single_precision_and_backwards_in_time() -> None:
    rate = number(0.5)

    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"z": 1j * rate * y["z"], "x": -y["x"]}

    y0 = {"z": torch.tensor([1.0 + 0j], dtype=torch.complex128), "x": torch.ones(2, dtype=D)}
    turned = Event(lambda t, y: y["z"].imag.sum(), lambda t, y: {"z": 2 * y["z"], "x": y["x"] + t}, direction=1)
    s = adjoint.solve(f, y0, [0.0, -7.0], events=[turned], rtol=1e-10, atol=1e-12)
    assert s.events[0].ts.tolist() == pytest.approx([-2 * math.pi]) and s.events[0].after["x"].shape == (1, 2)
    assert s.ys["z"][-1].abs().item() == pytest.approx(2.0)
    assert torch.autograd.grad(s.events[0].ts[0], rate)[0].item() == pytest.approx(4 * math.pi)
    small = torch.tensor(1.0, dtype=torch.float32, requires_grad=True)
    s = adjoint.solve(lambda t, y: -y, small, [0.0, 2.0], events=[Event(lambda t, y: y - 0.5, lambda t, y: y + 1)])
    assert s.events[0].ts.dtype is torch.float32 and s.events[0].ts[0].item() == pytest.approx(math.log(2), rel=1e-5)
    assert torch.autograd.grad(s.events[0].ts[0], small)[0].item() == pytest.approx(1.0, rel=1e-4)


def test_a_running_cost_goes_on_through_resets() -> None:
    """Doses of 1 every second, none eliminated: the integral of the amount over 3 seconds is 1 + 2 + 3 - dose at the end."""
    dose = number(1.0)
    events = [At([0.0, 1.0, 2.0], lambda t, y: y + dose), Event(lambda t, y: y - 10)]
    zero = torch.zeros((), dtype=D)
    s = adjoint.solve(lambda t, y: 0 * y, zero, [0.0, 3.0], events=events, cost=lambda t, y: y, method="rk4", dt=0.25)
    assert s.costs is not None and s.costs[-1].item() == pytest.approx(6.0)
    assert torch.autograd.grad(s.costs[-1], dose)[0].item() == pytest.approx(6.0)
    assert s.events[0].after.tolist() == [1.0, 2.0, 3.0] and len(s.events[1]) == 0


def test_an_event_function_that_is_zero_at_the_start_happens_when_it_is_zero_again() -> None:
    g = number(10.0)
    thrown = Event(lambda t, y: y[0], lambda t, y: torch.zeros_like(y), terminal=True)
    f = lambda t, y: torch.stack((y[1], -g))  # noqa: E731
    for y0, time in (([0.0, 5.0], 1.0), ([1e-13, 5.0], 1.0)):
        s = adjoint.solve(f, torch.tensor(y0, dtype=D), [0.0, 4.0], events=[thrown])
        assert s.events[0].ts.tolist() == pytest.approx([time], abs=1e-10)
        assert torch.autograd.grad(s.events[0].ts[0], g)[0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_an_event_in_the_last_place_of_a_step(method: str) -> None:
    """y falls by 1/8 a step, exactly, and is zero at the end of step 8; then it is set to 1/2, and again falls to zero."""
    rate, y0 = number(1.0), number(1.0)
    empty = Event(lambda t, y: y, lambda t, y: y + 0.5)
    s = adjoint.solve(lambda t, y: -rate + 0 * y, y0, [0.0, 1.0, 2.0], events=[empty], method=method, dt=0.125)
    assert s.events[0].ts.tolist() == [1.0, 1.5, 2.0]
    assert s.ys.tolist() == [1.0, 0.0, 0.0]
    assert [x.item() for x in torch.autograd.grad(s.events[0].ts[1], (y0, rate))] == pytest.approx([1.0, -1.5])


def test_what_comes_and_goes_within_a_step_is_seen_by_samples() -> None:
    how: dict[str, Any] = {"method": "euler", "dt": 1.0, "t": [0.0, 1.0]}
    bump = lambda t, y: (y - 0.3) * (y - 0.6)  # noqa: E731
    found = [
        adjoint.solve(lambda t, y: 1 + 0 * y, torch.zeros((), dtype=D), events=[Event(bump, samples=n)], **how)
        .events[0]
        .ts
        for n in (0, 3)
    ]
    assert found[0].tolist() == [] and found[1].tolist() == pytest.approx([0.3, 0.6])


@pytest.mark.parametrize(("direction", "expected"), [(0, [1, 2, 3]), (1, [2]), (-1, [1, 3])])
def test_directions(direction: int, expected: list[int]) -> None:
    event = Event(lambda t, y: torch.cos(math.pi * (t - 0.5)) + 0 * y, direction=direction)
    s = adjoint.solve(lambda t, y: 0 * y, torch.ones((), dtype=D), [0.5, 3.25], events=[event], method="rk4", dt=0.2)
    assert s.events[0].ts.tolist() == pytest.approx(expected)


def test_a_rebound_from_a_reset_counts_signs_from_where_the_reset_put_the_state() -> None:
    """A reset that jumps over the surface of another event is no event."""
    jump = At([1.0], lambda t, y: y + 5)
    s = adjoint.solve(
        lambda t, y: 1 + 0 * y, torch.zeros((), dtype=D), [0.0, 2.0], events=[jump, Event(lambda t, y: y - 3)]
    )
    assert len(s.events[1]) == 0 and s.ys[-1].item() == pytest.approx(7.0)


def test_grazing_has_no_derivative_and_says_so() -> None:
    y0 = number(0.0)
    graze = Event(lambda t, y: (y - 1.0) ** 3, lambda t, y: y, direction=1)
    f = lambda t, y: 1 + 0 * y  # noqa: E731
    with pytest.raises(ValueError, match=r"events\[0\] touches zero at t=1 without crossing"):
        adjoint.solve(f, y0, [0.0, 2.0], events=[graze], method="euler", dt=0.5)
    with torch.no_grad():
        s = adjoint.solve(f, y0, [0.0, 2.0], events=[graze], method="euler", dt=0.5)
    assert s.events[0].ts.tolist() == pytest.approx([1.0])


def test_a_ball_that_comes_to_rest_is_refused_with_a_way_out() -> None:
    stuck = Event(lambda t, y: y - 1, lambda t, y: y)
    sink = Event(lambda t, y: y[0], lambda t, y: torch.stack((y[0], -0.1 * y[1])), direction=-1)
    fall = lambda t, y: torch.stack((y[1], torch.full_like(y[1], -10.0)))  # noqa: E731
    s = adjoint.solve(lambda t, y: 1 + 0 * y, torch.zeros((), dtype=D), [0.0, 2.0], events=[stuck])
    assert s.events[0].ts.tolist() == pytest.approx([1.0])
    y0 = torch.tensor([5.0, 0.0], dtype=D)
    with pytest.raises(adjoint.SolveError, match=r"events\[0\] happens again and again at t=1\.22"):
        adjoint.solve(fall, y0, [0.0, 4.0], events=[sink])
    s = adjoint.solve(fall, y0, [0.0, 4.0], events=[sink], throw=False)
    assert s.status == "events" and s.ys.isnan().any() and s.last_t == pytest.approx(1 + 2 / 9)


def one(t: Tensor, y: Tensor) -> Tensor:
    return y * 0 + 1


def at(x: float, **more: Any) -> Event:
    return Event(lambda t, y: y[0] - x, lambda t, y: y + 1, **more)


WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "one alone": (lambda: at(0.5), {}, TypeError, r"for a single one write events=\[..\]"),
    "a function": (lambda: [one], {}, TypeError, r"events\[0\]=.* is neither an Event nor an At"),
    "two at once": (
        lambda: [at(0.5), at(0.5)],
        {},
        ValueError,
        r"events\[0\] and events\[1\] happen at once, at t=0.5",
    ),
    "an event at a known time": (
        lambda: [at(0.5), At([0.5], lambda t, y: y)],
        {},
        ValueError,
        r"events\[0\] and events\[1\] happen at once, at t=0.5",
    ),
    "known times at once, one of which moves": (
        lambda: [At([0.5]), At(number([0.5]))],
        {},
        ValueError,
        r"events\[0\] and events\[1\] both have the time 0.5",
    ),
    "a moving time at an end": (lambda: [At(number([0.0]))], {}, ValueError, r"is an end of t and requires grad"),
    "a batch": (lambda: [at(0.5)], {"batched": True}, ValueError, "events= and batched=True"),
    "observed at steps": (
        lambda: [at(0.5)],
        {"observe": lambda t, y: y, "observe_at": "steps"},
        ValueError,
        "events= and observe_at='steps'",
    ),
    "backsolve": (lambda: [at(0.5)], {"gradient": "backsolve"}, ValueError, "events= and gradient='backsolve'"),
    "Adams": (
        lambda: [at(0.5)],
        {"method": "explicit_adams", "dt": 0.1},
        ValueError,
        "leans on slopes of earlier steps",
    ),
    "a splitting": (
        lambda: [at(0.5)],
        {"method": "leapfrog", "dt": 0.1, "f": (one, one), "y0": (torch.zeros(1), torch.zeros(1))},
        ValueError,
        "has no interpolant on which events are found",
    ),
    "one time": (lambda: [at(0.5)], {"t": [0.0]}, ValueError, "events happen between two times"),
    "a journal": (lambda: [at(0.5)], {"journal": "nowhere"}, TypeError, "leave journal= out"),
    "a tree": (lambda: [Event(lambda t, y: y)], {}, TypeError, "must give a tensor of one real number"),
    "a truth": (lambda: [Event(lambda t, y: y[0] > 1)], {}, TypeError, "must give a tensor of one real number"),
    "not finite": (
        lambda: [Event(lambda t, y: y[0] / 0 * 0)],
        {},
        ValueError,
        r"function of events\[0\] gave nan at t=0",
    ),
    "writes": (lambda: [Event(lambda t, y: y.add_(1)[0])], {}, RuntimeError, "changed its state in place"),
    "resets in place": (
        lambda: [Event(lambda t, y: y[0] - 0.5, lambda t, y: y.mul_(2))],
        {},
        RuntimeError,
        r"the reset of events\[0\] changed its state in place",
    ),
    "another shape": (
        lambda: [Event(lambda t, y: y[0] - 0.5, lambda t, y: y[0])],
        {},
        ValueError,
        r"reset of events\[0\] has shape \(\)",
    ),
}


class Foreign:
    """An attribute of a class cannot be followed."""

    level = torch.tensor(0.5, dtype=D, requires_grad=True)
    change = torch.tensor(1.0, dtype=D, requires_grad=True)


@pytest.mark.parametrize("slots", [1, "all"])
@pytest.mark.parametrize(
    "event",
    [
        Event(lambda t, y: y[0] - Foreign.level),
        Event(lambda t, y: y[0] - 0.5, lambda t, y: y + Foreign.change),
        At([0.5], lambda t, y: y + Foreign.change),
    ],
)
def test_what_an_event_alone_uses_is_followed_or_refused(event: Any, slots: Any) -> None:
    y0 = torch.zeros(2, dtype=D, requires_grad=True)
    with pytest.raises(adjoint.UntrackedTensorError):
        s = adjoint.solve(one, y0, [0.0, 1.0], events=[event], slots=slots)
        (s.ys.sum() + s.events[0].ts.sum()).backward()


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_get_a_sentence(call: str, tmp_path: Any) -> None:
    events, how, kind, sentence = WRONG[call]
    y0 = torch.zeros(2, dtype=D, requires_grad=True)
    how = {"f": one, "y0": y0, "t": [0.0, 1.0]} | how | ({"journal": tmp_path} if "journal" in how else {})
    with pytest.raises(kind, match=sentence):
        adjoint.solve(**how, events=events())


def test_wrong_events_get_a_sentence() -> None:
    for wrong, sentence in (
        (lambda: Event(1.0), "must be a function of"),  # type: ignore[arg-type]
        (lambda: Event(one, 1.0), "reset=1.0 must be a function"),  # type: ignore[arg-type]
        (lambda: Event(one, direction=2), "direction=2 of an event"),
        (lambda: Event(one, terminal=-1), "terminal=-1 of an event"),
        (lambda: Event(one, samples=-1), "samples=-1 of an event"),
        (lambda: At([1.0, 1.0]), "holds a time twice"),
        (lambda: At([math.nan]), "must be finite"),
        (lambda: At(torch.ones(())), "give a series"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            wrong()


def test_under_transforms() -> None:
    def time(h: Tensor) -> Tensor:
        y0 = torch.stack((h, torch.zeros_like(h)))
        f = lambda t, y: torch.stack((y[1], torch.full_like(y[1], -10.0)))  # noqa: E731
        return adjoint.solve(f, y0, [0.0, 4.0], events=[Event(lambda t, y: y[0], terminal=True)]).events[0].ts[0]

    h = torch.tensor(5.0, dtype=D)
    assert torch.func.grad(time)(h).item() == pytest.approx(0.1)
    assert torch.func.jvp(time, (h,), (torch.ones_like(h),))[1].item() == pytest.approx(0.1)


def test_a_state_is_observed_behind_and_before_events() -> None:
    rate, weight = number(0.7), number(2.0)
    dose = At([1.0], lambda t, y: y + 1)
    how: dict[str, Any] = {"t": [0.0, 0.5, 1.0, 1.5], "events": [dose], "rtol": 1e-9}
    y0 = torch.ones((), dtype=D)
    s = adjoint.solve(lambda t, y: -rate * y, y0, observe=lambda t, y: weight * y**2 + t, **how)
    ys = adjoint.solve(lambda t, y: -rate * y, y0, **how).ys
    torch.testing.assert_close(s.observed, weight * ys**2 + s.ts, rtol=0.0, atol=0.0)
    assert len(s.ys) == 1 and s.observed_ts is not None and s.events[0].after.shape == (1,)
    found = torch.autograd.grad(s.observed.sum(), (rate, weight))
    for a, b in zip(found, torch.autograd.grad((weight * ys**2).sum(), (rate, weight)), strict=True):
        assert torch.equal(a, b)
