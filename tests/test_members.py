"""A batch in lock-step is its members one by one: values, steps, gradients, whatever the slots, whoever fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adjoint_cases import ADAPTIVE, MEMORY, assert_close, assert_same_bits, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint import METHODS, Backsolve, Controller, Device, Host, Solution, SolveError, check, solve
from adjoint.memory import Meter
from revolve import BudgetError

F64 = torch.float64
AMPLIFIED = 1e-9 / 2**-52
"""Errors are differences of nearly equal numbers: their rounding moves the lengths of steps by more than rounding."""


@dataclass
class Batch:
    """A right-hand side for all, and for one; whose gradients are wanted."""

    f: Callable[..., Any]
    one: Callable[[int], Callable[..., Any]]
    y0: Any
    t: Tensor
    wanted: list[Tensor]

    def together(self, **how: Any) -> Solution:
        return solve(self.f, self.y0, self.t, batched=True, **how)

    def apart(self, **how: Any) -> list[Solution]:
        """Each member by itself; arguments that are tensors have a row for each."""
        solutions = []
        for b in range(len(self.t)):
            own = {key: float(x[b]) if isinstance(x, Tensor) else x for key, x in how.items()}
            y0 = pytree.tree_map(lambda x, b=b: x[b], self.y0)
            solutions.append(solve(self.one(b), y0, self.t[b], **own))
        return solutions


def stacked(solutions: list[Solution]) -> Any:
    return pytree.tree_map(lambda *xs: torch.stack(xs, 1), *[s.ys for s in solutions])


def gradients(ys: Any, wanted: list[Tensor]) -> list[Tensor | None]:
    total = torch.zeros((), dtype=F64)
    for seed, x in enumerate(pytree.tree_leaves(ys)):
        total = total + ((numbers(*x.shape, seed=seed, dtype=x.dtype) * x).sum().real + (x.abs() ** 2).sum()).double()
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def predators(members: int = 4) -> Batch:
    """Lotka and Volterra: own parameters, a shared one, own times, forced in time."""
    own = (1 + 0.3 * numbers(members, 4, seed=1).tanh()).requires_grad_()
    shared = torch.tensor([1.1, 0.9], dtype=F64, requires_grad=True)
    y0 = (1.5 + 0.4 * numbers(members, 2, seed=2).tanh()).requires_grad_()
    t = (0.1 + numbers(members, 4, seed=3).abs()).cumsum(1).mul(0.4).requires_grad_()

    def one(b: int) -> Callable[..., Tensor]:
        def f(t: Tensor, y: Tensor) -> Tensor:
            p = own[b]
            return torch.stack((y[0] * (p[0] - p[1] * y[1]), y[1] * (p[3] * y[0] - p[2]))) * shared * torch.cos(t)

        return f

    def f(t: Tensor, y: Tensor) -> Tensor:
        x, z, p = y[:, 0], y[:, 1], own.unbind(1)
        slope = torch.stack((x * (p[0] - p[1] * z), z * (p[3] * x - p[2])), 1)
        return slope * shared * torch.cos(t)[:, None]

    return Batch(f, one, y0, t, [own, shared, y0, t])


def tree() -> Batch:
    """A dict with leaves of other shapes and dtypes, complex ones too; some members go backwards in time."""
    p = numbers(3, seed=1).requires_grad_()
    w = numbers(2, seed=4, dtype=torch.complex128).requires_grad_()
    y0 = {
        "a": numbers(3, seed=2).requires_grad_(),
        "b": [
            numbers(3, 2, seed=3, dtype=torch.complex128).requires_grad_(),
            numbers(3, 2, 2, seed=5),
        ],
    }
    t = torch.tensor([[0.0, 0.4, 1.0], [1.0, 0.5, -0.5], [0.2, 0.3, 0.9]], dtype=F64, requires_grad=True)

    def slopes(t: Tensor, p: Tensor, y: Any, a: Tensor, more: Callable[[Tensor, int], Tensor]) -> Any:
        c, d = y["b"]
        first = torch.sin(p * y["a"]) + t * c.abs().sum(-1)
        return {"a": first, "b": [1j * w * c * more(a, 1), torch.tanh(d) * more(a, 2)]}

    def f(t: Tensor, y: Any) -> Any:
        return slopes(t, p, y, y["a"], lambda a, dims: a.reshape(-1, *[1] * dims))

    def one(b: int) -> Callable[..., Any]:
        return lambda t, y: slopes(t, p[b], y, y["a"], lambda a, dims: a)

    return Batch(f, one, y0, t, [p, w, y0["a"], y0["b"][0], t])


def network() -> Batch:
    """Weights that all members share, states of 3 entries, times that all share."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    y0 = numbers(3, 3, seed=1).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.1], dtype=F64).expand(3, 3)
    return Batch(lambda t, y: net(y) - y, lambda b: lambda t, y: net(y) - y, y0, t, [*net.parameters(), y0])


def single() -> Batch:
    """float32 throughout, times included; a leaf without further dimensions."""
    p = numbers(3, seed=1, dtype=torch.float32).requires_grad_()
    y0 = numbers(3, seed=2, dtype=torch.float32).requires_grad_()
    t = torch.tensor([[0.0, 0.3, 0.8], [0.1, 0.2, 1.1], [0.0, 0.5, 0.9]], requires_grad=True)
    return Batch(
        lambda t, y: torch.sin(p * y) - y * t, lambda b: lambda t, y: torch.sin(p[b] * y) - y * t, y0, t, [p, y0, t]
    )


BATCHES: dict[str, Callable[[], Batch]] = {"predators": predators, "tree": tree, "network": network, "single": single}
PAIRS = [(method, "predators") for method in METHODS]
PAIRS += [(method, name) for method in ("rk4", "tsit5", "bosh3") for name in ("tree", "network", "single")]


def ways(method: str) -> dict[str, Any]:
    """Few steps: laws hold for steps of any length."""
    if METHODS[method].adaptive:
        loose = 10.0 if METHODS[method].order < 4 else 1.0
        return {"method": method, "rtol": 1e-3 * loose, "atol": 1e-5 * loose}
    return {"method": method, "dt": 0.21}


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_a_batch_is_its_members_one_by_one(method: str, name: str) -> None:
    batch, how = BATCHES[name](), ways(method)
    alone = batch.apart(**how)
    expected = gradients(stacked(alone), batch.wanted)
    places = 500 if name == "single" else AMPLIFIED if METHODS[method].adaptive else 4500
    for memory in ({"slots": 2}, {"gradient": "backprop"}):
        together = batch.together(**how, **memory)
        assert together.status == ("success",) * len(batch.t)
        assert together.stats.steps.tolist() == [s.stats.steps for s in alone]
        assert together.stats.rejected.tolist() == [s.stats.rejected for s in alone]
        assert_close(*(pytree.tree_leaves(ys) for ys in (together.ys, stacked(alone))), places)
        assert_close(gradients(together.ys, batch.wanted), expected, places)


@pytest.mark.parametrize(("method", "name"), [*PAIRS[::3], ("dopri5", "predators"), ("tsit5", "predators")])
def test_the_gradient_does_not_depend_on_memory_bit_for_bit(method: str, name: str) -> None:
    batch, how = BATCHES[name](), ways(method)
    found = []
    for memory in MEMORY[:3] + MEMORY[-2:]:
        solution = batch.together(**how, **memory)
        found.append([*pytree.tree_leaves(solution.ys), *gradients(solution.ys, batch.wanted)])
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_accepted_steps_taken_alone_give_the_same_to_rounding(method: str) -> None:
    """Without the control, which amplifies rounding, nothing but rounding is left."""
    batch = predators()
    together = batch.together(**ways(method))
    timeline = together.stats.counted.program.timeline
    knots = torch.stack([timeline.times(k) for k in range(timeline.steps + 1)])
    for b in range(len(batch.t)):
        unadapted = dataclasses.replace(METHODS[method], error=None)
        y = solve(batch.one(b), batch.y0[b], knots[:, b].unique(), method=unadapted).ys[-1]
        assert_close([together.ys[-1, b]], [y], 100)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_members_with_any_times_stiffness_and_tolerance_are_their_solves_alone(data: st.DataObject) -> None:
    members, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))

    def floats(low: float, high: float, n: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.floats(low, high), min_size=n, max_size=n)), dtype=F64)

    rate = (10 ** floats(-1.0, 2.0, members)).requires_grad_()
    shared = torch.tensor(0.7, dtype=F64, requires_grad=True)
    signs = torch.where(floats(0, 1, members) < 0.3, -1.0, 1.0).to(F64)[:, None]
    gaps = floats(0.01, 0.7, members * count).reshape(members, count)
    t = (signs * (gaps.cumsum(1) + floats(-1, 1, members)[:, None])).requires_grad_()
    y0 = floats(-2, 2, members).requires_grad_()
    rtol, atol = (10 ** floats(-7, -2, members) for _ in range(2))
    turn = -signs[:, 0]  # stable in the direction of time
    batch = Batch(
        lambda s, y: turn * rate * (y - shared * torch.cos(s)),
        lambda b: lambda s, y: turn[b] * rate[b] * (y - shared * torch.cos(s)),
        y0,
        t,
        [rate, shared, y0, t],
    )
    method = data.draw(st.sampled_from(["tsit5", "dopri5", "bosh3", "rk4"]))
    controller = data.draw(st.sampled_from(["I", "PI", "PID", Controller(max_step=0.1)]))
    how: dict[str, Any] = {"method": method, "controller": controller, "rtol": rtol, "atol": atol}
    if method == "rk4":
        how["dt"] = 10 ** floats(-1.7, -1, members)
        how["rtol"] = how["atol"] = 1e-6
    jumps = data.draw(st.lists(st.floats(-1, 1), max_size=2))
    alone = batch.apart(**how, jumps=jumps)
    together = batch.together(**how, jumps=jumps, slots=data.draw(st.sampled_from(["all", 1, 3])))
    steps = torch.tensor([s.stats.steps for s in alone])
    if not torch.equal(together.stats.steps, steps):  # an error on the very brink of what is accepted
        assert int((together.stats.steps - steps).abs().max()) <= 1
        return
    scale = float(stacked(alone).detach().abs().max())
    assert float((together.ys - stacked(alone)).detach().abs().max()) <= 1e-8 * max(scale, 1e-3)
    assert_close(gradients(together.ys, batch.wanted), gradients(stacked(alone), batch.wanted), 100 * AMPLIFIED)


def doomed(kind: str, member: int = 1) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
    """Four members with rates of their own and a shared factor, of which one comes to grief; f, y0, rates, shared."""
    rate = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=F64, requires_grad=True)
    shared = torch.tensor(1.2, dtype=F64, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.5]] * 4, dtype=F64) * torch.tensor([1.0, 1.1, 0.9, 1.3], dtype=F64)[:, None]
    bad = torch.zeros(4, 1, dtype=F64)
    bad[member] = 1
    if kind == "born":
        y0[member, 0] = torch.nan
    y0.requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        slope = -rate[:, None] * shared * y
        if kind == "explodes":
            return slope + bad * (5 * y) ** 3
        if kind == "root":  # not a number, and neither is its derivative
            return slope * torch.sqrt(1 - bad * t[:, None] / 0.8) + 0 * shared * torch.sqrt(1 - bad * t[:, None] / 0.8)
        if kind == "never":
            return slope * torch.sqrt(torch.where(bad > 0, y[:, :1] - 1.2, y[:, :1] * 0 + 1))
        if kind == "vertical":  # finite where it fails, with an infinite slope
            return slope - bad * shared * torch.sqrt(y)
        return slope

    return f, y0, rate, shared


KINDS = ("born", "explodes", "root", "never", "vertical", "nothing")


@pytest.mark.parametrize("how", [{"slots": "all"}, {"slots": 2}, {"gradient": "backprop"}], ids=str)
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_fails_does_not_disturb_the_rest(kind: str, method: str, how: dict[str, Any]) -> None:
    f, y0, rate, shared = doomed(kind)
    t = torch.tensor([0.0, 0.4, 1.5], dtype=F64)
    dt = 0.05 if method == "rk4" else None
    loose = {"method": method, "dt": dt, "rtol": 1e-3, "atol": 1e-4, "batched": True}
    solution = solve(f, y0, t, throw=False, **loose, **how)
    good = torch.tensor([kind == "nothing" or b != 1 for b in range(4)])
    assert torch.equal(solution.stats.succeeded, good)
    assert (solution.status[1] == "success") == (kind == "nothing")
    assert bool(solution.stats.reached[1] < 1.5) == (kind != "nothing")

    sane, other, *_ = doomed("nothing")
    alone = solve(lambda t, y: -rate[good, None] * shared * y, other.detach()[good], t, **loose)
    assert_close([solution.ys[:, good]], [alone.ys], 1e5)
    (found_rate, found_shared, found_y0) = torch.autograd.grad((solution.ys[:, good] ** 3).sum(), (rate, shared, y0))
    expected = torch.autograd.grad((alone.ys**3).sum(), (rate, shared))
    assert_close([found_rate[good], found_shared], [expected[0][good], expected[1]], 1e5)
    assert bool(torch.isfinite(found_y0[good]).all())
    if kind not in ("born", "nothing"):
        assert not found_rate[~good].any() and not found_y0[~good].any()


@pytest.mark.parametrize("how", [{"slots": "all"}, {"slots": 2}, {"gradient": "backprop"}], ids=str)
def test_what_a_failed_member_reached_has_its_gradient(how: dict[str, Any]) -> None:
    f, y0, rate, shared = doomed("root")
    t = [0.0, 0.3, 0.6, 1.5]
    solution = solve(f, y0, t, batched=True, throw=False, rtol=1e-4, **how)
    assert solution.status == ("success", "underflow", "success", "success")
    assert torch.equal(torch.isfinite(solution.ys[:, 1, 0]), torch.tensor([True, True, True, False]))
    found = torch.autograd.grad(torch.nansum(solution.ys[:3] ** 2), (rate, shared, y0))
    before = solve(f, y0, t[:3], batched=True, rtol=1e-4)
    # the last step of the failed member ends elsewhere: equal to the tolerance
    for a, b in zip(found, torch.autograd.grad((before.ys**2).sum(), (rate, shared, y0)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_rejected_attempt_leaks_nothing_into_shared_gradients() -> None:
    """The first step tried is much too long for one member: f is finite there, its derivative is not."""
    shared = torch.tensor(1.0, dtype=F64, requires_grad=True)
    rate = torch.tensor([1.0, 600.0], dtype=F64)
    y0 = torch.tensor([1.0, 5.0], dtype=F64, requires_grad=True)
    met = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        steep = torch.exp(-10 * y)
        met.append(bool(torch.isinf(steep).any()))
        return -rate * shared * y / (1 + 1 / (1 + steep))

    found = []
    for how in ({"slots": "all"}, {"slots": 2}, {"gradient": "backprop"}):
        solution = solve(f, y0, [0.0, 0.1], dt=0.1, batched=True, **how)
        assert int(solution.stats.rejected[1]) > 0
        found.append(torch.autograd.grad(solution.ys[-1].sum(), (shared, y0)))
    assert any(met)
    assert all(bool(torch.isfinite(x).all()) for x in found[0])
    assert_same_bits(found[1], found[0])
    assert_close(found[2], found[0])


@pytest.mark.parametrize("how", [{"slots": "all"}, {"slots": 2}, {"gradient": "backprop"}], ids=str)
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_a_member_with_a_nan_among_its_constants_is_kept_out(method: str, how: dict[str, Any]) -> None:
    scale = torch.tensor([1.0, torch.nan, 2.0], dtype=F64, requires_grad=True)
    more = torch.tensor([[0.1, 0.2, torch.nan]], dtype=F64)
    shared = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))
    y0 = torch.ones(3, dtype=F64, requires_grad=True)

    def f(t: Tensor, y: Tensor, scale: Tensor, more: Tensor) -> Tensor:
        return -scale * shared * y + more[0]

    own = {"batched": True, "method": method, "dt": 0.1} | how
    solution = solve(f, y0, [0.0, 1.0], args=(scale, more), throw=False, **own)
    assert solution.status == ("success", "nonfinite", "nonfinite")
    found = torch.autograd.grad(solution.ys[-1, 0], (shared, scale, y0))
    alone = solve(f, y0[:1], [0.0, 1.0], args=(scale[:1], more[:, :1]), **own)
    expected = torch.autograd.grad(alone.ys[-1, 0], (shared, scale, y0))
    assert_close(found, expected, AMPLIFIED)
    assert not found[1][1:].any() and not found[2][1:].any()


@pytest.mark.parametrize("how", [{"slots": "all"}, {"slots": 2}, {"gradient": "backprop"}], ids=str)
def test_a_member_for_which_f_is_nowhere_defined_is_named(how: dict[str, Any]) -> None:
    floor = torch.tensor([0.0, 9.0, 0.5], dtype=F64)
    shared = torch.tensor(0.5, dtype=F64, requires_grad=True)
    solve_it = lambda: solve(  # noqa: E731
        lambda t, y: -torch.sqrt(y - floor) * shared,
        torch.ones(3, dtype=F64),
        [0.0, 0.1],
        batched=True,
        throw=False,
        **how,
    )
    with pytest.raises(RuntimeError, match="not finite for member 1.*leave it out"):
        torch.autograd.grad(solve_it().ys[-1, ::2].sum(), shared)


def test_max_steps_and_min_step_are_each_members_own() -> None:
    rate = torch.tensor([1.0, 300.0, 2.0], dtype=F64)
    f = lambda t, y: -rate * (y - torch.cos(t))  # noqa: E731
    y0 = torch.zeros(3, dtype=F64)
    most = solve(f, y0, [0.0, 2.0], batched=True, throw=False, max_steps=30)
    assert most.status == ("success", "max_steps", "success")
    assert int(most.stats.steps[1]) == 30
    rate[1] = 1e4
    least = solve(f, y0, [0.0, 2.0], batched=True, throw=False, dt=0.05, controller=Controller(min_step=2e-3))
    assert least.status == ("success", "underflow", "success")


def test_a_failure_is_raised_with_member_time_step_component_and_a_way_out() -> None:
    f, y0, *_ = doomed("explodes")
    with pytest.raises(
        SolveError, match=r"1 of 4 members failed \(1 underflow\); member 1 .*component \(0,\).*throw=False"
    ) as caught:
        solve(f, y0, [0.0, 1.5], batched=True)
    assert caught.value.status == "underflow" and 0 < caught.value.t < 1.5 and caught.value.step > 0


def test_rows_of_times_may_differ_in_length() -> None:
    batch = predators(3)
    t = batch.t.detach().clone()
    t[0, 2:], t[2, 1:] = torch.nan, torch.nan
    t.requires_grad_()
    lone = solve(batch.one(0), batch.y0[0], t[0, :2], method="rk4")
    assert torch.equal(solve(batch.f, batch.y0, t, method="rk4", batched=True).ys[1, 0], lone.ys[1])
    assert solve(lambda t, y: y, torch.ones(1), [[0.0, 1.0, math.nan]], batched=True).ys.shape == (3, 1)
    for method in ("tsit5", "rk4"):
        found = []
        for memory in ({"slots": "all"}, {"slots": 1}, {"gradient": "backprop"}):
            solution = solve(batch.f, batch.y0, t, batched=True, **ways(method), **memory)
            there = torch.isfinite(t.detach().T)
            assert solution.status == ("success",) * 3
            assert torch.equal(torch.isfinite(solution.ys).all(2), there)
            found.append(torch.autograd.grad((solution.ys[there] ** 2).sum(), (batch.y0, t)))
        alone = [solve(batch.one(b), batch.y0[b], t[b][torch.isfinite(t[b])], **ways(method)) for b in range(3)]
        expected = torch.autograd.grad(sum((s.ys**2).sum() for s in alone), (batch.y0, t))
        assert_same_bits(found[1], found[0])
        for gradient in (found[0], found[2]):
            assert_close(gradient, expected, AMPLIFIED)


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_jumps_may_be_shared_or_each_members_own(method: str) -> None:
    at = torch.tensor([[0.3, 0.71], [0.5, torch.nan], [2.0, 0.1]], dtype=F64)
    dose = torch.tensor(1.7, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.6, 1.0], dtype=F64, requires_grad=True)
    y0 = torch.ones(3, dtype=F64, requires_grad=True)

    def batch(at: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, y: dose * (s[..., None] > at).sum(-1) - y

    for places in (at, torch.tensor([[0.25, 0.8]], dtype=F64).expand(3, 2)):
        for memory in ({"slots": "all"}, {"slots": 2}):
            jumps = places if places is at else places[0].tolist()
            together = solve(batch(places), y0, t, jumps=jumps, batched=True, **ways(method), **memory)
            alone = [
                solve(
                    batch(places[b]),
                    y0[b],
                    t,
                    jumps=[x for x in places[b].tolist() if math.isfinite(x)],
                    **ways(method),
                )
                for b in range(3)
            ]
            ys = torch.stack([s.ys for s in alone], 1)
            assert together.stats.steps.tolist() == [s.stats.steps for s in alone]
            assert_close([together.ys], [ys], AMPLIFIED)
            found, expected = (torch.autograd.grad((x**2).sum(), (dose, t, y0)) for x in (together.ys, ys))
            assert_close(found, expected, AMPLIFIED)


def test_a_norm_is_each_members_own() -> None:
    batch = predators()
    norm = lambda y: y[0].abs()  # noqa: E731
    together, alone = batch.together(norm=norm, rtol=1e-5), batch.apart(norm=norm, rtol=1e-5)
    assert together.stats.steps.tolist() == [s.stats.steps for s in alone]
    assert_close([together.ys], [stacked(alone)], AMPLIFIED)
    assert together.stats.steps.tolist() != batch.together(rtol=1e-5).stats.steps.tolist()


@pytest.mark.parametrize("method", ["tsit5", "midpoint"])
def test_the_taylor_test_passes_in_parameters_states_and_times(method: str) -> None:
    batch = predators(3)
    p, shared, y0, t = (x.detach() for x in batch.wanted)

    def loss(shared: Tensor, y0: Tensor, t: Tensor) -> Tensor:
        def f(s: Tensor, y: Tensor) -> Tensor:
            return (
                torch.stack((y[:, 0] * (1 - y[:, 1]), y[:, 1] * (y[:, 0] - p[:, 0])), 1)
                * shared
                * torch.cos(s)[:, None]
            )

        return (solve(f, y0, t, batched=True, slots=3, **ways(method)).ys ** 2).sum()

    assert check.taylor_test(loss, (shared, y0, t)).slope == pytest.approx(2, abs=0.1)


def test_no_member_is_looped_over_and_finished_ones_cost_no_call() -> None:
    calls = []
    rate = torch.linspace(1, 5, 50, dtype=F64)[:, None]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(tuple(y.shape))
        return -rate * y

    with torch.no_grad():
        solution = solve(f, torch.ones(50, 2, dtype=F64), [0.0, 3.0], batched=True, method="dopri5")
    stats = solution.stats
    assert set(calls) == {(50, 2)} and len(calls) == stats.evaluations
    most = int((stats.steps + stats.rejected).max())
    assert stats.lockstep <= most
    assert stats.evaluations <= 6 * most + 1 + 2 + 3  # first same as last; the first step; that members are apart


def test_members_that_feel_each_other_are_refused() -> None:
    y0 = numbers(4, 2, seed=1)
    for f in (
        lambda t, y: -y + y.mean(0),
        lambda t, y: -y * t[0],
        lambda t, y: -y - y[[1, 0, 3, 2]],
        lambda t, y: -y * t[-1],
    ):
        with pytest.raises(ValueError, match="f mixes members: .*torch.func.vmap"):
            solve(f, y0, [0.0, 1.0], batched=True)


def test_a_function_of_one_member_becomes_one_of_many_by_vmap() -> None:
    batch = predators()
    own, shared, *_ = batch.wanted

    def one(p: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[0] * (p[0] - p[1] * y[1]), y[1] * (p[3] * y[0] - p[2]))) * shared * torch.cos(t)

    each = torch.func.vmap(one)
    found, expected = (
        solve(f, batch.y0, batch.t, batched=True, slots=3) for f in (lambda t, y: each(own, t, y), batch.f)
    )
    assert_close([found.ys], [expected.ys])
    assert_close(gradients(found.ys, batch.wanted), gradients(expected.ys, batch.wanted), AMPLIFIED)


def test_one_time_returns_the_first_state_with_its_gradient() -> None:
    y0 = numbers(3, 2, seed=1).requires_grad_()
    t = torch.tensor([[0.0, torch.nan]] * 3, dtype=F64)
    for times, count in ((t, 2), (t[:, :1], 1), ([0.5], 1)):
        solution = solve(lambda t, y: y, y0, times, batched=True)
        assert solution.ys.shape == (count, 3, 2) and solution.status == ("success",) * 3
        assert torch.equal(torch.autograd.grad(solution.ys[0].sum(), y0)[0], torch.ones_like(y0))


@pytest.mark.parametrize("method", ["bosh3", "dopri5"])
@pytest.mark.parametrize(
    "memory", [{"slots": 2}, {"budget": "20 MB"}, {"tiers": [Device(slots=1), Host(slots=2)]}], ids=str
)
def test_many_asked_times_inside_of_one_step_stay_below_what_was_planned(method: str, memory: dict[str, Any]) -> None:
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y0, t = torch.ones(500, 4, dtype=torch.float64), torch.linspace(0, 1, 40, dtype=torch.float64)
    with Meter() as meter:
        solution = solve(
            lambda t, y: -rate * torch.tanh(y), y0, t, method=method, rtol=1e-2, atol=1e-2, batched=True, **memory
        )
        assert solution.plan is not None and solution.plan.steps < 5
        assert meter.peak <= solution.plan.bytes
        loss, before = solution.ys.sum(), meter.restart()
        loss.backward()
        assert meter.peak - before <= solution.plan.bytes
    with pytest.raises(BudgetError, match="cannot reverse"):
        solve(lambda t, y: -rate * y, y0, t, method=method, rtol=1e-2, atol=1e-2, batched=True, budget="1 MB")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y0": torch.tensor(1.0)}, "first dimension of every leaf counts the members"),
        ({"y0": (torch.ones(2), torch.ones(3))}, "first dimension of every leaf"),
        ({"y0": torch.ones(0, 2)}, "at least one"),
        ({"t": torch.ones(3, 2)}, "rows of times for each of the 2"),
        ({"t": [[0.0, 1.0], [0.0, 0.0]]}, r"t\[1, 0\]=0 is followed by 0"),
        ({"t": [[0.0, 1.0, 0.5], [0.0, 1.0, 2.0]]}, r"t\[0, 1\]=1 is followed by 0.5"),
        ({"t": [[0.0, math.nan, 0.5], [0.0, 1.0, 2.0]]}, r"t\[0, 1\]=nan is not a finite number"),
        ({"t": [[math.nan, math.nan], [0.0, 1.0]]}, r"t\[0, 0\]=nan"),
        ({"t": [0.0, math.nan]}, r"t\[1\]=nan is not a finite number"),
        ({"t": [0.0, math.inf]}, r"t\[1\]=inf"),
        ({"rtol": torch.ones(3)}, "rtol has shape.*one for each of 2 members"),
        ({"rtol": "small"}, "rtol='small'.*must be a number"),
        ({"atol": torch.tensor([-1.0, 1.0])}, "positive tolerances"),
        ({"dt": torch.tensor([0.1, 0.0])}, "not a length of time"),
        ({"gradient": Backsolve()}, "one state at a time"),
        ({"jumps": torch.ones(3, 1)}, "row for each of 2 members"),
        ({"jumps": 1.0}, r"write jumps=\(1.0,\)"),
        ({"f": lambda t, y: y.sum(1)}, "batch of states"),
        ({"max_steps": 0}, "allows no step"),
    ],
)
def test_calls_that_cannot_be_meant_are_answered_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    call: dict[str, Any] = {"f": lambda t, y: -y, "y0": torch.ones(2, 3), "t": [0.0, 1.0]} | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        solve(call.pop("f"), call.pop("y0"), call.pop("t"), batched=True, **call)
