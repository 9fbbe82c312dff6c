"""A gradient on the device ``meta``: it refuses stray tensors of other devices and every ``.item()``, so it shows on any
machine that nothing leaves the device, and it sizes models that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjoint_cases import FIXED, TIMES
from torch import Tensor, nn

from adjoint import METHODS, scan, solve

SLOTS = (1, 3, "all")
slots_matter = pytest.mark.parametrize("slots", SLOTS)


def on_meta(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_()


def assert_only_shapes(found: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    for gradient, x in zip(found, wanted, strict=True):
        assert gradient.is_meta and gradient.shape == x.shape and gradient.dtype == x.dtype


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "how", [*({"slots": slots} for slots in SLOTS), {"gradient": "backprop"}, {"gradient": "backsolve"}], ids=str
)
def test_a_fixed_step_gradient_runs_wholly_on_meta(method: str, how: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double().to("meta")
    y0, scale = {"a": on_meta(4, 3), "b": on_meta(2, dtype=torch.complex128)}, on_meta(2)

    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": net(y["a"]) * torch.cos(t), "b": 1j * scale * y["b"] + y["a"].sum()}

    solution = solve(f, y0, TIMES, method=method, dt=0.3, **how)
    assert solution.status == "success" and solution.ys["a"].shape == (len(TIMES), 4, 3)
    wanted = [*net.parameters(), *y0.values(), scale]
    loss = solution.ys["a"].sum() + solution.ys["b"].abs().sum()
    assert_only_shapes(torch.autograd.grad(loss, wanted), wanted)


@pytest.mark.parametrize("method", FIXED)
@slots_matter
def test_times_are_on_the_cpu_and_have_gradients_even_so(method: str, slots: int | str | None) -> None:
    """Without numbers their gradient has none either: it cannot come back to the CPU, and that is said."""
    t, y0 = torch.tensor(TIMES, dtype=torch.float64).requires_grad_(), on_meta(3)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        ys = solve(lambda t, y: torch.sin(y) * t, y0, t, method=method, slots=slots).ys
        torch.autograd.grad(ys.sum(), (y0, t))


@slots_matter
def test_a_scan_runs_wholly_on_meta(slots: int | str | None) -> None:
    cell, c, x = nn.GRUCell(3, 4).double().to("meta"), on_meta(2, 4), on_meta(9, 2, 3)
    final, outputs = scan(lambda c, x: (cell(x, c), c.sum()), c, x, slots=slots)
    assert outputs.is_meta and outputs.shape == (9,)
    wanted = [*cell.parameters(), c, x]
    assert_only_shapes(torch.autograd.grad(final.sum() + outputs.sum(), wanted), wanted)


def test_a_model_that_fits_nowhere_gets_a_plan() -> None:
    y0, p = on_meta(10**12), on_meta(10**12)
    solution = solve(lambda t, y: p * y, y0, (0.0, 1.0), method="rk4", dt=0.01, budget="200 TB")
    assert solution.plan is not None
    assert 8e12 <= solution.plan.state_bytes < solution.plan.tape_bytes <= solution.plan.bytes <= 200e12
    (found,) = torch.autograd.grad(solution.ys.sum(), p)
    assert found.is_meta


@pytest.mark.parametrize("method", [name for name, tableau in METHODS.items() if tableau.adaptive])
def test_an_adaptive_method_says_that_it_needs_numbers(method: str) -> None:
    with pytest.raises(ValueError, match=f"method='{method}' measures errors, and meta tensors hold none.*'rk4'.*dt="):
        solve(lambda t, y: y, on_meta(3), TIMES, method=method)
