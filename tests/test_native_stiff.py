"""Stiff methods by the native engine: linear systems, the steps that torch takes, and on the same steps the same gradient."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_slopes import slope
from torch import Tensor

import adjoint
from adjoint.engines.native import kernel, run
from adjoint.engines.native.algebra import algebra
from adjoint.engines.native.arrays import shape
from adjoint.engines.native.emit import declarations
from adjoint.frozen import frozen_steps

pytest.importorskip("llvmlite")
RANDOM, GROUP = int(os.environ.get("PROGRAMS_NATIVE_STIFF", 12)), 4
double = {"dtype": torch.float64}
METHODS = ("ros3p", "rodas4", "rodas5p")


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path_factory.getbasetemp() / "native"))
    kernel._known.clear()


# -- linear systems


ENTRY = """
define void @sweep(ptr %w) {
  call void @factor(ARRAYS)
  call void @solve(ARRAYS, ptr B, ptr X)
  call void @turn(ARRAYS, ptr U, ptr L)
  call void @solve_turned(ptr U, ptr L, ptr INVERSE, ptr ORDER, ptr C, ptr Z)
  ret void
}
"""


def solver(kind: str, size: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(A, b, c) to (A^-1 b, A^-T c), compiled."""
    helpers: set[tuple[str, str]] = set()
    names = "MATRIX LOWER INVERSE ORDER B X U L C Z".split()
    arrays = ", ".join(f"ptr {name}" for name in names[:4])
    entry, loads = ENTRY.replace("ARRAYS", arrays), []
    for i, name in enumerate(names):
        loads += [f"  %at{i} = getelementptr i64, ptr %w, i64 {i}", f"  %x{i} = load ptr, ptr %at{i}"]
        entry = entry.replace(f"ptr {name}", f"ptr %x{i}")
    entry = entry.replace("{\n", "{\n" + "\n".join(loads) + "\n", 1)
    compiled = run.Compiled("\n\n".join((algebra(kind, size, helpers), entry, declarations(helpers))))
    dtype, (_, stride) = np.dtype(np.float64 if kind == "f64" else np.float32), shape(kind, size)

    def aligned(rows: int, type: np.dtype[Any]) -> np.ndarray:
        raw = np.zeros(rows * stride * type.itemsize + 64, dtype=np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + rows * stride * type.itemsize].view(type).reshape(rows, stride)

    def solve(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = {name: aligned(size if name in ("MATRIX", "LOWER", "U", "L") else 1, dtype) for name in names}
        found["ORDER"] = aligned(1, np.dtype(np.int64))
        found["MATRIX"][:, :size], found["B"][0, :size], found["C"][0, :size] = a.T, b, c
        words = np.array([found[name].ctypes.data for name in names])
        compiled.sweep(words.ctypes.data)
        return found["X"][0, :size], found["Z"][0, :size]

    assert ctypes.sizeof(ctypes.c_void_p) == 8
    return solve


@pytest.mark.parametrize(
    ("kind", "size"), [*(("f64", n) for n in (1, 2, 3, 5, 8, 9, 20, 33, 70)), ("f32", 7), ("f32", 70)]
)
def test_systems_and_transposed_ones_are_solved_to_rounding(kind: str, size: int) -> None:
    random, solve = np.random.default_rng(size), solver(kind, size)
    eps = np.finfo(np.float64 if kind == "f64" else np.float32).eps
    for trial in range(8):
        a = random.standard_normal((size, size))
        if trial % 2:
            a = a * 10.0 ** random.uniform(-6, 6, (size, 1))  # rows of all sizes, so that pivots matter
        if trial % 4 == 2:
            a = np.where(random.random((size, size)) < 0.5, 0.0, a) + np.roll(np.eye(size), 1, 0)
        x, z = random.standard_normal((2, size))
        a = a.astype(np.float32 if kind == "f32" else np.float64)
        found = solve(a, a @ x, a.T @ z)
        growth = np.linalg.cond(a.astype(np.float64))
        for mine, true in zip(found, (x, z), strict=True):
            assert np.abs(mine - true).max() <= 40 * size * eps * growth * np.abs(true).max()


def test_a_pivot_is_the_largest_number_left_in_its_column() -> None:
    """Without pivots (1e-20, 1; 1, 1) has no right digit."""
    found, turned = solver("f64", 2)(np.array([[1e-20, 1.0], [1.0, 1.0]]), np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    assert found.tolist() == turned.tolist() == [1.0, 1.0]
    found, _ = solver("f64", 2)(np.zeros((2, 2)), np.ones(2), np.ones(2))
    assert not np.isfinite(found).any()


# -- Rosenbrock methods

Slope = Callable[..., Tensor]


def oscillator(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y.unbind()
    return torch.stack((v, mu * (1 - x * x) * v - x + torch.sin(3 * t)))


def gradient(t: list[float], f: Slope = oscillator, **how: Any) -> tuple[Any, list[Tensor]]:
    y0 = torch.tensor([2.0, 0.1], **double).requires_grad_()
    mu = torch.tensor(30.0, **double).requires_grad_()
    wishes = {"method": "rodas5p", "rtol": 1e-4, "atol": 1e-6, "engine": "native", **how}
    solution = adjoint.solve(f, y0, torch.tensor(t, **double), args=(mu,), **wishes)
    weights = torch.linspace(0.5, 1.5, solution.ys.numel(), **double).reshape(solution.ys.shape)
    return solution, list(torch.autograd.grad((solution.ys.square() * weights).mean(), [y0, mu]))


TIMES = {
    "the end": [0.0, 1.0],
    "in between": torch.linspace(0, 1, 15, **double).tolist(),
    "backwards": [0.0, -0.02, -0.05],
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_torchs_and_so_is_the_gradient_on_them(method: str, times: str) -> None:
    how = {"method": method, "rtol": 1e-2 if method == "ros3p" else 1e-4}
    with frozen_steps() as replay:
        mine, found = gradient(TIMES[times], **how)
        replay.rewind()
        theirs, wanted = gradient(TIMES[times], **how, engine="eager")
    assert mine.engine.startswith("native") and theirs.engine.startswith("eager"), mine.engine
    torch.testing.assert_close(mine.ys, theirs.ys, rtol=0.0, atol=1e-12 * float(theirs.ys.detach().abs().max()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-11 * float(b.abs().max()))
    with torch.no_grad():
        free = adjoint.solve(
            oscillator, mine.ys[0].detach(), mine.ts, args=(torch.tensor(30.0, **double),), **{"atol": 1e-6, **how}
        )
    assert (mine.stats.steps, mine.stats.rejected) == (free.stats.steps, free.stats.rejected)


def test_no_bit_depends_on_what_is_kept() -> None:
    reference, wanted = gradient(TIMES["in between"])
    assert reference.stats.plain_runs == 0
    for how in ({"slots": 1}, {"slots": 3}, {"slots": "all"}, {"budget": "3 KiB"}):
        solution, found = gradient(TIMES["in between"], **how)
        assert solution.engine.startswith("native") and torch.equal(solution.ys, reference.ys)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), how


def test_a_solve_that_is_known_gives_the_same_and_counts_anew() -> None:
    t = [0.0, 1.0]
    first, wanted = gradient(t)
    matrices = first.stats.jacobians
    assert matrices == 2 * first.stats.steps + first.stats.rejected == first.stats.factorisations
    for _ in range(2):
        again, found = gradient(t)
        assert "known already" in again.engine and again.stats.jacobians == matrices
        assert torch.equal(first.ys, again.ys) and all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert first.stats.jacobians == matrices
    other, moved = gradient(t, method="rodas4")
    assert "compiled" in other.engine or "disk" in other.engine
    assert not torch.equal(other.ys, first.ys) and not torch.equal(moved[1], wanted[1])


def random_gradient(seeds: range, method: str, engine: str, nudge: float = 0.0) -> tuple[str, list[Tensor | None]]:
    """Values and gradients of many random right-hand sides, side by side in one state."""
    parts = [slope(seed) for seed in seeds]
    y0 = tuple((y * (1 + nudge)).detach().requires_grad_() for _, y, _ in parts)
    held = [x for _, _, xs in parts for x in xs]

    def f(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part[0](t, x) for part, x in zip(parts, y, strict=True))

    how = {"rtol": 1.0, "atol": 1.0, "dt": 0.1, "slots": 2}
    solution = adjoint.solve(f, y0, [0.0, 0.1], method=method, engine=engine, **how)  # type: ignore[arg-type]
    torch.manual_seed(1)
    loss = sum((x * torch.randn_like(x)).sum() for x in solution.ys)
    return solution.engine, [*solution.ys, *torch.autograd.grad(loss, [*y0, *held], allow_unused=True)]


@pytest.mark.parametrize("first", range(0, RANDOM, GROUP))
def test_random_right_hand_sides_and_their_gradients_agree_with_torch(first: int) -> None:
    """To what one unit in the last place of y_0 does, times ten: everything here is of order one."""
    seeds, method = range(first, min(first + GROUP, RANDOM)), METHODS[first // GROUP % len(METHODS)]
    with frozen_steps() as replay:
        said, mine = random_gradient(seeds, method, "native")
        assert said.startswith("native"), said
        replay.rewind()
        _, theirs = random_gradient(seeds, method, "eager")
        replay.rewind()
        _, near = random_gradient(seeds, method, "eager", torch.finfo(torch.float64).eps)
    for a, b, c in zip(mine, theirs, near, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None and c is not None:
            allowed = 10 * float((b - c).detach().abs().max()) + 3e-13 * float(b.detach().abs().max()) + 3e-15
            assert float((a - b).detach().abs().max()) <= allowed


def test_single_precision_costs_and_trees() -> None:
    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": y["v"].expand(2, 3) * scale, "v": -20 * torch.sin(y["x"]).sum(0, keepdim=True)}

    scale, found = torch.tensor(1.5).requires_grad_(), []
    with frozen_steps() as replay:
        for engine in ("native", "eager"):
            y0 = {"x": torch.ones(2, 3).requires_grad_(), "v": torch.zeros(1, 3)}
            how: dict[str, Any] = {"method": "rodas4", "rtol": 1e-2, "atol": 1e-2, "engine": engine}
            solution = adjoint.solve(f, y0, [0.0, 0.1, 0.2], cost=lambda t, y: y["x"].square().sum(), **how)
            assert solution.engine.startswith(engine), solution.engine
            loss = solution.ys["x"].square().sum() + solution.costs[-1]
            found.append([*solution.ys.values(), *torch.autograd.grad(loss, [y0["x"], scale])])
            replay.rewind()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_second_derivatives_are_torchs() -> None:
    found = []
    with frozen_steps() as replay:
        for engine in ("native", "eager"):
            mu = torch.tensor(5.0, **double).requires_grad_()
            y0 = torch.tensor([2.0, 0.1], **double)
            how: dict[str, Any] = {"method": "ros3p", "rtol": 1e-2, "atol": 1e-2, "engine": engine}
            solution = adjoint.solve(oscillator, y0, [0.0, 0.3], args=(mu,), **how)
            (first,) = torch.autograd.grad(solution.ys[-1].square().sum(), mu, create_graph=True)
            found.append([first, *torch.autograd.grad(first, mu)])
            replay.rewind()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0.0)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0].clamp(-0.1, 0.1)


def said(f: Callable[..., Any], y0: Tensor | None = None, **how: Any) -> str:
    y0 = torch.tensor([0.5, 0.7], **double) if y0 is None else y0
    wishes: dict[str, Any] = {"method": "rodas4", "engine": "native", "rtol": 1e-2, "atol": 1e-2, **how}
    return adjoint.solve(f, y0, [0.0, 0.1], **wishes).engine


def test_what_is_left_to_torch_is_said() -> None:
    assert "not linear" in said(lambda t, y: -Clipped.apply(y))
    assert "a mass matrix" in said(lambda t, y: -y, method=adjoint.Implicit("rodas4", mass=torch.eye(2, **double)))
    own = adjoint.Implicit("rodas4", linear=adjoint.Dense(members=True))
    assert "linear=Dense(members=True)" in said(lambda t, y: -y, torch.ones(2, 2, **double), method=own)
    assert "300 equations" in said(lambda t, y: -y, torch.ones(300, **double))
    assert "_local_scalar_dense" in said(lambda t, y: -y * float(y[0]))


def test_a_solve_that_fails_fails_as_torch_has_it() -> None:
    messages = []
    for engine in ("native", "eager"):
        with pytest.raises(adjoint.SolveError) as caught:
            said(lambda t, y: 100 * y * y, engine=engine, max_steps=200)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
