"""Functions of whole vectors, number by number against long double precision."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import adjoint
from adjoint.engines.native import run
from adjoint.engines.native.emit import SCALARS, declarations
from adjoint.engines.native.mathematics import VECTORS

pytest.importorskip("llvmlite")

ENDS = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-300, 5e-324, 1e308, 709.78, 709.79, -745.13, -745.2]
ENDS += [
    88.7,
    88.8,
    -103.9,
    -104.2,
    1e5,
    1e22,
    math.pi,
    math.pi / 2,
    11 * math.pi,
    0.5,
    2.0,
    1e-17,
    -1e-17,
    22.0,
    -0.9999,
]


def numbers(op: str) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    near = [
        3 * random.standard_normal(3000),
        1e-3 * random.standard_normal(1000),
        1 + 0.1 * random.standard_normal(1000),
    ]
    wide = [np.linspace(-750, 712, 3001), 10.0 ** random.uniform(-310, 308, 2000)]
    x = np.concatenate([ENDS, *near, *wide, np.arange(-500, 500) * math.pi / 2])
    if op != "pow":
        return [x]
    bases = np.concatenate([np.abs(x), 10.0 ** random.uniform(-3, 3, 4000), np.repeat(ENDS, len(ENDS))])
    powers = np.concatenate(
        [3 * random.standard_normal(len(x)), random.uniform(-90, 90, 4000), np.tile(ENDS, len(ENDS))]
    )
    return [bases, powers]


def applied(op: str, kind: str, arrays: list[np.ndarray]) -> np.ndarray:
    """The compiled function of every number."""
    width = 64 // arrays[0].itemsize
    vector, name, count = f"<{width} x {SCALARS[kind]}>", f"lanes.{op}.{kind}", len(arrays)
    lines = ["define void @sweep(ptr %a) {\n  %t = load ptr, ptr %a"]
    for i in range(count):
        lines += [f"  %p{i} = getelementptr ptr, ptr %a, i64 {i + 1}", f"  %s{i} = load ptr, ptr %p{i}"]
        lines.append(f"  %x{i} = load {vector}, ptr %s{i}, align 4")
    given = ", ".join(f"{vector} %x{i}" for i in range(count))
    lines += [f"  %y = call {vector} @{name}({given})", f"  store {vector} %y, ptr %t, align 4", "  ret void", "}"]
    compiled = run.Compiled("\n".join([*lines, declarations({(name, f"{kind} {width} {count}")})]))
    found = np.empty_like(arrays[0])
    for i in range(0, len(found), width):
        parts = [np.zeros(width, found.dtype) for _ in range(count + 1)]
        for part, x in zip(parts[1:], arrays, strict=True):
            part[: len(x[i : i + width])] = x[i : i + width]
        compiled.sweep(np.array([part.ctypes.data for part in parts]).ctypes.data)
        found[i : i + width] = parts[0][: len(found[i : i + width])]
    return found


@pytest.mark.parametrize("kind", ["f64", "f32"])
@pytest.mark.parametrize("op", VECTORS)
def test_functions_of_vectors_are_right_to_the_last_places(
    op: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To two units; where the result is subnormal, to its last place; infinities, zeros and NaN as the C library has it."""
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path))
    dtype = np.float64 if kind == "f64" else np.float32
    with np.errstate(all="ignore"):
        arrays = [x.astype(dtype) for x in numbers(op)]
        found = applied(op, kind, arrays)
        function = {"pow": np.power}.get(op) or getattr(np, op)
        wanted = function(*(x.astype(np.longdouble) for x in arrays))
        rounded = wanted.astype(dtype)
        plain = np.isfinite(rounded) & (np.abs(rounded) > np.finfo(dtype).tiny)
        off = np.abs(found[plain].astype(np.longdouble) - wanted[plain]) / np.abs(np.spacing(rounded[plain]))
        worst = int(np.argmax(off))
        assert off.max() < (1.0 if kind == "f32" else 2.0), [x[plain][worst] for x in arrays]
        mine, theirs = found[~plain], rounded[~plain]
        close = np.abs(mine - theirs) <= np.finfo(dtype).smallest_subnormal
        alike = (mine == theirs) & (np.signbit(mine) == np.signbit(theirs)) | (np.isnan(mine) & np.isnan(theirs))
        bad = ~(alike | (close & (theirs != 0)) | (close & (mine != 0)))
        assert not bad.any(), [(x[~plain][bad][:5], mine[bad][:5], theirs[bad][:5]) for x in arrays]


def test_what_a_lane_gives_does_not_depend_on_the_others() -> None:
    """One odd number among ordinary ones changes nothing but its own lane."""
    x = np.linspace(-3, 3, 8)
    odd = x.copy()
    odd[3] = 1e9
    for op in ("sin", "cos", "pow"):
        arrays = [[z, np.full(8, 1.7)] if op == "pow" else [z] for z in (np.abs(x), np.abs(odd))]
        one, other = (applied(op, "f64", given) for given in arrays)
        assert (np.delete(one, 3) == np.delete(other, 3)).all() and one[3] != other[3]


def test_a_batch_with_all_of_them_agrees_with_torch() -> None:
    random = torch.Generator().manual_seed(0)
    y0 = torch.rand(20, 2, generator=random, dtype=torch.float64).requires_grad_()
    p = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = torch.sin(3 * y) - torch.cos(p * y) + torch.tanh(y) * torch.log(1 + y * y) + (1 + y * y) ** p
        return -y + 0.1 * (a + torch.log1p(y * y) + torch.log2(2 + y * y) - torch.log10(2 + y * y) + torch.exp(-y))

    found = []
    for engine in ("native", "eager"):
        solution = adjoint.solve(f, y0, [0.0, 1.0], method="rk4", dt=0.1, slots=3, engine=engine)
        found.append(torch.autograd.grad(solution.ys.square().sum(), (y0, p)))
        assert solution.engine.startswith(engine)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
