"""Pictures of fits, sweeps and comparisons. Each function gives a matplotlib Figure in one style; save it anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from math import isfinite
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from adjoint.compare import Comparison, Row
from adjoint.measure import TENSORS, Sweep, SweepRow, power
from adjoint.problems import Pelts
from revolve.budget import BINARY, format_bytes

BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#666666"
COLORS = {
    "discrete": BLUE,
    "backsolve": ORANGE,
    "interpolating": GREEN,
    "gauss": SKY,
    "torchdiffeq adjoint": PINK,
    "torchdiffeq backprop": GREY,
}
MARKERS = {
    "discrete": "o",
    "backsolve": "s",
    "interpolating": "v",
    "gauss": "P",
    "torchdiffeq adjoint": "D",
    "torchdiffeq backprop": "^",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 150,
}

Arguments = ParamSpec("Arguments")


def styled(drawn: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """The figure drawn in this library's style, whatever the user's own settings are."""

    @wraps(drawn)
    def draw(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with rc_context(STYLE):
            figure = drawn(*args, **kwargs)
            figure.set_dpi(STYLE["savefig.dpi"])
            return figure

    return draw


@styled
def fit(data: Pelts, years: np.ndarray, hare: np.ndarray, lynx: np.ndarray) -> Figure:
    """Observed pelts and the fitted populations: against time, and against each other."""
    figure = Figure(figsize=(10.5, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    for name, observed, curve, color in (("hare", data.hare, hare, BLUE), ("lynx", data.lynx, lynx, ORANGE)):
        left.plot(years, curve, color=color, label=f"{name}, fitted")
        left.plot(data.year, observed, "o", color=color, markersize=6, mec="white", label=f"{name}, observed")
    left.set(
        xlabel="year", ylabel="pelts (thousands a year)", title="Hudson Bay Company pelts and a Lotka-Volterra model"
    )
    left.set_ylim(0, 1.22 * max(*data.hare, *data.lynx))
    left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    left.legend(loc="upper left", ncols=2, columnspacing=1.2)
    right.plot(hare, lynx, color=GREEN)
    right.plot(data.hare, data.lynx, color=GREY, linewidth=0.7, marker="o", markersize=4, markeredgecolor="white")
    for k in (0, 4, 13):
        place = (data.hare[k], data.lynx[k])
        right.annotate(str(data.year[k]), place, (6, -3), textcoords="offset points", fontsize=8, color="0.3")
    right.set(xlabel="hare (thousands a year)", ylabel="lynx (thousands a year)", title="One against the other")
    right.set(xlim=(0, 1.15 * max(data.hare)), ylim=(0, 1.22 * max(data.lynx)))
    right.legend(
        handles=[Line2D([], [], color=GREEN, label="fitted"), Line2D([], [], color=GREY, marker="o", label="observed")]
    )
    return figure


@styled
def tradeoff(sweep: Sweep) -> Figure:
    """Memory against recomputation, predicted and found; and the time of the gradient against slots."""
    figure = Figure(figsize=(10.5, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    _memory(left, sweep)
    _time(right, sweep)
    return figure


def _memory(axes: Axes, sweep: Sweep) -> None:
    rows, everything = sweep.rows[:-1], sweep.rows[-1]
    unit, factor = _unit(everything.plan.bytes)

    def predicted(row: SweepRow) -> tuple[float, float]:
        return row.plan.bytes / factor, 1 + row.predicted_runs / sweep.steps

    def found(row: SweepRow) -> tuple[float, float]:
        return (row.measured_bytes or 0) / factor, 1 + row.counted_runs / sweep.steps

    axes.plot(*zip(*map(predicted, rows), strict=True), color=BLUE)
    axes.plot(*zip(*map(found, rows), strict=True), "o", color=BLUE, mfc="white")
    axes.plot(*predicted(everything), "|", color=ORANGE, markersize=11, mew=1.6)
    axes.plot(*found(everything), "o", color=ORANGE, mfc="white")
    for row in _spread(rows):
        name = f"{row.slots} slot{'s' * (row.slots != 1)}"
        left = min(found(row)[0], predicted(row)[0]), found(row)[1]
        axes.annotate(name, left, (-8, 0), textcoords="offset points", fontsize=8, color="0.3", ha="right", va="center")
    axes.annotate("every tape kept", found(everything), (0, 9), textcoords="offset points", color=ORANGE, ha="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.85, 1.1 * max(predicted(row)[1] for row in sweep.rows))
    axes.margins(x=0.16)
    axes.set(xlabel=f"memory ({unit})", ylabel=f"forward runs of each of the {sweep.steps} steps")
    axes.set_title(f"{_what(sweep)}: memory against recomputation")
    _plain_numbers(axes.xaxis, axes.yaxis)
    what = "tensors" if sweep.weighed == TENSORS else "resident memory"
    line = Line2D([], [], color=GREY, label="predicted: tensors and torch's graph")
    dots = Line2D([], [], color=GREY, linestyle="", marker="o", mfc="white", label=f"measured: {what}")
    axes.legend(handles=[line, dots], loc="upper right")


def _what(sweep: Sweep) -> str:
    problem, size = sweep.recipe.named, sweep.recipe.size
    return problem.name if size is None else f"{problem.name}, {size:,} {problem.size_is}"


def _spread(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Rows whose labels do not touch: each at least a third below the one before."""
    chosen: list[SweepRow] = []
    for row in rows:
        if not chosen or 1 + row.counted_runs / row.plan.steps < 0.78 * (1 + chosen[-1].counted_runs / row.plan.steps):
            chosen.append(row)
    return chosen


def _time(axes: Axes, sweep: Sweep) -> None:
    rows, everything = sweep.rows[:-1], sweep.rows[-1]
    slots = [int(row.slots) for row in rows]
    axes.plot(slots, [row.seconds for row in rows], color=BLUE, marker="o", mfc="white")
    axes.axhline(everything.seconds, color=ORANGE, linestyle="--", linewidth=1.2)
    axes.annotate(
        "every tape kept",
        (0, everything.seconds),
        (5, -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top",
        color=ORANGE,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    lowest, highest = min(row.seconds for row in sweep.rows), max(row.seconds for row in sweep.rows)
    axes.set_ylim(0.6 * lowest, 1.5 * highest)
    axes.set(xlabel="slots", ylabel="time of one gradient (seconds)", title="Time against slots")
    _plain_numbers(axes.xaxis, axes.yaxis)


@styled
def compare(*comparisons: Comparison) -> Figure:
    """For each problem the error of each gradient against tolerance and against time, and what each one holds."""
    figure = Figure(figsize=(13, 0.8 + 3.7 * len(comparisons)))
    grid = figure.subplots(len(comparisons), 3, squeeze=False, width_ratios=[1.15, 1, 0.8])
    for (error, time, memory), comparison in zip(grid, comparisons, strict=True):
        _errors(error, comparison, lambda row: row.tolerance)
        error.set(xlabel="tolerance (relative and absolute)", ylabel="relative error of the gradient")
        error.set_title(f"{comparison.recipe.problem}: error against tolerance")
        error.invert_xaxis()
        error.xaxis.set_major_locator(FixedLocator(comparison.tolerances))
        error.xaxis.set_minor_locator(NullLocator())
        _errors(time, comparison, lambda row: row.seconds)
        time.set(xlabel="time of one gradient (seconds)", title="Error against time")
        time.sharey(error)
        _plain_numbers(time.xaxis)
        _bars(memory, comparison)
    names = [name for name in comparisons[0].names if name in COLORS]
    handles = [Line2D([], [], color=COLORS[name], marker=MARKERS[name], mec="white", label=name) for name in names]
    handles.append(
        Line2D([], [], color="0.6", linestyle=":", linewidth=1.2, label="difference of the two reference gradients")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _errors(axes: Axes, comparison: Comparison, across: Callable[[Row], float]) -> None:
    for name in reversed([name for name in comparison.names if name in COLORS]):
        rows = [row for row in comparison.of(name) if isfinite(row.error)]
        places = [across(row) for row in rows]
        axes.plot(places, [row.error for row in rows], color=COLORS[name], marker=MARKERS[name], mec="white")
    axes.axhline(comparison.agreement, color="0.6", linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())


def _bars(axes: Axes, comparison: Comparison) -> None:
    tightest = min(comparison.tolerances)
    rows = [row for row in comparison.rows if row.tolerance == tightest and row.bytes is not None][::-1]
    unit, factor = _unit(max((row.bytes or 1 for row in rows), default=1))
    sizes = [(row.bytes or 0) / factor for row in rows]
    colors = [COLORS.get(row.way, COLORS.get(row.way.split(",")[0], GREY)) for row in rows]
    axes.barh(range(len(rows)), sizes, 0.62, color=colors)
    for place, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        text = format_bytes(row.bytes or 0)
        axes.annotate(text, (size, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color="0.3")
    axes.set_yticks(range(len(rows)), [row.way for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.28)
    what = "of tensors" if comparison.weighed == TENSORS else "of resident memory"
    axes.set(xlabel=f"{unit} {what}", title=f"Memory at tolerance {power(tightest)}")


def _plain_numbers(*axes: Axis) -> None:
    """1, 2, 5, 10, 20, ... along a logarithmic axis."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _unit(most: int) -> tuple[str, int]:
    """The unit that suits numbers up to this one."""
    return max(((unit, factor) for unit, factor in BINARY.items() if factor <= max(1, most)), key=lambda pair: pair[1])
