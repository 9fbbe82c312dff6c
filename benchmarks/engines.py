"""The native engine beside compiled peers and torch: small systems, one trajectory and many, fixed steps and controlled."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.measure import Section
from benchmarks.peers.in_torch import engine
from benchmarks.peers.measure import Child, Contender, Measured, measured
from benchmarks.peers.problems import Problem, small_problems
from benchmarks.peers.report import LOOKS, off_by, versions

REPEATS, SLOW_REPEATS = 5, 2
TITLE = "The native engine beside compiled peers"
TEXT = """\
One gradient of |y(T)|^2 with respect to the first state and all parameters, the classic Runge-Kutta method with fixed
steps but for the dopri5 row (tolerances 1e-8), float64 unless said, one core, one thread, each program in a process of
its own. Time: the processor's, the median of at least {repeats} rounds in turn ({slow} for torch loops), of ten runs in
a row where one takes less than 20 ms. Memory: the high-water mark of a fresh process above its start, which has warmed
up on four steps. Ours is a whole call of `solve(..., engine="native")` with its backward; a dense network it leaves to
torch. "4 steps" is the same call with only four: what reading the call, torch's graph and the loss cost; what is left
of ours are the two compiled calls. Where one trajectory misses what was aimed at, these two parts say why, and how far
it could still get. diffrax gets as many checkpoints as ours slots (adaptive: its default), jax is the faster of a scan
and a scan with nested rematerialisation; both are compiled programs with nothing around them. "times" is how many times
ours is faster, and in brackets what was aimed at. Off by: the difference from the gradient of the first of diffrax,
torch loop and torchdiffeq that there is (controlled steps of others are other steps). First: our first gradient in a
process where torch is warm, tracing and compiling included; then the same in another process, which finds the machine
code on disk and has to follow f again."""

OURS = Contender("adjoint", "in_torch", "engine")
QUICK = (
    OURS,
    Contender("diffrax", "in_diffrax", "checkpointed"),
    Contender("jax, scan", "in_jax", "scan"),
    Contender("jax, scan with remat", "in_jax", "remat"),
)
SLOW = (
    Contender("torch loop", "in_torch", "loop"),
    Contender("torchdiffeq", "in_torchdiffeq", "graph"),
    Contender("torchode", "in_torchode", "graph"),
)
AIMS: dict[str, tuple[float | None, float | None]] = {
    "Lotka-Volterra, one": (100, 7),
    "Lotka-Volterra, 1000": (8, 3),
    "Hodgkin-Huxley, one": (12, 5),
    "Hodgkin-Huxley, 1000": (5, 3),
    "Lorenz-96 (40), one": (15, 5),
    "Lorenz-96 (40), 1000": (10, 8),
    "Lotka-Volterra, dopri5": (15, None),
    "MLP 64, batch 64, float32": (1.0, None),
    "MLP 64, batch 64": (0.9, None),
}
"""So many times faster than diffrax and than jax."""


@dataclass(frozen=True)
class Row:
    problem: Problem
    found: dict[str, Measured]
    """By contender."""
    first: float
    cached: float
    """Seconds of our first gradient, with an empty cache and with the program in it."""
    around: float
    """And of one of four steps."""


def row(problem: Problem) -> Row:
    """Everyone on one problem."""
    with tempfile.TemporaryDirectory() as empty:
        before = os.environ.get("ADJOINT_CACHE")
        os.environ["ADJOINT_CACHE"] = empty
        try:
            first = _first(problem)
            found = [*measured(problem, REPEATS, QUICK), *measured(problem, SLOW_REPEATS, SLOW)]
        finally:
            os.environ.pop("ADJOINT_CACHE")
            os.environ.update({} if before is None else {"ADJOINT_CACHE": before})
    by_name = {m.contender.label: m for m in found}
    return Row(problem, by_name, first, by_name["adjoint"].first, around(problem))


def around(problem: Problem) -> float:
    """What a call costs beside its steps, in this process."""
    run = engine(problem.short())
    run()
    seconds = []
    for _ in range(100):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _first(problem: Problem) -> float:
    with Child("time", problem, OURS, core=max(os.sched_getaffinity(0))) as child:
        return float(child.answer()["first"])


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    aims, found = AIMS[row.problem.name], row.found
    ours = found["adjoint"]
    assert ours.gradient is not None, ours.why_not
    scans = [m for m in (found["jax, scan"], found["jax, scan with remat"]) if m.why_not is None]
    made = [row.problem.name, f"{row.problem.steps}" if row.problem.rtol is None else "", _cell(ours, bold=True)]
    made.append(f"{1e3 * row.around:.2g} ms" if row.problem.rtol is None else "")
    made += _against(ours, found["diffrax"], aims[0])
    made += _against(ours, min(scans, key=lambda m: m.median), aims[1]) if scans else ["", ""]
    made += [_cell(found[m.label]) for m in SLOW]
    references = [found[name].gradient for name in ("diffrax", "torch loop", "torchdiffeq")]
    reference = next((x for x in references if x is not None), None)
    return (*made, off_by(ours.gradient, reference), f"{row.first:.2f} / {row.cached:.2f} s")


def _cell(m: Measured, bold: bool = False) -> str:
    if m.why_not is not None:
        return "" if m.why_not.endswith("takes fixed steps") else m.why_not
    time = f"{1e3 * m.median:.3g} ms"
    memory = f"{m.bytes / 1e6:.1f} MB" if m.bytes > 1e5 else "< 0.1 MB"
    return f"**{time}**, {memory}" if bold else f"{time}, {memory}"


def _against(ours: Measured, other: Measured, aim: float | None) -> list[str]:
    if other.why_not is not None:
        return [_cell(other), ""]
    times = statistics.median(b / a for a, b in zip(ours.seconds, other.seconds, strict=True))
    missed = "" if aim is None or times >= aim else ", missed"
    return [_cell(other), f"{times:.2g}" if aim is None else f"{times:.2g} ({aim:g}{missed})"]


HEADER = (
    "problem, steps, ours, 4 steps, diffrax, times, best jax, times, torch loop, torchdiffeq, torchode, off by, "
    "first / from disk"
).split(", ")


def section(rows: Sequence[Row]) -> Section:
    words = " ".join(TEXT.format(repeats=REPEATS, slow=SLOW_REPEATS).split())
    pictures = (("engines.png", picture(rows)),)
    return Section(TITLE, f"{words} {versions()}", tuple(HEADER), tuple(map(cells, rows)), pictures=pictures)


def picture(rows: Sequence[Row]) -> Figure:
    """Time and memory of every program, a line for each problem."""
    figure = Figure(figsize=(12.5, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, of, label in zip(panels, (_milliseconds, _megabytes), ("milliseconds", "peak memory (MB)"), strict=True):
        for place, row in enumerate(rows):
            for contender in (*QUICK[1:], *SLOW, OURS):
                m = row.found[contender.label]
                if m.why_not is None:
                    color, marker = LOOK.get(contender.label) or LOOKS[contender.module, contender.function]
                    size = 15 if contender is OURS else 8
                    name = contender.label if place == 0 else None
                    axes.plot(of(m), place, marker, color=color, markersize=size, alpha=0.85, label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(rows)), [row.problem.name for row in rows])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    return figure


LOOK = {"adjoint": ("#d55e00", "*")}


def _milliseconds(m: Measured) -> float:
    return 1e3 * m.median


def _megabytes(m: Measured) -> float:
    return max(m.bytes, 4096) / 1e6


def run(device: str) -> Section:
    """Always on the CPU, on one core, with an empty cache of programs: some ten minutes."""
    return section([row(problem) for problem in small_problems().values()])
