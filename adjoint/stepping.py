"""``steps``: a solve taken step by step, in a loop of the caller's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import Controller
from adjoint.failures import broken_step
from adjoint.interpolate import Polynomials
from adjoint.methods import Method, program_of
from adjoint.solve import check_call, checked_times, control_asked_for, method_asked_for, steps_of
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.stages import Stages
from adjoint.steppers.symplectic import split_function
from adjoint.tensors import State, Structure, refuse_writing, versions_of
from adjoint.timeline import SolveError
from adjoint.transforms import mapped

OPEN = 2**62
"""Steps that a solve without an end may take, as far as its timeline is concerned."""


class TakenStep:
    """One step of a solve: its times, and the solution at its end and in between."""

    def __init__(self, number: int, ends: Tensor, stages: Stages, structure: Structure, dtype: torch.dtype) -> None:
        self.number = number
        """Counted from 0."""
        self._ends, self._stages, self._structure = ends, stages, structure
        self.start, self.stop = (x.to(dtype) for x in ends)
        """Times as tensors of no dimension; functions of the caller's ``t`` if that requires grad."""
        self.y = structure.unflatten(stages.new)
        """The state at ``stop``: a tree like y0, on torch's graph."""
        self._polynomial: State | None = None

    def at(self, t: Tensor | float) -> Any:
        """The solution at times of any shape within the step, by the method's dense output: (*times, *shape)."""
        times = torch.as_tensor(t, dtype=self._ends.dtype, device=self._ends.device)
        low, high = sorted(self._ends.detach().tolist())
        coarse = t.dtype if isinstance(t, Tensor) and t.is_floating_point() else self._ends.dtype
        hair = 4 * torch.finfo(coarse).eps * max(abs(low), abs(high))
        known = times.detach()
        beyond = known[(known < low - hair) | (known > high + hair)]
        if beyond.numel():
            raise ValueError(
                f"t={beyond[0]:g} is not within step {self.number}, from {self.start:g} to {self.stop:g}; ask another step"
            )
        if self._polynomial is None:
            self._polynomial = self._stages.polynomial()
        return self._structure.unflatten(Polynomials(self._ends, [c[None] for c in self._polynomial]).at(times))

    def __repr__(self) -> str:
        return f"TakenStep({self.number}, from {self.start:g} to {self.stop:g})"


class _Latest:
    """A view of a solve that keeps the stages of its latest step."""

    done = False
    stages: Stages

    def count(self, steps: int) -> int:
        return 0

    def look(self, stages: Stages) -> tuple[tuple[int, State], ...]:
        self.stages = stages
        return ()

    def afresh(self) -> _Latest:
        return self


def steps(
    f: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    args: tuple[Any, ...] = (),
    method: str | Method = "tsit5",
    dt: float | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = 100_000,
    controller: str | Controller = "PI",
    norm: Callable[[Any], Any] | None = None,
    jumps: Sequence[float] | Tensor = (),
    time_dtype: torch.dtype | None = None,
) -> Iterator[TakenStep]:
    """Take the steps of ``solve``, one for each turn of a loop: ``for step in adjoint.steps(f, y0, (0, 10)): ...``.

    They are the steps that ``solve`` takes with the same arguments, and may be left with ``break``. What they give is
    on torch's own graph, as with ``gradient="backprop"``: derivatives of any order, and memory that grows with every
    step that the loop still depends on. Under ``torch.no_grad()`` nothing is kept. For a gradient in few slots, look at
    the steps with ``solve(..., observe=g, observe_at="steps")``.

    Args:
        t: where to start and to stop; fixed steps land on further times in between. The last one may be infinite: then
            the loop says when it is over, and fixed steps need ``dt``.

    The other arguments, and what they raise, are those of :func:`adjoint.solve`. SolveError comes out of the loop when a
    step cannot be taken, or is not finite.
    """
    structure, state = Structure.of(y0, "y0")
    chosen = method_asked_for(method)
    f = split_function(chosen, f, y0)
    check_call(args, max_steps)
    if mapped():
        raise NotImplementedError(
            "steps cannot be taken one by one for each member under torch.func.vmap; map over solve, or give it batched=True"
        )
    times, endless = _until(t, state)
    if endless and dt is None and not chosen.adaptive:
        raise ValueError(f"method={chosen.name!r} takes fixed steps, and t has no end; give dt=, the length of a step")
    most = OPEN if endless else max_steps
    control = control_asked_for(structure, state, chosen, rtol, atol, dt, most, controller, norm, jumps, time_dtype)
    if len(times) == 1:
        return iter(())
    first = tuple(x.contiguous() for x in state)
    program = program_of(chosen, times, structure, tuple(x.detach() for x in first), control)
    return _taken(program, (f, tuple(args)), first, max_steps)


def _until(t: Any, state: State) -> tuple[Tensor, bool]:
    """The times, and whether the last one is infinite."""
    if len(t) == 2 and math.isinf(t[1].item() if isinstance(t, Tensor) else t[1]):
        start = checked_times(t[:1], state)
        return torch.cat((start, start.new_tensor([float(t[1])]))), True
    return checked_times(t, state), False


def _taken(program: ExplicitProgram, function: Any, first: State, most: int) -> Iterator[TakenStep]:
    view, structure = _Latest(), program.structure
    program = program.seen_by(view)
    program.begin(function, first)
    program = program.on_graph()
    first = program.settled(function, program.t[0], first, "y0")
    state, k, known = program.first(first), 0, steps_of(program)
    while not program.done if known is None else k < known:
        if k == most:
            at = program.timeline.ends(k - 1)[1]
            raise SolveError(
                "max_steps",
                f"max_steps={most} taken and t={at:.6g} reached, of no end; leave the loop earlier, or allow more",
                t=at,
                step=k,
                state=state,
            )
        try:
            new = program.step(function, k, state, torch.is_grad_enabled()).state
            if not all(bool(torch.isfinite(x).all()) for x in new):
                raise broken_step(program, function, k, state, new)
        except SolveError as error:
            error.y = structure.unflatten([x.detach().clone() for x in state[: structure.spec.num_leaves]])
            raise
        versions = versions_of(new)
        yield TakenStep(k, _ends(program, k), view.stages, structure, program.dtype)
        if versions_of(new) != versions:
            refuse_writing(f"the loop changed the state of step {k}")
        state, k = new, k + 1


def _ends(program: ExplicitProgram, k: int) -> Tensor:
    """Where step k started and stopped."""
    start, stop = program.timeline.ends(k)
    if program.graph_times is not None:
        return program.graph_times.ends(k, start, stop)
    return torch.tensor([start, stop], dtype=program.wide, device=program.device)
