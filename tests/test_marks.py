"""A function that is not the same when a step is computed again is refused, however late it changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adjoint
from adjoint.marks import Marks


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
        marks.pass_by(step, (torch.ones(()),), True)
    assert min(steps, 32) <= len(marks._sums) <= 32 * steps.bit_length()


def test_states_that_are_not_numbers_are_the_same_when_they_are_again() -> None:
    marks = Marks("f")
    state = (torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor([1, 2]))
    marks.pass_by(3, state, True)
    marks.pass_by(3, state, False)
    with pytest.raises(RuntimeError, match="step 2 was computed again"):
        marks.pass_by(3, (state[0], torch.tensor([2, 2])), False)


def test_a_module_that_keeps_statistics_is_refused_at_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    y0 = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"module\.1.*eval\(\)"):
        adjoint.solve(lambda t, y: module(y), y0, [0.0, 1.0], method="euler", dt=0.1)
