"""Gradients of named problems, counted, timed and weighed; a sweep of slots against recomputation.

Memory of small states on a CPU is the high-water mark of the resident memory of a child process above its warmed-up
start: torch's graph, which outweighs the tensors there, is in it. Large states, and other devices, are weighed by the
tensors alone: the graph is then negligible, and the allocator's own leftovers (which can be larger than the tensors)
do not count.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from adjoint.cases import Case, NamedProblem
from adjoint.memory import Meter
from adjoint.methods import NAMED
from adjoint.problems import problem_named
from adjoint.solve import Solution, solve
from adjoint.tensors import bytes_of
from revolve import Online, Plan

RESIDENT = "resident memory of a child process above its warmed-up start"
TENSORS = "bytes of tensors"
LARGE = 2**12
"""States of so many bytes and more are weighed by their tensors."""
STATUS = Path("/proc/self/status")
RTOL = 1e-6
"""The relative tolerance of ``solve``, where it is not said."""


@dataclass(frozen=True)
class Recipe:
    """A gradient that can be asked for in another process: a named problem, where, and how."""

    problem: str
    size: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``solve``."""

    @property
    def named(self) -> NamedProblem:
        return problem_named(self.problem)

    @property
    def adaptive(self) -> bool:
        """Whether the steps are found on the way."""
        return NAMED[self.options.get("method", self.named.method)].adaptive

    def case(self) -> Case:
        return self.named.case(self.size, self.device, self.dtype)

    def solved(self, case: Case) -> Solution:
        options = {"method": self.named.method, "dt": self.named.dt} | self.options
        if self.named.small is not None:
            options = self.named.tolerances(options.get("rtol", RTOL)) | options
        options["method"] = case.suited(options["method"])
        return solve(case.f, case.y0, case.t, args=case.args, **options)

    def but(self, **options: Any) -> Recipe:
        return replace(self, options=self.options | options)

    def __call__(self, case: Case) -> Differentiated:
        return differentiate(self.solved, case)


@dataclass(frozen=True)
class Differentiated:
    """A loss and its gradient by name, and the solution it came from."""

    loss: float
    gradient: dict[str, Tensor]
    solution: Any
    seconds: float


def differentiate(solved: Callable[[Case], Any], case: Case) -> Differentiated:
    """The gradient of the case's loss of ``solved(case).ys``."""
    synchronize(case.y0.device)
    start = time.perf_counter()
    solution = solved(case)
    loss = case.loss(solution.ys)
    gradients = torch.autograd.grad(loss, list(case.inputs.values()), allow_unused=True)
    synchronize(case.y0.device)
    seconds = time.perf_counter() - start
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(case.inputs.values(), gradients, strict=True))
    return Differentiated(float(loss.detach()), dict(zip(case.inputs, filled, strict=True)), solution, seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quickest(work: Callable[[], Differentiated], seconds: float) -> Differentiated:
    """The quickest of up to three repetitions, as many as fit the time."""
    best = work()
    spent = best.seconds
    for _ in range(2):
        if spent + best.seconds < seconds:
            again = work()
            spent += again.seconds
            best = min(best, again, key=lambda result: result.seconds)
    return best


def how_weighed(case: Case) -> str:
    """What memory means for this case, in words."""
    small = case.y0.device.type == "cpu" and bytes_of([case.y0]) < LARGE
    return RESIDENT if small and STATUS.exists() and hasattr(os, "fork") else TENSORS


Work = Callable[[Case], Any]


def tensor_bytes(work: Work, case: Case) -> int:
    """The peak of the bytes of tensors made by ``work(case)``: counted by the allocator of a GPU, else one by one."""
    device = case.y0.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work(case)
        return torch.cuda.max_memory_allocated(device) - start
    with Meter() as meter:
        work(case)
    return meter.peak


def resident_bytes(work: Work, case: Case) -> int:
    """How far ``work(case)`` lifts the resident memory of this process, which should be a fresh one."""
    work(case.beginning(0.5))
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    start = _kibibytes("VmRSS")
    with suppress(OSError):  # where it is forbidden, the mark is that of the warm-up, a little higher than the start
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    work(case)
    return max(0, _kibibytes("VmHWM") - start) * 1024


def _kibibytes(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


class Scales:
    """Weighs gradients. Small ones are weighed in children forked from one process that has only imported this."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Scales:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the server and its child
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()

    def peak(self, work: Callable[[Case], Any], recipe: Recipe) -> int:
        """Bytes held at most while ``work`` differentiates the case of this recipe; ``work`` must be picklable."""
        case = recipe.case()
        if how_weighed(case) == TENSORS:
            return tensor_bytes(work, case)
        if self._process is None:
            self._process = self._started()
        server = self._process
        assert server.stdin is not None and server.stdout is not None
        pickle.dump((work, recipe), server.stdin)
        server.stdin.flush()
        try:
            answer = pickle.load(server.stdout)
        except EOFError:
            answer = RuntimeError("the process that weighs gradients has ended; is there too little memory?")
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    @staticmethod
    def _started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", "from adjoint.measure import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
            | {"CUDA_VISIBLE_DEVICES": ""},  # with a GPU autograd starts threads, which no child would have
            start_new_session=True,
        )


def serve() -> None:
    """Answer requests from standard input, each in a forked child, until it ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    warm = Recipe("pendulum")
    warm(warm.case().beginning(0.1))  # torch imports parts of itself on the first gradient: not in every child
    while True:
        try:
            work, recipe = pickle.load(requests)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _answer(answers, work, recipe)
        os.waitpid(child, 0)


def _answer(answers: BinaryIO, work: Work, recipe: Recipe) -> None:
    answer: int | Exception
    try:
        answer = resident_bytes(work, recipe.case())
    except Exception as error:
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    pickle.dump(answer, answers)
    answers.flush()
    os._exit(0)


@dataclass(frozen=True)
class SweepRow:
    """One line of a sweep: what was predicted, and what was found."""

    slots: int | str
    plan: Plan
    predicted_runs: int
    """Plain runs by the plan, and what finding the accepted times takes beside it: one run, or a sweep of its own."""
    counted_runs: int
    seconds: float
    measured_bytes: int | None

    @property
    def repetitions(self) -> int:
        return self.plan.report.most_runs - 1

    def facts(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "repetitions": self.repetitions,
            "extra_steps_predicted": self.predicted_runs,
            "extra_steps_counted": self.counted_runs,
            "bytes_predicted": self.plan.bytes,
            "bytes_measured": self.measured_bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Sweep:
    """Slots against recomputation on one problem; the last row keeps every tape."""

    recipe: Recipe
    steps: int
    state_bytes: int
    weighed: str
    rows: tuple[SweepRow, ...]

    def facts(self) -> dict[str, Any]:
        return {
            "problem": self.recipe.problem,
            "steps": self.steps,
            "state_bytes": self.state_bytes,
            "memory": self.weighed,
            "rows": [row.facts() for row in self.rows],
        }


def sweep(
    recipe: Recipe,
    slots: Sequence[int],
    scales: Scales,
    *,
    patience: float = 0.5,
    tick: Callable[[], None] = lambda: None,
) -> Sweep:
    """The gradient of this recipe with each number of slots, and last with all tapes kept; every one the same bits.

    Each is timed as often as fits ``patience`` seconds; ``tick`` is called after each.
    """
    case = recipe.case()
    rows: list[SweepRow] = []
    expected: dict[str, Tensor] | None = None
    numbers: tuple[int | str, ...] = (*slots, "all")
    for number in numbers:
        asked = recipe.but(slots=number, gradient="discrete")
        result = quickest(partial(asked, case), patience)
        expected = expected or result.gradient
        assert same_bits(expected, result.gradient), f"slots={number} gave another gradient"
        rows.append(_row(number, result, scales.peak(asked, asked), recipe.adaptive))
        tick()
    plan = rows[-1].plan
    return Sweep(recipe, plan.steps, plan.state_bytes, how_weighed(case), tuple(rows))


def _row(slots: int | str, result: Differentiated, measured: int, finds_its_steps: bool) -> SweepRow:
    solution: Solution = result.solution
    plan = solution.plan
    assert plan is not None
    found = 0 if not finds_its_steps or slots == "all" else 1 if isinstance(plan.schedule, Online) else plan.steps
    predicted = plan.report.plain_runs + found
    return SweepRow(slots, plan, predicted, solution.stats.plain_runs, result.seconds, measured)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def power(number: float) -> str:
    """A power of ten without the zero that Python writes: 1e-7."""
    return f"{number:.0e}".replace("e-0", "e-")


def norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.cat([x.detach().double().cpu().reshape(-1) for x in tensors]).norm())
