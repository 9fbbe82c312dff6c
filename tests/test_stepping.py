"""``steps``: a loop over the steps of a solve gives what the solve gives, and its gradients."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits, leaf, loss_of
from torch import Tensor

from adjoint import METHODS, MULTISTEP, SolveError, solve, steps

CPU = torch.device("cpu")
EVERY = [*METHODS, *MULTISTEP]


def how_of(method: str) -> dict[str, Any]:
    adaptive = method in METHODS and METHODS[method].adaptive
    return {"method": method, "rtol": 1e-3} if adaptive else {"method": method, "dt": 0.15}


def setting() -> tuple[Any, Any, Tensor, list[Tensor]]:
    p, x, v = leaf(3, seed=1, on=CPU), leaf(3, seed=2, on=CPU), leaf(3, seed=3, on=CPU)
    t = torch.tensor([0.2, 1.4], dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": y["v"] * torch.cos(t), "v": -p * torch.sin(y["x"])}

    return f, {"x": x, "v": v}, t, [p, x, v, t]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", EVERY)
def test_the_steps_are_those_of_the_solve_and_so_are_the_gradients(method: str, backwards: bool) -> None:
    f, y0, t, wanted = setting()
    asked = t.flip(0) if backwards else t
    taken = list(steps(f, y0, asked, **how_of(method)))
    solution = solve(f, y0, asked, **how_of(method))
    assert [step.number for step in taken] == list(range(solution.stats.steps))
    assert all(torch.equal(a.stop, b.start) for a, b in pairwise(taken))
    last = {name: x[-1] for name, x in solution.ys.items()}
    assert_same_bits([taken[-1].y["x"], taken[-1].y["v"]], [last["x"], last["v"]])
    assert_close(
        torch.autograd.grad(loss_of(taken[-1].y), wanted),
        torch.autograd.grad(loss_of(last), wanted),
    )


@pytest.mark.parametrize("method", EVERY)
def test_every_step_is_one_of_an_observed_solve(method: str) -> None:
    """The sum of a loss over all steps, and over the times at which they end."""
    f, y0, t, wanted = setting()
    total = sum(loss_of((step.y, step.stop)) for step in steps(f, y0, t, **how_of(method)))
    seen = solve(f, y0, t, observe=lambda t, y: (y, t), observe_at="steps", slots=3, **how_of(method)).observed
    rows = [({"x": x, "v": v}, when) for x, v, when in zip(seen[0]["x"], seen[0]["v"], seen[1], strict=True)][1:]
    expected = sum(loss_of(row) for row in rows)
    assert isinstance(total, Tensor) and isinstance(expected, Tensor)
    assert_close([total, *torch.autograd.grad(total, wanted)], [expected, *torch.autograd.grad(expected, wanted)])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adaptive])
def test_a_step_knows_the_solution_in_between(method: str) -> None:
    f, y0, t, wanted = setting()
    inside = torch.tensor([0.3, 0.9, 1.3], dtype=torch.float64, requires_grad=True)
    found = []
    for step in steps(f, y0, t, **how_of(method)):
        low, high = step.start.item(), step.stop.item()
        found += [step.at(when) for when in inside if low < when.item() <= high]
    ys = solve(f, y0, torch.cat((t[:1], inside, t[1:])), **how_of(method)).ys
    expected = [{name: x[j] for name, x in ys.items()} for j in (1, 2, 3)]
    wanted.append(inside)
    assert_close(torch.autograd.grad(loss_of(found), wanted), torch.autograd.grad(loss_of(expected), wanted))


@pytest.mark.parametrize("method", ["tsit5", "rk4", "implicit_adams"])
def test_without_an_end_the_loop_says_when_it_is_over(method: str) -> None:
    f, y0, t, _ = setting()
    how = how_of(method) | {"dt": 0.125}
    some = list(islice(steps(f, y0, [0.25, -math.inf], **how), 20))
    assert some[-1].number == 19 and float(some[-1].stop) < -1
    ys = solve(f, y0, [0.25, float(some[-1].stop)], **how).ys
    assert_same_bits([some[-1].y["x"]], [ys["x"][-1]])
    with pytest.raises(SolveError, match="max_steps=30 taken and t=.* reached, of no end"):
        list(steps(f, y0, [0.25, math.inf], max_steps=30, **how))


def test_derivatives_of_derivatives_and_none_at_all() -> None:
    def last(p: Tensor) -> Tensor:
        *_, step = steps(lambda t, y: -p * y**2, torch.ones(2, dtype=torch.float64), (0.0, 1.0), method="rk4", dt=0.2)
        return step.y  # type: ignore[no-any-return]

    assert torch.autograd.gradgradcheck(last, leaf(2, seed=4, on=CPU))
    with torch.no_grad():
        assert not last(leaf(2, seed=4, on=CPU)).requires_grad


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_steps_work_under_grad(method: str) -> None:
    def last(p: Tensor, take: Any) -> Tensor:
        f, how = lambda t, y: p * y.sin(), how_of(method)
        return take(f, torch.ones(3, dtype=torch.float64), (0.0, 1.0), **how)  # type: ignore[no-any-return]

    p = leaf(3, seed=5, on=CPU).detach()
    found = torch.func.grad(lambda p: last(p, lambda *given, **how: list(steps(*given, **how))[-1].y).sum())(p)
    expected = torch.func.grad(lambda p: last(p, lambda *given, **how: solve(*given, **how).ys[-1]).sum())(p)
    assert_close([found], [expected])


def test_a_step_that_cannot_be_taken_raises_with_the_last_good_state() -> None:
    one = torch.ones(2, dtype=torch.float64)
    for how in ({"method": "tsit5"}, {"method": "euler", "dt": 0.1}):
        seen = []
        with pytest.raises(SolveError) as caught:
            for step in steps(lambda t, y: y**2 / (t < 0.55), one, (0.0, 3.0), **how):
                seen.append(step)
        assert torch.equal(caught.value.y, seen[-1].y) and caught.value.t == float(seen[-1].stop)


def test_wrong_calls_get_a_sentence() -> None:
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="give dt=, the length of a step"):
        steps(lambda t, y: -y, one, (0.0, math.inf), method="rk4")
    with pytest.raises(ValueError, match="must strictly increase"):
        steps(lambda t, y: -y, one, (1.0, 1.0))
    assert list(steps(lambda t, y: -y, one, [1.0])) == []
    with pytest.raises(NotImplementedError, match="map over solve, or give it batched=True"):
        torch.func.vmap(lambda y: next(steps(lambda t, y: -y, y, (0.0, 1.0))).y)(one)
    step = next(steps(lambda t, y: -y, one, (0.0, 1.0)))
    with pytest.raises(ValueError, match="t=2 is not within step 0, from 0 to"):
        step.at(2.0)
    assert step.at(torch.linspace(0, float(step.stop), 7)).shape == (7, 2)  # in single precision: a hair off
    with pytest.raises(RuntimeError, match="the loop changed the state of step 0 in place"):
        for step in steps(lambda t, y: -y, one, (0.0, 1.0)):
            step.y.mul_(2)
