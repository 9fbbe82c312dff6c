"""Runge-Kutta stages as tapes: what ``revolve.Stages`` keeps of a step, in place of torch's graph.

A kept tape is the points Y_1 .. Y_l at which f was evaluated for the new state; Y_1 is the state before the step. To
transpose the step, f is evaluated there once more, with its graph: a linearisation, which is in no plan and is counted
apart. The latest step stays on its graph until another one runs, so that a step that is transposed at once needs none.
"""

from __future__ import annotations

from typing import Any

import torch

from adjoint.autograd import AutogradStepper, Cotangent, Recorded
from adjoint.captured import Captured
from adjoint.marks import agree
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.stages import Stages as Computed
from adjoint.tensors import State, differentiable
from revolve import Stages


class StageTape:
    """One recorded step: on its graph, or as the points of its stages."""

    def __init__(self, step: int, block: Recorded, computed: Computed) -> None:
        self.step, self.fresh = step, block.fresh
        self.block: Recorded | None = block
        self.computed: Computed | None = computed
        self.points: tuple[State, ...] = ()

    def lay_aside(self, stages: int) -> None:
        """Keep the points, and let the graph go."""
        if self.computed is not None:
            self.points = points_of(self.computed, stages)
            self.block = self.computed = None


def points_of(computed: Computed, stages: int) -> tuple[State, ...]:
    """The points of a step's first stages, without their graph; one more is the state after the step."""
    with torch.no_grad():
        inner = computed.program.tableau.weighted
        points = [computed.point(i) for i in range(inner)]
        points += [computed.new] * (stages - inner)
        return tuple(tuple(x.detach() for x in point) for point in points)


class StagedStepper(AutogradStepper):
    """The same steps and the same gradient, with stages on kept tapes."""

    def __init__(self, program: ExplicitProgram, captured: Captured, stages: int) -> None:
        super().__init__(program, captured)
        self.block = 1
        self._stages = stages
        self._latest: StageTape | None = None
        self._computed: Computed | None = None
        program.watch = self._watch

    def _watch(self, computed: Computed) -> None:
        self._computed = computed

    def advance(self, state: State, start: int, stop: int) -> State:
        self._lay_aside()
        return super().advance(state, start, stop)

    def record(self, state: State, start: int, stop: int) -> tuple[State, list[Any]]:
        tape: list[Any] = []
        for k in range(start, stop):
            self._lay_aside()
            state, (block,) = super().record(state, k, k + 1)
            assert self._computed is not None
            self._latest = StageTape(k, block, self._computed)
            tape.append(self._latest)
            self._computed = None
        return state, tape

    def reverse(self, tape: list[Any], cotangent: Cotangent) -> Cotangent:
        while tape:
            one = tape.pop()
            if one is self._latest:
                self._latest = None
            self._lay_aside()
            block = self._linearised(one) if one.block is None else one.block
            cotangent = super().reverse([block], cotangent)
        return cotangent

    def _lay_aside(self) -> None:
        if self._latest is not None:
            self._latest.lay_aside(self._stages)
            self._latest = None

    def _linearised(self, tape: StageTape) -> Recorded:
        """The step on a graph again, from its first point; its other points must come out as they were."""
        before = self.program.evaluations
        leaves = tuple(x.detach().requires_grad_() if differentiable(x) else x for x in tape.points[0])
        if tape.fresh:
            self.cuts.update((x, True) for x in leaves if x.requires_grad)
        step = self.recorded_step(tape.step, leaves)
        self.linearisations += self.program.evaluations - before
        self.program.evaluations = before
        assert self._computed is not None
        again, self._computed = points_of(self._computed, self._stages), None
        for i, (new, old) in enumerate(zip(again, tape.points, strict=True)):
            if not all(map(agree, old, new)):
                raise RuntimeError(
                    f"f gave other values when step {tape.step} was linearised: stage {i} is at another point than "
                    f"before. f must give the same values for the same t and y; keep what it draws or "
                    f"counts in its arguments"
                )
        return Recorded(leaves, [step], tape.fresh)


def staged(program: Any, captured: Captured, schedule: Stages) -> StagedStepper:
    """A stepper for this schedule; ValueError if the method's steps have other stages, or none."""
    if type(program) is not ExplicitProgram:
        raise ValueError(
            f"schedule={schedule}: only explicit Runge-Kutta steps have stages to keep; take Mixed or Binomial"
        )
    tableau = program.tableau
    if schedule.last_is_solution and not tableau.first_same_as_last:
        raise ValueError(
            f"schedule={schedule}: the last stage of {tableau.name} is not the end of the step; "
            f"leave last_is_solution out"
        )
    stages = tableau.weighted + schedule.last_is_solution
    if schedule.stages != stages:
        raise ValueError(
            f"schedule={schedule}: a step of {tableau.name} has {stages} such stages; give stages={stages}"
        )
    return StagedStepper(program, captured, stages)
