"""Every library on every problem: weighed in a process of its own, then timed in turn on one core."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.problems import Problem

ROOT = Path(__file__).parents[2]
ROOM = 8 * 2**30
"""Bytes that a process may hold."""
PATIENCE = 300.0
"""Seconds that a gradient may take."""

QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
EXACT = {"MALLOC_MMAP_THRESHOLD_": "4096"}
"""With this the C library gives freed blocks of a page or more back at once."""


@dataclass(frozen=True)
class Contender:
    """A way to take the gradient: a function of a module in this folder."""

    label: str
    """May name {slots} or {segments}."""
    module: str
    function: str

    def named(self, problem: Problem) -> str:
        return self.label.format(slots=problem.slots, segments=problem.segments)


CONTENDERS = (
    Contender("torch loop", "in_torch", "loop"),
    Contender("**adjoint**, all tapes", "in_torch", "all_tapes"),
    Contender("**adjoint**, {slots} slots", "in_torch", "in_slots"),
    Contender("torch.utils.checkpoint, {segments} segments", "in_torch", "checkpointed"),
    Contender("torchdiffeq, odeint", "in_torchdiffeq", "graph"),
    Contender("torchdiffeq, odeint_adjoint", "in_torchdiffeq", "backsolve"),
    Contender("torchode", "in_torchode", "graph"),
    Contender("jax, scan", "in_jax", "scan"),
    Contender("jax, scan with remat, {segments} segments", "in_jax", "remat"),
    Contender("diffrax, {slots} checkpoints", "in_diffrax", "checkpointed"),
)


@dataclass(frozen=True)
class Measured:
    """What one library took for one gradient, or why that is not known."""

    contender: Contender
    bytes: int = 0
    seconds: tuple[float, ...] = ()
    """Of one gradient, round by round."""
    first: float = 0.0
    """Seconds of the first gradient, compilation included."""
    gradient: np.ndarray | None = None
    why_not: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Child:
    """A process on one core that answers in lines of JSON; it is stopped when it holds or takes too much."""

    def __init__(self, verb: str, problem: Problem, contender: Contender, *rest: str, core: int, **environment: str):
        words = [sys.executable, "-m", "benchmarks.peers.child", verb, problem.name]
        self._process = subprocess.Popen(
            [*words, contender.module, contender.function, *rest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, **QUIET, **environment},
        )
        os.sched_setaffinity(self._process.pid, {core})
        self._stopped: str | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has been stopped: the answer will say so
            self._process.stdin.write("again\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line; {"error": why} if there is none."""
        assert self._process.stdout is not None
        answered = threading.Event()
        guard = threading.Thread(target=self._watch, args=(answered,))
        guard.start()
        line = self._process.stdout.readline()
        answered.set()
        guard.join()
        return json.loads(line) if line else {"error": self._stopped or "the process ended"}

    def _watch(self, answered: threading.Event) -> None:
        begin = time.monotonic()
        try:
            process = psutil.Process(self._process.pid)
        except psutil.NoSuchProcess:
            return None
        while not answered.wait(0.1):
            if process.memory_info().rss > ROOM:
                self._stopped = f"needs more than {ROOM // 2**30} GiB"
            elif time.monotonic() - begin > PATIENCE:
                self._stopped = f"takes longer than {PATIENCE:.0f} s"
            if self._stopped is not None:
                return self._process.kill()


def weighed(problem: Problem, contender: Contender, core: int) -> Measured:
    """One gradient in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "gradient.npy")
        with Child("weigh", problem, contender, file, core=core, **EXACT) as child:
            found = child.answer()
        if "error" in found:
            return Measured(contender, why_not=found["error"])
        return Measured(contender, bytes=found["bytes"], gradient=np.load(file))


def measured(problem: Problem, repeats: int, contenders: Sequence[Contender] = CONTENDERS) -> list[Measured]:
    """Every contender on this problem, timed in turn."""
    core = max(os.sched_getaffinity(0))
    heavy = [weighed(problem, contender, core) for contender in contenders]
    children: dict[Contender, Child] = {}
    firsts: dict[Contender, dict[str, Any]] = {}
    for contender in (m.contender for m in heavy if m.why_not is None):
        children[contender] = Child("time", problem, contender, core=core)
        firsts[contender] = children[contender].answer()
    times: dict[Contender, list[float]] = {contender: [] for contender in children}
    for _ in range(repeats):
        for contender, child in children.items():
            if "error" not in firsts[contender]:
                child.ask()
                found = child.answer()
                if "error" in found:
                    firsts[contender] = found
                else:
                    times[contender].append(found["seconds"])
    for child in children.values():
        child.stop()
    return [_timed(m, firsts[m.contender], times[m.contender]) if m.why_not is None else m for m in heavy]


def _timed(m: Measured, first: dict[str, Any], seconds: list[float]) -> Measured:
    if "error" in first:
        return Measured(m.contender, why_not=first["error"])
    return Measured(m.contender, m.bytes, tuple(seconds), first["first"], m.gradient)
