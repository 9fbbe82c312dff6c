"""Explicit Runge-Kutta steps of many members at once, each with its own times, step sizes, errors and fate.

    k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),    y_new = y + h sum_i b_i k_i,    t, h: one for each member

A member that waits in a step keeps its state bit for bit. Zero times a NaN is a NaN, so a mask alone would not keep
what f does to such a member out of the gradients of tensors that all members share: where a step is recorded, f sees
a member that waits where it began, (t_0, y_0), a place from which a step was accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Cotangent, Step
from adjoint.join import Sweep
from adjoint.lockstep_timeline import NONFINITE, STATUS, UNDERFLOW, AdaptiveLockstep
from adjoint.member_times import FixedLockstep, KnownLockstep, MemberTimes
from adjoint.steppers.explicit import Tolerance
from adjoint.steppers.member_step import Coefficients, MemberStep, finite, spread
from adjoint.tableaus import Tableau
from adjoint.tangents import Batch, Directions, Second, pushed
from adjoint.tensors import State, Structure, refuse_writing, scattered, versions_of

NEVER = 2**62
DONORS = 8
"""So many members are asked for a place at which f is finite for one that has none."""

TOLD = 3
"""Of so many members that fail the worst component is kept."""

Number = float | Tensor
Timeline = FixedLockstep | AdaptiveLockstep | KnownLockstep


@dataclass(frozen=True)
class MemberTolerance:
    """``Tolerance`` for each member by itself; rtol and atol are numbers, or tensors with one for each member."""

    rtol: Number
    atol: Number
    norm: Callable[[Any], Any] | None = None
    """Of a tree like one member's state."""
    structure: Structure | None = None

    def squared(self, error: State, before: State, after: State) -> Tensor:
        """The squared error ratio of each member: at most 1 is acceptable."""
        scaled = [
            _size(e) / (torch.maximum(x.abs(), y.abs()).mul_(_fit(self.rtol, x)).add_(_fit(self.atol, x)))
            for e, x, y in zip(error, before, after, strict=True)
        ]
        if self.norm is not None:
            return self._normed(tuple(scaled), after)
        total: Tensor | None = None
        for x in scaled:
            part = (x * x).flatten(1).sum(1) if x.ndim > 1 else x * x
            total = part if total is None else total + part
        assert total is not None
        return total / max(sum(x[0].numel() for x in scaled), 1)

    def _normed(self, scaled: State, after: State) -> Tensor:
        assert self.norm is not None and self.structure is not None
        tree = self.structure.unflatten([x.abs() for x in scaled])
        values: Tensor = torch.func.vmap(self.norm)(tree)
        return torch.where(finite(after), values, torch.inf) ** 2

    def of(self, member: int) -> Tolerance:
        """That of one member."""
        rtol, atol = (float(x[member]) if isinstance(x, Tensor) else x for x in (self.rtol, self.atol))
        return Tolerance(rtol, atol)


def _size(x: Tensor) -> Tensor:
    """Something whose square is that of the absolute value."""
    return x.abs() if x.is_complex() else x


def _fit(x: Number, like: Tensor) -> Number:
    return x.to(like.real.dtype).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(x, Tensor) else x


class LockstepProgram:
    """The steps of a batch. ``function`` is a pair (f, args); f gets t of shape (members,) and y with leading members.

    Times are differentiable when the caller's ``t`` requires grad: from two small leaves (and one for asked times
    inside) per step.
    """

    label = "f"
    initial: int | None = 0
    series: State = ()

    def __init__(
        self,
        tableau: Tableau,
        t: Tensor,
        asked: MemberTimes,
        structure: Structure,
        first: State,
        timeline: Timeline,
        tolerance: MemberTolerance,
        dt: Tensor | None = None,
        jumps: Tensor | None = None,
    ) -> None:
        self.tableau, self.structure, self.asked, self.first = tableau, structure, asked, first
        self.timeline, self.tolerance, self.jumps = timeline, tolerance, jumps
        self.outputs = asked.t.shape[1]
        self.inputs: tuple[Tensor, ...] = (t,) if t.requires_grad else ()
        self.evaluations = 0
        self.doubtful = False
        """Whether a tape holds an attempt that a member rejected, or a member that waits where f may be undefined."""
        self.worst: dict[int, str] = {}
        """Where the error of a member was largest when it failed, in words."""
        self.poisoned: list[int] = []
        """Members for which nothing is known at which f is finite."""
        self._t, self._dt = t, dt
        self._deaths: Tensor | None = None
        """Of fixed steps: the one after which a member was no longer finite."""
        self._judged = 0
        self._on_graph: Tensor | None = None
        self._safe: tuple[Tensor, State] | None = None
        self._known_slope: tuple[int, State, State] | None = None
        self._coefficients = Coefficients(tableau, asked.t)

    @property
    def members(self) -> int:
        return self.asked.members

    @property
    def step_bytes(self) -> int:
        """What is kept of each step of an adaptive solve, whatever the plan: everybody's time."""
        return self.asked.start.nbytes if isinstance(self.timeline, AdaptiveLockstep) else 0

    def begin(self, function: Any, state: State) -> None:
        """Choose everybody's first step of an adaptive solve, unless that is known."""
        timeline = self.timeline
        if not isinstance(timeline, AdaptiveLockstep) or timeline.done:
            return
        timeline.fail(~finite(state), NONFINITE)
        if self._dt is not None:
            timeline.begin(self._dt.expand(self.members))
        else:
            timeline.begin(_first_steps(self, function, tuple(x.contiguous() for x in state)))

    def sample(self) -> LockstepProgram:
        """A program of one step like the first one of this, to try things out on."""
        other = copy.copy(self)
        timeline = self.timeline
        ends = timeline.ends(0) if timeline.steps else timeline.propose()  # type: ignore[union-attr]
        other.timeline = KnownLockstep(*ends)
        return other

    def on_graph(self) -> LockstepProgram:
        """The same steps as functions of the caller's own times, for torch's graph to follow."""
        other = copy.copy(self)
        other._on_graph = self._t.to(self.asked.t).expand(self.members, -1)
        return other

    @property
    def done(self) -> bool:
        return self.timeline.done

    @property
    def rejected(self) -> int:
        return int(self.timeline.rejected.sum()) if isinstance(self.timeline, AdaptiveLockstep) else 0

    def status(self) -> list[str]:
        """Of each member."""
        if isinstance(self.timeline, AdaptiveLockstep):
            return [STATUS[i] for i in self.timeline.status.tolist()]
        dead = [False] * self.members if self._deaths is None else (self._deaths < NEVER).tolist()
        return ["nonfinite" if x else "success" for x in dead]

    def accepted(self) -> Tensor:
        """Steps that each member took."""
        if isinstance(self.timeline, AdaptiveLockstep):
            return self.timeline.accepted
        assert isinstance(self.timeline, FixedLockstep)
        count = self.timeline.counts.expand(self.members)
        return count if self._deaths is None else torch.minimum(count, self._deaths)

    def reached(self) -> Tensor:
        """Until when each member has been solved."""
        if self._deaths is None:
            return self.timeline.times(self.timeline.steps)
        assert isinstance(self.timeline, FixedLockstep)
        return self.timeline.own_times(self.accepted())

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        if k == self.timeline.steps:
            return self._explore(function, k, state, recording)
        start, stop = self.timeline.ends(k)
        moves = None if self.timeline.everyone(k) else start != stop
        if self._deaths is not None:
            alive = self._deaths > k
            moves = alive if moves is None else moves & alive
        attempt = self._attempt(function, state, k, start, stop, recording)
        if moves is not None and recording:
            attempt.stand_in(moves, *self._safe_places(function))
        attempt.run()
        if k == self._judged:
            self._judged += 1
            if self.timeline.landing and self._has_died(k, attempt, moves):
                self._judged = k
                return self.step(function, k, state, recording, outputs)
        return self._finish(attempt, k, moves, outputs)

    def _has_died(self, k: int, attempt: MemberStep, moves: Tensor | None) -> bool:
        """Whether a member is finite no more; fixed steps cannot help it."""
        if all(bool(torch.isfinite(x.detach()).all()) for x in attempt.new):
            return False
        dies = ~finite(attempt.new) if moves is None else moves & ~finite(attempt.new)
        if not bool(dies.any()):
            return False
        known = torch.full_like(self.asked.count, NEVER) if self._deaths is None else self._deaths
        self._deaths, self._safe = torch.where(dies, k, known), None
        return True

    def _attempt(self, function: Any, state: State, k: int, start: Tensor, stop: Tensor, recording: bool) -> MemberStep:
        if self._on_graph is not None and self.inputs:
            start, stop = (self.timeline.moving(i, self._on_graph) for i in (k, k + 1))
        slope = partial(self.slope, function)
        step = MemberStep(self._coefficients, slope, state, start, stop, self._t.dtype, self.jumps)
        if self._on_graph is None and self.inputs and recording:
            step.make_leaves()
        return step

    def _finish(self, attempt: MemberStep, k: int, moves: Tensor | None, outputs: bool = True) -> Step:
        inside, ends = self.timeline.passing(k) if outputs else (None, None)
        return attempt.finish(moves, inside, ends, self.asked.t if self._on_graph is None else self._on_graph)

    def _explore(self, function: Any, k: int, state: State, recording: bool) -> Step:
        """Try steps until at least one member accepts its own, or nobody can go on."""
        timeline = self.timeline
        assert isinstance(timeline, AdaptiveLockstep)
        first = None if recording else self._reuse(k, state)
        while True:
            start, stop = timeline.propose()
            tried = timeline.running
            attempt = self._attempt(function, state, k, start, stop, recording)
            if recording and tried < self.members:
                attempt.stand_in(start != stop, *self._safe_places(None))
            attempt.run(first)
            with torch.no_grad():
                error = attempt.error()
                squared = self.tolerance.squared(error, state, attempt.new).to(start)
                judged = timeline.judge(stop, attempt.h.detach(), squared)
                if timeline.failed:
                    self._diagnose(error, state, attempt)
                if judged.accepted or timeline.done:
                    break
                first = None if self.inputs or attempt.moves is not None else attempt.slopes[0]
        everyone = judged.accepted == self.members
        self.doubtful |= recording and not everyone
        step = self._finish(attempt, k, None if everyone else judged.accepts)
        if not recording and self.tableau.first_same_as_last and not (self.jumps is not None and judged.landed):
            self._remember(k + 1, step.state, attempt, None if everyone else judged.accepts)
        return step

    def _diagnose(self, error: State, before: State, attempt: MemberStep) -> None:
        """Say of members that just failed whether f is finite where they are, and where their error was largest."""
        timeline = self.timeline
        assert isinstance(timeline, AdaptiveLockstep)
        undefined = ~finite(attempt.slopes[0]) & (timeline.status == UNDERFLOW)
        who = torch.zeros_like(undefined)
        who[timeline.failed] = True
        timeline.status = torch.where(undefined & who, NONFINITE, timeline.status)
        for b in timeline.failed[: max(0, TOLD - len(self.worst))]:
            rows = [tuple(x.detach()[b] for x in leaves) for leaves in (error, before, attempt.new)]
            self.worst[b] = self.tolerance.of(b).worst(*rows)

    def _reuse(self, k: int, state: State) -> State | None:
        """The first slopes of this step, if they were the last of the step before (first same as last)."""
        known, self._known_slope = self._known_slope, None
        return known[2] if known is not None and known[0] == k and known[1] is state else None

    def _remember(self, k: int, state: State, attempt: MemberStep, moves: Tensor | None) -> None:
        slope = attempt.slopes[-1]
        if moves is not None:  # whoever waits begins again where it was
            slope = tuple(torch.where(spread(moves, x), x, y) for x, y in zip(slope, attempt.slopes[0], strict=True))
        self._known_slope = (k, state, slope)

    def _safe_places(self, function: Any) -> tuple[Tensor, State]:
        """Where f may be called for members that wait: where they began; or somebody else, if f is not finite there.

        Without ``function`` nobody's failure is final yet, and the places of the beginning must do.
        """
        times = self.asked.start
        if function is None:
            return times, self.first
        if self._safe is None:
            self._safe = times, self.first
            stuck = self.accepted() == 0
            if bool(stuck.any()):
                with torch.no_grad():
                    self._safe = self._borrowed(function, stuck)
        return self._safe

    def _borrowed(self, function: Any, stuck: Tensor) -> tuple[Tensor, State]:
        """Where members began, and for those whose f is not finite there, where one that could go on did."""
        times, places = self.asked.start, self.first
        lost = stuck & ~finite(self.slope(function, self.time(times), places))
        donors = (~stuck).nonzero()[:, 0]
        for donor in donors[:: max(1, len(donors) // DONORS)].tolist():
            if not bool(lost.any()):
                break
            there = torch.where(lost, self.asked.start[donor], times)
            state = tuple(torch.where(spread(lost, x), x[donor], y) for x, y in zip(self.first, places, strict=True))
            helped = lost & finite(self.slope(function, self.time(there), state))
            times = torch.where(helped, there, times)
            places = tuple(torch.where(spread(helped, x), x, y) for x, y in zip(state, places, strict=True))
            lost = lost & ~helped
        self.poisoned = lost.nonzero()[:, 0].tolist()
        return times, places

    def slope(self, function: Any, t: Tensor, state: State) -> State:
        """f(t, y) as leaves, of the state's shapes and dtypes."""
        f, args = function
        self.evaluations += 1
        versions = versions_of(state)
        value = self.structure.flatten(f(t, self.structure.unflatten(state), *args), "the value of f")
        if versions_of(state) != versions:
            refuse_writing("f changed its state")
        for x, y in zip(value, state, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:
                raise ValueError(
                    f"f returned shape {tuple(x.shape)} and {x.dtype} for a batch of states of shape {tuple(y.shape)} "
                    f"and {y.dtype}; with batched=True it gets t of shape ({self.members},), one time for each "
                    f"member, and must return dy/dt, shaped and typed like y: t[:, None] * y, for example"
                )
        return value

    def time(self, t: Tensor) -> Tensor:
        """As f gets it."""
        return t.to(self._t.dtype)

    def begin_reverse(self) -> None:
        self._known_slope = None
        if self.inputs:
            self._of_asked = torch.zeros_like(self.asked.t)

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None:
        of_start, of_stop, *of_inside = cotangents
        for at, cotangent in ((k, of_start), (k + 1, of_stop)):
            if cotangent is not None:
                self._of_asked = self.timeline.pull(at, cotangent, self._of_asked)
        if of_inside and of_inside[0] is not None:
            inside, _ = self.timeline.passing(k)
            assert inside is not None
            places, member = inside
            flat = scattered(self._of_asked.view(1, -1), (member * self.outputs + places)[None], of_inside[0][None])
            self._of_asked = flat.view(self.members, -1)

    def input_cotangents(self) -> Sequence[Tensor | None]:
        if not self.inputs:
            return ()
        total = self._of_asked.sum(0) if self._t.ndim == 1 else self._of_asked
        return (total.to(self._t),)

    def begin_tangents(self, directions: Directions) -> None:
        self._directions = [None if v is None else v.to(self.asked.t) for v in directions]

    def tangents(self, k: int, leaves: int) -> Directions:
        rows = self._directions[0] if leaves else None
        if rows is None:
            return [None] * leaves
        with torch.enable_grad():
            t = self._t.detach().to(self.asked.t).requires_grad_()
            asked = t.expand(self.members, -1)
            moving = [self.timeline.moving(i, asked) for i in (k, k + 1)]
            inside, _ = self.timeline.passing(k)
            if inside is not None:
                places, member = inside
                moving.append(asked[member, places])
        return pushed(moving, [t], [rows], Batch(len(rows), self.label))


@dataclass
class MemberSweep:
    """The reverse sweep of a batch, in which a member's NaN reaches no tensor that others share.

    Tapes of the first sweep hold steps that some members rejected. Their cotangents are zero, but zero times infinity
    is not: then the sweep is made again, from tapes in which f sees such members at a safe place.
    """

    sweep: Sweep
    program: LockstepProgram

    def check(self) -> None:
        self.sweep.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> Cotangent:
        found = self.sweep.reverse(of_outputs, of_state)
        if self.program.doubtful and not _all_finite(found):
            self.program.doubtful = False
            found = self.sweep.reverse(of_outputs, of_state)
        return self._unpoisoned(found)

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        return self.sweep.tangents(directions)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        second = self.sweep.second(of_outputs, of_state, directions)
        self._unpoisoned(second.inputs)
        return second

    def _unpoisoned(self, found: Cotangent) -> Cotangent:
        if self.program.poisoned and not all(self._kept_in(x) for x in found if x is not None):
            b = self.program.poisoned[0]
            raise RuntimeError(
                f"f is not finite for member {b}, neither where it begins nor where another one does, so that NaN would "
                f"reach the gradients of all members; leave it out: take its row from y0, t and what f uses"
            )
        return found

    def _kept_in(self, x: Tensor) -> bool:
        """Whether what is not finite is in rows of the members that nothing could be done about."""
        bad = ~torch.isfinite(x)
        for dim in (i for i in range(x.ndim) if x.shape[i] == self.program.members):
            bad = bad.index_fill(dim, torch.tensor(self.program.poisoned, device=x.device), False)
        return not bool(bad.any())


def _all_finite(found: Cotangent) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in found if x is not None)


def _first_steps(program: LockstepProgram, function: Any, state: State) -> Tensor:
    """The length of everybody's first step to try: Hairer, Norsett & Wanner I, section II.4. Without f there is none.

    It calls the caller's own function as the caller would: a tensor that is kept from these calls has its whole graph.
    """
    tolerance, asked = program.tolerance, program.asked
    length = (asked.stop - asked.start).abs()

    def ratio(x: State) -> Tensor:
        return tolerance.squared(x, known, zero).to(length).sqrt()

    slope = program.slope(function, program.time(asked.start), state)
    assert isinstance(program.timeline, AdaptiveLockstep)
    program.timeline.fail(~finite(slope), NONFINITE)
    slope, known = (tuple(x.detach() for x in leaves) for leaves in (slope, state))
    zero = tuple(torch.zeros_like(x) for x in known)
    size, speed = ratio(known), ratio(slope)
    guess = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    guess = torch.where(length < guess, length, guess)
    shift = asked.sign * guess
    moved = tuple(y + spread(shift.to(x.real.dtype), x) * x for y, x in zip(state, slope, strict=True))
    bent = program.slope(function, program.time(asked.start + shift), moved)
    most = torch.fmax(speed, ratio(tuple(x.detach() - y for x, y in zip(bent, slope, strict=True))) / guess)
    exponent = 1 / (program.tableau.error_order + 1)
    wanted = torch.where(most <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / most) ** exponent)
    chosen = torch.minimum(torch.minimum(100 * guess, wanted), length)
    return torch.where(chosen > 0, chosen, length.clamp(max=1e-6))
