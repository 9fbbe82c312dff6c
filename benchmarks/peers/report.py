"""The tables and the picture of the peers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.measure import Section
from benchmarks.peers.measure import CONTENDERS, ROOM, Measured, measured
from benchmarks.peers.problems import Problem, problems

PACKAGES = ("torch", "torchdiffeq", "torchode", "jax", "diffrax", "equinox")
REPEATS = 5
TEXT = """\
One gradient of |y(T)|^2 with respect to the first state and all parameters: float64, the classic Runge-Kutta method
with fixed steps (torchdiffeq's rk4 is the 3/8 rule, of as many stages), one core, one thread. Time: the processor's,
the median of at least {repeats} gradients, taken in turn with the others. Memory: the high-water mark of a fresh process above
its start, which has warmed up on four steps; freed blocks of a page or more go back at once. Off by: the norm of the
difference from the gradient of the torch loop, relative to its norm. First: the first gradient, compilation included.
Slots are the fewest in which no step runs plainly more than twice; diffrax gets as many checkpoints. jax and diffrax
run compiled programs, the others torch operations, one at a time. Whoever needs more than {room} GiB is stopped."""


def run(device: str) -> Section:
    """A table for each problem, and a picture of all; always on the CPU."""
    return section({problem.name: measured(problem, REPEATS) for problem in problems().values()})


def section(found: dict[str, list[Measured]]) -> Section:
    every = problems()
    repeats = min(len(row.seconds) for rows in found.values() for row in rows if row.why_not is None)
    words = " ".join(TEXT.format(repeats=repeats, room=ROOM // 2**30).split())
    tables = tuple(table(every[name], rows) for name, rows in found.items())
    return Section("Beside the peers", f"{words} {versions()}", parts=tables, pictures=(("peers.png", picture(found)),))


def versions() -> str:
    named = []
    for package in PACKAGES:
        try:
            named.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            named.append(f"{package} not installed")
    return ", ".join(named) + ". To install them: `pip install -r benchmarks/peers.txt`."


def table(problem: Problem, rows: list[Measured]) -> Section:
    loop = rows[0]
    cells = []
    for row in rows:
        label = row.contender.named(problem)
        if row.why_not is not None:
            cells.append((label, row.why_not, *[""] * 5))
            continue
        assert row.gradient is not None
        cells.append(
            (
                label,
                milliseconds(row.median),
                against(row.seconds, loop.seconds),
                f"{row.bytes / 1e6:.1f} MB" if row.bytes > 1e5 else "< 0.1 MB",
                against([row.bytes], [loop.bytes]),
                off_by(row.gradient, loop.gradient),
                f"{row.first:.1f} s",
            )
        )
    header = ("", "time", "of the loop's", "memory", "of the loop's", "off by", "first")
    state = f"{problem.y0.nbytes / 1e6:.2g} MB" if problem.y0.nbytes > 1e5 else f"{problem.y0.nbytes} bytes"
    return Section(problem.name, f"{problem.steps} steps, a state of {state}.", header, tuple(cells))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds > 0.01 else f"{1e3 * seconds:.2g} ms"


def against(mine: Sequence[float], loops: Sequence[float]) -> str:
    """The median of the ratios of the same round; empty if the loop was not measured."""
    if not any(loops):
        return ""
    ratio = statistics.median(a / b for a, b in zip(mine, loops, strict=True))
    return f"{ratio:.2f}" if ratio > 0.05 else f"{ratio:.1g}"


def off_by(mine: np.ndarray, loops: np.ndarray | None) -> str:
    if loops is None:
        return ""
    off = float(np.linalg.norm(mine - loops) / np.linalg.norm(loops))
    return f"{off:.0e}".replace("e-0", "e-") if off else "0"


LOOKS = {
    ("in_torch", "loop"): ("0.3", "s"),
    ("in_torch", "all_tapes"): ("#d55e00", "o"),
    ("in_torch", "in_slots"): ("#d55e00", "*"),
    ("in_torch", "checkpointed"): ("0.3", "D"),
    ("in_torchdiffeq", "graph"): ("#0072b2", "o"),
    ("in_torchdiffeq", "backsolve"): ("#0072b2", "v"),
    ("in_torchode", "graph"): ("#56b4e9", "o"),
    ("in_jax", "scan"): ("#009e73", "o"),
    ("in_jax", "remat"): ("#009e73", "D"),
    ("in_diffrax", "checkpointed"): ("#cc79a7", "*"),
}


def picture(found: dict[str, list[Measured]]) -> Figure:
    """Memory against time, a panel for each problem."""
    figure = Figure(figsize=(13.5, 8.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (name, rows) in zip(panels, found.items(), strict=False):
        for row in rows:
            if row.why_not is None:
                color, marker = LOOKS[row.contender.module, row.contender.function]
                size = 15 if marker == "*" else 8
                axes.plot(
                    1e3 * row.median, max(row.bytes, 4096) / 1e6, marker, color=color, markersize=size, alpha=0.85
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.12)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set_title(name, loc="left", fontsize=11)
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("peak memory (MB)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for contender in CONTENDERS:
        color, marker = LOOKS[contender.module, contender.function]
        label = contender.label.replace("*", "").format(slots="few", segments="equal")
        panels[0].plot([], [], marker, color=color, markersize=10, label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
