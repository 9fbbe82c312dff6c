"""Second derivatives through checkpoints are those of torch's own graph, whatever is kept; products for Newton too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adjoint_cases import METHODS, PROBLEMS, Case, assert_close, assert_same_bits, leaf, loss_of, numbers, steps_of
from scipy.optimize import minimize
from test_captures import FOUND, case_of, theta
from torch import Tensor

from adjoint import (
    MULTISTEP,
    Device,
    Files,
    Host,
    Objective,
    UntrackedTensorError,
    check,
    gauss_newton,
    hvp,
    scan,
    solve,
)
from revolve import Periodic

CPU = torch.device("cpu")
PLACES = 45_000  # ten times what is asked of first derivatives: 1e-11 in double precision


def seconds(case: Case, **how: Any) -> list[Tensor | None]:
    """The derivative, along random directions in everything wanted, of the gradient of a loss."""
    first = torch.autograd.grad(loss_of(case.solve(**how).ys), case.wanted, create_graph=True, allow_unused=True)
    directions = [numbers(*x.shape, seed=30 + i, dtype=x.dtype) for i, x in enumerate(case.wanted)]
    pairs = [(g, v) for g, v in zip(first, directions, strict=True) if g is not None]
    roots, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, case.wanted, weights, allow_unused=True))


def assert_one_law(make: Callable[[], Case], how: dict[str, Any], memory: Sequence[Any] = (3,)) -> None:
    expected = seconds(make(), gradient="backprop", **how)
    first = seconds(make(), slots="all", **how)
    assert_close(first, expected, PLACES)
    for slots in memory:
        assert_same_bits(seconds(make(), slots=slots, **how), first)


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_second_derivatives_are_those_of_backpropagation(name: str, method: str) -> None:
    assert_one_law(lambda: PROBLEMS[name](CPU), steps_of(method), (1, None))


@pytest.mark.parametrize("method", [*METHODS, *MULTISTEP])
def test_every_method_has_them(method: str) -> None:
    how = steps_of(method) if method in METHODS else {"method": method, "dt": 0.1}
    assert_one_law(lambda: PROBLEMS["vector"](CPU), how)


NOT_AGAIN = ("sparse", "in_a_scan")  # torch's own fails with the first; the second is slow


@pytest.mark.parametrize("name", [name for name in FOUND if name not in NOT_AGAIN])
def test_what_is_found_has_them(name: str) -> None:
    y0 = theta() if name == "as_y0_too" else None
    assert_one_law(lambda: case_of(FOUND[name], y0), steps_of("rk4"))


@pytest.mark.parametrize("slots", ["all", 1, 3, None])
def test_a_recurrence_has_them(slots: int | str | None) -> None:
    def run(**how: Any) -> list[Tensor | None]:
        p, c, x = leaf(3, seed=1, on=CPU), leaf(3, seed=2, on=CPU), leaf(6, 3, seed=3, on=CPU)
        results = scan(lambda c, x: (torch.tanh(c * p + x * c), {"out": c * x}), c, x, **how)
        first = torch.autograd.grad(loss_of(results), (p, c, x), create_graph=True)
        return list(torch.autograd.grad(first, (p, c, x), [numbers(*g.shape, seed=7) for g in first]))

    assert_close(run(slots=slots), run(gradient="backprop"), PLACES)
    assert_same_bits(run(slots=slots), run(slots=2))


def test_a_product_takes_no_more_than_its_slots_and_few_runs() -> None:
    p, calls = leaf(3, seed=1, on=CPU), [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return torch.sin(p * y)

    solution = solve(f, numbers(3, seed=2), (0.0, 1.0), method="euler", dt=0.01, slots=5)
    last = solution.ys[-1]
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (transposed,) = torch.autograd.grad(last, p, u, create_graph=True)
    calls[0] = 0
    torch.autograd.grad(transposed, u, numbers(3))
    assert calls[0] == 100  # a product with the Jacobian is one sweep, in which nothing is kept
    (first,) = torch.autograd.grad(loss_of(last), p, create_graph=True)
    calls[0] = 0
    torch.autograd.grad(first, p, numbers(3))
    assert solution.plan is not None
    sweeps = 2  # of the tangents, and of the cotangents that the tangents of the loss give
    assert calls[0] <= sweeps * (solution.plan.report.plain_runs + 100 + 15)  # some are listened to


def test_second_derivatives_keep_pairs_in_several_memories(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "rk4", "dt": 0.05}
    first = seconds(PROBLEMS["nested"](CPU), slots="all", **how)
    for tiers in (
        [Device(slots=2)],
        [Device(slots=1), Files(slots=3, folder=tmp_path)],
        [Device(slots=1), Host(slots=2)],
    ):
        assert_same_bits(seconds(PROBLEMS["nested"](CPU), tiers=tiers, **how), first)
    assert_same_bits(seconds(PROBLEMS["nested"](CPU), schedule=Periodic(), **how), first)


class OnceOnly(torch.autograd.Function):
    """y p, with a backward that forgets that it depends on both."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(p, y)
        return p * y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        p, y = ctx.saved_tensors
        return g * y, g * p


@pytest.mark.parametrize("slots", ["all", 2])
@pytest.mark.parametrize("beside", [True, False])
def test_what_is_differentiable_once_is_refused(slots: int | str, beside: bool) -> None:
    p = theta()
    ys = solve(lambda t, y: OnceOnly.apply(p, y) + (p if beside else 0), numbers(3), (0.0, 1.0), slots=slots, dt=0.2).ys
    (first,) = torch.autograd.grad(ys.sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), p)
    with pytest.raises(RuntimeError, match="differentiable once"):
        solve(lambda t, y: OnceOnly.apply(p, y), numbers(3), (0.0, 1.0), gradient="tangent", dt=0.2)


def test_a_tensor_changed_before_the_second_sweep_is_noticed() -> None:
    p, scale = theta(), numbers(3, seed=4)
    ys = solve(lambda t, y: torch.sin(p * y) * scale, numbers(3), (0.0, 1.0), slots=2, method="rk4", dt=0.2).ys
    (first,) = torch.autograd.grad(loss_of(ys), p, create_graph=True)
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="scale .*changed in place"):
        torch.autograd.grad(first.sum(), p)


@pytest.mark.parametrize("from_when", [-1.0, 0.5])
def test_what_cannot_be_followed_is_refused_by_a_product_with_the_jacobian_too(from_when: float) -> None:
    """Also if nothing was transposed before: a Jacobian's product needs the graph alone."""
    q = theta(4)
    p, hidden = torch.sin(q), SimpleNamespace(p=torch.cos(q))
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UntrackedTensorError):
        f = lambda t, y: p * y + (hidden.p if t > from_when else 0)  # noqa: E731
        ys = solve(f, numbers(3), (0.0, 1.0), slots="all", method="rk4", dt=0.2).ys
        (transposed,) = torch.autograd.grad(ys[-1], q, u, create_graph=True)
        torch.autograd.grad(transposed, u, numbers(3))


def test_third_derivatives_and_batches_of_second_ones_are_refused() -> None:
    p = theta()
    ys = solve(lambda t, y: torch.sin(p * y), numbers(3), (0.0, 1.0), slots=2, method="rk4", dt=0.2).ys
    (first,) = torch.autograd.grad(loss_of(ys), p, create_graph=True)
    with pytest.raises(RuntimeError, match="one batch; .*one by one"):
        unit = torch.eye(3, dtype=torch.float64)
        torch.autograd.grad(first, p, unit, is_grads_batched=True, retain_graph=True)
    (second,) = torch.autograd.grad(first.sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives .*gradient='backprop'"):
        torch.autograd.grad(second.sum(), p)


# ---- products for Newton's method ------------------------------------------------------------------------------------


def model(p: Tensor, y0: Tensor, **how: Any) -> Tensor:
    """Lotka and Volterra at a few times."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[0] * (p[0] - p[1] * y[1]), y[1] * (p[3] * y[0] - p[2])))

    return solve(f, y0, torch.linspace(0, 4, 5, dtype=torch.float64), **how).ys  # type: ignore[no-any-return]


TRUE = torch.tensor([1.1, 0.4, 0.4, 0.1], dtype=torch.float64)
START = torch.tensor([2.0, 1.0], dtype=torch.float64)
DATA = model(TRUE, START, method="rk4", dt=0.5)
POINT = [TRUE * torch.tensor([1.05, 0.95, 1.02, 1.0], dtype=torch.float64), START * 1.02]
ALONG = [numbers(4, seed=1), numbers(2, seed=2)]


def misfit(ys: Tensor) -> Tensor:
    return ((ys - DATA) ** 2).sum() / 2 + torch.log(1 + ys**2).sum()


@pytest.mark.parametrize("how", [{"method": "rk4", "dt": 0.5}, {"method": "tsit5", "rtol": 1e-4}])
def test_products_are_those_of_torch(how: dict[str, Any]) -> None:
    with check.frozen_steps() as replay:
        model(*POINT, **how)
        replay.rewind()
        _, expected = torch.autograd.functional.vhp(
            lambda *x: misfit(model(*x, gradient="backprop", **how)), tuple(POINT), tuple(ALONG)
        )
    for slots in (1, 4, "all"):
        found = hvp(lambda *x: misfit(model(*x, slots=slots, **how)), POINT, ALONG)  # noqa: B023
        assert_close(found, expected, PLACES)


def test_gauss_newton_products_are_those_of_the_jacobian() -> None:
    how: dict[str, Any] = {"method": "rk4", "dt": 0.5}
    jacobian = torch.autograd.functional.jacobian(lambda *x: model(*x, gradient="backprop", **how), tuple(POINT))
    rows = torch.cat([j.reshape(DATA.numel(), -1) for j in jacobian], 1)
    moved = rows @ torch.cat(ALONG)
    bent = torch.autograd.functional.hessian(misfit, model(*POINT, **how)).reshape(DATA.numel(), -1)
    for loss, expected in ((None, rows.T @ moved), (misfit, rows.T @ (bent @ moved))):
        for slots in (1, 4, "all"):
            found = gauss_newton(lambda *x: model(*x, slots=slots, **how), POINT, ALONG, loss)  # noqa: B023
            assert_close([torch.cat(found)], [expected], PLACES)


@pytest.mark.parametrize("product", ["hvp", "gauss_newton"])
def test_scipy_finds_the_parameters_with_them(product: str) -> None:
    objective = Objective(
        lambda ys: ((ys - DATA) ** 2).sum() / 2, POINT, model=lambda *x: model(*x, slots=4, method="rk4", dt=0.5)
    )
    hessp = getattr(objective, product)
    found = minimize(objective.value_and_gradient, objective.start, jac=True, hessp=hessp, method="trust-ncg")
    assert np.allclose(found.x, torch.cat((TRUE, START)).numpy(), rtol=1e-6)


def test_an_objective_speaks_in_vectors() -> None:
    z, x = leaf(2, seed=1, dtype=torch.complex128, on=CPU), leaf(2, 2, seed=2, dtype=torch.float32, on=CPU)
    objective = Objective(lambda z, x: (z.abs() ** 4).sum() + (x.double() ** 2).sum() * (1j * z).real.sum(), [z, x])
    assert objective.start.shape == (8,) and objective.start.dtype == np.float64
    again = objective.tensors(objective.start)
    assert torch.equal(again[0], z.detach()) and torch.equal(again[1], x.detach())
    v, h = np.random.default_rng(0).normal(size=8), 1e-3
    difference = (objective.gradient(objective.start + h * v) - objective.gradient(objective.start - h * v)) / (2 * h)
    assert np.allclose(objective.hvp(objective.start, v), difference, rtol=1e-3, atol=1e-3)  # single precision
    assert objective.value(objective.start) == objective.value_and_gradient(objective.start)[0]
    with pytest.raises(ValueError, match=r"gauss_newton needs a model"):
        objective.gauss_newton(objective.start, v)
    with pytest.raises(ValueError, match="7 numbers, the tensors have 8"):
        objective.hvp(objective.start, v[:7])


def test_wrong_calls_get_a_sentence() -> None:
    loss = lambda x: (x**3).sum()  # noqa: E731
    with pytest.raises(TypeError, match="inputs is a Tensor; give a list or tuple"):
        hvp(loss, POINT[0], ALONG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 inputs and 2 directions"):
        hvp(loss, POINT[:1], ALONG)
    with pytest.raises(ValueError, match=r"directions\[0\] has shape \(2,\)"):
        hvp(loss, POINT[:1], ALONG[1:])
    with pytest.raises(TypeError, match=r"inputs\[0\]=1.0 is no tensor"):
        hvp(loss, [1.0], ALONG[:1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"loss returned shape \(4,\)"):
        hvp(lambda x: x, POINT[:1], ALONG[:1])
    with pytest.raises(ValueError, match="does not depend on its inputs"):
        hvp(lambda x: POINT[0].sum(), POINT[:1], ALONG[:1])
    with pytest.raises(ValueError, match="model does not depend"):
        gauss_newton(lambda x: POINT[0], POINT[:1], ALONG[:1])
    assert not torch.cat(hvp(lambda x: x.sum(), POINT[:1], ALONG[:1])).any()
