"""Events: their times, and exact derivatives of times and states."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import adjoint
from adjoint import Implicit, check
from adjoint.options import METHODS

EXPLICIT = [name for name, method in METHODS.items() if not isinstance(method, Implicit)]

D = torch.float64
INTERFACES = [adjoint.odeint, adjoint.odeint_adjoint]


class Ball(nn.Module):
    """A ball that falls with drag, from above a floor that rises with time."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([9.8, 0.03], dtype=dtype))
        self.floor = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], -self.p[0] - self.p[1] * y[1] * torch.sqrt(1 + y[1] ** 2)

    def lands(self, t: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        return y[0] - self.floor * torch.exp(0.1 * t)


def start(dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    return torch.tensor([10.0], dtype=dtype, requires_grad=True), torch.tensor([3.0], dtype=dtype, requires_grad=True)


def steps_of(method: str) -> dict[str, Any]:
    own: dict[str, Any] = {} if METHODS[method].adaptive else {"step_size": 0.02, "interp": "cubic"}
    return {"method": method, "options": own | ({"max_order": 5} if "adams" in method else {})}


def landing(odeint: Callable[..., Any], f: Ball, y0: Any, t0: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    time, (height, speed) = adjoint.odeint_event(f, y0, t0, event_fn=f.lands, odeint_interface=odeint, **how)
    return time, height[-1], speed[-1]


def derivatives(odeint: Callable[..., Any], **how: Any) -> list[Tensor]:
    f, y0, t0 = Ball(), start(), torch.tensor(0.2, dtype=D, requires_grad=True)
    time, height, speed = landing(odeint, f, y0, t0, **how)
    loss = time + 0.3 * height.sum() - 0.2 * speed.sum()
    return [time.detach(), height.detach(), speed.detach(), *torch.autograd.grad(loss, (*y0, f.p, f.floor, t0))]


@pytest.mark.parametrize("method", EXPLICIT)
def test_the_event_is_where_the_function_is_zero_and_the_gradient_is_that_of_the_numbers(method: str) -> None:
    """Differences over frozen steps, of the event's time and state in everything that they depend on."""
    f, t0 = Ball(), torch.tensor(0.2, dtype=D)

    def loss(h: Tensor, v: Tensor, p: Tensor, floor: Tensor, t0: Tensor) -> Tensor:
        def falling(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1], -p[0] - p[1] * y[1] * torch.sqrt(1 + y[1] ** 2)

        time, (height, speed) = adjoint.odeint_event(
            falling,
            (h, v),
            t0,
            event_fn=lambda t, y: y[0] - floor * torch.exp(0.1 * t),
            odeint_interface=adjoint.odeint_adjoint,
            rtol=1e-5,
            **steps_of(method),
        )
        assert abs(height[-1].item() - floor.item() * math.exp(0.1 * time.item())) < 1e-12
        return time + 0.3 * height[-1].sum() - 0.2 * speed[-1].sum()

    inputs = [*(x.detach() for x in start()), f.p.detach(), f.floor.detach(), t0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, dtype=D, generator=generator) for x in inputs]
    expected = float(sum((g * d).sum() for g, d in zip(gradients, along, strict=True)))
    assert check.directional_difference(loss, inputs, along, h=1e-6) == pytest.approx(expected, rel=2e-8)


@pytest.mark.parametrize("method", EXPLICIT)
def test_every_gradient_is_the_same_and_no_schedule_changes_a_bit(method: str) -> None:
    how = {"rtol": 1e-3, "atol": 1e-4, **steps_of(method)}
    everything = derivatives(adjoint.odeint_adjoint, slots="all", **how)
    for memory in ({"slots": 2}, {"slots": 5}, {"budget": "300 KiB"}):
        assert all(map(torch.equal, derivatives(adjoint.odeint_adjoint, **memory, **how), everything))
    for a, b in zip(derivatives(adjoint.odeint, **how), everything, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "rk4", "implicit_adams"])
def test_continuous_adjoints_agree_within_the_tolerance(method: str) -> None:
    how = {"rtol": 1e-6, "atol": 1e-8, **steps_of(method)}
    discrete = derivatives(adjoint.odeint_adjoint, **how)
    for a, b in zip(derivatives(adjoint.odeint_adjoint, gradient="backsolve", **how), discrete, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", [name for name in EXPLICIT if name != "tsit5"])
def test_times_and_states_agree_with_torchdiffeq(method: str, reverse: bool) -> None:
    f, (h, v), t0 = Ball(), start(), torch.tensor(0.2, dtype=D)
    y0 = (h, -v) if reverse else (h, v)
    how: dict[str, Any] = {"event_fn": f.lands, "reverse_time": reverse, "rtol": 1e-5, "atol": 1e-7, **steps_of(method)}
    with torch.no_grad():
        theirs = torchdiffeq.odeint_event(f, y0, t0, odeint_interface=torchdiffeq.odeint, **how)
        for odeint in INTERFACES:
            ours = adjoint.odeint_event(f, y0, t0, odeint_interface=odeint, **how)
            assert (float(ours[0]) < 0.2) is reverse
            rough = 5e-3 if method in ("dopri8", "bosh3", "fehlberg2") else 1e-4  # where theirs interpolates coarsely
            torch.testing.assert_close(ours[0], theirs[0], rtol=rough, atol=rough)
            for a, b in zip(ours[1], theirs[1], strict=True):
                assert a.shape == b.shape == (2, 1)
                torch.testing.assert_close(a, b, rtol=rough, atol=rough)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_gradients_of_gradients(method: str) -> None:
    def time_and_place(h: Tensor, p: Tensor, floor: Tensor, t0: Tensor) -> tuple[Tensor, Tensor]:
        def falling(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1], -p[0] - p[1] * y[1] * y[1].abs()

        own = {"method": method, "options": {} if method == "dopri5" else {"step_size": 0.2, "interp": "cubic"}}
        time, (height, speed) = adjoint.odeint_event(
            falling, (h, torch.zeros_like(h)), t0, event_fn=lambda t, y: y[0] - floor * t, rtol=1e-3, atol=1e-3, **own
        )
        return time * speed[-1].sum(), height[-1]

    inputs = [torch.tensor(x, dtype=D, requires_grad=True) for x in ([4.0], [9.8, 0.2], 0.3, 0.1)]
    with adjoint.frozen_steps() as replay:
        time_and_place(*inputs)

        def again(*given: Tensor) -> tuple[Tensor, Tensor]:
            replay.rewind()
            return time_and_place(*given)

        assert torch.autograd.gradcheck(again, inputs)
        assert torch.autograd.gradgradcheck(again, inputs)


def test_a_known_time() -> None:
    """A free fall from height h takes sqrt(2 h / g): every derivative is known."""
    h, g = (torch.tensor([x], dtype=D, requires_grad=True) for x in (5.0, 10.0))
    y0 = (h, torch.zeros(1, dtype=D))
    for odeint in INTERFACES:
        time, (height, speed) = adjoint.odeint_event(
            lambda t, y: (y[1], -g), y0, 0.0, event_fn=lambda t, y: y[0], odeint_interface=odeint
        )
        assert time.item() == pytest.approx(1.0, abs=1e-12)
        assert [float(x) for x in torch.autograd.grad(time, (h, g), retain_graph=True)] == pytest.approx([0.1, -0.05])
        assert [float(x) for x in torch.autograd.grad(speed[-1], (h, g), retain_graph=True)] == pytest.approx(
            [-1, -0.5]
        )
        assert [float(x) for x in torch.autograd.grad(height[-1], (h, g))] == pytest.approx([0, 0], abs=1e-12)


def test_the_first_of_several_events_counts() -> None:
    """y = (t, 2 t, -t): the components reach 1.5, 1.2 and -1.3; all at once, in one tensor of any shape."""
    rates = torch.tensor([1.0, 2.0, -1.0], dtype=D, requires_grad=True)
    levels = torch.tensor([[1.5, 1.2, -1.3]], dtype=D, requires_grad=True)
    time, ys = adjoint.odeint_event(
        lambda t, y: rates, torch.zeros(3, dtype=D), torch.zeros(1, dtype=D), event_fn=lambda t, y: y - levels
    )
    assert time.item() == pytest.approx(0.6)
    (of_rates, of_levels) = torch.autograd.grad(time, (rates, levels), retain_graph=True)
    assert of_rates.tolist() == pytest.approx([0, -0.3, 0], abs=1e-12)
    assert of_levels.flatten().tolist() == pytest.approx([0, 0.5, 0], abs=1e-12)
    assert torch.autograd.grad(ys[-1, 0], rates)[0].tolist() == pytest.approx([0.6, -0.3, 0], abs=1e-12)


@pytest.mark.parametrize("odeint", INTERFACES)
def test_an_event_at_the_start_is_one_at_once(odeint: Any) -> None:
    f = Ball()
    y0, t0 = start(), torch.tensor(0.2, dtype=D, requires_grad=True)
    y0 = (f.floor.detach()[None] * math.exp(0.02), y0[1])
    y0[0].requires_grad_()
    time, height, speed = landing(odeint, f, y0, t0)
    assert time.item() == 0.2 and torch.equal(height, y0[0]) and torch.equal(speed, y0[1])
    slope = 3.0 - 0.05 * math.exp(0.02)  # of height - floor along the flight
    assert float(torch.autograd.grad(time, y0[0])[0]) == pytest.approx(-1 / slope)


def test_an_event_in_the_last_place_of_a_step() -> None:
    one = torch.ones(1, dtype=D, requires_grad=True)
    how: dict[str, Any] = {"method": "euler", "options": {"step_size": 0.125}}
    for odeint in INTERFACES:
        how["odeint_interface"] = odeint
        time, y = adjoint.odeint_event(lambda t, y: -one, one, 0.0, event_fn=lambda t, y: y, **how)
        assert time.item() == 1.0 and y[-1].item() == 0.0
        assert float(torch.autograd.grad(time, one)[0]) == pytest.approx(0.0)  # later by y0, sooner by the rate


def test_a_bounce_is_solved_on_from_the_event() -> None:
    """Height h, restitution e: the second landing is at sqrt(2 h / g) (1 + 2 e)."""
    h, e = (torch.tensor([x], dtype=D, requires_grad=True) for x in (5.0, 0.8))
    for odeint in INTERFACES:
        interface = functools.partial(odeint, rtol=1e-9, atol=1e-9)

        def fall(y0: Any, t0: Any, interface: Any = interface) -> Any:
            def falling(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                return y[1], torch.full_like(y[1], -10.0)

            return adjoint.odeint_event(falling, y0, t0, event_fn=lambda t, y: y[0], odeint_interface=interface)

        time, (height, speed) = fall((h, torch.zeros_like(h)), 0.0)
        time, _ = fall((height[-1] + 1e-13, -e * speed[-1]), time)
        assert time.item() == pytest.approx(2.6, abs=1e-9)
        of_h, of_e = torch.autograd.grad(time, (h, e))
        assert float(of_h) == pytest.approx(0.26, rel=1e-8)
        assert float(of_e) == pytest.approx(2.0, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return rate * y

    rate = torch.tensor(-1.0, dtype=dtype, requires_grad=True)
    y0 = torch.full((2,), 2.0, dtype=dtype, requires_grad=True)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    how: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    for odeint in INTERFACES:
        t0 = torch.zeros((), dtype=torch.float32)
        time, ys = adjoint.odeint_event(
            f, y0, t0, event_fn=lambda t, y: y.abs().mean() - 1, odeint_interface=odeint, **how
        )
        assert time.dtype is torch.float32 and ys.dtype is dtype and ys.shape == (2, 2)
        assert time.item() == pytest.approx(math.log(2), rel=1e-5)
        assert torch.autograd.grad(time, rate)[0].real == pytest.approx(math.log(2), rel=1e-4)


def test_parameters_of_the_event_alone() -> None:
    """torchdiffeq gives these no gradient."""
    f, y0 = Ball(), tuple(x.detach() for x in start())
    f.p.requires_grad_(False)
    for odeint in INTERFACES:
        time, height, _ = landing(odeint, f, y0, torch.tensor(0.2, dtype=D))
        assert torch.autograd.grad(time, f.floor)[0] < 0
    theirs, _ = torchdiffeq.odeint_event(f, y0, torch.tensor(0.2, dtype=D), event_fn=f.lands)
    assert not theirs.requires_grad


@pytest.mark.parametrize("odeint", INTERFACES)
def test_under_transforms(odeint: Any) -> None:
    def time(p: Tensor) -> Tensor:
        y0 = torch.ones(1, dtype=D)
        return adjoint.odeint_event(
            lambda t, y: -p * y, y0, 0.0, event_fn=lambda t, y: y - 0.5, odeint_interface=odeint, rtol=1e-10
        )[0]

    rates = torch.tensor([0.5, 2.0], dtype=D)  # the time is log(2) / p
    expected = -math.log(2) / rates**2
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(time))(rates), expected, rtol=1e-6, atol=0.0)
    forwards = [torch.func.jvp(time, (p,), (torch.ones_like(p),))[1] for p in rates]
    torch.testing.assert_close(torch.stack(forwards), expected, rtol=1e-6, atol=0.0)


def test_only_signs_at_the_ends_of_steps_are_compared() -> None:
    how = {"method": "euler", "options": {"step_size": 1.0}}
    event = lambda t, y: (y - 0.5) * (y - 0.75) * (y - 2.5)  # noqa: E731
    time, _ = adjoint.odeint_event(lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=D), 0.0, event_fn=event, **how)
    assert time.item() == pytest.approx(2.5)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no step size": ({"method": "rk4"}, ValueError, "give options={'step_size'"),
    "not a tensor": ({"event_fn": lambda t, y: float(y[0])}, TypeError, "must give a tensor of real numbers"),
    "true or false": ({"event_fn": lambda t, y: y[0] < 0}, TypeError, "must give a tensor of real numbers"),
    "not finite": ({"event_fn": lambda t, y: y[0] * torch.nan}, ValueError, "event_fn gave \\[nan\\] at t=0"),
    "in place": ({"event_fn": lambda t, y: y[0].add_(1.0)}, RuntimeError, "event_fn changed its state in place"),
    "two starts": ({"t0": torch.zeros(2)}, ValueError, "t0 has shape"),
    "their interface": ({"odeint_interface": torchdiffeq.odeint}, ValueError, "event times without derivatives"),
    "their interface, inside": (
        {"odeint_interface": functools.partial(torchdiffeq.odeint_adjoint, rtol=1e-3)},
        ValueError,
        "event times without derivatives",
    ),
    "never": (
        {"event_fn": lambda t, y: y[0] * 0 + 1, "options": {"max_num_steps": 20}, "method": "dopri5"},
        adjoint.SolveError,
        "max_steps=20 taken and no event met by t=",
    ),
    "never, fixed steps": (
        {"event_fn": lambda t, y: y[0] * 0 + 1, "method": "euler", "options": {"step_size": 0.01}},
        adjoint.SolveError,
        "no event in 300 steps of 0.01, up to t=3",
    ),
    "touched": (
        {"event_fn": lambda t, y: (t - 1.0) ** 3 + 0 * y[0].sum(), "method": "euler", "options": {"step_size": 0.5}},
        ValueError,
        "touches zero at t=1 without crossing",
    ),
}


@pytest.mark.parametrize("odeint", INTERFACES)
@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_get_a_sentence(call: str, odeint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adjoint.options, "FIXED_UNTIL_EVENT", 300)
    given, kind, sentence = WRONG[call]
    f, y0 = Ball(), start()
    given = {"t0": torch.zeros(()), "event_fn": f.lands, "odeint_interface": odeint} | given
    with pytest.raises(kind, match=sentence):
        adjoint.odeint_event(f, y0, given.pop("t0"), **given)


def test_two_times_are_a_start_and_a_direction() -> None:
    f, y0 = Ball(), start()
    with pytest.raises(ValueError, match="t has 3 times; with event_fn give two"):
        adjoint.odeint(f, y0, torch.arange(3.0), event_fn=f.lands)
    time, _ = adjoint.odeint(f, y0, torch.tensor([0.0, 1e-3], dtype=D), event_fn=f.lands)
    assert time.item() > 1.5


def test_components_that_are_zero_at_once_have_no_derivative() -> None:
    y0 = torch.ones(1, dtype=D, requires_grad=True)

    def both(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[0] - 0.5, 2 * y[0] - 1))

    with torch.no_grad():
        time, _ = adjoint.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=both)
    assert time.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="components 0 and 1 of event_fn are zero at once, at t=0.693"):
        adjoint.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=both)
