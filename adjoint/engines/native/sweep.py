"""A whole chain natively: its first sweep, and its reverse sweep as torch wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.captured import Captured
from adjoint.engines.native.kernel import Kernel
from adjoint.engines.native.rows import plain_rows, rows_of
from adjoint.engines.native.trace import Held
from adjoint.join import TwiceDifferentiable
from adjoint.memories import Memories
from adjoint.memory import SHARE, free_bytes
from adjoint.probe import Weights
from adjoint.problem import Problem
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tangents import Directions, Second
from adjoint.tensors import State, bytes_of
from adjoint.timeline import FixedTimeline
from revolve import Plan, Schedule, parse_bytes
from revolve.actions import RECORD


def native_plan(problem: Problem, captured: Captured, state: State) -> Plan:
    """The caller's plan, or the cheapest: here the tape of a step is the state before it."""
    steps, size = problem.steps, bytes_of(state)
    assert steps is not None
    working = 4 * size + 2 * size * problem.program.outputs + 8 * steps
    rest = (captured, state, Weights(size, size, working), None)
    memories = Memories(problem, *rest)
    memories.check()
    if problem.slots is not None or problem.schedule is not None:
        return memories.plan(steps)
    room = free_bytes(state[0].device) // SHARE if problem.budget is None else parse_bytes(problem.budget)
    if working + size * steps <= room:
        return memories.plan(steps, recorded=True)
    return Memories(replace(problem, budget=None, slots=(room - working) // size), *rest).plan(steps)


class NativeSweep:
    """One trajectory, by one call forwards and one back; it may be reversed again and again.

    ``linearised`` makes what the derivative of this sweep is had from: the same chain in torch.
    """

    def __init__(
        self,
        kernel: Kernel,
        stepper: AutogradStepper,
        held: Held,
        state: State,
        linearised: Callable[[], TwiceDifferentiable],
    ) -> None:
        assert isinstance(stepper.program, ExplicitProgram)
        self.kernel, self.stepper, self.program, self.held = kernel, stepper, stepper.program, held
        self.state, self.steps = state, stepper.program.timeline.steps
        self._linearised = linearised
        self._schedule: Schedule | None = None
        self._fresh = False
        self._words = self._begin()

    def _begin(self) -> dict[str, Any]:
        """What both sweeps need."""
        kernel, program, timeline = self.kernel, self.program, self.program.timeline
        assert isinstance(timeline, FixedTimeline)
        times = timeline.times
        sign = 1.0 if times[-1] >= times[0] else -1.0
        places = np.searchsorted(sign * times, sign * np.array(program.asked.t))
        self._index = np.full(self.steps, -1, dtype=np.int64)
        self._index[places[1:] - 1] = np.arange(1, len(places))
        start = kernel.layout.packed([x[None] for x in self.state], kernel.layout.members)
        words = {"times": times, "index": self._index, "x0": start, "work": start.clone()}
        return {**words, **kernel.inputs(self.held.tensors), "outputs_each": program.outputs}

    def forward(self, schedule: Schedule | None) -> tuple[list[Tensor], State]:
        """Outputs by leaf, and the last state. Without a schedule nothing is kept."""
        words, layout = self._words, self.kernel.layout
        outputs = layout.packed([x.new_empty(self.program.outputs, *x.shape) for x in self.state], layout.members)
        outputs[:, :1] = words["x0"]
        if schedule is None:
            rows, plain, recorded = plain_rows(self.steps), self.steps, 0
        else:
            rowed = rows_of(schedule, self.steps, False)
            self._schedule, self._fresh, rows = schedule, True, rowed.forward
            words |= self._room(rowed.slots, rowed.tape)
            plain = rowed.plain_runs[0]
            recorded = self.steps - plain
        self.kernel.call({**words, **_rows(rows), "outputs": outputs, "emitting": 1})
        self._count(plain, recorded)
        return layout.unpacked(outputs), tuple(x[0] for x in layout.unpacked(words["work"]))

    def check(self) -> None:
        self.stepper.captured.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        """Cotangents of (x_0, the program's inputs, the captured tensors)."""
        kernel, words, program = self.kernel, self._words, self.program
        assert self._schedule is not None
        rowed = rows_of(self._schedule, self.steps, not self._fresh)
        if not self._fresh:
            words |= self._room(rowed.slots, rowed.tape)
        self._fresh = False
        seeds, lam = (
            self._packed(of_outputs, program.outputs),
            self._packed([x if x is None else x[None] for x in of_state], 1),
        )
        sums, width = kernel.sums(), kernel.layout.width
        ends = torch.zeros(self.steps + 1 if kernel.times else 1, width, dtype=torch.float64)
        kernel.call({**words, **_rows(rowed.backward), "cotangents": seeds, "lam": lam, "ends": ends, **sums})
        for name in ("slots", "tape"):
            words.pop(name)
        self._count(rowed.plain_runs[1], self.steps - (rowed.forward[:, 0] == RECORD).sum())
        first = kernel.layout.unpacked(lam + seeds[:, :1])
        program.begin_reverse()
        if kernel.times:
            program.take_ends(ends.sum(1))
        of_held = dict(zip(map(id, self.held.tensors), kernel.of_held(sums, self.held.tensors), strict=True))
        captured = [of_held[id(x)] for x in self.stepper.captured.tensors]
        return [*(x[0] for x in first), *program.input_cotangents(), *captured]

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        return self._linearised().tangents(directions)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        return self._linearised().second(of_outputs, of_state, directions)

    def _room(self, slots: int, tape: int) -> dict[str, Any]:
        """Memory for kept states."""
        like = self._words["x0"]
        size = like.numel()
        places = {"slots": like.new_empty(slots * size), "tape": like.new_empty(tape * size)}
        return {**places, "slots_each": slots, "tape_each": tape}

    def _count(self, plain: int, recorded: int) -> None:
        self.stepper.plain_runs += plain
        self.stepper.recorded_runs += int(recorded)
        self.program.evaluations += self.program.tableau.weighted * (plain + int(recorded))

    def _packed(self, cotangents: Sequence[Tensor | None], count: int) -> Tensor:
        """Cotangents by leaf, of so many rows; what is None is zero."""
        layout, zero = self.kernel.layout, torch.zeros((), dtype=self.kernel.dtype)
        given = cotangents or [None] * len(self.state)
        whole = [zero.expand(count, *like.shape) if x is None else x for x, like in zip(given, self.state, strict=True)]
        return layout.packed(whole, layout.members, zeros=True).clone()


def _rows(rows: np.ndarray) -> dict[str, Any]:
    return {"rows": rows, "row_count": len(rows)}
