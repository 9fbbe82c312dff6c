"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from adjoint.compare import Comparison, Row
from adjoint.measure import RESIDENT, Sweep, power
from adjoint.race import Race
from revolve.budget import format_bytes

SHOWN = 4
"""Tensors of up to so many numbers are printed in full."""


def table(*headings: str, left: int = 1) -> Table:
    """An empty table whose first ``left`` columns hold words, and the others numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="left" if place < left else "right", vertical="bottom")
    return made


def note(text: str) -> Text:
    return Text(text, style="dim")


def gradient_table(loss: float, gradient: dict[str, Tensor]) -> RenderableType:
    """Every input with its gradient, or what describes a large one."""
    made = table("input", "shape", "gradient", left=3)
    for name, x in gradient.items():
        made.add_row(name, "×".join(map(str, x.shape)) or "scalar", numbers(x))
    return Group(Text(f"loss {loss:.8g}"), made)


def numbers(x: Tensor) -> str:
    """All numbers of a small tensor; norm and largest of a large one."""
    if x.numel() <= SHOWN:
        return "  ".join(f"{value:.6g}" for value in x.detach().reshape(-1).tolist())
    size, largest = float(torch.linalg.vector_norm(x)), float(x.abs().max())
    return f"norm {size:.6g}, largest {largest:.6g}"


def engines_table(found: Sequence[Race], eager: Race) -> RenderableType:
    """What each engine says, its first gradient, its best one, and how far it is from the eager one."""
    made = table("engine", "first", "best", "off by", "steps were taken by")
    made.columns[-1].justify, made.columns[-1].overflow = "left", "fold"
    for race in found:
        times = seconds(race.first.seconds), seconds(race.best.seconds)
        made.add_row(race.engine, *times, f"{race.off_by(eager):.0e}", Text(race.said))
    return made


def facts_table(facts: dict[str, str]) -> Table:
    """Names and what is to be said of each."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for name, value in facts.items():
        made.add_row(name, Text(value))
    return made


def words_table(words: dict[str, str]) -> Table:
    """Two columns of words; the first pair is their heading."""
    heading, *rows = words.items()
    made = table(*heading, left=2)
    for column in made.columns:
        column.vertical = "top"
    for name, value in rows:
        made.add_row(name, Text(value))
    return made


def sweep_table(sweep: Sweep) -> RenderableType:
    """Slots against recomputation: predicted and counted, predicted and measured."""
    made = table("slots", "r", "extra steps\npredicted", "\ncounted", "memory\npredicted", "\nmeasured", "time", left=0)
    for row in sweep.rows:
        measured = "" if row.measured_bytes is None else format_bytes(row.measured_bytes)
        runs = f"{row.predicted_runs:,}", f"{row.counted_runs:,}"
        size = format_bytes(row.plan.bytes), measured
        name = "store all" if row.slots == "all" else str(row.slots)
        made.add_row(name, str(row.repetitions), *runs, *size, seconds(row.seconds), end_section=row is sweep.rows[-2])
    heading = Text(f"{sweep.steps} steps, a state of {format_bytes(sweep.state_bytes)}")
    explained = f"Memory measured: {sweep.weighed}."
    if sweep.weighed == RESIDENT:
        explained += " States so small weigh less than what Python itself needs to recompute."
    else:
        explained += " The prediction has torch's graph as well."
    return Group(heading, made, note(explained))


def compare_table(comparison: Comparison) -> RenderableType:
    """The error of each gradient by tolerance, and its price at the tightest."""
    tolerances = comparison.tolerances
    price = f"at {power(tolerances[-1])}:\n"
    headings = [f"error at\n{power(tolerance)}" for tolerance in tolerances]
    made = table("gradient", *headings, f"{price}time", "\nmemory", "\nevaluations")
    for name in comparison.names:
        rows = comparison.of(name)
        made.add_row(name, *map(_error, rows), *_price(rows[-1]))
    lines = [
        f"Relative error of all gradients together; the two reference gradients agree to {comparison.agreement:.1e}.",
        f"Backsolve's error is {comparison.least_ratio:.3g} times the discrete one's, or more, at equal tolerance.",
        f"Memory: {comparison.weighed}.",
    ]
    lines += [f"{row.way} at {power(row.tolerance)}: {row.failure}" for row in comparison.rows if row.failure]
    return Group(made, note("\n".join(lines)))


def _error(row: Row) -> str:
    return f"{row.error:.1e}" if isfinite(row.error) else "failed"


def _price(row: Row) -> Sequence[str]:
    if row.failure:
        return "", "", ""
    return seconds(row.seconds), format_bytes(row.bytes or 0), f"{row.evaluations:,}"


def seconds(time: float) -> str:
    return f"{time:.2g} s" if time < 1 else f"{time:.1f} s"
