"""A process that takes one gradient: ``python -m benchmarks.sequences.child LENGTH MODULE FUNCTION FILE``.

It warms up on a short sequence, makes the inputs (and compiles), and then tells how far one gradient lifts its resident
memory, outputs and all gradients included, and the processor's seconds it takes. The gradient goes to FILE.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.child import answer, resident, trim
from benchmarks.sequences import in_torch

SHORT = 1024


def weigh(length: int, module: str, function: str, file: str) -> None:
    prepare = getattr(importlib.import_module(f"benchmarks.sequences.{module}"), function)
    prepare(SHORT)()
    run = prepare(length)
    in_torch.RUNS.clear()
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    before, start = resident("VmRSS"), time.process_time()
    gradient = run()
    seconds, peak = time.process_time() - start, resident("VmHWM") - before
    np.save(file, np.concatenate([x.ravel() for x in gradient]))
    answer({"bytes": peak, "seconds": seconds, "runs": len(in_torch.RUNS)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        weigh(int(sys.argv[1]), *sys.argv[2:])
    except ModuleNotFoundError as error:
        print(json.dumps({"error": f"{error.name} is not installed"}), flush=True)
