"""Pictures of schedules and of what memory buys. Each function gives a matplotlib Figure; save it where you like."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from revolve.actions import ADVANCE, LOAD, RECORD, REVERSE, SAVE, Report, Schedule
from revolve.budget import BINARY, DECIMAL, Plan, Prices, UniformSweep, counted, format_bytes, prices_of
from revolve.compare import Priced
from revolve.hierarchy import HRevolve
from revolve.trace import Tape, Trace, trace

COLORS = {ADVANCE: "#0072b2", RECORD: "#d55e00", REVERSE: "#009e73"}
LABELS = {ADVANCE: "advance", RECORD: "record", REVERSE: "reverse"}
TIERS = ("#b8b8b8", "#8fb8de", "#c9a3d4", "#a8c98f", "#e0c068")
"""The colour of states kept in each tier, the fastest first; then over again."""
TAPE = "#f2c7a5"
MOVED = {SAVE: "#111111", LOAD: "#c2185b"}
"""Writes and reads that take time."""
ACCENT = "#d55e00"


def draw(schedule: Schedule, steps: int, prices: Prices | None = None) -> Figure:
    """A schedule in time: steps across, time downward, the life of each kept state; beside it the slots, one by one.

    With ``prices`` time is theirs, and a write or a read that costs something is drawn where the chain waits for it.
    """
    traced = trace(schedule, steps, prices)
    lanes = sum(traced.slots.values())
    height = 3.4 + 5.2 * min(1.0, sum(move.stop - move.start for move in traced.moves) / 90)
    figure = Figure(figsize=(10, height), layout="constrained")
    if lanes:
        share = min(0.5, 0.07 + 0.035 * lanes)
        main, side = figure.subplots(1, 2, sharey=True, width_ratios=[1, share])
        _slots(side, traced)
    else:
        main = figure.subplots()
    _moves(main, traced)
    main.set_ylim(traced.time * 1.01, -traced.time * 0.01)
    report = schedule.price(steps)
    head = textwrap.wrap(str(schedule), 100, max_lines=2)
    runs = f"{counted(steps, 'step')}, {report.plain_runs} plain and {counted(report.recorded_runs, 'recorded run')}, "
    head += [f"{runs}at most {report.most_runs} of one step", *_moved(report)]
    if prices:
        main.set_ylabel("time (at the prices given)")
    main.set_title("\n".join(head), fontsize=10, loc="left")
    _legend(figure, traced)
    return figure


def _moved(report: Report) -> list[str]:
    """A line on the tiers, if there are several."""
    told = [f"tier {k}: {tier.saves} writes, {tier.loads} reads" for k, tier in report.tiers.items()]
    return ["; ".join(told)] if len(told) > 1 else []


def _moves(axes: Axes, traced: Trace) -> None:
    width = max(0.7, min(2.5, 120 / traced.steps))
    band = max(0.8, min(7.0, 200 / traced.steps))
    for tier in reversed(list(traced.slots)):
        lives = [[(life.step, life.begin), (life.step, life.end)] for life in traced.lives if life.tier == tier]
        axes.add_collection(LineCollection(lives, colors=_color(tier), linewidths=band, capstyle="butt", zorder=1))
    tapes = [[(tape.step + 0.5, tape.begin), (tape.step + 0.5, tape.end)] for tape in _kept_tapes(traced)]
    axes.add_collection(LineCollection(tapes, colors=TAPE, linewidths=band, capstyle="butt", zorder=1))
    for verb, color in COLORS.items():
        lines = [
            [(move.stop, move.begin), (move.start, move.end)]
            if verb == REVERSE
            else [(move.start, move.begin), (move.stop, move.end)]
            for move in traced.moves
            if move.verb == verb
        ]
        axes.add_collection(LineCollection(lines, colors=color, linewidths=width, capstyle="round", zorder=2 + verb))
    waits = [[(wait.step, wait.begin), (wait.step, wait.end)] for wait in traced.waits]
    colors = [MOVED[wait.verb] for wait in traced.waits]
    axes.add_collection(LineCollection(waits, colors=colors, linewidths=max(2.0, width), capstyle="butt", zorder=5))
    axes.set_xlim(-0.02 * traced.steps - 0.2, traced.steps * 1.02 + 0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("time (runs of one step)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _color(tier: int) -> str:
    return TIERS[tier % len(TIERS)]


def _kept_tapes(traced: Trace) -> list[Tape]:
    """The tapes that are not reversed at once."""
    return [tape for tape in traced.tapes if tape.end - tape.begin > 2]


def _slots(axes: Axes, traced: Trace) -> None:
    """One lane for each slot, with the step of the state that lies in it where there is room for a number."""
    names = [(tier, slot) for tier, slots in traced.slots.items() for slot in range(slots)]
    lane = {name: number for number, name in enumerate(names)}
    room = traced.time / 40
    for life in traced.lives:
        middle = lane[life.tier, life.slot]
        length = life.end - life.begin
        axes.bar(middle, length, 0.8, bottom=life.begin, color=_color(life.tier), edgecolor="white", linewidth=0.6)
        if length > room and len(names) <= 20:
            axes.text(middle, life.begin + length / 2, str(life.step), ha="center", va="center", fontsize=7)
    shown = range(len(names)) if len(names) <= 10 else range(0, len(names), -(-len(names) // 8))
    tiers = len(traced.slots) > 1
    axes.set_xticks(shown, [f"{names[k][0]}:{names[k][1] + 1}" if tiers else str(names[k][1] + 1) for k in shown])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("tier:slot" if tiers else "slot")
    axes.tick_params(left=False, labelleft=False, bottom=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(figure: Figure, traced: Trace) -> None:
    present = {move.verb for move in traced.moves}
    handles = [
        Line2D([], [], color=COLORS[verb], linewidth=2, label=LABELS[verb]) for verb in COLORS if verb in present
    ]
    for verb, name in ((SAVE, "write"), (LOAD, "read")):
        if any(wait.verb == verb for wait in traced.waits):
            handles.append(Line2D([], [], color=MOVED[verb], linewidth=3, label=name))
    for tier in traced.slots:
        where = f"state in tier {tier}" if len(traced.slots) > 1 or tier else "state kept (number: its step)"
        handles.append(Line2D([], [], color=_color(tier), linewidth=6, label=where))
    if _kept_tapes(traced):
        handles.append(Line2D([], [], color=TAPE, linewidth=6, label="tape kept"))
    columns = len(handles) if len(handles) < 7 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def priced(made: Mapping[str, Sequence[Priced]], steps: int, state_bytes: int = 0, *, decimal: bool = False) -> Figure:
    """Time against memory: the ways of :func:`revolve.compare.priced_sweep`, both axes logarithmic."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    looks = zip(("0.45", COLORS[ADVANCE], COLORS[RECORD]), ("--", "-", ":"), ("s", "o", "^"), strict=True)
    for (name, rows), (color, line, marker) in zip(made.items(), looks, strict=True):
        slots, costs = [row.slots for row in rows], [row.cost for row in rows]
        axes.plot(slots, costs, color=color, linestyle=line, marker=marker, markersize=4, linewidth=1.4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis, axes.yaxis)
    axes.set_xlabel("slots in memory (states kept at once, x_0 among them)")
    axes.set_ylabel("time (runs, writes and reads at their prices)")
    best = made["with a disk"][0].schedule
    head = textwrap.wrap(f"Time against memory: {steps} steps, {prices_in_words(best)}", 90)
    axes.set_title("\n".join(head), fontsize=11, loc="left")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    if state_bytes:
        unit, factor = _unit(state_bytes * max(row.slots for row in made["with a disk"]), decimal)
        scale = state_bytes / factor

        def memory(slots: Any) -> Any:
            return slots * scale

        def slots_of(memory: Any) -> Any:
            return memory / scale

        above = axes.secondary_xaxis("top", functions=(memory, slots_of))
        above.set_xlabel(f"kept states ({unit})")
        _plain_numbers(above.xaxis)
    return figure


def prices_in_words(schedule: Schedule) -> str:
    prices = prices_of(schedule)
    slots = f"{schedule.tiers[-1].slots} slots on disk" if isinstance(schedule, HRevolve) else "an unlimited disk"
    return f"{slots}, a write {prices.write[-1]:g}, a read {prices.read[-1]:g}, a run {prices.step:g}"


def sweep(plans: Sequence[Plan], *, decimal: bool = False) -> Figure:
    """Runs of a step against slots, both logarithmic; a number marks where the repetition r falls to the next.

    The plans of :func:`revolve.sweep`: one for each number of slots, the one that keeps every tape last.
    """
    *bounded, everything = plans
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    slots = [plan.slots for plan in bounded]
    runs = [plan.report.runs / plan.steps for plan in bounded]
    axes.plot(slots, runs, color=COLORS[ADVANCE], marker="o", markersize=4, linewidth=1.2)
    before, labelled = None, 0.0
    near = (max(slots) / min(slots)) ** 0.055 if slots else 1.0
    for plan, x, y in zip(bounded, slots, runs, strict=True):
        repetitions = plan.report.most_runs - 1
        if repetitions != before and x > labelled * near:
            axes.annotate(f"r = {repetitions}", (x, y), (4, 6), textcoords="offset points", fontsize=8, color="0.3")
            labelled = x
        before = repetitions
    memory = f", {format_bytes(everything.bytes, decimal=decimal)}" if everything.bytes else ""
    axes.axhline(1, color=ACCENT, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"store all: 1 run a step, {everything.report.peak_tapes} tapes{memory}",
        (1, 1),
        (-4, 5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=ACCENT,
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(right=max(slots, default=1) * near * 1.02)
    most = max(runs, default=1)
    axes.set_ylim(0.85, most * max(1.6, most**0.07))  # room for the first r, however long the axis is
    _plain_numbers(axes.xaxis, axes.yaxis)
    axes.set_xlabel("slots (states kept at once, x_0 among them)")
    axes.set_ylabel("forward runs a step, recorded run included")
    axes.set_title(f"Recomputation against memory: {everything.steps} steps, Binomial", fontsize=11, loc="left")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if bounded and bounded[-1].state_bytes:
        _memory_axis(axes, bounded, decimal)
    return figure


def _memory_axis(axes: Axes, plans: Sequence[Plan], decimal: bool) -> None:
    first = plans[0]
    rest = first.bytes - first.slots * first.state_bytes
    unit, factor = _unit(max(plan.bytes for plan in plans), decimal)

    def memory(slots: Any) -> Any:
        return (slots * first.state_bytes + rest) / factor

    def slots(memory: Any) -> Any:
        return (memory * factor - rest) / first.state_bytes

    above = axes.secondary_xaxis("top", functions=(memory, slots))
    above.set_xlabel(f"predicted memory ({unit})")
    _plain_numbers(above.xaxis)


def _plain_numbers(*axes: Axis) -> None:
    """1, 2, 5, 10, 20, ... along a logarithmic axis."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def uniform(sweep: UniformSweep, *, decimal: bool = False) -> Figure:
    """Memory against the number of uniform checkpoints: k + L/k states, the minimum 2 sqrt(L), and store-all."""
    unit, factor = _unit(sweep.store_all.bytes, decimal) if sweep.state_bytes > 1 else ("states", 1)
    least, everything = sweep.least, sweep.store_all
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    checkpoints = [row.checkpoints for row in sweep.rows]
    axes.plot(checkpoints, [row.bytes / factor for row in sweep.rows], color=COLORS[ADVANCE], linewidth=1.6)
    axes.axhline(everything.bytes / factor, color="0.35", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"store all: {sweep.steps} states",
        (0.5, everything.bytes / factor),
        (0, -5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="center",
        va="top",
        color="0.35",
    )
    axes.plot(least.checkpoints, least.bytes / factor, "o", color=ACCENT, markersize=8, zorder=3)
    memory = f", {format_bytes(least.bytes, decimal=decimal)}" if sweep.state_bytes > 1 else ""
    axes.annotate(
        f"least: {least.checkpoints} checkpoints, {least.states} states{memory}\n"
        f"2 sqrt({sweep.steps}) = {sweep.bound:.4g}; {100 - 100 * least.states / sweep.steps:.3g} % of store-all saved",
        (least.checkpoints, least.bytes / factor),
        (0.5, 0.68),
        textcoords="axes fraction",
        arrowprops={"arrowstyle": "-", "color": ACCENT, "linewidth": 0.8},
        ha="center",
        color=ACCENT,
    )
    if sweep.steps > 400:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_numbers(axes.xaxis, axes.yaxis)
    else:
        axes.set_ylim(0, 1.12 * everything.bytes / factor)
    axes.set_xlabel("checkpoints k")
    axes.set_ylabel(f"memory ({unit})" if unit != "states" else "states held at once")
    axes.set_title(f"Uniform checkpointing of {sweep.steps} steps: k + {sweep.steps}/k states", fontsize=11, loc="left")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _unit(most: int, decimal: bool) -> tuple[str, int]:
    """The unit that suits numbers up to this one."""
    units = DECIMAL if decimal else BINARY
    return max(((unit, factor) for unit, factor in units.items() if factor <= max(1, most)), key=lambda pair: pair[1])
