"""A batch of solves in lock-step: what is asked of it, and what became of each member."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.adaptive_timeline import Controller
from adjoint.continuous import Backsolve
from adjoint.frozen import replayed
from adjoint.implicit_method import Implicit
from adjoint.lockstep_timeline import AdaptiveLockstep
from adjoint.member_times import FixedLockstep, MemberTimes
from adjoint.problem import Outcome, Problem, Stats
from adjoint.progress import Progress, progress_ticker
from adjoint.rosenbrock_tableaus import RosenbrockTableau
from adjoint.steppers.lockstep import LockstepProgram
from adjoint.steppers.member_error import MemberTolerance
from adjoint.steppers.member_implicit import ImplicitLockstep
from adjoint.steppers.member_rosenbrock import RosenbrockLockstep
from adjoint.steppers.member_step import spread
from adjoint.tableaus import Tableau
from adjoint.tensors import State, Structure, check_dense, differentiable
from adjoint.timeline import SolveError
from revolve import Plan

WHY = {
    "max_steps": "allow more steps, loosen rtol/atol, or the problem is stiff",
    "newton": "Newton's method does not find its stages: give shorter steps by dt=, or a method that controls them",
    "underflow": "the solution may blow up there, or rtol/atol are too tight for the precision",
    "nonfinite": "f or the solution is not finite there: the steps are too long, or f is undefined",
}


@dataclass(frozen=True, repr=False)
class MemberStats:
    """What was done, counted; tensors hold one number for each member."""

    succeeded: Tensor
    """Which members reached their last time."""
    reached: Tensor
    """The time that each member reached."""
    steps: Tensor
    """Steps that each member took."""
    rejected: Tensor
    """Steps that each member tried in vain."""
    counted: Stats

    def __repr__(self) -> str:
        good, (least, most) = int(self.succeeded.sum()), (int(x) for x in self.steps.aminmax())
        return (
            f"{good} of {len(self.steps)} members succeeded, with {least} to {most} steps each "
            f"({int(self.rejected.max())} rejected at most), in {self.lockstep} of the batch, "
            f"{self.evaluations} evaluations"
        )

    @property
    def lockstep(self) -> int:
        """Steps of the batch; in each of them some members may wait."""
        return self.counted.steps

    @property
    def evaluations(self) -> int:
        """Calls of the caller's function, each for all members."""
        return self.counted.evaluations

    @property
    def plain_runs(self) -> int:
        return self.counted.plain_runs

    @property
    def recorded_runs(self) -> int:
        return self.counted.recorded_runs


class Each(NamedTuple):
    """What became of a batch."""

    times: Tensor
    outputs: list[Tensor]
    status: tuple[str, ...]
    stats: MemberStats
    plan: Plan | None
    failure: SolveError | None


@dataclass(frozen=True)
class Wishes:
    """How the members are to be solved; numbers may be tensors with one for each member."""

    method: Tableau | Implicit
    rtol: float | Tensor
    atol: float | Tensor
    dt: float | Tensor | None
    max_steps: int
    controller: Controller
    norm: Callable[[Any], Any] | None
    jumps: Sequence[float] | Tensor


def solve_members(
    function: tuple[Callable[..., Any], tuple[Any, ...]],
    structure: Structure,
    state: State,
    t: Any,
    wishes: Wishes,
    how: Callable[[Problem], Outcome],
    memory: dict[str, Any],
    progress: bool | Progress,
) -> Each:
    """Solve them all; raises for what cannot be meant, not for members that fail."""
    members = _check_state(state)
    if isinstance(how, Backsolve):
        raise ValueError("gradient='backsolve' solves one state at a time; with batched=True use 'discrete'")
    times, asked = _times(t, state, members)
    program = _program(times, asked, structure, state, wishes)
    if not bool((asked.count > 1).any()):
        status, stats = ["success"] * members, _stats(program, ["success"] * members, Stats(program))
        alone = [torch.cat((x[None], x.new_full((program.outputs - 1, *x.shape), torch.nan))) for x in state]
        return Each(times, alone, tuple(status), stats, None, None)
    _check_apart(program, function, state)
    steps = program.timeline.steps if program.timeline.done else None
    with progress_ticker(progress, steps) as tick:
        outcome = how(
            Problem(program, function, program.begun_from(state), steps, **memory, wants_final=True, tick=tick)
        )
    done = outcome.stats.program
    assert isinstance(done, LockstepProgram)
    status = _settle(outcome, done)
    stats = _stats(done, status, outcome.stats)
    failure = _failure(done, status, stats)
    if failure is not None and outcome.final is not None:
        failure.y = structure.unflatten([x.detach() for x in outcome.final[: len(state)]])
    return Each(times, outcome.outputs, tuple(status), stats, outcome.plan, failure)


def _program(times: Tensor, asked: MemberTimes, structure: Structure, state: State, wishes: Wishes) -> LockstepProgram:
    like, method = asked.start, wishes.method
    tableau: Any = method.tableau if isinstance(method, Implicit) else method
    rtol, atol, dt = (_number(name, getattr(wishes, name), like) for name in ("rtol", "atol", "dt"))
    if tableau.adaptive:
        both = torch.stack([torch.zeros_like(like) + x for x in (rtol, atol) if x is not None])
        if not bool(((both >= 0).all(0) & (both.sum(0) > 0)).all()):
            raise ValueError(f"rtol={wishes.rtol}, atol={wishes.atol}: give positive tolerances, such as rtol=1e-6")
    first = dt if isinstance(dt, Tensor) else None if dt is None else like.new_tensor([dt])
    if first is not None and not bool((torch.isfinite(first) & (first > 0)).all()):
        raise ValueError(f"dt={wishes.dt} is not a length of time; give positive numbers, also backwards in time")
    jumps = _jumps(wishes.jumps, like)
    timeline: FixedLockstep | AdaptiveLockstep
    if not tableau.adaptive:
        timeline = FixedLockstep(asked, None if first is None else first[:, None], jumps)
    else:
        order = tableau.error_order + 1
        timeline = AdaptiveLockstep(asked, order, wishes.max_steps, wishes.controller, jumps)
    tolerance = MemberTolerance(rtol, atol, wishes.norm, structure)  # type: ignore[arg-type]
    start = tuple(x.detach().contiguous() for x in state)
    rest = times, asked, structure, start, replayed(timeline), tolerance, first, jumps
    if isinstance(method, Implicit):
        kind = RosenbrockLockstep if isinstance(tableau, RosenbrockTableau) else ImplicitLockstep
        return kind(method, *rest)
    return LockstepProgram(tableau, *rest)


def _check_state(state: State) -> int:
    """How many members there are."""
    for x in state:
        check_dense((x,), "y0")
        if not differentiable(x):
            raise TypeError(f"y0 has dtype {x.dtype}; an ODE state is real or complex: y0.double(), for example")
        if x.ndim == 0 or len(x) != len(state[0]) or len(x) == 0:
            shapes = ", ".join(str(tuple(x.shape)) for x in state)
            raise ValueError(
                f"y0 has leaves of shape {shapes}; with batched=True the first dimension of every leaf counts the "
                f"members, at least one"
            )
        if x.device != state[0].device:
            raise ValueError(f"y0 has leaves on {state[0].device} and on {x.device}; put them on one device")
        if torch._C._functorch.is_batchedtensor(x):
            raise NotImplementedError("batched=True inside torch.func.vmap: let the members be what you map over")
        if x.is_meta:
            raise ValueError("y0 is on the meta device; batched=True looks at numbers, and meta tensors hold none")
    return len(state[0])


def _times(t: Any, state: State, members: int) -> tuple[Tensor, MemberTimes]:
    """The caller's times as a tensor, and as rows of the members."""
    real = state[0].real.dtype
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=real)
    if not times.is_floating_point():
        if times.is_complex():
            raise TypeError(f"t has dtype {times.dtype}; times are real numbers")
        times = times.to(real)
    if times.ndim not in (1, 2) or times.shape[-1] == 0 or (times.ndim == 2 and len(times) != members):
        raise ValueError(
            f"t has shape {tuple(times.shape)}; give times that all members share, or rows of times for each of the "
            f"{members} members"
        )
    device = state[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    rows = times.detach().to(device=device, dtype=wide)
    _check_rows(rows.reshape(-1, rows.shape[-1]).cpu(), times.ndim == 1)
    return times, MemberTimes(rows.expand(members, -1).contiguous(), times.ndim == 1)


def _check_rows(rows: Tensor, shared: bool) -> None:
    """Raise for rows that are not finite, or not strictly monotone; all but shared times may end in NaN."""

    def place(where: Tensor) -> tuple[int, int, str]:
        b, j = (int(i) for i in where.nonzero()[0])
        return b, j, f"t[{j}]" if shared else f"t[{b}, {j}]"

    none = rows.isnan()
    late = none[:, :1] | (none[:, :-1] & ~none[:, 1:]).any(1, keepdim=True) | (none & shared)
    wrong = rows.isinf() | (none & late)
    if bool(wrong.any()):
        b, j, name = place(wrong)
        raise ValueError(
            f"{name}={float(rows[b, j])} is not a finite number; only the end of a row may be NaN, where a member has "
            f"fewer times than others"
        )
    last = rows.gather(1, (~none).sum(1, keepdim=True) - 1)
    steps = rows.diff(dim=1) * torch.where(last >= rows[:, :1], 1, -1)
    if bool((steps <= 0).any()):
        b, j, name = place(steps <= 0)
        raise ValueError(
            f"{name}={float(rows[b, j]):g} is followed by {float(rows[b, j + 1]):g}: the times of a member must "
            f"strictly increase or strictly decrease; sort them"
        )


def _number(name: str, x: Any, like: Tensor) -> float | Tensor | None:
    """One number for all members, or a tensor with one for each."""
    if isinstance(x, Tensor):
        if x.shape not in ((), like.shape) or x.is_complex():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; give one number, or one for each of {len(like)} members"
            )
        return float(x) if x.ndim == 0 else x.detach().to(like)
    if x is not None and not isinstance(x, Real):
        raise TypeError(f"{name}={x!r} ({type(x).__name__}) must be a number, or a tensor with one for each member")
    return None if x is None else float(x)


def _jumps(jumps: Any, like: Tensor) -> Tensor | None:
    """As rows: one for all members, or one for each, which may hold NaN."""
    refuse_moving_jumps(jumps)
    if isinstance(jumps, Tensor) and jumps.ndim == 2:
        if len(jumps) != len(like):
            raise ValueError(
                f"jumps has shape {tuple(jumps.shape)}; give times, or a row for each of {len(like)} members"
            )
        return jumps.detach().to(like) if jumps.shape[1] else None
    if isinstance(jumps, Real):
        raise TypeError(f"jumps={jumps!r} must be a series of times; for a single one write jumps=({jumps!r},)")
    places = [float(x) for x in jumps]
    for x in places:
        if not math.isfinite(x):
            raise ValueError(f"jumps holds {x}, which is not a finite time")
    return like.new_tensor(places)[None] if places else None


def refuse_moving_jumps(jumps: Any) -> None:
    """Raise for jumps that require grad: steps end at them as at constants."""
    if isinstance(jumps, Real):
        return
    if any(isinstance(x, Tensor) and x.requires_grad for x in (jumps, *jumps)):
        raise ValueError(
            "jumps requires grad, and no gradient comes back to it; give jumps.detach(). For the derivative by a switching "
            "time solve up to it, t=[.., switch], and go on from there"
        )


def _check_apart(program: LockstepProgram, function: Any, state: State) -> None:
    """Raise if f lets one member feel another: moving half of them must not change what it gives for the others."""
    if program.members == 1:
        return
    asked, state = program.asked, tuple(x.clone() for x in state)
    start = program.time(asked.start)
    first = program.slope(function, start, state)
    odd = torch.arange(program.members, device=start.device) % 2 == 1
    for who in (odd, ~odd):
        moved = tuple(torch.where(spread(who, x), x + 1e-3 * (x.abs() + 1), x) for x in state)
        later = torch.where(who, start + program.time(asked.stop - asked.start) / 128, start)
        second = program.slope(function, later, moved)
        for x, y in zip(first, second, strict=True):
            x, y = (z.detach().flatten(1) if z.ndim > 1 else z.detach()[:, None] for z in (x, y))
            scale = torch.nan_to_num(x.abs(), posinf=0.0).amax(1, keepdim=True) if x.shape[1] else x.abs()
            same = (x == y) | ((x - y).abs() <= torch.finfo(x.dtype).eps ** 0.5 * scale) | (x != x) & (y != y)
            felt = ~(same.all(1) | who)
            if bool(felt.any()) and _repeats(program, function, start, state, first):
                raise ValueError(
                    f"f mixes members: what it gives for member {int(felt.nonzero()[0])} changes when others do. With "
                    f"batched=True row b of f(t, y) may depend on t[b] and on row b of y alone (t has shape "
                    f"({program.members},), a time for each); torch.func.vmap makes such a function of one for a single "
                    f"member"
                )


def _repeats(program: LockstepProgram, function: Any, start: Tensor, state: State, first: State) -> bool:
    """Whether f gives the same values again; if not, it is another sentence's business."""
    again = program.slope(function, start, state)
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, again, strict=True))


def _settle(outcome: Outcome, program: LockstepProgram) -> list[str]:
    """The status of each member; whatever was not reached becomes NaN."""
    status, asked = program.status(), program.asked
    unreached = asked.keys > (asked.sign * program.reached())[:, None]
    if bool(unreached.any()):
        with torch.no_grad():
            for x in outcome.outputs:
                x[unreached.T] = torch.nan
    for x in outcome.outputs:
        rows = x.detach().transpose(0, 1)
        bad = ~(torch.isfinite(rows).flatten(2).all(2) if x.ndim > 2 else torch.isfinite(rows)) & ~unreached
        for b in bad.any(1).nonzero()[:, 0].tolist():
            status[b] = "nonfinite" if status[b] == "success" else status[b]
    return status


def _stats(program: LockstepProgram, status: list[str], counted: Stats) -> MemberStats:
    steps, timeline = program.accepted(), program.timeline
    rejected = timeline.rejected if isinstance(timeline, AdaptiveLockstep) else torch.zeros_like(steps)
    good = torch.tensor([x == "success" for x in status], device=steps.device)
    return MemberStats(good, program.reached(), steps, rejected, counted)


def _failure(program: LockstepProgram, status: list[str], stats: MemberStats) -> SolveError | None:
    failed = [b for b, x in enumerate(status) if x != "success"]
    if not failed:
        return None
    b = next(iter(program.worst), failed[0])
    t, step, why = float(stats.reached[b]), int(stats.steps[b]), status[b]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(status[b] for b in failed).items())
    where = f", largest error in {program.worst[b]}" if b in program.worst else ""
    return SolveError(
        why,
        f"{len(failed)} of {len(status)} members failed ({kinds}); member {b} stopped at t={t:.6g}, step {step} "
        f"({why}{where}): {WHY[why]}. The others went on undisturbed: throw=False returns them all, with the status of each",
        t=t,
        step=step,
    )
