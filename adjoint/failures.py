"""What became of a solve: the status, and of one that failed the place, the last good state and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.problem import Outcome
from adjoint.steppers.adams import AdamsProgram
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.implicit import ImplicitProgram
from adjoint.steppers.symplectic import SplittingProgram
from adjoint.tensors import State, Structure
from adjoint.timeline import SolveError


def failure_of(
    outcome: Outcome, asked: list[float], program: ExplicitProgram, function: Any, first: State, observed: bool
) -> SolveError | None:
    """What went wrong, if anything did, with the last good state; whatever was not reached becomes NaN.

    ``observed``: the outputs are no states.
    """
    failure = outcome.failure
    if failure is not None:
        sign = 1 if asked[-1] > asked[0] else -1
        beyond = [j for j, x in enumerate(asked) if sign * x > sign * failure.t]
        with torch.no_grad():
            for x in outcome.outputs:
                x[beyond] = torch.nan
    else:
        j = _first_bad(outcome.outputs, len(asked))
        if j is None:
            return None
        failure = getattr(program, "broken", None)
        failure = failure or (None if observed else _first_broken(program, function, first, outcome.outputs, j))
        failure = failure or _coarsely(outcome, program, asked, j, observed)
    failure.y = _tree(program.structure, failure.state)
    return failure


def _first_bad(outputs: Sequence[Tensor], count: int) -> int | None:
    """The first index at which an output is not finite."""
    found = []
    for x in outputs:
        if not x.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            good = torch.isfinite(x.detach()).reshape(count, x[0].numel()).all(1)
            found += [] if bool(good.all()) else [int((~good).nonzero()[0])]
    return min(found, default=None)


def _first_broken(
    program: ExplicitProgram, function: Any, first: State, outputs: Sequence[Tensor], j: int
) -> SolveError | None:
    """The fixed step that broke down, found by taking those before output j again; None if they cannot be."""
    if (
        not program.timeline.landing
        or isinstance(program, (AdamsProgram, SplittingProgram, ImplicitProgram))
        or (program.inputs and j == 0)
    ):
        return None
    begin = program.asked.t[j - 1]
    state = tuple(x.detach()[j - 1] for x in outputs) if j > 1 else first
    k = next((k for k in range(program.timeline.steps) if program.timeline.ends(k)[0] == begin), None)
    with torch.no_grad():
        while k is not None and k < program.timeline.steps:
            new = program.step(function, k, state, False, False).state
            if not all(bool(torch.isfinite(x).all()) for x in new):
                return broken_step(program, function, k, state, new)
            state, k = new, k + 1
    return None


def _step_from(program: ExplicitProgram, t: float) -> int | None:
    """The step that starts at this time."""
    return next((k for k in range(program.timeline.steps) if program.timeline.ends(k)[0] == t), None)


def broken_step(program: ExplicitProgram, function: Any, k: int, state: State, new: State) -> SolveError:
    """Step k, taken from ``state``, gave a ``new`` one that is not finite."""
    start, stop = program.timeline.ends(k)
    slope = program.slope(function, program.time(start), state)
    size = max(float(x.abs().max()) for x in state if x.numel())
    place = f"the solution is not finite at t={stop:.6g}, after step {k} from t={start:.6g} ({_component(new)})"
    if not all(bool(torch.isfinite(x).all()) for x in slope):
        why = (
            f"{place}: f itself is not finite at t={start:.6g}, where |y| is at most {size:.3g} ({_component(slope)}). The "
            f"steps are too long for the problem, or f divides by zero, or takes a root or a logarithm outside of where "
            f"that is defined: try a smaller dt or an adaptive method, or keep y inside"
        )
    else:
        why = (
            f"{place}; f is largest in {program.control.tolerance.worst(slope, state, state)} there, and |y| is at most "
            f"{size:.3g}. The steps are too long for the problem, or f is undefined on the way: try a smaller dt or an "
            f"adaptive method"
        )
    return SolveError("nonfinite", why, t=start, step=k, state=tuple(x.detach() for x in state))


def _component(state: State) -> str:
    """The first component that is not finite, in words."""
    for leaf, x in enumerate(state):
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad):
            return f"component {tuple(bad[0].tolist())}" + (f" of leaf {leaf}" if len(state) > 1 else "")
    return "no component"


def _coarsely(outcome: Outcome, program: ExplicitProgram, asked: list[float], j: int, observed: bool) -> SolveError:
    """Between which asked times the solution, or what was seen of it, ceased to be finite."""
    what = "what observe returned" if observed else "the solution"
    where = _component(tuple(x.detach()[j] for x in outcome.outputs))
    good = () if observed or j == 0 else tuple(x.detach()[j - 1].clone() for x in outcome.outputs)
    before = asked[max(j - 1, 0)]
    step = _step_from(program, before)
    step = outcome.stats.steps if step is None else step
    return SolveError(
        "nonfinite",
        f"{what} is not finite at t={asked[j]:.6g} ({where}), and was at t={before:.6g}, before step {step}. The steps "
        f"are too long for the problem, or f is undefined there: try a smaller dt or an adaptive method",
        t=before,
        step=step,
        state=good,
    )


def _tree(structure: Structure, state: State) -> Any:
    """Leaves as the caller's tree; None if there are none."""
    size = structure.spec.num_leaves
    return structure.unflatten([x.clone() for x in state[:size]]) if state else None
