"""A function that is not the same when a step is computed again is refused, however late it changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adjoint
from adjoint.marks import SMALL, Marks


def counting(rate: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    calls = [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            calls[0] += 1
        return -rate * y * (1 + 0.01 * calls[0])

    return f


def remembering(rate: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    seen: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            seen.append(float(y.detach().sum()))
        return -rate * y * (1 + (seen[-2] if len(seen) > 1 else 0.0))

    return f


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("make", [counting, remembering])
def test_a_function_that_changes_late_is_refused(
    make: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]], method: str, slots: int
) -> None:
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="computed again"):
        ys = adjoint.solve(make(rate), y0, [0.0, 1.0], method=method, dt=0.02, slots=slots).ys
        ys.sum().backward()


@pytest.mark.parametrize("steps", [1, 40, 1000, 100_000])
def test_marks_are_few(steps: int) -> None:
    marks = Marks("f")
    for step in range(1, steps + 1):
        marks.note(step, (torch.ones(()),))
    assert min(steps, 16) <= len(marks.notes) <= 16 + 8 * steps.bit_length()


@pytest.mark.parametrize("size", [3, SMALL])
def test_states_that_are_not_numbers_are_the_same_when_they_are_again(size: int) -> None:
    marks = Marks("f")
    numbers = torch.ones(size)
    numbers[1], numbers[2] = float("nan"), float("inf")
    state = (numbers, torch.arange(size))
    marks.note(3, state)
    marks.compare(3, tuple(x.clone() for x in state))
    for other in ((numbers, torch.ones_like(state[1])), (numbers * 1.001, state[1])):
        with pytest.raises(RuntimeError, match="step 2 was computed again"):
            marks.compare(3, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128, torch.int64])
@pytest.mark.parametrize("size", [129, 1000, 1024])
def test_a_change_of_any_one_number_is_noticed(size: int, dtype: torch.dtype) -> None:
    marks, x = Marks("f"), torch.ones(size, dtype=dtype)
    marks.note(1, (x,))
    marks.compare(1, (x.clone(),))
    for i in range(0, size, 1 if dtype is torch.float64 else 7):
        other = x.clone()
        other[i] = 2
        with pytest.raises(RuntimeError, match="computed again"):
            marks.compare(1, (other,))


def test_a_function_that_changes_late_in_one_number_is_refused() -> None:
    rate, calls = torch.ones(1000, dtype=torch.float64, requires_grad=True), [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        changed = torch.zeros_like(y)
        changed[1] = float(calls[0] > 20)
        return -rate * y * (1 + changed)

    ys = adjoint.solve(f, torch.ones(1000, dtype=torch.float64), [0.0, 1.0], method="euler", dt=0.1, slots=3).ys
    with pytest.raises(RuntimeError, match="computed again"):
        ys.sum().backward()


def test_a_note_is_not_a_view() -> None:
    """A step may hand on the memory of a slot, which others fill later."""
    marks, x = Marks("f"), torch.ones(3)
    marks.note(1, (x,))
    x.zero_()
    with pytest.raises(RuntimeError, match="computed again"):
        marks.compare(1, (x,))


def test_a_module_that_keeps_statistics_is_refused_at_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    y0 = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"module\.1.*eval\(\)"):
        adjoint.solve(lambda t, y: module(y), y0, [0.0, 1.0], method="euler", dt=0.1)
