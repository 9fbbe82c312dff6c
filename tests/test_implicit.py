"""Implicit steps: laws of their gradients, their order, mass matrices, pairs, batches, and what goes wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from adjoint_cases import PROBLEMS, assert_close, assert_same_bits, gradients
from test_tableaus import errors, observed_order
from torch import Tensor

import adjoint
from adjoint import IMPLICIT, ROSENBROCK, Dense, Implicit, Newton, SolveError, check, frozen_steps, odeint, solve

D = torch.float64
TABLES: dict[str, Any] = {**IMPLICIT, **ROSENBROCK}
every_method = pytest.mark.parametrize("name", TABLES)
PAIRS = [
    *(("kvaerno3", x) for x in ("vector", "pair")),
    *(("radau5", x) for x in ("vector", "oscillator", "backwards")),
    *(("gauss4", x) for x in ("oscillator", "network", "shared")),
    *(("rodas4", x) for x in ("pair", "backwards")),
    *(("ros3p", x) for x in ("oscillator", "shared")),
    ("rodas5p", "vector"),
    *(("trapezoid", x) for x in ("forced", "nested", "matrix", "other_kernels")),
]


def fixed(name: str) -> Any:
    """The method with steps of one length."""
    return replace(TABLES[name], error=None, **({"filtered": 0.0} if name in IMPLICIT else {}))


def steps_of(name: str) -> dict[str, Any]:
    how: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3} if TABLES[name].adaptive else {"dt": 0.4}
    return {"method": name, **how}


@pytest.mark.parametrize(("name", "problem"), PAIRS)
def test_the_gradient_does_not_depend_on_memory_and_is_that_of_the_graph(name: str, problem: str) -> None:
    case, how = PROBLEMS[problem](torch.device("cpu")), steps_of(name)
    expected = gradients(case, slots="all", **how)
    for memory in ({"slots": 1}, {"slots": 3}):
        assert_same_bits(gradients(case, **memory, **how), expected)
    assert_close(gradients(case, gradient="backprop", **how), expected)
    assert_close(gradients(case, gradient="tangent", **how), expected)


@every_method
def test_every_method_has_a_gradient_that_does_not_depend_on_memory(name: str) -> None:
    case, how = PROBLEMS["scalar"](torch.device("cpu")), steps_of(name)
    expected = gradients(case, slots="all", **how)
    assert_same_bits(gradients(case, slots=2, **how), expected)
    assert_close(gradients(case, gradient="tangent", **how), expected)


@every_method
def test_halving_the_step_divides_errors_of_solution_and_gradient_by_two_to_the_order(name: str) -> None:
    own = Implicit(fixed(name))
    halvings = {6: (8, 16)}.get(own.order, (16, 32)) if name != "rodas5p" else (32, 64)
    for kind in zip(*(errors(own, steps) for steps in halvings), strict=True):  # type: ignore[arg-type]
        assert observed_order(kind) == pytest.approx(own.order, abs=0.35)


def robertson(t: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    a, b, c = logs.exp()
    slow, fast, back = a * y[0], b * y[1] ** 2, c * y[1] * y[2]
    return torch.stack((back - slow, slow - back - fast, fast))


LOGS = torch.tensor([0.04, 3e7, 1e4], dtype=D).log()
START = torch.tensor([1.0, 0.0, 0.0], dtype=D)


def robertson_loss(logs: Tensor, **how: Any) -> Tensor:
    ys = solve(robertson, START, [0.0, 0.4, 40.0], args=(logs,), **how).ys[1:]
    return (ys * torch.tensor([1.0, 1e4, 1.0], dtype=D)).square().sum()


@pytest.mark.parametrize("name", [name for name, x in TABLES.items() if x.adaptive])
def test_the_remainder_of_a_stiff_gradient_falls_as_the_square(name: str) -> None:
    rough = TABLES[name].order < 4
    tolerance = {"rtol": 1e-3, "atol": 1e-7} if rough else {"rtol": 1e-5, "atol": 1e-9}
    how: dict[str, Any] = {"method": Implicit(name, newton=Newton(kappa=1e-4)), **tolerance}
    taylor = check.taylor_test(lambda logs: robertson_loss(logs, **how), [LOGS], h=3e-3, halvings=2)
    assert taylor.slopes[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", ["kvaerno3", "radau5"])
def test_the_gradient_is_that_of_the_tangents_through_the_same_steps(name: str) -> None:
    found = []
    with frozen_steps() as replay:
        for gradient in ("discrete", "tangent"):
            logs = LOGS.clone().requires_grad_()
            loss = robertson_loss(logs, method=name, rtol=1e-3, atol=1e-7, gradient=gradient)
            found.append(torch.autograd.grad(loss, logs)[0])
            replay.rewind()
    assert torch.allclose(*found, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["kvaerno3", "gauss4", "ros3p"])
def test_second_derivatives_are_those_of_the_equations(name: str) -> None:
    how: dict[str, Any] = {"dt": 0.5} if name == "gauss4" else {"rtol": 1e-3, "atol": 1e-6}
    method = Implicit(name, newton=Newton(kappa=1e-8, most=30))
    point, along = torch.tensor([0.3, -0.7], dtype=D), torch.tensor([0.6, 0.5], dtype=D)

    def loss(p: Tensor) -> Tensor:
        y0 = torch.stack((1 + p[0], p[1]))
        f = lambda t, y: torch.stack((y[1], p[0] * y[1] * (1 - y[0] ** 2) - y[0]))  # noqa: E731
        return solve(f, y0, [0.0, 1.5], method=method, **how).ys[-1].square().sum()

    def slope(p: Tensor) -> Tensor:
        p = p.clone().requires_grad_()
        return torch.autograd.grad(loss(p), p)[0]

    (product,) = adjoint.hvp(loss, [point], [along])
    with frozen_steps() as replay:
        slope(point)
        ends = []
        for h in (1e-4, -1e-4):
            replay.rewind()
            ends.append(slope(point + h * along))
    assert torch.allclose(product, (ends[0] - ends[1]) / 2e-4, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["kencarp3", "kencarp4", "kencarp5"])
def test_a_pair_is_the_sum_of_its_parts_with_a_gradient_of_its_own_steps(name: str) -> None:
    rate = torch.tensor([1.0, 1.0], dtype=D, requires_grad=True)
    y0 = torch.tensor([0.3, 1.0], dtype=D, requires_grad=True)
    own = Implicit(fixed(name))

    def stiff(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return torch.stack((-rate[0] * (y[0] - torch.cos(y[1])), 0 * y[1]))

    def other(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return torch.stack((y[1] * y[0], rate[1] * torch.sin(y[0]) + 0.1 * t))

    def gradient(f: Any, how: Any, **more: Any) -> list[Tensor]:
        y = solve(f, y0, [0.0, 1.0], args=(rate,), method=how, **more).ys[-1]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, rate))]

    exact = gradient(lambda t, y, r: stiff(t, y, r) + other(t, y, r), "dopri8", rtol=1e-12, atol=1e-13)
    coarse, fine = (gradient((other, stiff), own, dt=dt) for dt in (1 / 8, 1 / 16))
    for a, b, x in zip(coarse, fine, exact, strict=True):
        assert observed_order((float((a - x).norm()), float((b - x).norm()))) > own.order - 0.4
    assert_same_bits(gradient((other, stiff), own, dt=1 / 8, slots=2), coarse)
    assert_close(gradient((other, stiff), own, dt=1 / 8, gradient="tangent"), coarse)


@pytest.mark.parametrize("name", ["kvaerno3", "radau5", "sdirk2", "ros3p"])
def test_a_regular_mass_matrix_is_a_division(name: str) -> None:
    mass = torch.tensor([[2.0, 0.5], [0.0, 1.0]], dtype=D)
    p = torch.tensor([1.3, 0.4], dtype=D, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((-p[0] * y[0] + y[1] ** 2, p[1] * torch.sin(y[0])))

    def gradient(g: Any, **how: Any) -> list[Tensor]:
        own = Implicit(fixed(name), **how)
        y = solve(g, START[:2] + 1, [0.0, 1.0], method=own, dt=0.1).ys[-1]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), p)]

    inverse = torch.linalg.inv(mass)
    assert_close(gradient(f, mass=mass), gradient(lambda t, y: inverse @ f(t, y)))


@pytest.mark.parametrize("name", ["radau5", "radau3", "sdirk2", "backward_euler", "rodas4", "rodas5p"])
def test_a_singular_mass_matrix_makes_an_algebraic_equation(name: str) -> None:
    """y' = -z y, 0 = y - a z: so y' = -y^2 / a, y = y0 / (1 + y0 t / a)."""
    a = torch.tensor(0.8, dtype=D, requires_grad=True)
    y0 = torch.tensor(1.5, dtype=D, requires_grad=True)
    mass = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((-y[0] * y[1], y[0] - a * y[1]))

    adaptive = TABLES[name].adaptive
    how: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10} if adaptive else {"dt": 1 / 64}
    y = solve(f, torch.stack((y0, y0 / a)), [0.0, 2.0], method=Implicit(name, mass=mass), **how).ys[-1]
    found = torch.stack((y[0].detach(), *torch.autograd.grad(y[0], (y0, a)), y[1].detach()))
    s = 1 + 2 * 1.5 / 0.8
    exact = torch.tensor([1.5 / s, 1 / s**2, 1.5 * 2 * 1.5 / 0.64 / s**2, 1.5 / s / 0.8], dtype=D)
    assert torch.allclose(found, exact, rtol=1e-6 if adaptive else 64.0 ** -min(TABLES[name].order, 2) * 4, atol=0)


def test_members_share_steps_and_have_matrices_of_their_own() -> None:
    rates = torch.linspace(1.0, 30.0, 5, dtype=D).requires_grad_()
    y0 = torch.stack((torch.linspace(0.5, 1, 5, dtype=D), torch.ones(5, dtype=D)), -1)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((-rates * (y[:, 0] - torch.cos(y[:, 1])), y[:, 0] * y[:, 1]), -1)

    for name in ("sdirk2", "gauss4", "kvaerno5"):
        own = fixed(name)
        found = []
        for members in (False, True):
            y = solve(f, y0, [0.0, 1.0], method=Implicit(own, linear=Dense(members=members)), dt=0.2).ys[-1]
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), rates)])
        assert_close(*found)
    adaptive = solve(f, y0, [0.0, 1.0], method=Implicit("kvaerno5", linear=Dense(members=True)), rtol=1e-7).ys[-1]
    alone = [solve(lambda t, y, i=i: f(t, y.expand(5, 2))[i], y0[i], [0.0, 1.0], rtol=1e-9).ys[-1] for i in range(5)]
    assert torch.allclose(adaptive, torch.stack(alone), rtol=1e-6)


class Foreign:
    """Not to be copied: it owns something."""

    def __init__(self) -> None:
        self.rate = torch.tensor(0.7, dtype=D, requires_grad=True)

    def __del__(self) -> None:
        pass


@pytest.mark.parametrize("slots", ["all", 1])
def test_a_tensor_that_cannot_be_followed_is_refused(slots: Any) -> None:
    holder = Foreign()
    late = lambda t, y: -y * (holder.rate if t > 0.5 else 1.0)  # noqa: E731
    for f in (lambda t, y: -holder.rate * y, late):
        with pytest.raises(adjoint.UntrackedTensorError, match="Pass it through args="):
            y0 = START[:1].clone().requires_grad_()
            solve(f, y0, [0.0, 1.0], method="sdirk2", dt=0.2, slots=slots).ys[-1].backward()


def test_newtons_failure_is_a_rejected_step() -> None:
    """A square root that is undefined a little further on than the solution goes."""
    y0 = torch.tensor([1.0], dtype=D)
    f = lambda t, y: -100 * torch.sqrt(y)  # noqa: E731
    found = solve(f, y0, [0.0, 0.0199], method="radau5", dt=1.0, rtol=1e-6)
    assert found.stats.rejected > 0
    assert float(found.ys[-1]) == pytest.approx((1 - 50 * 0.0199) ** 2, rel=1e-2)


def test_a_fixed_step_whose_stages_are_not_found_says_so() -> None:
    f = lambda t, y: torch.where(y > 0, -torch.ones_like(y), torch.ones_like(y))  # noqa: E731
    with pytest.raises(SolveError, match="Newton's method does not find the stages of step 1") as failed:
        solve(f, torch.tensor([1.0], dtype=D), [0.0, 3.0], method="backward_euler", dt=0.75)
    assert failed.value.status == "newton" and failed.value.t == 0.75


@pytest.mark.parametrize("name", [name for name in IMPLICIT if not TABLES[name].adaptive])
def test_fixed_steps_leave_a_state_of_zeros(name: str) -> None:
    """Rounding is that of what the step adds: y' = 2 - y^2 from 0 is sqrt(2) tanh(sqrt(2) t)."""
    for first in (0.0, 1e-30):
        y = solve(lambda t, y: 2 - y**2, torch.full((1,), first, dtype=D), [0.0, 0.1], method=name, dt=0.05).ys[-1]
        assert y.item() == pytest.approx(2**0.5 * math.tanh(0.1 * 2**0.5), abs=2e-3)


def test_an_explosion_ends_with_a_status() -> None:
    found = solve(lambda t, y: y**2, torch.ones(1, dtype=D), [0.0, 2.0], method="kvaerno5", throw=False, max_steps=200)
    assert found.status in ("max_steps", "underflow")
    assert found.last_t == pytest.approx(1, abs=1e-2)
    none = solve(lambda t, y: torch.nan * y, torch.ones(1, dtype=D), [0.0, 2.0], method="kvaerno5", throw=False)
    assert none.status != "success" and torch.isnan(none.ys[-1]).all()


@pytest.mark.parametrize(
    "name", "implicit_euler implicit_midpoint trapezoid radauIIA3 gl4 radauIIA5 gl6 sdirk2 trbdf2".split()
)
def test_names_of_torchdiffeq_take_fixed_steps(name: str) -> None:
    rate = torch.tensor(2.0, dtype=D, requires_grad=True)
    t = torch.linspace(0, 1, 5, dtype=D)
    y = odeint(lambda t, y: -rate * y, torch.ones((), dtype=D), t, method=name, options={"step_size": 1 / 64})
    order = 1 if name == "implicit_euler" else 2
    assert torch.allclose(y, torch.exp(-2 * t), atol=2 * 64.0**-order, rtol=0)
    assert float(torch.autograd.grad(y[-1], rate)[0]) == pytest.approx(-math.exp(-2), abs=4 * 64.0**-order)


@pytest.mark.parametrize("name", ["gl6", "trapezoid"])
def test_events_are_met_by_steps_of_torchdiffeqs_names(name: str) -> None:
    """cos(w t) = 0 at t = pi / 2w."""
    w = torch.tensor(2.0, dtype=D, requires_grad=True)
    f, start = lambda t, y: torch.stack((y[1], -(w**2) * y[0])), torch.tensor([1.0, 0.0], dtype=D)
    how: dict[str, Any] = {"method": name, "options": {"step_size": 0.02, "interp": "cubic"}}
    t, _ = adjoint.odeint_event(f, start, torch.zeros((), dtype=D), event_fn=lambda t, y: y[0], **how)
    assert float(t) == pytest.approx(math.pi / 4, abs=1e-3)
    assert float(torch.autograd.grad(t, w)[0]) == pytest.approx(-math.pi / 8, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Implicit("kvarno5"), "did you mean 'kvaerno5'"),
        (lambda: Newton(kappa=0.0), "kappa=0.0"),
        (lambda: Newton(most=0), "most=0"),
        (lambda: Implicit("radau5", mass=torch.ones(2, 3)), r"mass has shape \(2, 3\)"),
        (lambda: Implicit("radau5", mass=torch.eye(2).requires_grad_()), "mass requires grad"),
        (lambda: Implicit("kvaerno5", mass=torch.diag(torch.tensor([1.0, 0.0]))), "mass is singular"),
        (lambda: Implicit("radau5", split=True), "no explicit part"),
        (lambda: run((decay, decay), method="radau5"), "no explicit part"),
        (lambda: run((decay, decay), method="tsit5"), "one part only"),
        (lambda: run((decay,), method="kencarp3"), r"pair of functions \(explicit, implicit\)"),
        (
            lambda: run(decay, method=Implicit("radau5", mass=torch.eye(3, dtype=D))),
            "mass has 3 rows, and y0 2 numbers",
        ),
    ],
)
def test_wrong_calls_are_told(call: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        call()


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def run(f: Any, **how: Any) -> Any:
    return solve(f, torch.ones(2, dtype=D), [0.0, 1.0], **how)


def test_precisions_are_not_mixed() -> None:
    y0 = (torch.ones(2), torch.ones(2, dtype=D))
    with pytest.raises(TypeError, match="one precision"):
        solve(lambda t, y: (-y[0], -y[1]), y0, [0.0, 1.0], method="kvaerno5")


def test_single_precision_reaches_what_it_can() -> None:
    y = solve(robertson, START.float(), [0.0, 40.0], args=(LOGS.float(),), method="radau5", rtol=1e-4, atol=1e-8).ys[-1]
    fine = solve(robertson, START, [0.0, 40.0], args=(LOGS,), method="radau5", rtol=1e-8, atol=1e-12).ys[-1]
    assert torch.allclose(y.double(), fine, rtol=1e-3)


def test_a_layer_norm_has_the_gradient_of_a_rosenbrock_step() -> None:
    """torch's formula for its second derivative cannot be differentiated again: means and widths count as fixed there."""
    start = torch.tensor([0.3, 0.5, 0.7, -0.2], dtype=D)

    def loss(y0: Tensor) -> Tensor:
        f = lambda t, y: torch.nn.functional.layer_norm(y.sin(), y.shape) - 5 * y  # noqa: E731
        return solve(f, y0, [0.0, 0.2], method="rodas4", rtol=1e-2, atol=1e-2, engine="eager").ys[-1].square().sum()

    assert check.taylor_test(loss, [start], h=1e-2).slopes[-1] == pytest.approx(2, abs=0.1)
