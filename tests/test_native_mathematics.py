"""Functions of whole vectors, number by number against long double precision."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from adjoint.engines.native import run
from adjoint.engines.native.emit import SCALARS, declarations
from adjoint.engines.native.mathematics import exponential, needed

pytest.importorskip("llvmlite")


def applied(kind: str, x: np.ndarray) -> np.ndarray:
    """The compiled exponential of every number."""
    width = 64 // x.itemsize
    vector = f"<{width} x {SCALARS[kind]}>"
    loop = f"""
define void @sweep(ptr %a) {{
  %source = load ptr, ptr %a
  %place = getelementptr ptr, ptr %a, i64 1
  %target = load ptr, ptr %place
  %x = load {vector}, ptr %source, align 4
  %y = call {vector} @e({vector} %x)
  store {vector} %y, ptr %target, align 4
  ret void
}}
"""
    compiled = run.Compiled("\n".join([exponential("e", kind, width), loop, declarations(needed(width))]))
    found = np.empty_like(x)
    for i in range(0, len(x), width):
        source, target = (np.zeros(width, x.dtype) for _ in range(2))
        part = x[i : i + width]
        source[: len(part)] = part
        compiled.sweep(np.array([source.ctypes.data, target.ctypes.data]).ctypes.data)
        found[i : i + width] = target[: len(part)]
    return found


@pytest.mark.parametrize("kind", ["f64", "f32"])
def test_exp_is_right_to_one_unit_in_the_last_place(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path))
    dtype = np.float64 if kind == "f64" else np.float32
    ends = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-300,
        709.78,
        709.79,
        -745.13,
        -745.2,
        88.7,
        88.8,
        -103.9,
        -104.2,
    ]
    random = np.random.default_rng(0)
    x = np.concatenate([ends, np.linspace(-750, 712, 3001), 3 * random.standard_normal(3000)]).astype(dtype)
    found = applied(kind, x)
    with np.errstate(over="ignore", under="ignore"):
        wanted = np.exp(x.astype(np.longdouble))
        rounded = wanted.astype(dtype)
    plain = np.isfinite(rounded) & (rounded > np.finfo(dtype).tiny)
    off = np.abs(found[plain].astype(np.longdouble) - wanted[plain]) / np.spacing(rounded[plain])
    assert off.max() < 1.5
    subnormal = np.finfo(dtype).smallest_subnormal
    with np.errstate(invalid="ignore"):
        rest = np.abs(found[~plain].astype(np.longdouble) - rounded[~plain]) <= subnormal
    assert (rest | (found[~plain] == rounded[~plain]) | (np.isnan(found[~plain]) & np.isnan(rounded[~plain]))).all()
