"""A dense solution is a function of time that agrees with the solution at asked times, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import adjoint
from adjoint import Implicit
from adjoint.options import METHODS

EXPLICIT = [name for name, method in METHODS.items() if not isinstance(method, Implicit)]

D = torch.float64
WHEN = torch.tensor([[0.1, 0.33, 0.5], [0.9, 1.3, 1.7]], dtype=D)


def swing(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return torch.stack((y[1], -p[0] * torch.sin(y[0]) - p[1] * y[1] * t))


def setting() -> list[Tensor]:
    return [torch.tensor(x, dtype=D, requires_grad=True) for x in ([1.0, 0.3], [1.3, 0.2], 0.1, 1.7)]


def how_of(method: str) -> dict[str, Any]:
    own: dict[str, Any] = {} if METHODS[method].adaptive else {"step_size": 0.1}
    stable = {"max_order": 5} if "adams" in method else {}
    return {"method": method, "options": own | stable, "rtol": 1e-3, "atol": 1e-4}


def gradients(values: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((values**2).sum() + values.sum(), inputs))


@pytest.mark.parametrize("interp", ["cubic", "linear"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_it_is_the_interpolant_of_the_solution_at_asked_times(method: str, interp: str) -> None:
    y0, p, t0, t1 = setting()
    how = how_of(method)
    if not METHODS[method].adaptive:
        how["options"] = {"interp": interp, **how["options"]}
    when = WHEN.clone().requires_grad_()
    u = adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), **how)
    t = torch.cat((t0[None], when.flatten()[1:-1], t1[None]))
    ys = adjoint.odeint(swing, y0, t, args=(p,), **how)
    inner = u(when).reshape(-1, 2)[1:-1]
    torch.testing.assert_close(inner, ys[1:-1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.stack((u(t0), u(t1))), ys[[0, -1]], rtol=1e-12, atol=1e-13)
    inputs = [y0, p, t0, t1, when]
    for a, b in zip(gradients(inner, inputs), gradients(ys[1:-1], inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", EXPLICIT)
def test_no_schedule_changes_a_bit(method: str) -> None:
    y0, p, t0, t1 = setting()
    found = []
    for memory in ({"slots": "all"}, {"slots": 1}, {"slots": 4}, {"budget": "1 MiB"}):
        u = adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), gradient="discrete", **memory, **how_of(method))
        found.append([u(WHEN).detach(), *gradients(u(WHEN), [y0, p, t0, t1])])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    u = adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), **how_of(method))
    for a, b in zip(found[0][1:], gradients(u(WHEN), [y0, p, t0, t1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_it_agrees_with_torchdiffeq() -> None:
    y0, p, t0, t1 = (x.detach() for x in setting())
    how: dict[str, Any] = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
    ours = adjoint.odeint_dense(lambda t, y: swing(t, y, p), y0, t0, t1, **how)
    theirs = torchdiffeq.odeint_dense(lambda t, y: swing(t, y, p), y0, t0, t1, **how)
    for t in (0.1, 0.4567, 1.234, 1.69):
        torch.testing.assert_close(ours(t), theirs(torch.tensor(t, dtype=D)), rtol=1e-7, atol=1e-7)


def test_trees_backwards_in_time_and_second_derivatives() -> None:
    def f(t: Tensor, y: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        return {"a": 1j * p * y["a"], "b": -y["b"] * y["a"].abs().sum() * t * p}

    y0 = {"a": torch.tensor([0.5 + 0.2j], dtype=torch.complex128), "b": torch.ones(2, 3, dtype=D)}

    def loss(p: Tensor, when: Tensor) -> Tensor:
        u = adjoint.odeint_dense(f, y0, 2.0, 0.5, args=(p,), method="rk4", options={"step_size": 0.3})
        ys = u(when)
        assert ys["a"].shape == (2, 1) and ys["b"].shape == (2, 2, 3)
        assert u(1.0)["b"].shape == (2, 3)
        return ys["a"].real.sum() + ys["b"].square().sum()

    inputs = torch.tensor(0.7, dtype=D, requires_grad=True), torch.tensor([1.9, 0.77], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_times_of_its_steps() -> None:
    y0, p, t0, t1 = setting()
    u = adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), method="rk4", options={"step_size": 0.5})
    assert u.ts.tolist() == pytest.approx([0.1, 0.6, 1.1, 1.6, 1.7])
    assert u(torch.empty(0, dtype=D)).shape == (0, 2)


def test_wrong_calls_get_a_sentence() -> None:
    y0, p, t0, t1 = setting()
    u = adjoint.odeint_dense(swing, y0, t0, t1, args=(p,))
    for t in (0.0, 1.8, torch.tensor([1.0, torch.nan])):
        with pytest.raises(ValueError, match="is not all between 0.1 and 1.7"):
            u(t)
    with pytest.raises(ValueError, match="give options={'step_size'"):
        adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), method="rk4")
    with pytest.raises(ValueError, match="gradient='backsolve' keeps no steps"):
        adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), gradient="backsolve")
    with pytest.raises(ValueError, match="t0 and t1 hold 3 numbers"):
        adjoint.odeint_dense(swing, y0, torch.tensor([0.1, 0.2]), torch.tensor([0.5]), args=(p,))
    with pytest.raises(adjoint.SolveError, match="max_steps=3"):
        adjoint.odeint_dense(swing, y0, t0, t1, args=(p,), method="dopri5", options={"max_num_steps": 3})
    with pytest.raises(NotImplementedError, match="under vmap with method=None"):
        torch.func.vmap(lambda p: adjoint.odeint_dense(swing, y0, t0, t1, args=(p,))(0.5))(p.detach()[None])
