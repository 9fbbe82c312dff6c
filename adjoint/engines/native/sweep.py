"""A whole chain natively: its first sweep, and its reverse sweep as torch wants it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.captured import Captured
from adjoint.engines.native.adaptive import Explored, explored, note_systems
from adjoint.engines.native.kernel import Kernel
from adjoint.engines.native.rows import plain_rows, rows_of
from adjoint.join import TwiceDifferentiable
from adjoint.memories import Memories
from adjoint.memory import SHARE, free_bytes
from adjoint.probe import Weights
from adjoint.problem import Problem, Runs
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tangents import Directions, Second
from adjoint.tensors import State, bytes_of
from adjoint.timeline import FixedTimeline
from revolve import Plan, Schedule, parse_bytes


class Room:
    """Memory for one gradient: here the tape of a step is the state before it."""

    def __init__(self, problem: Problem, captured: Captured, state: State) -> None:
        self._problem, self._state, self._size = problem, state, bytes_of(state)
        self._working = 4 * self._size + 2 * self._size * problem.program.outputs
        self._rest = (captured, state, Weights(self._size, self._size, self._working, 8), None)
        self._memories = Memories(problem, *self._rest)
        self._memories.check()

    @cached_property
    def _free(self) -> int:
        budget = self._problem.budget
        return free_bytes(self._state[0].device) // SHARE if budget is None else parse_bytes(budget)

    def most(self) -> int:
        """How many states may be recorded before the number of steps is known."""
        problem = self._problem
        if problem.slots == "all":
            return sys.maxsize
        if problem.slots is not None or problem.schedule is not None:
            return 0
        return (self._free - self._working) // (self._size + 8)

    def plan(self, steps: int, *, recorded: bool = False) -> Plan:
        """The caller's plan, or the cheapest."""
        problem = self._problem
        if not recorded and (problem.slots is not None or problem.schedule is not None):
            return self._memories.plan(steps)
        if recorded or steps <= self.most():
            return self._memories.plan(steps, recorded=True)
        slots = (self._free - self._working - 8 * steps) // self._size
        return Memories(replace(problem, budget=None, slots=max(slots, 1)), *self._rest).plan(steps)


@dataclass
class NativeSweep:
    """A chain by one call forwards and one back; it may be reversed again and again.

    What does not depend on numbers is shared with the sweeps that follow the same call made again.
    """

    kernel: Kernel
    program: ExplicitProgram
    state: State
    held: Sequence[Tensor]
    """The tensors that f holds, as the kernel takes them."""
    runs: Runs | AutogradStepper
    watch: Callable[[], None]
    """Raises if something that is still needed has changed."""
    linearised: Callable[[], TwiceDifferentiable]
    """Makes what the derivative of this sweep is had from: the same chain in torch."""
    fixed: dict[str, Any] | None = None
    """Words that are the same whenever the same call is made, if they are known: of fixed steps."""

    def __post_init__(self) -> None:
        self.steps = self.program.timeline.steps
        self._schedule: Schedule | None = None
        self._fresh = False
        self._explored: Explored | None = None
        layout = self.kernel.layout
        start = layout.packed([x[None] for x in self.state], layout.members)
        self._words: dict[str, Any] = {
            "x0": start,
            **self.kernel.inputs(self.held),
            "outputs_each": self.program.outputs,
        }
        if isinstance(self.program.timeline, FixedTimeline):
            if self.fixed is None:
                self.fixed = self._placed(self.program.timeline.times)
            self._words |= self.fixed

    def _placed(self, times: np.ndarray) -> dict[str, Any]:
        """Which steps end at an asked time, and the asked times inside of others."""
        asked, sign = np.array(self.program.asked.t), 1.0 if times[-1] >= times[0] else -1.0
        index, inner = np.full(self.steps, -1, dtype=np.int64), np.zeros(self.steps + 1, dtype=np.int64)
        if self._explored is None:
            places = np.searchsorted(sign * times, sign * asked)
            index[places[1:] - 1] = np.arange(1, len(places))
        else:
            index[-1] = len(asked) - 1
            inner = np.searchsorted(sign * asked, sign * times, side="right")
            inner[-1] = len(asked) - 1
        words: dict[str, Any] = {"times": times, "index": index, "asked": asked, "inner": inner}
        return {name: torch.from_numpy(x) for name, x in words.items()}

    def explore(self, most: int) -> bool:
        """Find the steps of an adaptive solve, and record at most so many states; whether the end was reached."""
        held = {name: self._words[name] for name in ("p", "pre")}
        found = explored(self.kernel, self.program, self._words["x0"], held, most)
        if found is None:
            return False
        self._explored, timeline = found, self.program.timeline
        assert isinstance(timeline, AdaptiveTimeline)
        self.steps = timeline.steps
        self._words |= self._placed(found.times)
        return True

    @property
    def recorded(self) -> bool:
        """Whether every state was recorded while the steps were found."""
        return self._explored is not None and self._explored.tape is not None

    def forward(self, schedule: Schedule | None) -> list[Tensor]:
        """Outputs by leaf. Without a schedule nothing is kept."""
        words, layout, found = self._words, self.kernel.layout, self._explored
        self._schedule = schedule
        if found is not None:
            words["work"] = torch.empty_like(words["x0"])
            if self.recorded:
                words |= {**self._room(0, 0), "tape": found.tape}
                self._fresh = True
            self._count(0 if self.recorded else self.steps, self.steps if self.recorded else 0)
            self._final = found.final
            return layout.unpacked(found.outputs)
        words["work"] = self._final = work = words["x0"].clone()
        shape = self.kernel.tiles, self.program.outputs, layout.numbers, layout.width
        outputs = torch.empty(shape, dtype=layout.dtype)
        outputs[:, :1] = work
        if schedule is None:
            rows, runs = plain_rows(self.steps), (self.steps, 0)
        else:
            rowed = rows_of(schedule, self.steps, False)
            self._fresh, rows, runs = True, rowed.forward, rowed.runs[0]
            words |= self._room(rowed.slots, rowed.tape)
        self.kernel.call({**words, "rows": rows, "row_count": rows.shape[0], "outputs": outputs, "emitting": 1})
        self._count(*runs)
        return layout.unpacked(outputs)

    def final(self) -> State:
        """The last state."""
        return tuple(x[0] for x in self.kernel.layout.unpacked(self._final))

    def check(self) -> None:
        self.watch()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        """Cotangents of (x_0, the program's inputs, the captured tensors)."""
        kernel, words, program = self.kernel, self._words, self.program
        assert self._schedule is not None
        rowed = rows_of(self._schedule, self.steps, not self._fresh)
        if not self._fresh:
            words |= self._room(rowed.slots, rowed.tape)
        self._fresh = False
        seeds = self._packed(of_outputs, program.outputs)
        lam = self._packed([None if x is None else x[None] for x in of_state], 1)
        lam = lam.clone() if of_state else lam
        sums, layout = kernel.sums(), kernel.layout
        ends = torch.zeros(self.steps + 1 if kernel.times else 1, layout.width, dtype=torch.float64)
        more = {
            "rows": rowed.backward,
            "row_count": rowed.backward.shape[0],
            "cotangents": seeds,
            "lam": lam,
            "ends": ends,
        }
        if self._explored is not None:
            more["g"] = torch.empty((program.tableau.stages + 1) * layout.numbers, dtype=layout.dtype)
        kernel.call({**words, **more, **sums})
        for name in ("slots", "tape"):
            words.pop(name)
        self._count(*rowed.runs[1])
        note_systems(program, rowed.runs[1][0] + self.steps)
        first = layout.unpacked(lam + seeds[:, :1])
        program.begin_reverse()
        if kernel.times:
            program.take_ends(ends.sum(1))
        found = zip(kernel.of_held(sums, self.held), self.held, strict=True)
        captured = [g for g, x in found if x.requires_grad]
        return [*(x[0] for x in first), *program.input_cotangents(), *captured]

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        return self.linearised().tangents(directions)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        return self.linearised().second(of_outputs, of_state, directions)

    def _room(self, slots: int, tape: int) -> dict[str, Any]:
        """Memory for kept states."""
        like = self._words["x0"]
        size = like.numel()
        places = {"slots": like.new_empty(slots * size), "tape": like.new_empty(tape * size)}
        return {**places, "slots_each": slots, "tape_each": tape}

    def _count(self, plain: int, recorded: int) -> None:
        self.runs.plain_runs += plain
        self.runs.recorded_runs += recorded
        self.program.evaluations += self.program.tableau.weighted * (plain + recorded)

    def _packed(self, cotangents: Sequence[Tensor | None], count: int) -> Tensor:
        """Cotangents by leaf, of so many rows; what is None is zero."""
        layout = self.kernel.layout
        if not cotangents:
            return torch.zeros((self.kernel.tiles, count, layout.numbers, layout.width), dtype=layout.dtype)
        pairs = zip(cotangents, self.state, strict=True)
        whole = [like.new_zeros(()).expand(count, *like.shape) if x is None else x for x, like in pairs]
        return layout.packed(whole, layout.members, zeros=True)
