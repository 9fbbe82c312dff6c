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
from adjoint.engines.native.kernel import Kernel, flat
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
        start = flat(self.state, kernel.dtype)
        return {
            "times": times,
            "index": self._index,
            "x0": start,
            "work": start.clone(),
            "p": flat(self.held.tensors, kernel.dtype),
            "pre": torch.empty(kernel.hoisted, dtype=torch.float64),
            "last_tile": 1,
        }

    def forward(self, schedule: Schedule | None) -> tuple[list[Tensor], State]:
        """Outputs by leaf, and the last state. Without a schedule nothing is kept."""
        words, leaves = self._words, self.kernel.leaves
        outputs = torch.empty((self.program.outputs, leaves), dtype=self.kernel.dtype)
        outputs[0] = words["x0"]
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
        return self._by_leaf(outputs), tuple(self._by_leaf(words["work"][None]))

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
        shape = (program.outputs, kernel.leaves)
        seeds = self._whole(of_outputs, shape)
        lam = self._whole(of_state, (1, kernel.leaves))[0].clone()
        mu = torch.zeros(kernel.held, dtype=kernel.dtype)
        ends = torch.zeros(self.steps + 1 if kernel.times else 1, dtype=torch.float64)
        kernel.call({**words, **_rows(rowed.backward), "cotangents": seeds, "lam": lam, "mu": mu, "ends": ends})
        for name in ("slots", "tape"):
            words.pop(name)
        self._count(rowed.plain_runs[1], self.steps - (rowed.forward[:, 0] == 1).sum())
        first = self._by_leaf((lam + seeds[0])[None])
        program.begin_reverse()
        if kernel.times:
            program.take_ends(ends)
        return [*(x[0] for x in first), *program.input_cotangents(), *self._of_captured(mu)]

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        return self._linearised().tangents(directions)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        return self._linearised().second(of_outputs, of_state, directions)

    def _room(self, slots: int, tape: int) -> dict[str, Any]:
        leaves, dtype = self.kernel.leaves, self.kernel.dtype
        return {
            "slots": torch.empty(slots * leaves, dtype=dtype),
            "tape": torch.empty(tape * leaves, dtype=dtype),
            "slots_each": slots,
            "tape_each": tape,
        }

    def _count(self, plain: int, recorded: int) -> None:
        self.stepper.plain_runs += plain
        self.stepper.recorded_runs += int(recorded)
        self.program.evaluations += self.program.tableau.weighted * (plain + int(recorded))

    def _by_leaf(self, rows: Tensor) -> list[Tensor]:
        """Rows of numbers as leaves with a leading dimension."""
        if len(self.state) == 1:
            return [rows.view(len(rows), *self.state[0].shape)]
        parts = rows.split([x.numel() for x in self.state], 1)
        return [x.reshape(len(rows), *like.shape) for x, like in zip(parts, self.state, strict=True)]

    def _whole(self, cotangents: Sequence[Tensor | None], shape: tuple[int, int]) -> Tensor:
        """Cotangents by leaf as rows of numbers."""
        if not any(x is not None for x in cotangents):
            return torch.zeros(shape, dtype=self.kernel.dtype)
        pairs = zip(cotangents, self.state, strict=True)
        parts = [
            torch.zeros((shape[0], like.numel()), dtype=self.kernel.dtype)
            if x is None
            else x.reshape(shape[0], like.numel())
            for x, like in pairs
        ]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()

    def _of_captured(self, mu: Tensor) -> list[Tensor | None]:
        """The parts that belong to the tensors that require grad; None where nothing depends on one."""
        found: dict[int, Tensor | None] = {}
        first = 0
        for x in self.held.tensors:
            size = x.numel()
            used = any(j in self.kernel.reached for j in range(first, first + size))
            found[id(x)] = mu[first : first + size].view(x.shape) if used else None
            first += size
        return [found[id(x)] for x in self.stepper.captured.tensors]


def _rows(rows: np.ndarray) -> dict[str, Any]:
    return {"rows": rows, "row_count": len(rows)}
