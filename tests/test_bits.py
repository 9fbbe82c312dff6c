"""Steps that return leaves, one tensor several times, or pieces of larger memory: the same bits with any slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adjoint import scan

STEPS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a parameter as output": lambda c, x, p: ((_next(c, x, p), c[0], c[1]), (p, c[0])),
    "a carry three times": lambda c, x, p: ((_next(c, x, p),) * 3, None),
    "a parameter carried twice": lambda c, x, p: ((_next(c, x, p), p[0], p[0]), c[0]),
    "a piece of larger memory": lambda c, x, p: ((torch.cat((x[:1], _next(c, x, p)))[1:], c[0], c[1]), x),
}


def _next(c: Any, x: Tensor, p: Tensor) -> Tensor:
    return torch.tanh(p @ c[0] + x + 0.1 * c[1] * c[2])


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_gradients_do_not_depend_on_slots(step: Callable[..., Any]) -> None:
    def gradients(slots: int | str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        p, c, x = (
            torch.randn(shape, dtype=torch.float64).div_(5).requires_grad_() for shape in ((33, 33), (33,), (70, 33))
        )
        carry, outputs = scan(lambda c, x: step(c, x, p), (c, c, c), x, slots=slots)
        seen = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
        return torch.autograd.grad(sum(y.sin().sum() for y in (*carry, *seen)), (p, c, x))

    first = gradients(1)
    for slots in (2, 5, "all"):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(slots), strict=True))
