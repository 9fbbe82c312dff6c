"""Observations, running costs and interpolated controls: what they return, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_cases import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline
from torch import Tensor

from adjoint import METHODS, Signal, UntrackedTensorError, scan, solve

DOUBLE = torch.float64
TIMES = [0.0, 0.3, 0.7, 1.0]


class World:
    """A system, and a receiver with a gain of its own."""

    def __init__(self) -> None:
        self.y0 = torch.tensor([1.0, -0.5, 0.3], dtype=DOUBLE).requires_grad_()
        self.matrix = torch.tensor(
            [[-0.3, 1.0, 0.0], [-1.0, -0.2, 0.4], [0.1, 0.0, -0.5]], dtype=DOUBLE
        ).requires_grad_()
        self.gain = torch.tensor(1.7, dtype=DOUBLE).requires_grad_()
        self.t = torch.tensor(TIMES, dtype=DOUBLE).requires_grad_()

    @property
    def wanted(self) -> list[Tensor]:
        return [self.y0, self.matrix, self.gain, self.t]

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.matrix @ y) * (1 + t)

    def see(self, t: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.gain * y[:2].sum() * torch.cos(t), "part": y[1:] ** 2}

    def cost(self, t: Tensor, y: Tensor) -> Tensor:
        return self.gain * (y**2).sum() * torch.exp(-t)

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, self.wanted, allow_unused=True))


def weighed(tree: dict[str, Tensor]) -> Tensor:
    return sum(
        (torch.sin(x) * torch.arange(1, x.numel() + 1, dtype=DOUBLE).reshape(x.shape)).sum() for x in tree.values()
    )


def how(method: str) -> dict[str, Any]:
    return (
        {"method": method, "rtol": 1e-5, "atol": 1e-7} if METHODS[method].adaptive else {"method": method, "dt": 0.06}
    )


def close(one: list[Tensor | None], other: list[Tensor | None], tolerance: float = 1e-12) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a,
            torch.zeros(()) if b is None else b,
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
        )


@pytest.mark.parametrize("method", METHODS)
def test_what_is_seen_is_g_of_the_states(method: str) -> None:
    """Values and every gradient, those of the times among them, are those of g applied to the states afterwards."""
    world = World()
    states = solve(world.f, world.y0, world.t, gradient="backprop", **how(method))
    pairs = [world.see(t, y) for t, y in zip(world.t, states.ys, strict=True)]
    after = {key: torch.stack([p[key] for p in pairs]) for key in pairs[0]}
    expected = world.gradients(weighed(after))
    bits: list[Tensor | None] | None = None
    for kind in ("backprop", 1, 3, "all"):
        choice = {"gradient": kind} if kind == "backprop" else {"slots": kind}
        solution = solve(world.f, world.y0, world.t, observe=world.see, **choice, **how(method))
        torch.testing.assert_close(solution.observed, after, rtol=1e-12, atol=1e-12)
        assert solution.ys.shape == (1, 3)
        assert torch.equal(solution.ys[0], states.ys[-1].detach()) or kind == "backprop"
        found = world.gradients(weighed(solution.observed))
        close(found, expected, 1e-10)
        if kind != "backprop":
            bits = bits or found
            assert_same_bits(found, bits)


@pytest.mark.parametrize("method", ["rk4", "tsit5", "euler", "dopri8"])
def test_seen_after_every_step(method: str) -> None:
    world = World()
    plain = solve(world.f, world.y0, world.t, observe=world.see, observe_at="steps", slots=2, **how(method))
    assert plain.observed_ts is not None and len(plain.observed_ts) == plain.stats.steps + 1
    assert plain.observed["part"].shape == (plain.stats.steps + 1, 2)
    loss = weighed(plain.observed) + (plain.ys**2).sum()
    found = world.gradients(loss)
    for choice in ({"slots": 1}, {"slots": "all"}, {"slots": 5}):
        again = solve(world.f, world.y0, world.t, observe=world.see, observe_at="steps", **choice, **how(method))
        assert_same_bits(world.gradients(weighed(again.observed) + (again.ys**2).sum()), found)
    graph = solve(world.f, world.y0, world.t, observe=world.see, observe_at="steps", gradient="backprop", **how(method))
    close(world.gradients(weighed(graph.observed) + (graph.ys**2).sum()), found, 1e-10)


def test_the_last_state_and_the_continuous_adjoint() -> None:
    world = World()
    exact = solve(world.f, world.y0, TIMES, observe=world.see, method="dopri5", rtol=1e-10, atol=1e-12)
    other = solve(
        world.f, world.y0, TIMES, observe=world.see, method="dopri5", rtol=1e-10, atol=1e-12, gradient="backsolve"
    )
    torch.testing.assert_close(exact.observed, other.observed)
    world.t = world.y0  # the times have no gradient here
    close(world.gradients(weighed(exact.observed)), world.gradients(weighed(other.observed)), 1e-7)
    with pytest.raises(ValueError, match="observe_at='steps' needs"):
        solve(world.f, world.y0, TIMES, observe=world.see, observe_at="steps", gradient="backsolve")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("observing", [False, True])
def test_a_running_cost_is_one_more_part_of_the_state(method: str, observing: bool) -> None:
    world = World()

    def both(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return world.f(t, state[0]), world.cost(t, state[0])

    first = (world.y0, torch.zeros((), dtype=DOUBLE))
    ys, q = solve(both, first, world.t, gradient="backprop", **how(method)).ys
    expected = world.gradients((q**2).sum() + (ys[-1] ** 3).sum())
    see = {"observe": lambda t, y: y.sum()} if observing else {}
    solution = solve(world.f, world.y0, world.t, cost=world.cost, slots=2, **see, **how(method))
    torch.testing.assert_close(solution.costs, q.detach(), rtol=1e-13, atol=1e-13)
    assert solution.ys.shape == ((1 if observing else 4), 3)
    close(world.gradients((solution.costs**2).sum() + (solution.ys[-1] ** 3).sum()), expected, 1e-10)


def test_the_integral_of_a_known_function() -> None:
    rate = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    solution = solve(
        lambda t, y: -rate * y,
        torch.ones(1, dtype=DOUBLE),
        [0.0, 1.0, 2.0],
        cost=lambda t, y: y[0] ** 2,
        rtol=1e-10,
        atol=1e-12,
    )
    assert solution.costs is not None
    known = (1 - torch.exp(-2 * rate * torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE))) / (2 * rate)
    torch.testing.assert_close(solution.costs, known, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(solution.costs[-1], rate)[0], torch.autograd.grad(known[-1], rate)[0], rtol=1e-8, atol=1e-9
    )


def test_members_have_costs_of_their_own() -> None:
    y0 = torch.tensor([[1.0], [2.0], [3.0]], dtype=DOUBLE)
    solution = solve(lambda t, y: -y, y0, [0.0, 1.0], batched=True, cost=lambda t, y: y[:, 0], rtol=1e-9, atol=1e-11)
    assert solution.costs is not None
    torch.testing.assert_close(
        solution.costs[-1], y0[:, 0] * (1 - torch.exp(torch.tensor(-1.0, dtype=DOUBLE))), rtol=1e-8, atol=1e-9
    )


def test_a_single_time_is_seen_too() -> None:
    world = World()
    solution = solve(world.f, world.y0, [0.5], observe=world.see, cost=world.cost)
    assert solution.observed["part"].shape == (1, 2)
    assert torch.equal(solution.costs, torch.zeros(1, dtype=DOUBLE))


def test_what_an_observation_holds_is_found_or_refused() -> None:
    world = World()
    hidden = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    shelf = type("Shelf", (), {"x": hidden})  # a class attribute is not followed
    with pytest.raises(UntrackedTensorError):
        solve(world.f, world.y0, TIMES, observe=lambda t, y: y * shelf.x, slots=2, method="rk4", dt=0.1)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"observe": 3}, TypeError, "observe=3"),
    ({"cost": "x"}, TypeError, "cost='x'"),
    ({"observe_at": "steps"}, ValueError, "observe= is missing"),
    ({"observe": lambda t, y: y, "observe_at": "step"}, ValueError, "did you mean 'steps'"),
    ({"cost": lambda t, y: 1.0}, TypeError, "cost returned 1.0"),
    ({"observe": lambda t, y: y > 0}, TypeError, "torch.bool"),
    ({"observe": lambda t, y: y.mul_(2)}, RuntimeError, "observe changed its state"),
    (
        {"observe": lambda t, y: y, "observe_at": "steps", "batched": True},
        ValueError,
        "members have steps of their own",
    ),
    ({"observe": lambda t, y: y.sum(), "batched": True}, ValueError, "a row for each member"),
    ({"observe": lambda t, y: y if t < 0.5 else (y,)}, TypeError, "the same always"),
]


@pytest.mark.parametrize(("wrong", "error", "text"), WRONG)
def test_wrong_calls(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    y0 = torch.ones(2, 2, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(error, match=text):
        solve(lambda t, y: -y, y0, TIMES, method="rk4", dt=0.1, **wrong)


def test_a_failed_solve_has_seen_what_it_reached() -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return y**2  # y = 1 / (1 - t)

    solution = solve(f, torch.ones(1, dtype=DOUBLE), [0.0, 0.5, 2.0], observe=lambda t, y: y * 2, throw=False)
    assert solution.status != "success"
    assert torch.isfinite(solution.observed[:2]).all() and not torch.isfinite(solution.observed[2]).any()


# --- signals ---


def numpy_of(kind: str, times: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    if kind == "cubic":
        spline = CubicSpline(times.numpy(), values.numpy(), bc_type="natural")
        return lambda t: torch.from_numpy(spline(t.clamp(times[0], times[-1]).numpy()))
    if kind == "linear":
        return lambda t: torch.stack([_linear(times, v, t) for v in values.T], -1)
    return lambda t: values[(torch.searchsorted(times, t, right=True) - 1).clamp(0, len(times) - 1)]


def _linear(times: Tensor, values: Tensor, t: Tensor) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.interp(t.numpy(), times.numpy(), values.numpy()))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["constant", "linear", "cubic"]), st.integers(2, 9), st.integers(0, 1000))
def test_a_signal_is_what_numpy_and_scipy_make_of_it(kind: str, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = torch.cumsum(0.1 + torch.rand(count, dtype=DOUBLE, generator=generator), 0)
    values = torch.randn(count, 2, dtype=DOUBLE, generator=generator)
    t = torch.cat((times, torch.linspace(float(times[0]) - 1, float(times[-1]) + 1, 41, dtype=DOUBLE)))
    torch.testing.assert_close(Signal(times, values, kind)(t), numpy_of(kind, times, values)(t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["constant", "linear", "cubic"])
@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_gradients_to_the_values_of_a_control(kind: str, method: str) -> None:
    values = torch.tensor([0.3, -1.0, 0.7, 0.2], dtype=DOUBLE, requires_grad=True)

    def final(gradient: dict[str, Any]) -> Tensor:
        u = Signal(TIMES, values, kind)
        steps = {"dt": 0.05} if method == "rk4" else {"rtol": 1e-8, "atol": 1e-10}
        return (
            solve(
                lambda t, y: torch.sin(u(t)) - y,
                torch.ones(1, dtype=DOUBLE),
                [0.0, 1.0],
                method=method,
                jumps=u.jumps,
                **steps,
                **gradient,
            )
            .ys[-1]
            .sum()
        )

    found = torch.autograd.grad(final({"slots": 2}), values)
    close(list(found), list(torch.autograd.grad(final({"gradient": "backprop"}), values)))
    assert torch.autograd.gradcheck(lambda v: _final_of(v, kind), values, rtol=1e-5, atol=1e-7)


def _final_of(values: Tensor, kind: str) -> Tensor:
    u = Signal(TIMES, values, kind)
    return solve(
        lambda t, y: torch.sin(u(t)) - y,
        torch.ones(1, dtype=DOUBLE),
        [0.0, 1.0],
        method="rk4",
        dt=0.1,
        jumps=u.jumps,
        slots=3,
    ).ys[-1]


def test_a_step_ends_where_a_control_jumps() -> None:
    """The order of the method is kept: the exact answer to rounding for a piecewise constant slope."""
    u = Signal([0.0, 1 / 3], torch.tensor([1.0, -2.0], dtype=DOUBLE), "constant")
    y = solve(lambda t, y: u(t) + 0 * y, torch.zeros(1, dtype=DOUBLE), [0.0, 1.0], method="tsit5", jumps=u.jumps).ys[-1]
    torch.testing.assert_close(y, torch.tensor([1 / 3 - 2 * 2 / 3], dtype=DOUBLE), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Signal([0.0, 1.0], torch.zeros(3)), "one time for each"),
        (lambda: Signal([1.0, 0.0], torch.zeros(2)), "strictly increase"),
        (lambda: Signal([0.0], torch.zeros(1)), "at least two"),
        (lambda: Signal([0.0, 1.0], torch.zeros(2), "cubc"), "did you mean 'cubic'"),
        (lambda: Signal([0.0, 1.0], [0.0, 1.0]), "must be a tensor"),  # type: ignore[arg-type]
    ],
)
def test_wrong_signals(call: Callable[[], object], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()


@pytest.mark.parametrize("at", ["times", "steps"])
def test_forward_sensitivities_of_what_is_seen(at: str) -> None:
    world = World()
    world.t = world.y0
    how_many = {"observe": world.see, "observe_at": at, "cost": world.cost, "method": "tsit5"}
    found = [
        world.gradients(weighed(s.observed) + s.costs.sum())
        for s in (solve(world.f, world.y0, TIMES, gradient=g, **how_many) for g in ("discrete", "tangent"))
    ]
    close(found[0], found[1], 1e-10)


@pytest.mark.parametrize("slots", ["all", 1, 3, None])
@pytest.mark.parametrize("times", [TIMES, [0.01 * j for j in range(101)], [0.0, 0.95, 1.0]])
@pytest.mark.parametrize("where", ["times", "steps"])
def test_what_is_seen_must_not_change_before_the_reverse_sweep(
    where: str, times: list[float], slots: int | str | None
) -> None:
    """A number that observe uses alone: the states are computed again as they were."""
    world, number = World(), [1.0]

    def gradients(change: bool) -> list[Tensor | None]:
        number[0] = 1.0
        how: dict[str, Any] = {"observe": lambda t, y: number[0] * world.gain * y, "observe_at": where, "slots": slots}
        seen = solve(world.f, world.y0, times, method="rk4", dt=0.05, **how).observed
        number[0] = 2.0 if change else 1.0
        return world.gradients(seen.sum())

    expected = gradients(False)
    if slots in ("all", None):  # nothing is computed again
        assert_same_bits(gradients(True), expected)
    else:
        with pytest.raises(RuntimeError, match="gives other values when it is called again"):
            gradients(True)


def test_outputs_of_a_recurrence_must_not_change_either() -> None:
    decay, number = torch.tensor(0.9, dtype=DOUBLE, requires_grad=True), [1.0]
    _, outputs = scan(
        lambda c, x: (decay * c + x, number[0] * decay * c), torch.ones((), dtype=DOUBLE), torch.ones(50), slots=4
    )
    number[0] = 2.0
    with pytest.raises(RuntimeError, match="gives other values when it is called again"):
        outputs.sum().backward()


@pytest.mark.parametrize("batched", [False, True])
def test_jumps_that_require_grad_are_refused(batched: bool) -> None:
    switch = torch.tensor([0.4], dtype=DOUBLE, requires_grad=True)
    for jumps in (switch, [switch[0], 0.7]):
        with pytest.raises(ValueError, match="jumps requires grad, and no gradient comes back"):
            solve(lambda t, y: -y, torch.ones(2, dtype=DOUBLE), [0.0, 1.0], jumps=jumps, batched=batched)
    assert solve(lambda t, y: -y, torch.ones(2, dtype=DOUBLE), [0.0, 1.0], jumps=switch.detach(), batched=batched)


@pytest.mark.parametrize("how", [{"method": "rk4", "dt": 0.1}, {"method": "tsit5", "rtol": 1e-8}])
@pytest.mark.parametrize("with_cost", [False, True])
def test_members_are_seen_as_they_would_be_alone(how: dict[str, Any], with_cost: bool) -> None:
    """One has fewer times, and one fails: what is seen of the others and its gradients are as without them."""
    rates = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE).requires_grad_()
    gain, y0 = torch.tensor(1.7, dtype=DOUBLE).requires_grad_(), torch.full((3, 2), 1.2, dtype=DOUBLE).requires_grad_()
    rows = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.3, torch.nan], [0.0, 0.2, 4.0]], dtype=DOUBLE).requires_grad_()
    wanted = (rates, gain, y0, rows)
    fails = torch.tensor([[1.0], [1.0], [2.0]], dtype=DOUBLE)

    def see(t: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"log": gain * y.log().sum(-1) * t, "sum": gain + y.sum(-1)}

    def cost(t: Tensor, y: Tensor) -> Tensor:
        return gain * y.sum(-1)

    more: dict[str, Any] = how | {"observe": see} | ({"cost": cost} if with_cost else {})
    solution = solve(lambda t, y: rates[:, None] * y**fails, y0, rows, batched=True, throw=False, **more)
    assert solution.status[:2] == ("success", "success") != solution.status[2:]
    seen = {**solution.observed, **({"cost": solution.costs} if with_cost else {})}
    assert all(x.shape == (3, 3) and x[2, 1:].isnan().all() for x in seen.values())
    loss = sum((torch.sin(x[:, :2])[torch.isfinite(x[:, :2])]).sum() for x in seen.values())
    assert isinstance(loss, Tensor)
    expected = torch.zeros((), dtype=DOUBLE)
    for b, count in ((0, 3), (1, 2)):
        alone = solve(lambda t, y: rates[b] * y, y0[b], rows[b, :count], **more)  # noqa: B023
        assert with_cost or torch.allclose(alone.observed["log"], seen["log"][:count, b], rtol=1e-9)
        parts = [*alone.observed.values(), *([alone.costs] if with_cost else [])]
        expected = expected + sum((torch.sin(x)).sum() for x in parts)
    for found, right in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)
