"""Time and memory of one gradient of a recurrence of 64 states, for sequences up to a million rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure

import revolve
from benchmarks.measure import Section
from benchmarks.peers.measure import QUIET
from benchmarks.sequences import in_torch
from benchmarks.sequences.problem import STATES, segment

ROOT = Path(__file__).parents[2]
LENGTHS = (10_000, 100_000, 1_000_000)
ROOM = 8 * 2**30
"""Bytes that a process may hold."""
PATIENCE = 60.0
"""Seconds of the processor that it may take, its start and the trial on a short sequence included."""

CONTENDERS = (
    ("**adjoint**, in parallel inside of chunks", "in_torch", "parallel"),
    ("**adjoint**, the same, every chunk's start kept", "in_torch", "every_chunk"),
    ("**adjoint**, row by row inside of chunks", "in_torch", "sequential"),
    ("**adjoint**, any step, row by row", "in_torch", "any_step"),
    ("**adjoint**, in parallel, all tapes", "in_torch", "all_tapes"),
    ("torch loop", "in_torch", "loop"),
    ("torch.utils.checkpoint, two levels", "in_torch", "checkpointed"),
    ("jax, scan", "in_jax", "scan"),
    ("jax, scan with remat", "in_jax", "remat"),
    ("equinox, checkpointed scan", "in_jax", "checkpointed"),
    ("mambapy, pscan", "in_mambapy", "parallel"),
)
"""How it is called in the table, module, function."""


@dataclass(frozen=True)
class Measured:
    """What one gradient took, or why that is not known."""

    label: str
    bytes: int = 0
    seconds: float = 0.0
    runs: int = 0
    gradient: np.ndarray | None = None
    why_not: str | None = None


def measured(length: int, label: str, module: str, function: str, patience: float = PATIENCE) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradient.npy"
        words = [sys.executable, "-m", "benchmarks.sequences.child", str(length), module, function, str(file)]
        child = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env={**os.environ, **QUIET}
        )
        while child.poll() is None:
            why_not, (held, seconds) = None, _taken(child.pid)
            if seconds > patience:
                why_not = f"takes longer than {patience:.0f} s"
            if held > ROOM:
                why_not = f"needs more than {revolve.format_bytes(ROOM)}"
            if why_not is not None:
                child.kill()
                child.wait()
                return Measured(label, why_not=why_not)
            time.sleep(0.05)
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
        if not lines:
            return Measured(label, why_not="failed")
        facts = json.loads(lines[-1])
        if "error" in facts:
            return Measured(label, why_not=facts["error"])
        return Measured(label, facts["bytes"], facts["seconds"], facts["runs"], np.load(file))


def _taken(process: int) -> tuple[int, float]:
    """Bytes held now, and seconds of the processor so far."""
    try:
        known = psutil.Process(process)
        times = known.cpu_times()
        return int(known.memory_info().rss), times.user + times.system
    except psutil.NoSuchProcess:
        return 0, 0.0


def off_by(found: np.ndarray, expected: np.ndarray, length: int) -> float:
    """The largest difference of a gradient, relative to the largest entry of the same tensor."""
    edges = [length + k * STATES for k in range(4)]
    pairs = zip(np.split(found, edges), np.split(expected, edges), strict=True)
    return float(max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs))


def table(length: int, rows: Sequence[Measured]) -> Section:
    truth = next((row.gradient for row in rows if row.gradient is not None), None)
    cells = []
    for row in rows:
        if row.gradient is None or truth is None:
            cells.append((row.label, row.why_not or "", "", ""))
            continue
        off = off_by(row.gradient, truth, length)
        weight = f"{row.bytes / 1e6:.1f} MB" if row.bytes < 1e9 else f"{row.bytes / 1e9:.2f} GB"
        cells.append((row.label, f"{row.seconds:.2f} s", weight, f"{off:.0e}" if off else "0"))
    return Section(f"{length:,} rows", _counted(length, rows), ("", "time", "memory", "differs by"), tuple(cells))


def _counted(length: int, rows: Sequence[Measured]) -> str:
    """Chunks run, beside those that the plan says; beside them step 0 is run twice on trial."""
    size, slots = segment(length), in_torch.kept(length)
    report = revolve.plan(steps=length // size, slots=slots).report
    found = {row.runs for row in rows[:1] if row.gradient is not None}
    counted = f"; counted: {found.pop() - 2}" if found else ""
    return (
        f"Chunks of {size} rows; {slots} slots. Chunks run by the plan: {report.plain_runs + report.recorded_runs}{counted}, "
        f"and 2 on trial."
    )


def picture(found: dict[int, list[Measured]]) -> Figure:
    """Memory against length."""
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(row.label for rows in found.values() for row in rows):
        points = [(n, row.bytes / 1e6) for n, rows in found.items() for row in rows if row.label == label and row.bytes]
        if points:
            ours = "adjoint" in label
            axes.loglog(*zip(*points, strict=True), "o-" if ours else "s--", label=label.replace("*", ""))
    axes.loglog(list(found), [16 * n / 1e6 for n in found], color="0.6", label="y and the gradient in u")
    axes.set_xlabel("rows")
    axes.set_ylabel("MB of one gradient, with outputs and gradients")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def run(device: str) -> Section:
    found = {n: [measured(n, *contender) for contender in CONTENDERS] for n in LENGTHS}
    return Section(
        "Long sequences",
        "The gradient of a gated recurrence of 64 states in double precision, a_k = sigmoid(w u_k + c), "
        "h_k = a_k h_{k-1} + (1 - a_k) v u_k, y_k = r h_k, with respect to u, w, c, v and r, on one core, once, each in a "
        "process of its own that has warmed up on 1024 rows and, for jax, compiled. Memory: how far its high-water mark "
        "rises above what it holds with the inputs, so that it includes the outputs and all gradients (y and "
        "the gradient in u alone are 16 MB for a million rows). Which chunk is done in parallel is measured by "
        "each process anew, hence differences of rounding. Nobody may take more than "
        f"{revolve.format_bytes(ROOM)} or {PATIENCE:.0f} s.",
        parts=tuple(table(n, rows) for n, rows in found.items()),
        pictures=(("sequences.png", picture(found)),),
    )
