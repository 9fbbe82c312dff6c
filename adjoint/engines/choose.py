"""Which engine takes the steps of one chain, and why: the only place where that is decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adjoint.autograd import AutogradStepper
from adjoint.engines.native.cells import Refused
from adjoint.engines.native.kernel import Kernel, kernel_for
from adjoint.engines.native.trace import Held
from adjoint.problem import Problem
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tensors import State
from adjoint.timeline import FixedTimeline

ENGINES = ("auto", "eager", "native")
EAGER = "eager: torch operations, one at a time"


@dataclass(frozen=True)
class Choice:
    """How the steps are taken: by a compiled program, or by torch if there is none."""

    said: str
    kernel: Kernel | None = None
    held: Held | None = None
    known: bool = False
    """Whether the program was there, and f has been tried, before."""


def chosen(problem: Problem, stepper: AutogradStepper, state: State) -> Choice:
    if problem.engine != "native":
        return Choice(EAGER)
    try:
        _suits(problem, state)
        assert isinstance(problem.program, ExplicitProgram)
        held = Held.of(stepper.captured.reach, state[0].dtype)
        kernel, known = kernel_for(problem.program, held, state)
    except Refused as reason:
        return Choice(f"{EAGER}; the native engine does not take {reason}")
    where = "kept on disk" if kernel.compiled.from_disk else "compiled"
    layout = kernel.layout
    shape = (
        f"{layout.numbers} numbers" if layout.dim is None else f"{layout.members} members of {layout.numbers} numbers"
    )
    said = f"native: {'known already' if known else where}, {shape}, every sweep in one call"
    return Choice(said, kernel, held, known)


def _suits(problem: Problem, state: State) -> None:
    """Raises Refused, with what stands in the way."""
    program = problem.program
    if type(program) is not ExplicitProgram:
        raise Refused("this kind of step (observe=, implicit, multistep or lock-step)")
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
    if not isinstance(program.timeline, FixedTimeline):
        raise Refused(f"controlled steps (method={program.tableau.name!r})")
    if any(x.device.type != "cpu" for x in state):
        raise Refused(f"tensors on {state[0].device}")
    if torch.is_autocast_enabled("cpu"):
        raise Refused("autocast")
