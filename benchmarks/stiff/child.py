"""A process that takes gradients with one library: ``python -m benchmarks.stiff.child PROBLEM MODULE FUNCTION MEMBERS ...``.

One line of JSON for every pair of FUNCTION and MEMBERS: processor seconds of the first gradient with all preparation, of
the quickest of a few, and the gradient of the first member; or the key "error".
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time

import numpy as np

from benchmarks.stiff.problems import PROBLEMS

PATIENCE = 6.0
"""Processor seconds for repetitions."""


def measured(problem: str, module: str, function: str, members: int) -> dict[str, object]:
    start = time.process_time()
    run = getattr(importlib.import_module(f"benchmarks.stiff.{module}"), function)(PROBLEMS[problem], members)
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) + times[0] < PATIENCE):
        gc.collect()
        begin = time.process_time()
        found = run()
        times.append(time.process_time() - begin)
        if len(times) == 1:
            first = time.process_time() - start
    of_y0, of_p = (x[0].tolist() for x in found)
    failed = int(np.isnan(found[1]).any(1).sum())
    told = {"y0": of_y0, "p": of_p, "failed": failed, "steps": getattr(run, "steps", None)}
    return {"first": first, "seconds": min(times), **told}


def main(problem: str, module: str, *work: str) -> None:
    for function, members in zip(work[::2], work[1::2], strict=True):
        try:
            answer = measured(problem, module, function, int(members))
        except ModuleNotFoundError as error:
            answer = {"error": f"{error.name} is not installed"}
        except Exception as error:
            lines = str(error).splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0][:140]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
