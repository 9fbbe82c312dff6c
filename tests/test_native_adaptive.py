"""Controlled steps by the native engine: the steps that torch takes, and on the same steps the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import again
from adjoint.engines.native import adaptive, kernel
from adjoint.frozen import frozen_steps

pytest.importorskip("llvmlite")
double = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path_factory.getbasetemp() / "native"))
    kernel._known.clear()
    again._known.clear()


def oscillator(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y.unbind()
    return torch.stack((v, mu * (1 - x * x) * v - x + torch.sin(3 * t)))


def gradient(t: Tensor | list[float], f: Callable[..., Tensor] = oscillator, **how: Any) -> tuple[Any, list[Tensor]]:
    y0 = torch.tensor([2.0, 0.0], **double).requires_grad_()
    mu = torch.tensor(8.0, **double).requires_grad_()
    wishes = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7, "engine": "native", **how}
    solution = adjoint.solve(f, y0, torch.as_tensor(t, **double), args=(mu,), **wishes)
    weights = torch.linspace(0.5, 1.5, solution.ys.numel(), **double).reshape(solution.ys.shape)
    return solution, list(torch.autograd.grad((solution.ys.square() * weights).mean(), [y0, mu]))


TIMES = {
    "the end": [0.0, 2.0],
    "in between": torch.linspace(0, 2, 40, **double).tolist(),
    "backwards": [0.0, -0.05, -0.07, -0.3],
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("method", ["adaptive_heun", "dopri5", "dopri8"])
def test_the_steps_are_torchs_and_so_is_the_gradient_on_them(method: str, times: str) -> None:
    how = {"method": method, "rtol": 1e-3 if method == "adaptive_heun" else 1e-5}
    with frozen_steps() as replay:
        mine, found = gradient(TIMES[times], **how)
        replay.rewind()
        theirs, wanted = gradient(TIMES[times], **how, engine="eager")
    assert mine.engine.startswith("native"), mine.engine
    torch.testing.assert_close(mine.ys, theirs.ys, rtol=0.0, atol=1e-12 * float(theirs.ys.detach().abs().max()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-11 * float(b.abs().max()))
    free, _ = gradient(TIMES[times], **how, engine="eager")
    assert (mine.stats.steps, mine.stats.rejected) == (free.stats.steps, free.stats.rejected)


@pytest.mark.parametrize("controller", ["I", "PI", "PID", adjoint.Controller(max_step=0.03, safety=0.8)])
def test_every_controller_takes_the_steps_that_torch_takes(controller: Any) -> None:
    for dt in (None, 0.5):
        how = {"controller": controller, "dt": dt}
        mine, theirs = (gradient(TIMES["in between"], **how, engine=engine)[0] for engine in ("native", "eager"))
        assert mine.engine.startswith("native") and mine.stats.steps > 30
        assert (mine.stats.steps, mine.stats.rejected) == (theirs.stats.steps, theirs.stats.rejected)


@pytest.mark.parametrize("room", [2, 256])
def test_no_bit_depends_on_what_is_kept(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "ROOM", room)
    reference, wanted = gradient(TIMES["in between"])
    assert reference.stats.plain_runs == 0
    for how in ({"slots": 1}, {"slots": 3}, {"slots": 20}, {"slots": "all"}, {"budget": "3 KiB"}, {"budget": "64 KiB"}):
        solution, found = gradient(TIMES["in between"], **how)
        assert solution.engine.startswith("native") and torch.equal(solution.ys, reference.ys)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), how


def test_a_graph_that_is_kept_is_reversed_again_and_differentiated_again() -> None:
    found = []
    for engine in ("native", "eager"):
        y0 = torch.tensor([2.0, 0.0], **double).requires_grad_()
        mu = torch.tensor(2.0, **double).requires_grad_()
        t = torch.tensor([0.0, 0.2, 0.5], **double)
        solution = adjoint.solve(oscillator, y0, t, args=(mu,), rtol=1e-6, engine=engine)
        loss = solution.ys.square().sum()
        first = torch.autograd.grad(loss, [y0, mu], create_graph=True)
        again = torch.autograd.grad(loss, [y0, mu], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        found.append(torch.autograd.grad(sum(x.sum() for x in first), [y0, mu]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0.0)


def test_without_a_gradient_and_in_single_precision() -> None:
    values = []
    for engine in ("native", "eager"):
        y0 = torch.tensor([2.0, 0.0])
        solution = adjoint.solve(
            oscillator, y0, torch.linspace(0, 1, 5), args=(torch.tensor(2.0),), rtol=1e-4, engine=engine
        )
        assert solution.engine.startswith(engine)
        values.append(solution.ys)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"max_steps": 5}, {"throw": False}])
def test_a_solve_that_fails_fails_as_torch_has_it(how: dict[str, Any]) -> None:
    found = []
    for engine in ("native", "eager"):
        y0 = torch.ones(1, **double)
        try:
            solution = adjoint.solve(lambda t, y: y * y, y0, [0.0, 0.5, 2.0], engine=engine, **how)
        except adjoint.SolveError as error:
            found.append(str(error))
        else:
            assert "does not reach its end" in solution.engine or engine == "eager"
            found.append((solution.status, solution.ys.nan_to_num().tolist()))
    assert found[0] == found[1]


def test_what_the_compiled_control_does_not_do_is_said() -> None:
    def said(t: Tensor | None = None, y0: Tensor | None = None, **how: Any) -> str:
        t, y0 = (
            (torch.linspace(0, 1, 3, **double) if t is None else t),
            torch.ones(8, 2, **double) if y0 is None else y0,
        )
        return adjoint.solve(lambda t, y: -y, y0, t, engine="native", **how).engine

    moving = torch.linspace(0, 1, 3, **double).requires_grad_()
    assert "times that require grad" in said(moving)
    assert "a norm" in said(norm=lambda y: y.abs().max())
    assert "force_min" in said(controller=adjoint.Controller(force_min=True, min_step=0.1))
    assert "jumps" in said(jumps=(0.5,))
    assert "in lock-step" in said(batched=True)
    assert "16 numbers" in said()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stop", [2.0, -0.3, 1e-7])
@pytest.mark.parametrize("start", [2.0, 1e-9])
def test_the_first_step_is_as_long_as_torchs(start: float, stop: float, dtype: torch.dtype) -> None:
    """Also where y or its slope is next to nothing, and where the end comes first."""
    y0, mu = torch.tensor([start, 0.0], dtype=dtype), torch.tensor(8.0, dtype=dtype)
    ends = []
    for engine in ("native", "native", "eager"):
        solution = adjoint.solve(oscillator, y0, [0.0, stop], args=(mu,), method="dopri5", rtol=1e-3, engine=engine)
        assert solution.engine.startswith(engine)
        ends.append(solution.stats.program.timeline.ends(0))
    assert ends[0] == ends[1] == pytest.approx(ends[2], rel=1e-12 if dtype == torch.float64 else 1e-5, abs=0.0)
