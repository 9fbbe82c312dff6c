"""The tables of ``python -m benchmarks stiff``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adjoint.problems import reference_of
from benchmarks.measure import Section
from benchmarks.peers.measure import QUIET
from benchmarks.stiff.problems import PROBLEMS, RTOL, SPREAD, Stiff
from benchmarks.stiff.where import PARTS, where

ROOT = Path(__file__).parents[2]
MEMBERS = 1000
PATIENCE = 80
"""Seconds that a process may take."""


class Contender(NamedTuple):
    """A way to take the gradient: functions of a module, for one member and for many."""

    label: str
    module: str
    alone: str | None
    many: str | None


CONTENDERS = (
    Contender("**adjoint**, kvaerno5", "in_adjoint", "kvaerno5", "together"),
    Contender("**adjoint**, kvaerno5, `batched=True`", "in_adjoint", None, "apart"),
    Contender('**adjoint**, rodas5p, `engine="native"`', "in_adjoint", "native", None),
    Contender("CVODES by casadi", "in_casadi", "cvodes", "cvodes"),
    Contender("diffrax, Kvaerno5", "in_diffrax", "kvaerno5", "kvaerno5"),
)
TITLE = "Stiff gradients beside CVODES and diffrax"
TEXT = (
    f"One gradient of a number at the end with respect to y0 and all parameters, rtol = {RTOL:.0e} with the absolute tolerance "
    "that the problem asks for, float64, one thread. Time: the processor's, the quickest of up to five. "
    "Error: of the gradient, each component scaled by its parameter, by norm, against the references (in a batch, of the "
    f"first member, which has the nominal numbers; the others vary by {SPREAD:.0%}). First: the first gradient, with "
    "compilation and import. CVODES (BDF forwards, its adjoint equation backwards) takes members in turn; for Pollution the "
    "loss is multiplied by 1e-8, since its adjoint must meet the absolute tolerance of the state and fails otherwise. diffrax "
    "takes the PI control that its pages recommend for stiff problems, its "
    "discrete adjoint, and vmap, whose steps end when the slowest member's do. The batch of the first row has its "
    "steps in common (`Dense(members=True)`). To install the peers: `pip install -r benchmarks/stiff.txt`."
)
HEADER = ("", "alone", "error", "first", f"{MEMBERS:,} members", "error", "a member, of one alone")


def measured(problem: Stiff, contender: Contender) -> list[dict[str, Any]]:
    """What the child says of one member and of many."""
    work = {1: contender.alone, MEMBERS: contender.many}
    asked = [word for members, function in work.items() if function for word in (function, str(members))]
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.stiff.child", problem.name, contender.module, *asked]
    why = ""
    try:
        done = subprocess.run(
            words, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=PATIENCE
        )
        said = done.stdout
        why = f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"more than {PATIENCE} s"
    answers = iter([json.loads(line) for line in said.splitlines() if line.startswith("{")])
    return [next(answers, {"error": why}) if function else {"error": ""} for function in work.values()]


def error(problem: Stiff, found: dict[str, Any]) -> float:
    """Of the gradient, scaled, by norm."""
    known, case = reference_of(problem.name), problem.case
    assert known is not None
    y0 = case.y0.detach().abs().numpy()
    scale = np.concatenate(
        (np.where(y0 == 0, known.state.abs().numpy(), y0), *(x.detach().abs().numpy().ravel() for x in case.args))
    )
    true = np.concatenate([x.numpy().ravel() for x in known.gradient.values()])
    ours = np.concatenate((found["y0"], found["p"]))
    return float(np.linalg.norm((ours - true) * scale) / np.linalg.norm(true * scale))


def row(problem: Stiff, contender: Contender) -> tuple[str, ...]:
    one, many = measured(problem, contender)
    cells = [one.get("error", ""), "", ""]
    if "error" not in one:
        cells = [_time(one["seconds"]), f"{error(problem, one):.0e}", _time(one["first"])]
    if "error" in many:
        return contender.label, *cells, many["error"], "", ""
    share = "" if "error" in one else f"1/{one['seconds'] * MEMBERS / many['seconds']:.3g}"
    lost = f", {many['failed']} fail" if many["failed"] else ""
    return contender.label, *cells, f"{_time(many['seconds'])}{lost}", f"{error(problem, many):.0e}", share


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def shares(problem: Stiff, members: int) -> tuple[str, ...]:
    seconds, clock, steps = where(problem, members)
    parts = [clock.seconds.get(part, 0.0) for part in PARTS]
    cells = [f"{100 * x / seconds:.0f} % ({clock.calls.get(part, 0)})" for part, x in zip(PARTS, parts, strict=True)]
    rest = 100 * (1 - sum(parts) / seconds)
    return f"{problem.name}, {members:,}", str(steps), _time(seconds), *cells, f"{rest:.0f} %"


def versions() -> str:
    found = []
    for name in ("casadi", "diffrax", "jax"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return ", ".join(found)


def part(problem: Stiff) -> Section:
    rows = []
    for contender in CONTENDERS:
        rows.append(row(problem, contender))
        print(problem.name, *rows[-1], sep=" | ", file=sys.stderr, flush=True)
    inputs = problem.inputs(1)
    return Section(problem.name, f"{inputs[0].size} numbers, {inputs[1].size} parameters.", HEADER, tuple(rows))


def shared() -> Section:
    header = ("problem, members", "steps", "time", *(f"{part} (calls)" for part in PARTS), "the rest")
    rows = tuple(shares(problem, members) for problem in PROBLEMS.values() for members in (1, MEMBERS))
    text = (
        "One gradient with kvaerno5, eager, timed piece by piece. The rest is Python, and torch's work for the graph of each "
        "step and the products with the transpose of f."
    )
    return Section("Where the time goes", text, header, rows)


def main() -> None:
    """``python -m benchmarks.stiff.report [PROBLEM ..]``: these parts alone."""
    for name in sys.argv[1:] or PROBLEMS:
        print(part(PROBLEMS[name]).markdown("###"), flush=True)
    if not sys.argv[1:]:
        print(shared().markdown("###"))


def run(device: str) -> Section:
    parts = [part(problem) for problem in PROBLEMS.values()]
    return Section(TITLE, f"{TEXT} {versions()}.", parts=(*parts, shared()))


if __name__ == "__main__":
    main()
