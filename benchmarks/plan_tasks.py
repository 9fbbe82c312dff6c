"""Plans to be made by us and by the peers: ``python -m benchmarks.plan_tasks TASK WHO`` times one, once.

A peer's plan is made when its constructor has run and its last action has been asked for; ours when the array of its
actions is there, or when the last of them has been walked to.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from io import StringIO
from typing import Any

import numpy as np

from revolve import (
    Binomial,
    Differing,
    DiskRevolve,
    HRevolve,
    Mixed,
    Multistage,
    PeriodicDisk,
    Plan,
    Schedule,
    Tier,
    both_sweeps,
)

Made = Callable[[], int]
"""Makes a plan and says how many forward runs it has."""


@dataclass(frozen=True)
class Task:
    """One plan to make."""

    steps: int
    schedule: Schedule
    theirs: dict[str, Made]
    walked: bool = True


def stepped(name: str, steps: int, *arguments: Any, **keywords: Any) -> int:
    """A schedule of checkpoint_schedules, action by action."""
    theirs = import_module("checkpoint_schedules")
    runs = 0
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = getattr(theirs, name)(*arguments, **keywords)
        for action in schedule:
            if isinstance(action, theirs.Forward):
                runs += min(action.n1, steps) - action.n0
                if schedule.max_n is None and action.n1 >= steps:
                    schedule.finalize(steps)
            elif isinstance(action, theirs.EndReverse):
                break
    return runs


def taken(steps: int, slots: int) -> int:
    """pyrevolve's plan: its constructor takes every action from the C++ code."""
    pyrevolve = import_module("pyrevolve.schedulers")
    forward = (pyrevolve.Action.ADVANCE, pyrevolve.Action.LASTFW)
    plan = pyrevolve.CRevolve(slots, steps).oplist
    return steps + sum(action.capo - action.old_capo for action in plan if action.type in forward)


def tiers_taken(steps: int, fast: int, slow: int, write: float, read: float) -> int:
    """pyrevolve's plan for two tiers, made whole by its constructor."""
    pyrevolve = import_module("pyrevolve.schedulers")
    architecture = pyrevolve.Architecture(None)
    architecture.nblevels, architecture.sizes = 2, [fast, slow]
    architecture.wd, architecture.rd = [0.0, write], [0.0, read]
    plan = pyrevolve.HRevolve(steps - 1, steps - 1, architecture).oplist
    runs = (action.index[1] - action.index[0] + 1 for action in plan if action.type == "Forwards")
    return steps + sum(runs) + sum(action.type == "Forward" for action in plan)


def multistage(steps: int, memory: int, disk: int) -> Made:
    return partial(stepped, "MultistageCheckpointSchedule", steps, steps, memory, disk)


def named(name: str, steps: int, *arguments: Any) -> Made:
    return partial(stepped, name, steps, steps, *arguments)


def two_levels(steps: int, period: int, slots: int) -> Made:
    """It counts the slots between two files without that of the file itself."""
    return partial(stepped, "TwoLevelCheckpointSchedule", steps, period, slots)


CS, PY = "checkpoint_schedules", "pyrevolve"

TASKS = {
    "binomial, n = 1,000,000, c = 100": Task(
        10**6, Binomial(100), {CS: multistage(10**6, 100, 0), PY: partial(taken, 10**6, 100)}
    ),
    "binomial, n = 100,000, c = 10": Task(
        10**5, Binomial(10), {CS: multistage(10**5, 10, 0), PY: partial(taken, 10**5, 10)}
    ),
    "binomial, n = 1,000, c = 100": Task(
        1000, Binomial(100), {CS: named("Revolve", 1000, 100), PY: partial(taken, 1000, 100)}
    ),
    "multistage, n = 1,000,000, 50 + 50": Task(
        10**6, Multistage(50, 50, promotes=False), {CS: multistage(10**6, 50, 50)}, walked=False
    ),
    "two levels, n = 1,000,000, every 1,000, 11": Task(
        10**6, PeriodicDisk(11, 1.0, 1.0, every=1000), {CS: two_levels(10**6, 1000, 10)}, walked=False
    ),
    "several tiers, n = 400, 5 + 5": Task(
        400,
        HRevolve((Tier(5), Tier(5, 2.0, 2.0))),
        {CS: named("HRevolve", 400, 5, 5), PY: partial(tiers_taken, 400, 5, 5, 2.0, 2.0)},
    ),
    "several tiers, n = 10,000, 10 + 10": Task(
        10**4,
        HRevolve((Tier(10), Tier(10, 2.0, 2.0))),
        {CS: named("HRevolve", 10**4, 10, 10), PY: partial(tiers_taken, 10**4, 10, 10, 2.0, 2.0)},
    ),
    "unlimited disk, n = 2,000, 5": Task(2000, DiskRevolve(5, 2.0, 2.0), {CS: named("DiskRevolve", 2000, 5)}),
    "periodic disk, n = 20,000, 5": Task(
        20_000, PeriodicDisk(5, 2.0, 2.0), {CS: named("PeriodicDiskRevolve", 20_000, 5)}
    ),
    "states or tapes, n = 2,000, 20": Task(2000, Mixed(20), {CS: named("MixedCheckpointSchedule", 2000, 20)}),
    "states or tapes, n = 10,000, 10": Task(10**4, Mixed(10), {CS: named("MixedCheckpointSchedule", 10**4, 10)}),
    "steps that differ, 500 steps, 500 units": Task(
        500,
        Differing(
            tuple(1 + k * 7 % 9 for k in range(500)),
            tuple(1 + k * 13 % 20 for k in range(500)),
            500,
            tuple(5 + k * 29 % 56 for k in range(500)),
        ),
        {},
        walked=False,
    ),
}


WARM: dict[str, Made] = {
    CS: lambda: stepped("MixedCheckpointSchedule", 5, 5, 2) + stepped("MultistageCheckpointSchedule", 5, 5, 2, 0),
    PY: lambda: taken(5, 2),
}
"""What is imported or compiled on first use is not counted."""


def made(task: Task, who: str) -> int:
    """The plan of a task as ``who`` makes it, and its forward runs."""
    if who not in ("array", "walked"):
        return task.theirs[who]()
    plan = Plan(task.steps, task.schedule)
    if who == "array":
        return runs_of(plan.array())
    return sum(action[2] - action[1] for action in both_sweeps(task.schedule, task.steps) if action[0] in (0, 1))


def runs_of(rows: np.ndarray) -> int:
    return int((rows[:, 2] - rows[:, 1])[rows[:, 0] < 2].sum())


def main(name: str, who: str, limit: str = "100") -> None:
    """Processor seconds and forward runs as JSON, or why there are none; killed if it takes longer than the limit."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    task = TASKS[name]
    try:
        if who in WARM:
            WARM[who]()
        before = time.process_time()
        runs = made(task, who)
        print(json.dumps({"seconds": time.process_time() - before, "runs": int(runs)}))
    except ImportError:
        print(json.dumps({"why": "not installed"}))
    except Exception as error:
        print(json.dumps({"why": f"{type(error).__name__}: {error}"}))


if __name__ == "__main__":
    main(*sys.argv[1:])
