"""A wrong call gets a sentence: the argument, its value and a way out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_cases import (
    ADAPTIVE,
    FIXED,
    PROBLEMS,
    TIMES,
    assert_close,
    assert_same_bits,
    gradients,
    leaf,
    numbers,
    steps_of,
)
from torch import Tensor

from adjoint import CONTROLLERS, GRADIENTS, METHODS, Controller, Discrete, SolveError, solve
from revolve import Binomial

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf
FOUR = (0.0, 1.0, 2.0, 3.0)

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no slots": ({"slots": 0}, ValueError, "slots=0 .*at least 1"),
    "fewer than no slots": ({"slots": -3}, ValueError, "slots=-3 .*at least"),
    "half a slot": ({"slots": 2.5}, TypeError, "slots=2.5 is not an integer"),
    "some slots": ({"slots": "some"}, ValueError, "slots='some' is unknown; give a number of at least 1, or 'all'"),
    "slots and a budget": (
        {"slots": 3, "budget": "1 MB"},
        ValueError,
        "slots=3 and budget='1 MB' were both given; one",
    ),
    "no size": ({"budget": "plenty"}, ValueError, "budget='plenty' is not a size; give bytes, or text like '512 MiB'"),
    "an unknown unit": ({"budget": "3 MX"}, ValueError, "budget='3 MX' is not a size"),
    "a negative budget": ({"budget": -1}, ValueError, "budget=-1 .*at least"),
    "half a byte": ({"budget": 0.5}, TypeError, "budget=0.5 is not an integer"),
    "a tiny budget": (
        {"budget": 100},
        ValueError,
        "budget=100 cannot reverse even 2 steps.*give at least [0-9]+ bytes",
    ),
    "unsorted times": ({"t": (0.0, 2.0, 1.0)}, ValueError, r"t\[1\]=2, t\[2\]=1: times must strictly increase or"),
    "equal times": ({"t": (0.0, 1.0, 1.0)}, ValueError, r"t\[1\]=1, t\[2\]=1: times must strictly increase"),
    "there and back": ({"t": (0.0, 1.0, 0.0)}, ValueError, "times must strictly increase or strictly decrease; sort"),
    "a time that is none": ({"t": (0.0, NAN)}, ValueError, r"t\[1\]=nan is not a finite number"),
    "forever": ({"t": (0.0, INF)}, ValueError, r"t\[1\]=inf is not a finite number"),
    "no times": ({"t": ()}, ValueError, r"t has shape \(0,\); give a one-dimensional series of at least one time"),
    "a single number as times": ({"t": torch.tensor(1.0)}, ValueError, r"t has shape \(\); give a one-dimensional"),
    "a table of times": ({"t": torch.ones(2, 2)}, ValueError, r"t has shape \(2, 2\); give a one-dimensional series"),
    "complex times": ({"t": torch.tensor([0j, 1j])}, TypeError, "t has dtype torch.complex64; times are real"),
    "times on meta": ({"t": torch.ones(2, device="meta")}, ValueError, "t is on the meta device.*on the CPU"),
    "a state that is none": ({"y0": torch.tensor([0.0, NAN])}, ValueError, "y0 holds a NaN or an infinity"),
    "an infinite state": ({"y0": {"a": torch.ones(2), "b": torch.tensor(INF)}}, ValueError, "y0 holds a NaN or"),
    "an integer state": ({"y0": torch.ones(2, dtype=torch.int64)}, TypeError, "y0 has dtype torch.int64.*y0.double"),
    "a number as state": ({"y0": 1.0}, TypeError, r"y0 holds 1.0 \(float\); every leaf must be a torch tensor"),
    "a list of numbers": ({"y0": [1.0, 2.0]}, TypeError, r"y0 holds 1.0 \(float\); every leaf must be a torch tensor"),
    "an empty tree": ({"y0": {"a": []}}, TypeError, "y0=.*holds no tensor"),
    "no state": ({"y0": None}, TypeError, "y0 holds None"),
    "two devices": (
        {"y0": (torch.ones(2), torch.ones(2, device="meta"))},
        ValueError,
        "y0 has leaves on cpu and on meta; put them on one device",
    ),
    "arguments in a list": ({"args": [1]}, TypeError, r"args=\[1\] must be a tuple; .*args=\(x,\)"),
    "a bare argument": ({"args": 2.0}, TypeError, r"args=2.0 must be a tuple; .*args=\(x,\)"),
    "a near method": ({"method": "dopri6"}, ValueError, "method='dopri6' is unknown; did you mean 'dopri.'.*'tsit5'"),
    "a far method": ({"method": "zzz"}, ValueError, "method='zzz' is unknown; known are 'euler'"),
    "no method": ({"method": None}, ValueError, "method=None is unknown; known are"),
    "a near gradient": (
        {"gradient": "backslove"},
        ValueError,
        "gradient='backslove' is unknown; did you mean 'backsolve'",
    ),
    "a far gradient": ({"gradient": "zzz"}, ValueError, "gradient='zzz' is unknown; known are 'discrete'"),
    "a class as gradient": ({"gradient": Discrete}, TypeError, "gradient=<class .*makes none; .*such as Discrete"),
    "no gradient": ({"gradient": None}, TypeError, "gradient=None makes none; give a name"),
    "a sparse state": ({"y0": torch.eye(2).to_sparse()}, TypeError, "y0 has the layout torch.sparse_coo; .*to_dense"),
    "a near controller": ({"controller": "PDI"}, ValueError, "controller='PDI' is unknown; did you mean 'P"),
    "no tolerance": ({"rtol": 0.0, "atol": 0.0}, ValueError, "rtol=0.0, atol=0.0: give positive tolerances"),
    "a negative tolerance": ({"rtol": -1e-3}, ValueError, "rtol=-0.001, atol=.*: give positive tolerances"),
    "a tolerance that is none": ({"atol": NAN}, ValueError, "rtol=.*atol=nan: give positive tolerances"),
    "a step of no length": ({"dt": 0.0}, ValueError, "dt=0.0 is not a length of time; give a positive number"),
    "a step backwards": ({"dt": -0.1}, ValueError, "dt=-0.1 is not a length of time; .*also backwards in time"),
    "a step that is none": ({"dt": NAN}, ValueError, "dt=nan is not a length of time"),
    "an endless step": ({"dt": INF}, ValueError, "dt=inf is not a length of time"),
    "no steps": ({"max_steps": 0}, ValueError, "max_steps=0 allows no step; give at least 1"),
}


def call(**change: Any) -> Any:
    p = leaf(2, seed=1, on=CPU)
    arguments: dict[str, Any] = {"y0": numbers(2), "t": TIMES} | change
    return solve(lambda t, y, *args: p * y, **arguments)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_gets_a_sentence(name: str) -> None:
    change, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call(**change)


@pytest.mark.parametrize("name", [name for name, (change, _, _) in WRONG.items() if "tiny" not in name])
def test_a_wrong_call_gets_its_sentence_without_grad_too(name: str) -> None:
    change, error, match = WRONG[name]
    with torch.no_grad(), pytest.raises(error, match=match):
        call(**change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["budget=100", "budget='0.1 kB'"])
def test_a_budget_that_is_too_small_names_the_smallest_that_works(method: str, start: str) -> None:
    case = PROBLEMS["network"](CPU)
    how = steps_of(method)
    with pytest.raises(ValueError, match=start) as refusal:
        case.solve(budget=eval(start.removeprefix("budget=")), **how)
    found = re.search(r"give at least (\d+) bytes", str(refusal.value))
    assert found is not None
    smallest = int(found[1])
    plan = case.solve(budget=smallest, **how).plan
    assert plan is not None and plan.bytes <= smallest
    assert_same_bits(gradients(case, budget=smallest, **how), gradients(case, slots="all", **how))
    with pytest.raises(ValueError, match=f"give at least {smallest} bytes"):
        case.solve(budget=smallest - 1, **how)


def test_more_slots_than_steps_are_no_error() -> None:
    solution = call(method="rk4", slots=1000)
    assert solution.plan.schedule == Binomial(1000)
    assert solution.plan.report.plain_runs == len(TIMES) - 2


Slope = Callable[[float, Tensor], Any]
FUNCTIONS: dict[str, tuple[Slope, type[Exception], str]] = {
    "another shape": (lambda t, y: y[:1], ValueError, r"f returned shape \(1,\) and torch.float64.*shape \(2,\)"),
    "a broadcast shape": (lambda t, y: y.sum(), ValueError, r"f returned shape \(\) .*shaped and typed like y"),
    "another dtype": (lambda t, y: y.float(), ValueError, "f returned shape .*float32 for a state of .*float64"),
    "a complex slope": (lambda t, y: 1j * y, ValueError, "f returned shape .*complex128 for a state of .*float64"),
    "another structure": (lambda t, y: (y, y), TypeError, "the value of f has the structure"),
    "a list of the slope": (lambda t, y: [y], TypeError, "the value of f has the structure"),
    "nothing": (lambda t, y: None, TypeError, "the value of f"),
    "a number": (lambda t, y: 1.0, TypeError, "the value of f"),
}


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_value_of_f_gets_a_sentence(name: str, late: bool, gradient: str, method: str) -> None:
    wrong, error, match = FUNCTIONS[name]
    p = leaf(2, seed=1, on=CPU)
    with pytest.raises(error, match=match):
        solve(
            lambda t, y: wrong(t, p * y) if not late or t > 0.6 else p * y,
            numbers(2),
            TIMES,
            gradient=gradient,
            **steps_of(method),
        )


def test_a_wrong_leaf_of_a_tree_gets_a_sentence() -> None:
    y0 = {"a": numbers(2), "b": numbers(3)}
    with pytest.raises(TypeError, match="the value of f has the structure"):
        solve(lambda t, y: {"a": y["a"]}, y0, TIMES)
    with pytest.raises(TypeError, match="the value of f has the structure"):
        solve(lambda t, y: {"a": y["a"], "c": y["b"]}, y0, TIMES)
    with pytest.raises(ValueError, match=r"f returned shape \(2,\)"):
        solve(lambda t, y: {"a": y["a"], "b": y["a"]}, y0, TIMES)


def test_an_error_inside_f_comes_out_as_it_is() -> None:
    class Mine(Exception):
        pass

    def f(t: Tensor, y: Tensor) -> Tensor:
        raise Mine("from within")

    for gradient in GRADIENTS:
        with pytest.raises(Mine, match="from within"):
            solve(f, numbers(2), TIMES, gradient=gradient)


# ---- solves that fail -----------------------------------------------------------------------------------------------


def explode(t: Tensor, y: Tensor) -> Tensor:
    """y' = y^2 is infinite at t = 1 / y0."""
    return y**2


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_too_many_steps_are_an_error_with_numbers(method: str, gradient: str) -> None:
    y0 = leaf(2, on=CPU)
    with pytest.raises(SolveError, match=r"max_steps=3 taken and t=.* of 10 reached \(step size .*allow more") as error:
        solve(lambda t, y: torch.sin(9 * t) * y, y0, (0.0, 10.0), method=method, max_steps=3, gradient=gradient)
    assert error.value.status == "max_steps" and error.value.step == 3 and 0 < error.value.t < 10


@pytest.mark.parametrize("method", [name for name in ADAPTIVE if METHODS[name].order > 3])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_step_too_small_for_t_is_an_error_with_numbers(method: str, gradient: str) -> None:
    """Methods of low order would take too many steps before they came so near to the singularity."""
    y0 = torch.tensor([[0.5, 1.0], [0.2, 0.1]], dtype=torch.float64).requires_grad_()
    with pytest.raises(SolveError, match=r"step size fell to .* at t=.*step \d+.*component \(0, 1\)") as error:
        solve(explode, y0, (0.0, 2.0), method=method, rtol=1e-5, gradient=gradient)
    assert error.value.status == "underflow" and error.value.t == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_numbers_that_overflow_at_fixed_steps_are_an_error_with_the_place(method: str, gradient: str) -> None:
    y0 = torch.tensor([[0.5, 0.1], [0.2, 9.0]], dtype=torch.float64).requires_grad_()
    with pytest.raises(
        SolveError, match=r"not finite at t=.*after step \d+ from.*\(component \(1, 1\)\).*smaller dt or an adaptive"
    ) as error:
        solve(lambda t, y: y**3, y0, (0.0, 0.01, 2.0), method=method, dt=0.1, gradient=gradient)
    failure = error.value
    assert (
        failure.status == "nonfinite" and 0.01 <= failure.t < 2 and failure.step == 1 + round(10 * (failure.t - 0.01))
    )
    assert failure.y.isfinite().all() and failure.y.shape == y0.shape and not failure.y.requires_grad


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_a_slope_that_is_no_number_is_an_error(method: str) -> None:
    with pytest.raises(SolveError) as error:
        solve(lambda t, y: torch.sqrt(0.5 - t) * y, numbers(2), TIMES, **steps_of(method))
    assert error.value.status in ("nonfinite", "underflow")


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("slots", ["all", 1, 3, None])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_was_reached_is_returned_with_its_gradient(method: str, slots: int | str | None, backwards: bool) -> None:
    """Seven steps of a hundred: inside the last one, too, values and gradients are those of backpropagation."""
    y0, p = leaf(2, seed=1, on=CPU), leaf(2, seed=2, on=CPU)
    t = (torch.linspace(0, -20 if backwards else 20, 500, dtype=torch.float64)).requires_grad_()
    results = []
    for how in ({"slots": slots}, {"gradient": "backprop"}):
        f = lambda t, y: p * torch.sin(8 * t) * y  # noqa: E731
        solution = solve(f, y0, t, method=method, rtol=1e-3, max_steps=7, throw=False, **how)
        reached = ~solution.ys.isnan().any(1)
        count = int(reached.sum())
        assert solution.status == "max_steps" and solution.stats.steps == 7
        assert 1 < count < 250 and bool(reached[:count].all())
        results.append((solution.ys[:count], torch.autograd.grad(solution.ys[:count].pow(2).sum(), (y0, p, t))))
    (values, found), (expected_values, expected) = results
    assert_close([values], [expected_values])
    assert_close(found, expected)
    assert not found[2][count:].any(), "what was not reached cannot matter"


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
@pytest.mark.parametrize("slots", ["all", 1, None])
def test_a_solve_that_fails_at_once_returns_y0_with_its_gradient(gradient: str, slots: int | str | None) -> None:
    y0 = leaf(2, on=CPU)
    f = lambda t, y: y * math.nan  # noqa: E731
    solution = solve(f, y0, FOUR, dt=0.1, throw=False, gradient=gradient, slots=slots)
    assert solution.status in ("underflow", "nonfinite") and solution.stats.steps == 0
    assert torch.equal(solution.ys[0], y0) and bool(solution.ys[1:].isnan().all())
    (found,) = torch.autograd.grad(solution.ys[0].sum(), y0)
    assert torch.equal(found, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_overflow_at_fixed_steps_is_returned_as_a_status(gradient: str) -> None:
    y0 = torch.tensor([9.0], dtype=torch.float64).requires_grad_()
    solution = solve(lambda t, y: y**3, y0, (0.0, 0.001, 2.0), method="rk4", dt=0.1, throw=False, gradient=gradient)
    assert solution.status == "nonfinite"
    assert bool(solution.ys[:2].isfinite().all()) and not bool(solution.ys[2].isfinite().all())


def test_a_gradient_through_backsolve_of_a_failed_solve_is_refused() -> None:
    y0 = leaf(2, on=CPU)
    how: dict[str, Any] = {"method": "tsit5", "max_steps": 2, "throw": False, "gradient": "backsolve"}
    solution = solve(lambda t, y: torch.sin(9 * t) * y, y0, (0.0, 0.1, 10.0), **how)
    assert solution.status == "max_steps"
    with pytest.raises(RuntimeError, match="does not require grad|not reached"):
        torch.autograd.grad(solution.ys[0].sum(), y0)


# ---- transforms -----------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vmap": lambda loss, x: torch.func.vmap(loss)(x[None]),
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
}
Y0, RATE = numbers(2, seed=1), numbers(2, seed=2)
USES: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "a captured tensor": lambda x, how: solve(lambda t, y: x * y, Y0, TIMES, **how).ys.sum(),
    "an argument": lambda x, how: solve(lambda t, y, x: x * y, Y0, TIMES, args=(x,), **how).ys.sum(),
    "the first state": lambda x, how: solve(lambda t, y: RATE * y, x, TIMES, **how).ys.sum(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("use", USES)
def test_torchs_own_graph_follows_transforms_by_itself(transform: str, use: str) -> None:
    how, x = {"gradient": "backprop", "method": "rk4", "dt": 0.3}, numbers(2, seed=3)
    found = TRANSFORMS[transform](lambda x: USES[use](x, how), x)
    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(USES[use](z, {"method": "rk4", "dt": 0.3}), z)
    if transform in ("grad", "jacrev", "jacfwd"):
        assert torch.allclose(found, expected, rtol=1e-12)
    elif transform == "jvp":
        assert torch.allclose(found[1], (expected * x).sum(), rtol=1e-12)


@pytest.mark.parametrize("field", ["min_step", "max_step", "safety", "smallest", "largest"])
def test_a_controller_that_cannot_be_meant_gets_a_sentence(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        Controller(**{field: -1.0})


def test_controllers_have_names() -> None:
    assert set(CONTROLLERS) >= {"I", "PI", "PID"}
    for name in CONTROLLERS:
        assert call(controller=name, method="tsit5").status == "success"
