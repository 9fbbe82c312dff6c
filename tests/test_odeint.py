"""The drop-in means what torchdiffeq means by the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import adjoint
from adjoint import Implicit
from adjoint.options import METHODS

FIXED = [name for name, x in METHODS.items() if not x.adaptive and not isinstance(x, Implicit)]
ADAPTIVE = [
    name for name, tableau in METHODS.items() if tableau.adaptive and name in torchdiffeq.odeint.__globals__["SOLVERS"]
]


class Pendulum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.3, 0.2], dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.seen: list[tuple[float, float]] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[1], -self.rates[0] * torch.sin(y[0]) - self.rates[1] * y[1] + 0.1 * torch.cos(t)))


def setting(backwards: bool = False) -> tuple[Pendulum, Tensor, Tensor]:
    y0 = torch.tensor([1.0, 0.3], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.33, 1.0, 1.7], dtype=torch.float64)
    return Pendulum(), y0, (t.flip(0) if backwards else t).requires_grad_()


def gradients(values: Tensor, f: Pendulum, y0: Tensor, t: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((values**2).sum(), (y0, f.rates, t)))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.15}, {"step_size": 0.15, "interp": "cubic"}])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_agree_to_rounding_in_values_and_gradients(
    method: str, options: dict[str, Any], backwards: bool
) -> None:
    f, y0, t = setting(backwards)
    theirs = torchdiffeq.odeint(f, y0, t, method=method, options=dict(options))
    expected = gradients(theirs, f, y0, t)
    for gradient in ("backprop", "discrete"):
        ours = adjoint.odeint(f, y0, t, method=method, options=options, gradient=gradient)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        for a, b in zip(gradients(ours, f, y0, t), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_controlled_steps_are_at_least_as_near_the_solution_as_theirs(method: str, backwards: bool) -> None:
    f, y0, t = setting(backwards)
    exact = torchdiffeq.odeint(f, y0, t, method="dopri5", rtol=1e-12, atol=1e-13)
    how: dict[str, Any] = {"method": method, "rtol": 1e-5, "atol": 1e-6}
    theirs = torchdiffeq.odeint(f, y0, t, **how)
    ours = adjoint.odeint_adjoint(f, y0, t, slots=3, **how)
    assert distance([ours], [exact]) <= distance([theirs], [exact])
    wanted = gradients(exact, f, y0, t)[:2]  # not the times: where a step ends is each solver's own choice
    assert distance(gradients(ours, f, y0, t), wanted) <= 2 * distance(gradients(theirs, f, y0, t), wanted)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(found, wanted, strict=False))


def test_the_rule_called_rk4_is_the_three_eighths_rule() -> None:
    f, y0, t = setting()
    by_name = adjoint.odeint(f, y0, t, method="rk4")
    assert torch.equal(by_name, adjoint.solve(f, y0, t, method="rk4_38", gradient="backprop").ys)
    assert not torch.equal(by_name, adjoint.solve(f, y0, t, method="rk4", gradient="backprop").ys)


def test_odeint_stays_on_the_graph_for_second_derivatives() -> None:
    f, y0, t = setting()

    def loss(rates: Tensor) -> Tensor:
        def g(time: Tensor, y: Tensor) -> Tensor:
            return torch.stack((y[1], -rates[0] * torch.sin(y[0]) - rates[1] * y[1]))

        return (adjoint.odeint(g, y0.detach(), t.detach(), method="midpoint", options={"step_size": 0.1}) ** 2).sum()

    assert torch.autograd.gradgradcheck(loss, f.rates.detach().requires_grad_())


@pytest.mark.parametrize("method", ADAPTIVE)
def test_odeint_finds_its_steps_and_makes_the_graph_in_one_pass(method: str) -> None:
    f, y0, t = setting()
    calls = 0

    def counted(time: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(time, y)

    found = adjoint.odeint(counted, y0, t, method=method, rtol=1e-4)
    first, calls = calls, 0
    expected = adjoint.odeint_adjoint(counted, y0, t, method=method, rtol=1e-4, slots=1)  # finds them plainly
    assert torch.equal(found, expected)
    assert first <= METHODS[method].stages / METHODS[method].weighted * calls + 2
    torch.testing.assert_close(gradients(found, f, y0, t), gradients(expected, f, y0, t), rtol=1e-11, atol=1e-11)


def test_tuples_and_tolerances_for_each_leaf() -> None:
    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1].sum(0), -y[0].expand_as(y[1]) * torch.cos(t)

    y0 = (torch.ones(3, dtype=torch.float64), torch.full((2, 3), 0.5, dtype=torch.float64))
    t = torch.linspace(0, 2, 4, dtype=torch.float64)
    how: dict[str, Any] = {"rtol": (1e-8, 1e-7), "atol": (1e-9, 1e-8), "method": "dopri5"}
    for ours, theirs in zip(adjoint.odeint(f, y0, t, **how), torchdiffeq.odeint(f, y0, t, **how), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_callbacks_are_called_for_every_step_once(method: str) -> None:
    f, y0, t = setting()
    seen: list[tuple[str, float, float]] = []
    for name in ("step", "accept_step", "reject_step"):
        if method == "dopri5" or name == "step":
            setattr(f, f"callback_{name}", lambda t, y, h, name=name: seen.append((name, float(t), float(h))))
    values = adjoint.odeint_adjoint(
        f, y0, t, method=method, slots=2, options={} if method == "dopri5" else {"step_size": 0.1}
    )
    before = list(seen)
    gradients(values, f, y0, t)
    assert seen == before
    taken = [entry for entry in seen if entry[0] == ("accept_step" if method == "dopri5" else "step")]
    ends = [start + length for _, start, length in taken]
    assert [start for _, start, _ in taken][1:] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(1.7)


def test_options_of_controlled_steps() -> None:
    f, y0, t = setting()
    lengths: list[float] = []
    f.callback_accept_step = lambda t, y, h: lengths.append(h)  # type: ignore[assignment]
    options = {"first_step": 0.01, "max_step": 0.05, "jump_t": torch.tensor([0.77]), "ifactor": 2.0}
    adjoint.odeint(f, y0, t, method="dopri5", options=options)
    assert lengths[0] == pytest.approx(0.01)
    assert max(lengths) <= 0.05 * (1 + 1e-8)
    starts = torch.cumsum(torch.tensor([0.0, *lengths], dtype=torch.float64), 0)
    assert (starts - 0.77).abs().min() < 1e-7


def test_one_time_is_the_first_state() -> None:
    f, y0, _ = setting()
    assert torch.equal(adjoint.odeint(f, y0, torch.tensor([0.5])), y0[None])


def test_wrong_calls_get_a_sentence() -> None:
    f, y0, t = setting()
    with pytest.raises(ValueError, match="did you mean 'dopri5'"):
        adjoint.odeint(f, y0, t, method="dopri55")
    with pytest.raises(ValueError, match="step_size=0"):
        adjoint.odeint(f, y0, t, method="euler", options={"step_size": 0})
    with pytest.raises(ValueError, match="interp='quadratic'"):
        adjoint.odeint(f, y0, t, method="euler", options={"interp": "quadratic"})
    with pytest.raises(ValueError, match="must start and stop where t does"):
        adjoint.odeint(f, y0, t, method="euler", options={"grid_constructor": lambda f, y, t: t[1:]})
    with pytest.warns(UserWarning, match="step_sizes"):
        adjoint.odeint(f, y0, t, method="euler", options={"step_sizes": 0.1})
    with pytest.raises(ValueError, match="adjoint_method='rk5' is unknown; did you mean 'rk4'"):
        adjoint.odeint_adjoint(f, y0, t, adjoint_method="rk5")
