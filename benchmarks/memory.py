"""Predicted bytes against the high-water mark of a child process above its warmed-up start."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import adjoint
from benchmarks.measure import Section

CASES: list[tuple[int, str, int | str, int]] = [
    (131_072, "rk4", 10, 40),
    (131_072, "rk4", 30, 40),
    (131_072, "dopri5", 10, 20),
    (1_000_000, "euler", 3, 10),
    (500_000, "rk4", "all", 6),
]

SETTINGS: dict[str, dict[str, str]] = {
    "given back at once": {"MALLOC_MMAP_THRESHOLD_": "131072"},
    "no small caches": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"},
    "as it comes": {},
}
"""How the C library may be asked to handle freed blocks."""


def solve(y0: Tensor, k: Tensor, method: str, slots: int | str, steps: int) -> adjoint.Solution:
    """A ring of pendulums coupled by springs of stiffness k, and the gradient of its last state."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return k * (torch.roll(y, 1) - 2 * y + torch.roll(y, -1)) - 0.1 * torch.sin(y)

    solution = adjoint.solve(f, y0, [0.0, 0.01 * steps], method=method, dt=0.01, slots=slots)
    torch.autograd.grad((solution.ys[-1] ** 2).sum(), (y0, k))
    return solution


def make(size: int, device: str) -> tuple[Tensor, Tensor]:
    k = torch.full((size,), 0.3, dtype=torch.float64, device=device, requires_grad=True)
    y0 = torch.linspace(0, 1, size, dtype=torch.float64, device=device).requires_grad_()
    k.sum().item()
    return y0, k


def child(size: int, method: str, slots: int | str, steps: int, device: str) -> None:
    """In a process of its own: warm up on a small problem, then weigh one gradient."""
    torch.set_num_threads(1)
    inputs = make(size, device)
    solve(*make(1000, device), method, slots, 3)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plan = solve(*inputs, method, slots, steps).plan
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        plan = solve(*inputs, method, slots, steps).plan
        peak = _status("VmHWM") - before
    assert plan is not None
    start = time.process_time()
    solve(*inputs, method, slots, steps)
    print(json.dumps({"predicted": plan.bytes, "measured": peak, "seconds": time.process_time() - start}))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def weigh(case: tuple[int, str, int | str, int], device: str, environment: dict[str, str]) -> dict[str, float]:
    """Bytes predicted and measured, and the processor's seconds of a second gradient."""
    result = subprocess.run(
        [sys.executable, "-c", f"from benchmarks.memory import child; child(*{case!r}, {device!r})"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(result.stdout)
    return found


def run(device: str) -> Section:
    rows = []
    for case in CASES:
        size, method, slots, steps = case
        found = [weigh(case, device, environment) for environment in SETTINGS.values()]
        predicted = found[0]["predicted"]
        rows.append(
            (
                f"{size * 8 / 1e6:.1f} MB",
                f"{method}, {steps} steps, slots={slots}",
                f"{predicted / 1e6:.1f} MB",
                *(f"**{x['measured'] / x['predicted']:.2f}** ({x['seconds']:.2f} s)" for x in found),
            )
        )
    return Section(
        "Memory: predicted and measured",
        "The high-water mark of a child process above its warmed-up start (inputs held), as a ratio to "
        "`solution.plan.bytes`, and the processor's seconds of one gradient. On the CPU with three settings of glibc's "
        "allocator: freed blocks given back at once (`MALLOC_MMAP_THRESHOLD_=131072`), no caches of small blocks "
        "(`GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0`), and as it comes. What goes beyond 1 is "
        "the allocator's fragmentation, not tensors that are held.",
        ("state", "gradient", "predicted", *SETTINGS),
        tuple(rows),
    )
