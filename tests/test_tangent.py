"""Forward sensitivities: the discrete adjoint to rounding, in memory that does not grow with the number of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjoint_cases import (
    METHODS,
    PROBLEMS,
    Case,
    assert_close,
    assert_same_bits,
    gradients,
    leaf,
    loss_of,
    numbers,
    steps_of,
)
from test_captures import FOUND, case_of, theta
from torch import Tensor

from adjoint import SolveError, Tangent, check, scan, solve
from adjoint.memory import Meter

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_the_discrete_adjoint(name: str, method: str) -> None:
    expected = gradients(PROBLEMS[name](CPU), **steps_of(method))
    assert_close(gradients(PROBLEMS[name](CPU), gradient="tangent", **steps_of(method)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_the_dot_test_against_it(method: str) -> None:
    """(J v, w) forwards, (v, J^T w) backwards."""
    case, w = PROBLEMS["vector"](CPU), numbers(3, 2, seed=9)
    p, how = case.wanted[0], steps_of(method)

    def forward(v: Tensor) -> Tensor:
        u = torch.zeros_like(w).requires_grad_()
        (transposed,) = torch.autograd.grad(case.solve(gradient="tangent", **how).ys, p, u, create_graph=True)
        return torch.autograd.grad(transposed, u, v)[0]

    def transpose(w: Tensor) -> Tensor:
        return torch.autograd.grad(case.solve(slots=2, **how).ys, p, w)[0]

    assert check.dot_test(forward, transpose, numbers(4, seed=8), w) < 1e-12


@pytest.mark.parametrize("name", [name for name in FOUND if name not in ("sparse", "in_a_scan", "in_a_solve")])
def test_what_is_found_gets_its_sensitivities(name: str) -> None:
    y0 = theta() if name == "as_y0_too" else None
    expected = gradients(case_of(FOUND[name], y0), **steps_of("rk4"))
    assert_close(gradients(case_of(FOUND[name], y0), gradient="tangent", **steps_of("rk4")), expected)


def test_a_solve_inside_takes_directions_one_by_one() -> None:
    def make() -> Case:
        p = leaf(2, seed=1, on=CPU)
        inner = {"method": "euler", "dt": 0.1, "slots": 1}
        return Case(lambda t, y: -solve(lambda s, z: p * z, y, (0.0, 0.1), **inner).ys[-1], numbers(2), (0.0, 1.0), [p])

    how = {"method": "euler", "dt": 0.25}
    assert_close(gradients(make(), gradient="tangent", **how), gradients(make(), gradient="backprop", **how))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_directions_come_in_chunks(chunk: int) -> None:
    how = steps_of("rk4")
    expected = gradients(PROBLEMS["matrix"](CPU), **how)
    assert_close(gradients(PROBLEMS["matrix"](CPU), gradient=Tangent(chunk=chunk), **how), expected)
    with pytest.raises(ValueError, match="chunk=0 carries nothing"):
        Tangent(chunk=0)


def test_a_recurrence_has_sensitivities() -> None:
    def run(**how: Any) -> list[Tensor | None]:
        p, c, x = leaf(2, seed=1, on=CPU), leaf(2, seed=2, on=CPU), leaf(5, 2, seed=3, on=CPU)
        results = scan(lambda c, x: (torch.tanh(c * p + x), c * x), c, x, **how)
        return list(torch.autograd.grad(loss_of(results), (p, c, x)))

    assert_close(run(gradient="tangent"), run())


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    peaks = []
    for steps in (10, 100):
        p = leaf(3, seed=1, on=CPU)
        with Meter() as meter:
            ys = solve(
                lambda t, y: torch.sin(p[0] * y) * p[1] + p[2],  # noqa: B023
                numbers(8000),
                (0.0, 1.0),
                method="rk4",
                dt=1 / steps,
                gradient="tangent",
            ).ys
            torch.autograd.grad(ys[-1].sum(), p)
            peaks.append(meter.peak)
    assert peaks[1] <= 1.05 * peaks[0]


def test_a_solve_that_fails_has_the_sensitivities_of_what_it_reached() -> None:
    p = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    how: dict[str, Any] = {"method": "tsit5", "rtol": 1e-6, "max_steps": 12}
    found = []
    for gradient in ("tangent", "discrete"):
        solution = solve(
            lambda t, y: p * y**2, numbers(1).abs() + 1, (0.0, 0.1, 9.0), gradient=gradient, throw=False, **how
        )
        assert solution.status != "success" and solution.ys[-1].isnan().all()
        found.append(torch.autograd.grad(solution.ys[1].sum(), p)[0])
    assert_close(found[:1], found[1:])
    with pytest.raises(SolveError):
        solve(lambda t, y: p * y**2, numbers(1).abs() + 1, (0.0, 9.0), gradient="tangent", **how)


def test_a_sparse_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="layout torch.sparse_coo; use 'discrete'"):
        gradients(case_of(FOUND["sparse"]), gradient="tangent", **steps_of("rk4"))


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch(**how: Any) -> tuple[Tensor, list[Tensor]]:
    """Members with their own times; the last one leaves the domain of f early."""
    p, y0 = leaf(2, seed=1, on=CPU), (numbers(3, 2, seed=2).abs() + 0.5).requires_grad_()
    t = torch.tensor([[0.0, 0.4, 1.0], [0.1, 0.5, 0.7], [0.0, 0.9, 1.5]], dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return (
            torch.sin(p * y) * torch.cos(t)[:, None]
            - torch.tensor([[0.0], [0.0], [8.0]]) * torch.sqrt(1.2 - t)[:, None]
        )

    ys = solve(f, y0, t, batched=True, throw=False, **how).ys
    return ys[:, :2], [p, y0, t]


def of_the_living(gradients: Any) -> list[Tensor]:
    return [g if g.ndim == 1 else g[:2] for g in gradients]


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_a_batch_has_sensitivities(method: str) -> None:
    how = {"method": method, "dt": 0.1, "rtol": 1e-3} if method == "tsit5" else {"method": method, "dt": 0.1}
    values, wanted = batch(gradient="tangent", **how)
    found = torch.autograd.grad(loss_of(values), wanted)
    expected_values, expected_wanted = batch(slots=2, **how)
    assert_close([values.detach()], [expected_values.detach()])
    expected = torch.autograd.grad(loss_of(expected_values), expected_wanted)
    assert_close(of_the_living(found), of_the_living(expected))


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_a_batch_has_second_derivatives(method: str) -> None:
    how = {"method": method, "dt": 0.1, "rtol": 1e-3} if method == "tsit5" else {"method": method, "dt": 0.1}
    results = []
    for memory in ({"gradient": "backprop"}, {"slots": "all"}, {"slots": 2}):
        values, wanted = batch(**how, **memory)  # type: ignore[arg-type]
        first = torch.autograd.grad(loss_of(values), wanted, create_graph=True)
        directions = [numbers(*g.shape, seed=7) for g in first]
        results.append(of_the_living(torch.autograd.grad(first, wanted, directions)))
    assert_close(results[1], results[0], 45_000)
    assert_same_bits(results[2], results[1])
