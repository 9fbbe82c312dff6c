"""A process that takes the gradient of one problem with one library: ``python -m benchmarks.peers.child``.

    ... child weigh PROBLEM MODULE FUNCTION FILE     bytes of one gradient, which goes to FILE
    ... child time PROBLEM MODULE FUNCTION           processor seconds of one gradient for every line on standard input

Answers are lines of JSON; one with the key "error" is the last.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peers.problems import Problem, problems, small_problems

QUICK, IN_A_ROW = 0.02, 10
"""Of a gradient that takes fewer seconds, so many in a row: the first one finds nothing in the processor's caches."""
STATUS = Path("/proc/self/status")


def weigh(problem: Problem, module: str, function: str, file: str) -> None:
    """How far a gradient lifts the resident memory of a process that has warmed up on four steps."""
    library = importlib.import_module(f"benchmarks.peers.{module}")
    prepare = getattr(library, function)
    prepare(problem.short())()
    run = prepare(problem)
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    before = resident("VmRSS")
    gradient = run()
    peak = resident("VmHWM") - before
    np.save(file, np.concatenate([x.ravel() for x in library.numbers(gradient)]))
    answer({"bytes": peak})


def serve(problem: Problem, module: str, function: str) -> None:
    """One gradient to begin with, and one for each line that comes in."""
    library = importlib.import_module(f"benchmarks.peers.{module}")
    prepare = getattr(library, function)
    getattr(library, "warm", int)()
    start = time.process_time()
    run = prepare(problem)
    run()
    answer({"first": time.process_time() - start})
    start = time.process_time()
    run()
    runs = IN_A_ROW if time.process_time() - start < QUICK else 1
    for _ in sys.stdin:
        if problem.y0.nbytes > 2**20:
            trim()
        gc.collect()
        start = time.process_time()
        for _ in range(runs):
            run()
        answer({"seconds": (time.process_time() - start) / runs})


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def answer(facts: dict[str, float | str]) -> None:
    print(json.dumps(facts), flush=True)


def main(verb: str, problem: str, module: str, function: str, *rest: str) -> None:
    work = {"weigh": weigh, "time": serve}[verb]
    try:
        work((problems() | small_problems())[problem], module, function, *rest)
    except ModuleNotFoundError as error:
        answer({"error": f"{error.name} is not installed"})
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        answer({"error": f"{type(error).__name__}: {first[:120]}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
