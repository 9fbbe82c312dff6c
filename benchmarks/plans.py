"""The time to make a whole plan, beside the peers that can make it. Every figure in a process of its own, medians."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from signal import SIGXCPU
from statistics import median

from benchmarks.measure import Section
from benchmarks.plan_tasks import CS, PY, TASKS, Task

LIMIT = 100
"""Seconds after which a measurement is given up."""
REPEATS = 3
ENOUGH = 5.0
"""A plan that takes so many seconds is not made again."""


@dataclass(frozen=True)
class Figure:
    """Seconds and forward runs, or why there are none."""

    seconds: float | None
    runs: int | None
    why: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            return self.why
        return f"{self.seconds:.2g}" if self.seconds < 10 else f"{self.seconds:.0f}"


def measured(name: str, who: str) -> Figure:
    seconds: list[float] = []
    runs = None
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH:
        command = [sys.executable, "-m", "benchmarks.plan_tasks", name, who, str(LIMIT)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == -SIGXCPU:
            return Figure(None, None, f"> {LIMIT}")
        if done.returncode:
            return Figure(None, None, f"ended by signal {-done.returncode}")
        found = json.loads(done.stdout)
        if "why" in found:
            return Figure(None, None, found["why"])
        seconds.append(found["seconds"])
        runs = found["runs"]
    return Figure(median(seconds), runs)


def row(name: str, task: Task) -> tuple[str, ...]:
    ours = measured(name, "array")
    walked = measured(name, "walked") if task.walked else Figure(None, None, "")
    theirs = {who: measured(name, who) if who in task.theirs else Figure(None, None, "has none") for who in (CS, PY)}
    assert ours.seconds is not None and ours.runs is not None, (name, ours.why)
    for who, figure in theirs.items():
        assert figure.runs is None or ours.runs <= figure.runs, f"{name}: {who} runs less"
    rates = []
    for figure in theirs.values():
        if figure.seconds is not None:
            rates.append(f"{figure.seconds / ours.seconds:.0f}")
        elif figure.why.startswith(">"):
            rates.append(f"> {LIMIT / ours.seconds:.0f}")
    fastest = min(rates, key=lambda rate: float(rate.strip("> ")), default="")
    return name, str(ours), str(walked), *map(str, theirs.values()), fastest and f"**{fastest}**"


def run(device: str) -> Section:
    return Section(
        "Plans",
        "Processor seconds to make a whole plan, every action of both sweeps: as an array, and walked action by action; beside "
        f"{version(CS)} and {version(PY)}, whose constructors and iterators are run to the end (what they compile on first "
        "use is not counted). Slots count x_0, runs are checked to be no more than theirs. The last column is how many "
        f"times faster the array is than the faster of them. Each in a process of its own, medians of {REPEATS}, at most "
        f"{LIMIT} s. The array of a million steps in 100 slots is 136 MB, and more than half of its time goes into "
        "getting them from the system for the first time.",
        ("plan", "revolve", "walked", CS, PY, "times"),
        tuple(row(name, task) for name, task in TASKS.items()),
    )


def version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (not installed)"
