"""The exact gradient of the numbers that were computed, by a schedule within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Ambient, AutogradStepper, Reversal, Sweep, TooManyTapes, join
from adjoint.captured import Captured
from adjoint.probe import Weights, probe, unchanging
from adjoint.problem import Outcome, Problem, Stats
from adjoint.steppers.lockstep import LockstepProgram, MemberSweep
from adjoint.stores import Slots
from adjoint.tensors import State
from adjoint.timeline import SolveError
from revolve import Plan, Run, StoreAll


@dataclass(frozen=True)
class Discrete:
    """The discrete adjoint: every step transposed, in reverse, from states kept or recomputed."""

    def __call__(self, problem: Problem) -> Outcome:
        program = problem.program
        captured = Captured(problem.function, program.label)
        for x in problem.state:
            captured.watch("the first state", x)
        for x in (*program.inputs, *program.series):
            captured.watch("an input", x)
        state = tuple(x.detach().contiguous() for x in problem.state)
        stepper = AutogradStepper(program, captured)
        stepper.tick = problem.tick
        everything = (*problem.state, *program.inputs, *captured.tensors)
        if stepper.tracking and any(x.requires_grad for x in everything):
            ambient = Ambient()
            with ambient.entered():
                return _differentiable(problem, stepper, state, ambient)
        program.begin(problem.function, problem.state)
        final, failure = run_plainly(stepper, state, problem.steps)
        last = tuple(x.clone() for x in final) if problem.wants_final else None
        return Outcome(stepper.outputs.buffers, last, _stats(stepper), None, failure)


def run_plainly(
    stepper: AutogradStepper, state: State, steps: int | None, start: int = 0
) -> tuple[State, SolveError | None]:
    """Steps from ``start`` to the end; nothing is kept."""
    if start == 0:
        stepper.start(state)
    if steps is not None:
        return stepper.advance(state, start, steps), None
    try:
        while not stepper.program.done:
            state = stepper.advance(state, start, start + 1)
            start += 1
    except SolveError as error:
        return state, error
    return state, None


def _stats(stepper: AutogradStepper) -> Stats:
    return Stats(stepper.program, stepper, stepper.frontier)


def _differentiable(problem: Problem, stepper: AutogradStepper, state: State, ambient: Ambient) -> Outcome:
    program = problem.program
    weights = probe(problem, stepper.captured, state)
    device = state[0].device
    weights.check(problem.budget, device)
    slots = Slots(state)
    failure: SolveError | None = None
    plan: Plan | None = None
    with unchanging(state, stepper.captured):
        if problem.steps is not None:
            plan = weights.plan(problem.steps, problem.slots, problem.budget, device)
            run = Run[Any, Any, Any](plan.schedule, stepper, {0: slots}, given=True)
            stepper.start(state)
            final = run.forward(state, problem.steps)
        else:
            recorded, final, failure = _explore(problem, stepper, state, weights, slots)
    stepper.captured.check_unwritten()
    if problem.steps is None:
        if stepper.frontier == 0:
            return Outcome(_only_first(problem, stepper), final, _stats(stepper), None, failure)
        if recorded is not None:
            run, plan = recorded, weights.plan(stepper.frontier, "all", None, device)
        else:
            plan = weights.plan(stepper.frontier, problem.slots, problem.budget, device)
            run = Run[Any, Any, Any](plan.schedule, stepper, {0: slots}, given=True)
            run.adopt(state, stepper.frontier)
    values, stepper.outputs.buffers = stepper.outputs.buffers, []
    inputs = (*problem.state, *program.inputs, *stepper.captured.tensors)
    sweep = Sweep(run, stepper, slots, ambient)
    reversal: Reversal = MemberSweep(sweep, program) if isinstance(program, LockstepProgram) else sweep
    outputs, last = join(reversal, values, final if problem.wants_final else None, inputs)
    return Outcome(outputs, last, _stats(stepper), plan, failure)


def _only_first(problem: Problem, stepper: AutogradStepper) -> list[Tensor]:
    """The outputs when not even one step was taken: the first state is the caller's own."""
    pairs = zip(problem.state, stepper.outputs.buffers, strict=True)
    return [torch.cat((x[None], rest[1:])) for x, rest in pairs]


def _explore(
    problem: Problem, stepper: AutogradStepper, state: State, weights: Weights, slots: Slots
) -> tuple[Run[Any, Any, Any] | None, State, SolveError | None]:
    """Find the end: recording as long as the tapes may stay, plainly (and then without a Run) from there on."""
    start = 0
    if problem.slots is None or problem.slots == "all":
        if problem.slots is None:
            stepper.most_tapes = weights.most_tapes(problem.budget, state[0].device)
        run = Run[Any, Any, Any](StoreAll(), stepper, {0: slots}, given=True)
        stepper.start(state)
        try:
            return run, run.forward(state, None), None
        except TooManyTapes as full:
            run.clear()
            start, state = full.step, full.state
        except SolveError as error:
            run.clear()
            return None, state, error
        finally:
            stepper.most_tapes = None
    final, failure = run_plainly(stepper, state, None, start)
    return None, final, failure
