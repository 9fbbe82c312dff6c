"""check=True finds the step that is not reproducible, down to the last bit, and otherwise changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from adjoint_cases import PROBLEMS, assert_same_bits, gradients, leaf, loss_of, numbers, steps_of
from torch import Tensor

from adjoint import Device, ReproducibilityError, UntrackedTensorError, scan, solve
from revolve import Cast, Stages

CPU = torch.device("cpu")
TIMES = (0.0, 1.0)
EULER: dict[str, Any] = {"method": "euler", "dt": 0.1}


@pytest.mark.parametrize("memory", [{"slots": "all"}, {"slots": 2}, {"slots": 5}, {}, {"gradient": "tangent"}])
@pytest.mark.parametrize("method", ["rk4", "tsit5"])
@pytest.mark.parametrize("name", ["vector", "nested", "other_kernels", "mixed_dtypes", "network"])
def test_what_is_reproducible_has_the_same_bits_as_without(name: str, method: str, memory: dict[str, Any]) -> None:
    expected = gradients(PROBLEMS[name](CPU), **memory, **steps_of(method))
    assert_same_bits(gradients(PROBLEMS[name](CPU), check=True, **memory, **steps_of(method)), expected)


def test_without_grad_it_is_checked_too() -> None:
    with torch.no_grad():
        assert solve(lambda t, y: -y, numbers(3), TIMES, check=True, **EULER).status == "success"
        with pytest.raises(
            ReproducibilityError, match=r"f \(.*counting.*\) is not reproducible: step 4 from t=0.4 to t=0.5"
        ):
            solve(counting(), numbers(3), TIMES, check=True, **EULER)


def counting() -> Callable[[Tensor, Tensor], Tensor]:
    """Late in time every call gives a little more, too little to be seen in half of the digits."""
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        if t > 0.35:
            calls += 1
        return -y * (1 + 1e-12 * calls)

    return f


def remembering() -> Callable[[Tensor, Tensor], Tensor]:
    """The second time at a place it knows better."""
    seen: ContextVar[bool] = ContextVar("seen", default=False)

    def f(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.85:
            seen.set(True)
        return -y * (1 + 1e-12 * float(seen.get() and 0.45 < float(t) < 0.55))

    return f


@pytest.mark.parametrize("slots", ["all", 1, 3, None])
def test_a_counter_is_found_in_the_step_where_it_starts(slots: int | str | None) -> None:
    p = leaf(3, seed=1, on=CPU)
    own = counting()
    with pytest.raises(
        ReproducibilityError, match="Two runs in a row differ by .* component.*counts its calls"
    ) as error:
        solve(lambda t, y: own(t, y) * p, numbers(3), TIMES, slots=slots, check=True, **EULER)
    assert error.value.step == 4


@pytest.mark.parametrize("slots", [1, 2])
def test_a_memory_of_earlier_calls_is_found_when_it_matters(slots: int) -> None:
    p = leaf(3, seed=1, on=CPU)
    own = remembering()
    ys = solve(lambda t, y: own(t, y) * p, numbers(3), TIMES, slots=slots, check=True, **EULER).ys
    with pytest.raises(ReproducibilityError, match="Runs in a row agree, but not with the first one") as error:
        loss_of(ys).backward()
    assert error.value.step == 5


def test_without_check_such_differences_are_below_notice() -> None:
    """The reason for check: half of the digits are compared otherwise, because kernels may not be deterministic."""
    p = leaf(3, seed=1, on=CPU)
    for own in (counting(), remembering()):
        loss_of(solve(lambda t, y: own(t, y) * p, numbers(3), TIMES, slots=2, **EULER).ys).backward()  # noqa: B023


@pytest.mark.parametrize("slots", ["all", 2])
def test_a_recurrence_is_checked(slots: int | str) -> None:
    p, calls = leaf(3, seed=1, on=CPU), 0

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += bool(x > 0.5)
        return torch.tanh(c * p) * (1 + 1e-14 * calls), x

    with pytest.raises(
        ReproducibilityError, match=r"step \(.*<locals>.step\) is not reproducible: step 3 gave other bits"
    ):
        scan(step, numbers(3), torch.linspace(0, 1, 6), slots=slots, check=True)


def test_what_is_kept_in_any_step_is_found() -> None:
    """Only a few steps are listened to otherwise; here one is used in a single step, between them."""

    def make(check: bool) -> Tensor:
        p, kept = leaf(3, seed=1, on=CPU), ContextVar("kept")

        def f(t: Tensor, y: Tensor) -> Tensor:
            if not 0.47 < t < 0.53:
                return -p * y
            found = kept.get(None)
            if found is None:
                found = torch.sin(p)
                kept.set(found)
            return found * y

        ys = solve(f, numbers(3), TIMES, slots=2, check=check, **EULER).ys
        return torch.autograd.grad(ys.sum(), p)[0]

    with pytest.raises(UntrackedTensorError, match="f uses in step 5 .*gradient would be lost"):
        make(True)


def test_every_step_of_a_batch_is_checked() -> None:
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += bool(t[0] > 0.35)
        return -y * (1 + 1e-12 * calls)

    with pytest.raises(ReproducibilityError, match="step 4 gave other bits"):
        solve(f, numbers(3, 2), TIMES, batched=True, check=True, **EULER)


def test_what_cannot_be_checked_is_said() -> None:
    y0 = leaf(3, on=CPU)
    for gradient in ("backprop", "backsolve"):
        with pytest.raises(ValueError, match=f"check=True.*gradient='{gradient}'.*'discrete' or 'tangent'"):
            solve(lambda t, y: -y, y0, TIMES, gradient=gradient, check=True, **EULER)
    with pytest.raises(ValueError, match="check=True compares bits.*codec="):
        solve(lambda t, y: -y, y0, TIMES, tiers=[Device(slots=2, codec=Cast("float32"))], check=True, **EULER)
    with pytest.raises(ValueError, match="check=True.*keeps stages; check with slots="):
        solve(lambda t, y: -y, y0, TIMES, schedule=Stages(3, 1), check=True, **EULER)
