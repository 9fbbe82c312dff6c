"""Which engine takes the steps of one chain, and why: the only place where that is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.autograd import AutogradStepper
from adjoint.engines.native.cells import Refused
from adjoint.engines.native.kernel import Kernel, kernel_for
from adjoint.engines.native.trace import Held
from adjoint.linear import Dense
from adjoint.problem import Problem
from adjoint.steppers.control import Control
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.implicit import ImplicitProgram
from adjoint.steppers.rosenbrock import RosenbrockProgram
from adjoint.tensors import State
from adjoint.timeline import FixedTimeline

ENGINES = ("auto", "eager", "native")
EAGER = "eager: torch operations, one at a time"
WORTH = 1000
"""Fixed steps from which on "auto" compiles: so many take torch longer than to trace and to compile."""


@dataclass(frozen=True)
class Choice:
    """How the steps are taken: by a compiled program, or by torch if there is none."""

    said: str
    kernel: Kernel | None = None
    held: Held | None = None
    known: bool = False
    """Whether the program was there, and f has been tried, before."""


def chosen(problem: Problem, stepper: AutogradStepper, state: State) -> Choice:
    if problem.engine == "eager":
        return Choice(EAGER)
    if problem.engine == "auto" and (problem.steps is None or problem.steps < WORTH):
        return Choice(f"{EAGER}; engine='auto' compiles {WORTH} fixed steps and more")
    try:
        _suits(problem, state)
        assert isinstance(problem.program, ExplicitProgram)
        held = Held.of(stepper.captured.reach, state[0].dtype)
        kernel, known = kernel_for(problem.program, held, state)
    except Refused as reason:
        return Choice(f"{EAGER}; the native engine does not take {reason}")
    where = "kept on disk" if kernel.compiled.from_disk else "compiled"
    return Choice(kernel.said("known already" if known else where), kernel, held, known)


def _suits(problem: Problem, state: State) -> None:
    """Raises Refused, with what stands in the way."""
    program = problem.program
    if isinstance(program, ImplicitProgram):
        _suits_system(program)
    elif type(program) is not ExplicitProgram:
        raise Refused("this kind of step (observe=, multistep or lock-step)")
    wishes = {
        "journal=": problem.journal,
        "tiers=": problem.tiers,
        "check=True": problem.check or None,
        "callbacks": problem.reversing or program.control.callbacks or program.control.twins or None,
        "progress": problem.tick,
        "events": program.view,
        "jumps": program.control.jumps or program.edges or None,
    }
    for name, wish in wishes.items():
        if wish is not None:
            raise Refused(name)
    timeline, control = program.timeline, program.control
    if isinstance(timeline, AdaptiveTimeline):
        _suits_control(program, timeline, control)
    elif not isinstance(timeline, FixedTimeline):
        raise Refused("steps on a grid of their own")
    if any(x.device.type != "cpu" for x in state):
        raise Refused(f"tensors on {state[0].device}")
    if torch.is_autocast_enabled("cpu"):
        raise Refused("autocast")


def _suits_system(program: ImplicitProgram) -> None:
    """Raises Refused for equations that it does not solve."""
    if type(program) is not RosenbrockProgram:
        raise Refused("Newton's method")
    odd = {
        f"linear={program.how.linear}": program.how.linear != Dense(),
        "a mass matrix": program.how.mass is not None,
    }
    for name, wish in odd.items():
        if wish:
            raise Refused(name)


def _suits_control(program: ExplicitProgram, timeline: AdaptiveTimeline, control: Control) -> None:
    """Raises Refused for what the compiled control does not do."""
    tolerance = control.tolerance
    odd = {
        "times that require grad, with controlled steps": bool(program.inputs),
        "a norm": tolerance.norm is not None,
        "tolerances by component": not all(isinstance(x, (int, float)) for x in (tolerance.rtol, tolerance.atol)),
        "stops": bool(control.stops),
        "ends of steps in another precision": control.rounding != torch.float64,
        "force_min=True": control.controller.force_min,
        "a method without an interpolant": program.tableau.dense is None,
        "steps that are known, with an interpolant": timeline.steps > 0,
        "a solve without an end": math.isinf(timeline.stop),
    }
    for name, wish in odd.items():
        if wish:
            raise Refused(name)
