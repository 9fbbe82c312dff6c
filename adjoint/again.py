"""A solve that has been made before, made again: only what may have changed is looked at.

The native engine needs some microseconds for a small solve; reading arguments, following what f holds, and planning take
a hundred times as long. So a solve that it carried out leaves behind a :class:`Pattern` of f and what does not depend on
numbers. A call that is the same in everything else, and whose f fits the pattern, goes straight to the compiled program.
"""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.ambient import Ambient
from adjoint.captured import check_versions
from adjoint.discrete import Native, linearised_chain, prepare
from adjoint.engines.native.adaptive import begin
from adjoint.engines.native.kernel import Kernel
from adjoint.engines.native.pattern import NoPattern, Pattern
from adjoint.engines.native.sweep import NativeSweep
from adjoint.frozen import replaying
from adjoint.join import Sweep, join
from adjoint.memory import SHARE, free_bytes
from adjoint.problem import Outcome, Problem, Runs, Stats
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tensors import State, Structure
from adjoint.timeline import FixedTimeline
from revolve import Plan, StoreAll

KEPT = 64
"""Calls that are known at once .."""
EACH = 4
""".. and of each so many functions of the same code that hold other things."""
AGE = 0.05
"""Seconds for which the free memory counts as known."""


class Call(NamedTuple):
    """All of a call to ``solve`` that is no number in a tensor, and not what f holds."""

    code: Any
    structure: Structure | None
    """None: a single tensor."""
    forms: tuple[Any, ...]
    times: Any
    wishes: tuple[Any, ...]
    ambient: tuple[Any, ...]


def call_of(f: Any, structure: Structure, state: State, t: Any, wishes: tuple[Any, ...]) -> Call | None:
    """The call, if it is one of those that may be known."""
    if isinstance(t, Tensor):
        if type(t) is not Tensor or t.requires_grad or t.dtype not in (torch.float64, torch.float32) or not t.is_cpu:
            return None
        times: Any = t.dtype, t.numpy().tobytes() if t.ndim == 1 and not t.is_neg() else None
    elif type(t) in (list, tuple) and all(type(x) in (float, int) for x in t):
        times = array("d", t).tobytes()
    else:
        return None
    if any(isinstance(x, Tensor) for x in wishes):
        return None
    if any(type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided for x in state) or _surrounded():
        return None
    forms = tuple([(x.shape, x.dtype, x.requires_grad) for x in state])
    ambient = torch.is_grad_enabled(), torch.get_default_dtype()
    code = getattr(f, "__code__", type(f))
    call = Call(code, None if structure.single else structure, forms, times, (*wishes, *map(type, wishes)), ambient)
    try:
        hash(call)
    except TypeError:
        return None
    return call


def _surrounded() -> bool:
    """Whether something around the call may change what torch does."""
    modes = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    return bool(modes or torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or replaying())


@dataclass
class Known:
    """What stays of a solve that the native engine carried out; it holds none of the caller's tensors."""

    pattern: Pattern
    kernel: Kernel
    program: ExplicitProgram
    """As it is before the first step."""
    fixed: dict[str, Any] | None
    plan: Plan | None
    unbounded: bool
    """Whether the free memory decides about the plan."""
    said: str
    problem: dict[str, Any]
    """What a :class:`Problem` is made of, beside function, program and state."""
    held: list[str]
    """How to call the tensors that f holds, in the order of the pattern."""
    ambient: Ambient

    def outcome(self, root: Any, state: State, times: Tensor) -> Outcome | None:
        """The solve; None if it is not known after all, or does not come to a good end."""
        found = self.pattern.found(root)
        if found is None or (self.unbounded and self.plan is not None and not self._fits(self.plan)):
            return None
        tensors, every = found
        program = _afresh(self.program, times)
        spoken = ("the first state",) * len(state)
        versions = [(name, x, x._version) for name, x in zip((*self.held, *spoken), (*every, *state), strict=True)]
        inputs = (*state, *(x for x in tensors if x.requires_grad))
        runs = Runs()
        stats = Stats(program, runs)

        def watch() -> None:
            check_versions(versions)

        def linearised() -> Sweep:
            again = self.pattern.found(root)
            if again is None or any(x is not y for x, y in zip(again[1], every, strict=True)):
                raise RuntimeError(
                    "what f holds was changed between the solve and the derivative of its gradient; make both first"
                )
            problem = Problem(program, root, state, **self.problem)
            stepper, first, _ = prepare(problem)
            stepper.plain_runs, stepper.recorded_runs = runs.plain_runs, runs.recorded_runs
            stepper.frontier, stats.stepper = program.timeline.steps, stepper
            return linearised_chain(problem, stepper, first, self.ambient)

        sweep = NativeSweep(self.kernel, program, state, tensors, runs, watch, linearised, self.fixed)
        plan = self.plan
        if isinstance(program.timeline, AdaptiveTimeline):
            begin(program, root, state)
            if not sweep.explore(self._most(plan)):
                return None
            plan = None if plan is None else self._planned(plan, program.timeline.steps, sweep.recorded)
            if (plan is None) != (self.plan is None):
                return None
        stats.steps = program.timeline.steps
        outputs = sweep.forward(None if plan is None else plan.schedule)
        if not all(math.isfinite(x.sum().item()) for x in outputs):
            return None  # the long way says where
        if plan is not None:
            outputs, _ = join(sweep, outputs, None, inputs)
        return Outcome(outputs, None, stats, plan, None, self.said)

    def _most(self, plan: Plan | None) -> int:
        """How many states may be recorded while the steps are found."""
        if plan is None or not self.unbounded:
            return 0
        return (_free() // SHARE - plan.working_bytes + 8 * plan.steps) // (plan.state_bytes + 8)

    def _planned(self, plan: Plan, steps: int, recorded: bool) -> Plan | None:
        """The plan of another number of steps, if it is one that keeps everything."""
        if not recorded or not isinstance(plan.schedule, StoreAll):
            return None
        return (
            plan
            if steps == plan.steps
            else replace(plan, steps=steps, working_bytes=plan.working_bytes + 8 * (steps - plan.steps))
        )

    def _fits(self, plan: Plan) -> bool:
        return isinstance(plan.schedule, StoreAll) and plan.bytes <= _free() // SHARE


def _afresh(program: ExplicitProgram, times: Tensor) -> ExplicitProgram:
    """A program that has not taken a step yet."""
    other = object.__new__(type(program))
    other.__dict__.update(program.__dict__)
    other.evaluations, other.t = 0, times
    other.begin_anew()
    if isinstance(program.timeline, AdaptiveTimeline):
        other.timeline = replace(program.timeline, rejected=0)
    return other


_read = (-1.0, 0)


def _free() -> int:
    """The free memory: asking for it takes longer than a small solve."""
    global _read
    now = time.monotonic()
    if now - _read[0] > AGE:
        _read = now, free_bytes(torch.device("cpu"))
    return _read[1]


_known: dict[Call, list[Known]] = {}


def is_known(call: Call) -> bool:
    """Whether such a call has been made, with whatever function of the same code."""
    return call in _known


def known(call: Call, root: Any, state: State, times: Tensor) -> Outcome | None:
    """The outcome of a call that has been made before with such a function."""
    for candidate in _known.get(call, ()):
        outcome = candidate.outcome(root, state, times)
        if outcome is not None:
            return outcome
    return None


def remember(call: Call, native: Native, outcome: Outcome) -> None:
    """Keep what a solve by the native engine was made with."""
    problem, plan = native.problem, outcome.plan
    program, held, free = problem.program, native.held, problem.slots is None and problem.budget is None
    if type(program) is not ExplicitProgram:
        return
    fixed = isinstance(program.timeline, FixedTimeline)
    if not fixed and (not free or problem.schedule is not None):
        return
    if plan is not None and free and problem.schedule is None and not isinstance(plan.schedule, StoreAll):
        return
    try:
        pattern = Pattern(held)
    except NoPattern:
        return
    names = {id(x): name for name, x, _ in reversed(native.versions)}
    if any(key not in names for key in pattern.order):
        return
    spoken = [names[key] for key in pattern.order]
    wishes = {name: getattr(problem, name) for name in ("steps", "slots", "budget", "schedule", "engine")}
    said = native.kernel.said("known already")
    sweep = native.sweep.fixed if fixed else None
    unbounded = free and problem.schedule is None
    clean = _afresh(program, torch.empty(0))
    made = Known(pattern, native.kernel, clean, sweep, plan, unbounded, said, wishes, spoken, native.ambient)
    places = _known.setdefault(call, [])
    places.insert(0, made)
    del places[EACH:]
    if len(_known) > KEPT:
        del _known[next(iter(_known))]
