"""The exact gradient of the numbers that were computed, by a schedule within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, TooManyTapes
from adjoint.captured import Captured
from adjoint.checked import CheckedStepper
from adjoint.continued import Continuable, describe, opened
from adjoint.draws import unchanging
from adjoint.engines.choose import EAGER, Choice, chosen
from adjoint.engines.native.adaptive import begin
from adjoint.engines.native.cells import Refused
from adjoint.engines.native.kernel import Kernel
from adjoint.engines.native.sweep import NativeSweep, Room
from adjoint.engines.native.trace import Held
from adjoint.join import Filled, Reversal, Sweep, join
from adjoint.memories import Memories
from adjoint.probe import Unmarked, Weights, probe
from adjoint.problem import Outcome, Problem, Stats
from adjoint.staged import staged
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.lockstep import LockstepProgram
from adjoint.steppers.member_sweep import MemberSweep
from adjoint.tangents import Linearisation
from adjoint.tensors import State
from adjoint.tiers import Store
from adjoint.timeline import SolveError
from revolve import Action, Journal, Online, Plan, Report, Run, Saved, Schedule, Stages, StoreAll
from revolve.journal import Watched


@dataclass(frozen=True)
class Discrete:
    """The discrete adjoint: every step transposed, in reverse, from states kept or recomputed."""

    def __call__(self, problem: Problem) -> Outcome:
        stepper, state, inputs = prepare(problem)
        choice = chosen(problem, stepper, state)
        if choice.kernel is not None:
            try:
                return _natively(problem, stepper, state, inputs, choice)
            except Refused as reason:
                choice = Choice(f"{EAGER}; the native engine does not take {reason}")
        outcome = self._eagerly(problem, stepper, state, inputs)
        outcome.engine = choice.said
        return outcome

    def _eagerly(self, problem: Problem, stepper: AutogradStepper, state: State, inputs: tuple[Tensor, ...]) -> Outcome:
        if stepper.tracking and any(x.requires_grad for x in inputs):
            ambient = Ambient()
            with ambient.entered():
                return _differentiable(problem, stepper, state, ambient)
        return without_gradient(problem, stepper, state)


def prepare(problem: Problem) -> tuple[AutogradStepper, State, tuple[Tensor, ...]]:
    """A stepper, its first state, and all that a gradient may reach: the first state, the inputs, the captured."""
    program = problem.program
    captured = Captured(problem.function, program.label)
    for x in problem.state:
        captured.watch("the first state", x)
    for x in (*program.inputs, *program.series):
        captured.watch("an input", x)
    stages = problem.schedule if isinstance(problem.schedule, Stages) else None
    if problem.check and stages is not None:
        raise ValueError(f"check=True compares states, and schedule={stages} keeps stages; check with slots= once")
    if problem.check:
        stepper: AutogradStepper = CheckedStepper(program, captured)
    else:
        stepper = AutogradStepper(program, captured) if stages is None else staged(program, captured, stages)
    stepper.tick = problem.tick
    if problem.reversing is not None:
        stepper.reversing, stepper.block = problem.reversing, 1
    state = tuple(x.detach().contiguous() for x in problem.state)
    return stepper, state, (*problem.state, *program.inputs, *captured.tensors)


def _natively(
    problem: Problem, stepper: AutogradStepper, state: State, inputs: tuple[Tensor, ...], choice: Choice
) -> Outcome:
    """The whole chain by a compiled program. The derivative of its reverse sweep is had from torch."""
    assert choice.kernel is not None and choice.held is not None and isinstance(problem.program, ExplicitProgram)
    captured, ambient = stepper.captured, Ambient()
    weights = None if choice.known else probe(problem, captured, state)
    if choice.known:
        begin(problem.program, problem.function, problem.state)
    stepper.marks = Unmarked(problem.program.label)

    def linearised() -> Sweep:
        return linearised_chain(problem, stepper, state, ambient, weights)

    kernel, held = choice.kernel, choice.held.tensors
    sweep = NativeSweep(kernel, problem.program, state, held, stepper, captured.check, linearised)
    room = Room(problem, captured, state) if stepper.tracking and any(x.requires_grad for x in inputs) else None
    if problem.steps is None and not sweep.explore(0 if room is None else room.most()):
        raise Refused("a solve that does not reach its end: it is done again, to say why")
    stepper.frontier = problem.program.timeline.steps
    plan = None if room is None else room.plan(stepper.frontier, recorded=sweep.recorded)
    outputs = sweep.forward(None if plan is None else plan.schedule)
    stats = Stats(problem.program, stepper, stepper.frontier)
    last = sweep.final() if problem.wants_final else None
    if plan is not None:
        reversal: Reversal = Filled(sweep, inputs) if problem.zeros else sweep
        outputs, last = join(reversal, outputs, last, inputs)
    native = Native(problem, kernel, choice.held, captured.versions, sweep, ambient)
    return Outcome(outputs, last, stats, plan, None, choice.said, native)


class Native(NamedTuple):
    """What the native engine made a solve with."""

    problem: Problem
    kernel: Kernel
    held: Held
    versions: list[tuple[str, Tensor, int]]
    sweep: NativeSweep
    ambient: Ambient


def linearised_chain(
    problem: Problem, stepper: AutogradStepper, state: State, ambient: Ambient, weights: Weights | None = None
) -> Sweep:
    """A chain whose first sweep has been made elsewhere, in torch: what its derivatives are had from."""
    captured = stepper.captured
    other = Memories(problem, captured, state, weights or probe(problem, captured, state), None)
    stepper.marks = Unmarked(problem.program.label)

    def again(pair: State) -> tuple[Schedule, dict[int, Store]]:
        anew = other.of_pairs(pair)
        second = anew.plan(stepper.frontier)
        return second.schedule, anew.stores(second)

    run, stores = _run(other.plan(stepper.frontier), stepper, other, None)
    return Sweep(run, stepper, stores[0], ambient, Linearisation(stepper, state, again, ambient))


def without_gradient(problem: Problem, stepper: AutogradStepper, state: State) -> Outcome:
    """The values alone."""
    problem.program.begin(problem.function, problem.state)
    journal = _journal(problem, stepper, state)
    final, failure = _plainly(problem, stepper, state, journal)
    if journal is not None:
        journal.finish()
    last = tuple(x.clone() for x in final) if problem.wants_final else None
    outputs = stepper.outputs.finished(problem.program.outputs) or only_first(problem, stepper)
    return Outcome(outputs, last, _stats(stepper), None, failure)


def run_plainly(
    stepper: AutogradStepper, state: State, steps: int | None, start: int = 0, watched: Any = None
) -> tuple[State, SolveError | None]:
    """Steps from ``start`` to the end; nothing is kept. ``watched``: the same stepper, seen by a journal."""
    through = stepper if watched is None else watched
    if start == 0:
        stepper.start(state)
    if steps is not None:
        return through.advance(state, start, steps), None
    try:
        while not stepper.program.done:
            state = through.advance(state, start, start + 1)
            start += 1
    except SolveError as error:
        return state, error
    return state, None


def tried_and_run(problem: Problem, stepper: AutogradStepper, state: State) -> tuple[State, SolveError | None]:
    """All steps plainly, once step 0 has been tried; f is watched while they are taken."""
    probe(problem, stepper.captured, state)
    with unchanging(state, stepper.captured):
        final, failure = run_plainly(stepper, state, problem.steps)
    stepper.captured.check_unwritten()
    return final, failure


def _plainly(
    problem: Problem, stepper: AutogradStepper, state: State, journal: Journal | None
) -> tuple[State, SolveError | None]:
    """The whole chain, from where an earlier process was."""
    if journal is None:
        return run_plainly(stepper, state, problem.steps)
    continuable = Continuable(stepper)
    point, start = journal.begin(state, problem.steps), 0
    if point is not None:
        continuable.restore(point.stepper)
        start, state = point.step, point.value
    try:
        return run_plainly(stepper, state, problem.steps, start, Watched(continuable, journal))
    except BaseException:
        journal.pause()
        raise


def _journal(problem: Problem, stepper: AutogradStepper, state: State) -> Journal | None:
    """The journal that the caller asked for, told which run this is."""
    journal = opened(problem.journal)
    if journal is not None:
        describe(journal, stepper, state)
    return journal


def _stats(stepper: AutogradStepper, stores: dict[int, Store] | None = None) -> Stats:
    return Stats(stepper.program, stepper, stepper.frontier, stores or {})


def _differentiable(problem: Problem, stepper: AutogradStepper, state: State, ambient: Ambient) -> Outcome:
    program = problem.program
    weights = probe(problem, stepper.captured, state)
    with unchanging(state, stepper.captured):
        journal = _journal(problem, stepper, state)
        memories = Memories(problem, stepper.captured, state, weights, journal)
        memories.check()
        if not memories.exact:
            if problem.check:
                raise ValueError("check=True compares bits, and a codec= loses some; leave one of them out")
            stepper.marks = Unmarked(program.label)
        if problem.steps is not None:
            failure: SolveError | None = None
            plan = memories.plan(problem.steps)
            run, stores = _run(plan, stepper, memories, journal)
            stepper.start(state)
            final = run.forward(state, problem.steps)
        else:
            found, final, failure = _explore(problem, stepper, state, memories, journal)
            if failure is not None and journal is not None:
                journal.finish()
                journal = memories.journal = None
            if stepper.frontier == 0:
                return Outcome(only_first(problem, stepper), final, _stats(stepper), None, failure)
            if found is not None:
                run, stores, plan = found
            else:
                plan = memories.plan(stepper.frontier)
                run, stores = _run(plan, stepper, memories, journal)
                run.adopt(state, stepper.frontier)
    stepper.captured.check_unwritten()
    values = stepper.outputs.finished(program.outputs)
    inputs = (*problem.state, *program.inputs, *stepper.captured.tensors)
    frontier = stepper.frontier

    def again(pair: State) -> tuple[Schedule, dict[int, Store]]:
        anew = memories.of_pairs(pair)
        second = anew.plan(frontier)
        return second.schedule, anew.stores(second)

    sweep = Sweep(run, stepper, stores[0], ambient, Linearisation(stepper, state, again, ambient))
    reversal: Reversal = MemberSweep(sweep, program) if isinstance(program, LockstepProgram) else sweep
    if problem.zeros:
        reversal = Filled(reversal, inputs)
    outputs, last = join(reversal, values, final if problem.wants_final else None, inputs)
    return Outcome(outputs, last, _stats(stepper, stores), plan, failure)


Chain = Run[Any, Any, Any]


def _run(
    plan: Plan, stepper: AutogradStepper, memories: Memories, journal: Journal | None
) -> tuple[Chain, dict[int, Store]]:
    stores = memories.stores(plan)
    through: Any = stepper if journal is None else Continuable(stepper)
    return Chain(plan.schedule, through, stores, given=True, journal=journal), stores


def only_first(problem: Problem, stepper: AutogradStepper) -> list[Tensor]:
    """The outputs when not even one step was taken: the first state is the caller's own, if it is an output."""
    if problem.program.initial is None:
        return stepper.outputs.buffers or getattr(problem.program, "unstarted", lambda state: [])(problem.state)
    pairs = zip(problem.state, stepper.outputs.buffers, strict=True)
    return [torch.cat((x[None], rest[1:])) for x, rest in pairs]


def _explore(
    problem: Problem, stepper: AutogradStepper, state: State, memories: Memories, journal: Journal | None
) -> tuple[tuple[Chain, dict[int, Store], Plan] | None, State, SolveError | None]:
    """Find the end: by a schedule that can; or recording as long as the tapes may stay, and then with states alone."""
    most = 0 if journal is not None else memories.most_tapes()
    one_sweep = memories.one_sweep()
    own = problem.schedule if problem.schedule is not None and _finds_ends(problem.schedule) else None
    online = one_sweep or own
    if most == 0 and online is None:
        return None, *_plainly(problem, stepper, state, journal)
    schedule = online or StoreAll()
    stores = memories.all_stores()
    through: Any = stepper if journal is None else Continuable(stepper)
    run = Chain(schedule, through, stores, given=True, journal=journal)
    stepper.most_tapes = most if online is None else None
    stepper.start(state)
    try:
        final = run.forward(state, None)
        if one_sweep is None:
            return (run, stores, memories.plan(stepper.frontier, recorded=online is None)), final, None
        plan = memories.settled(one_sweep, stepper.frontier)
        if plan is not None:
            return (run, stores, plan), final, None
        run.clear()
        return None, final, None
    except TooManyTapes as full:
        run.clear()
        states = full.states
    except SolveError as error:
        run.clear()
        return None, error.state or state, error
    finally:
        stepper.most_tapes, stepper.begun = None, []
    chosen = memories.online_within(stepper.frontier)
    if chosen is None:
        return None, *run_plainly(stepper, states.pop(), None, stepper.frontier)
    return _go_on(chosen, stepper, states, memories)


def _go_on(
    online: Online, stepper: AutogradStepper, states: list[State], memories: Memories
) -> tuple[tuple[Chain, dict[int, Store], Plan] | None, State, SolveError | None]:
    """Find the end with states alone; those up to here are known."""
    start = len(states) - 1
    known = {step: states[step] for step in (*online.kept(start + 1), start)}
    states.clear()
    first, through, stores = known[0], Known(stepper, known, start), memories.all_stores()
    run = Chain(GoingOn(online, start), through, stores, given=True)
    try:
        final = run.forward(first, None)
    except SolveError as error:
        run.clear()
        return None, error.state or first, error
    finally:
        known.clear()
        through.until = 0
    run.schedule = online
    plan = memories.settled(online, stepper.frontier)
    if plan is not None:
        return (run, stores, plan), final, None
    run.clear()
    return None, final, None


class Known:
    """A stepper for which the first steps are known: it gives their ends, where these are still wanted; others are not looked
    at, and the state before stands for them."""

    def __init__(self, stepper: AutogradStepper, states: dict[int, State], until: int) -> None:
        self.stepper, self.states, self.until = stepper, states, until

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stepper, name)

    def advance(self, state: State, start: int, stop: int) -> State:
        return self.states.pop(stop, state) if stop <= self.until else self.stepper.advance(state, start, stop)


@dataclass(frozen=True)
class GoingOn:
    """The first sweep of an online schedule, from where its first steps have been run."""

    online: Online
    start: int

    def forward(self, steps: int | None) -> Iterator[Action]:
        assert steps is None
        return self.online.going_on(self.start)

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return self.online.backward(steps, saved)

    def price(self, steps: int) -> Report:
        return self.online.price(steps)


def _finds_ends(schedule: Schedule) -> bool:
    """Whether a schedule can run a chain whose length it is not told."""
    try:
        next(iter(schedule.forward(None)))
    except ValueError:
        return False
    return True
