"""A process that takes one gradient with one library: ``python -m benchmarks.stiff.child PROBLEM MEMBERS MODULE FUNCTION``.

One line of JSON: processor seconds of the first gradient with all preparation, of the quickest of a few more, and the
gradient of the first member; or the key "error".
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time

from benchmarks.stiff.problems import PROBLEMS

PATIENCE = 20.0
"""Processor seconds for repetitions."""


def measured(problem: str, members: int, module: str, function: str) -> dict[str, object]:
    start = time.process_time()
    run = getattr(importlib.import_module(f"benchmarks.stiff.{module}"), function)(PROBLEMS[problem], members)
    found = run()
    first = time.process_time() - start
    times: list[float] = []
    while len(times) < 1 or (len(times) < 5 and sum(times) + times[0] < PATIENCE):
        gc.collect()
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    of_y0, of_p = (x[0].tolist() for x in found)
    return {"first": first, "seconds": min(times), "y0": of_y0, "p": of_p, "steps": getattr(run, "steps", None)}


def main(problem: str, members: str, module: str, function: str) -> None:
    try:
        answer = measured(problem, int(members), module, function)
    except ModuleNotFoundError as error:
        answer = {"error": f"{error.name} is not installed"}
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer = {"error": f"{type(error).__name__}: {lines[0][:140]}"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
