"""Explicit Runge-Kutta steps of many members at once, each with its own times, step sizes, errors and fate.

    k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),    y_new = y + h sum_i b_i k_i,    t, h: one for each member

A member that waits in a step keeps its state bit for bit. Zero times a NaN is a NaN, so a mask alone would not keep
what f does to such a member out of the gradients of tensors that all members share: where a step is recorded, f sees
a member that waits where it began, (t_0, y_0), a place from which a step was accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.captured import lent
from adjoint.lockstep_timeline import NONFINITE, STATUS, UNDERFLOW, AdaptiveLockstep
from adjoint.member_times import FixedLockstep, KnownLockstep, MemberTimes, Pairs
from adjoint.reach import Reach
from adjoint.steppers.member_error import MemberTolerance, first_steps
from adjoint.steppers.member_step import Coefficients, MemberStep, Numbers, finite
from adjoint.tableaus import Tableau
from adjoint.tangents import Batch, Directions, pushed
from adjoint.tensors import State, Structure, bytes_of, refuse_writing, scattered, versions_of

NEVER = 2**62
DONORS = 8
"""So many members are asked for a place at which f is finite for one that has none."""

TOLD = 3
"""Of so many members that fail the worst component is kept."""

Timeline = FixedLockstep | AdaptiveLockstep | KnownLockstep


class LockstepProgram:
    """The steps of a batch. ``function`` is a pair (f, args); f gets t of shape (members,) and y with leading members.

    Times are differentiable when the caller's ``t`` requires grad: from two small leaves (and one for asked times
    inside) per step.
    """

    label = "f"
    wish = "batched=True"
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
        self.leaves = len(first)
        """Those of y; a state may have more behind them."""
        self.timeline, self.tolerance, self.jumps = timeline, tolerance, jumps
        self.outputs = asked.t.shape[1]
        self.inputs: tuple[Tensor, ...] = (t,) if t.requires_grad else ()
        self.evaluations = 0
        self.trial = False
        """Whether this is but a sample."""
        self.doubtful = False
        """Whether a tape holds an attempt that a member rejected, or a member that waits where f may be undefined."""
        self.worst: dict[int, str] = {}
        """Where the error of a member was largest when it failed, in words."""
        self.poisoned: list[int] = []
        """Members for which nothing is known at which f is finite."""
        self.donor = 0
        """A member that could take a step."""
        self._t, self._dt = t, dt
        self._deaths: Tensor | None = None
        """Of fixed steps: the one after which a member was no longer finite."""
        self._judged = 0
        self._on_graph: Tensor | None = None
        self._safe: tuple[Tensor, State] | None = None
        self._loan: tuple[Any, tuple[Tensor, State]] | None = None
        self._known_slope: tuple[int, State, State] | None = None
        self._coefficients = Coefficients(tableau, asked.t)

    @property
    def members(self) -> int:
        return self.asked.members

    @property
    def step_bytes(self) -> int:
        """What is kept of each step of an adaptive solve, whatever the plan: everybody's time."""
        return self.asked.start.nbytes if isinstance(self.timeline, AdaptiveLockstep) else 0

    @property
    def inside_bytes(self) -> int:
        """What the values at asked times inside of one step take to make, at most, of the steps that are known."""
        pairs = self.timeline.most_inside if isinstance(self.timeline, AdaptiveLockstep) else 0
        return 3 * (len(self._coefficients.used) + 2) * pairs * (bytes_of(self.first) // self.members)

    @property
    def inside_kept(self) -> int:
        """What of that all tapes together hold."""
        pairs = self.timeline.all_inside if isinstance(self.timeline, AdaptiveLockstep) else 0
        return len(self._coefficients.used) * pairs * (bytes_of(self.first) // self.members)

    @property
    def chain_start(self) -> State:
        """The first state of the chain."""
        return self.first

    def begun_from(self, state: State) -> State:
        """The first state of the chain, from the caller's own."""
        return (*state, *self.chain_start[self.leaves :])

    def begin(self, function: Any, state: State) -> None:
        """Choose everybody's first step of an adaptive solve, unless that is known."""
        timeline, state = self.timeline, state[: self.leaves]
        if not isinstance(timeline, AdaptiveLockstep) or timeline.done:
            return
        timeline.fail(~finite(state), NONFINITE)
        if self._dt is not None:
            timeline.begin(self._dt.expand(self.members))
        else:
            slope, start = partial(self.slope, function), tuple(x.contiguous() for x in state)
            order = self.tableau.error_order + 1
            first, defined = first_steps(slope, start, self.asked, self.tolerance, order, self._t.dtype)
            timeline.fail(~defined, NONFINITE)
            timeline.begin(first)

    def sample(self) -> LockstepProgram:
        """A program of one step like the first one of this, to try things out on."""
        other = copy.copy(self)
        timeline = self.timeline
        ends = timeline.ends(0) if timeline.steps else timeline.propose()  # type: ignore[union-attr]
        other.timeline, other.trial = KnownLockstep(*ends), True
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
        if moves is not None and recording:
            if not (self.timeline.anyone(k) if self._deaths is None else bool(moves.any())):
                return self._with_last(Step(state), k, outputs)  # f is needed by nobody, and may be defined for nobody
            places = self.safe_places(function)
            if self._on_graph is not None and self.poisoned:
                function, places = self._lent(function)
        attempt = self._attempt(function, state, k, start, stop, recording)
        if moves is not None and recording:
            attempt.stand_in(moves, *places)
        attempt.run()
        if k == self._judged:
            self._judged += 1
            if self.timeline.landing and self._has_died(k, attempt, moves):
                self._judged = k
                return self.step(function, k, state, recording, outputs)
        return self._finish(attempt, k, None if moves is None else Numbers(moves), outputs)

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
        step = self.attempt(function, k, state, start, stop, recording)
        if self._on_graph is None and self.inputs and recording:
            step.make_leaves()
        return step

    def attempt(self, function: Any, k: int, state: State, start: Tensor, stop: Tensor, recording: bool) -> MemberStep:
        """A step to be computed."""
        slope = partial(self.slope, function)
        return MemberStep(self._coefficients, slope, state, start, stop, self._t.dtype, self.jumps)

    def _finish(self, attempt: MemberStep, k: int, moves: Numbers | None, outputs: bool = True) -> Step:
        """The step as its caller sees it."""
        asked = self.asked.t if self._on_graph is None else self._on_graph
        step = attempt.finish(moves, self.timeline.passing(k) if outputs else None, asked)
        landing = self.timeline.landing_on(k) if outputs else None
        if landing is not None:
            step = step._replace(
                outputs=(*step.outputs, (landing, self._landed(landing, step.state[: self.leaves], moves)))
            )
        return self._with_last(step, k, outputs)

    def _with_last(self, step: Step, k: int, outputs: bool) -> Step:
        """With the last step of the batch come the last values of all that arrived, whenever they did."""
        if not outputs or self.trial or not self.timeline.done or k != self.timeline.steps - 1:
            return step
        index = self.asked.last
        arrived = self.reached() == self.asked.stop if self._deaths is None else self._deaths == NEVER
        moves = None if bool(arrived.all()) else Numbers(arrived)
        return step._replace(outputs=(*step.outputs, (index, self._landed(index, step.state[: self.leaves], moves))))

    def _landed(self, index: int | Pairs, state: State, moves: Numbers | None) -> State:
        """States at the end of a step, of those that were to get there."""
        if isinstance(index, int):
            nothing = tuple(torch.full_like(x, torch.nan) for x in state) if moves is not None else ()
            return state if moves is None else moves.choose(state, nothing)
        member = index[1]
        state = tuple(x[member] for x in state)
        if moves is None:
            return state
        return Numbers(moves.numbers[member]).choose(state, tuple(torch.full_like(x, torch.nan) for x in state))

    def _explore(self, function: Any, k: int, state: State, recording: bool) -> Step:
        """Try steps until at least one member accepts its own, or nobody can go on."""
        timeline = self.timeline
        assert isinstance(timeline, AdaptiveLockstep)
        first = None if recording else self._reuse(k, state)
        y = state[: self.leaves]
        while True:
            start, stop = timeline.propose()
            tried = timeline.running
            attempt = self._attempt(function, state, k, start, stop, recording)
            if recording and tried < self.members:
                attempt.stand_in(start != stop, *self.safe_places(None))
            attempt.run(first)
            with torch.no_grad():
                error, scale = attempt.error()
                squared = self.tolerance.squared(error, y, attempt.new, scale).to(start)
                squared = self.penalised(attempt, squared)
                judged = timeline.judge(stop, attempt.h.detach(), squared)
                if timeline.failed:
                    self._diagnose(error, y, attempt)
                if judged.accepted or timeline.done:
                    break
                first = None if self.inputs or attempt.moves is not None else attempt.slopes[0]
        moves = None if judged.accepted == self.members else Numbers(judged.accepts)
        self.doubtful |= recording and moves is not None
        step = self._finish(attempt, k, moves)
        if not recording and self.tableau.first_same_as_last and not (self.jumps is not None and judged.landed):
            last, first = attempt.slopes[-1], attempt.slopes[0]  # whoever waits begins again where it was
            self._known_slope = (k + 1, step.state, last if moves is None else moves.choose(last, first))
        return step

    def penalised(self, attempt: MemberStep, squared: Tensor) -> Tensor:
        """The squared error ratios, changed where a step failed for another reason."""
        return squared

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

    def safe_places(self, function: Any) -> tuple[Tensor, State]:
        """Where f may be called for members that wait: where they began; or somebody else, if f is not finite there.

        Without ``function`` nobody's failure is final yet, and the places of the beginning must do.
        """
        if function is None:
            return self.asked.start, self.first
        if self._safe is None:
            self._safe = self.asked.start, self.first
            stuck = self.reached() == self.asked.start
            if bool(stuck.any()):
                with torch.no_grad():
                    self._safe = self._borrowed(function, stuck)
        return self._safe

    def _lent(self, function: Any) -> tuple[Any, tuple[Tensor, State]]:
        """On torch's own graph: the function with another member's numbers for the NaN of one, and places for it."""
        if self._loan is None:
            reach, other = Reach(function, self.label), copy.copy(self)
            aliases = {id(x): lent(x, self.members, self.donor) for _, x in reach.tensors.values()}
            function = reach.rebind({key: x for key, x in aliases.items() if key != id(x)})
            other.forget_places()
            self._loan = function, other.safe_places(function)
            if other.poisoned:
                raise RuntimeError(self.poison())
        return self._loan

    def forget_places(self) -> None:
        """f is another: look for places at which it is finite once more."""
        self._safe = None

    def poison(self) -> str:
        """What to say of a member whose NaN cannot be kept from the others."""
        return (
            f"f is not finite for member {self.poisoned[0]}, neither where it begins nor where others do, so that NaN "
            f"would reach the gradients of all members; leave it out: take its row from y0, t and what f uses"
        )

    def _borrowed(self, function: Any, stuck: Tensor) -> tuple[Tensor, State]:
        """Where members began, and for those whose f is not finite there, where one that could go on did."""
        times, places = self.asked.start, self.first
        lost = stuck & ~finite(self.slope(function, self.time(times), places))
        donors = (~stuck).nonzero()[:, 0]
        self.donor = int(donors[0]) if len(donors) else 0
        for donor in donors[:: max(1, len(donors) // DONORS)].tolist():
            if not bool(lost.any()):
                break
            there = torch.where(lost, self.asked.start[donor], times)
            state = Numbers(lost).choose(tuple(x[donor].expand_as(x) for x in self.first), places)
            helped = lost & finite(self.slope(function, self.time(there), state))
            times, places = torch.where(helped, there, times), Numbers(helped).choose(state, places)
            lost = lost & ~helped
        self.poisoned = lost.nonzero()[:, 0].tolist()
        return times, places

    def slope(self, function: Any, t: Tensor, state: State) -> State:
        """f(t, y) as leaves, of the state's shapes and dtypes."""
        f, args = function
        self.evaluations += 1
        versions = versions_of(state)
        value = f(t, self.structure.unflatten(state), *args)
        leaves = self.structure.flatten(value, "the value of f")
        if versions_of(state) != versions:
            refuse_writing("f changed its state")
        for x, y in zip(leaves, state):  # noqa: B905 (the structure has as many leaves)
            if x.shape != y.shape or x.dtype != y.dtype:
                raise ValueError(
                    f"f returned shape {tuple(x.shape)} and {x.dtype} for a batch of states of shape {tuple(y.shape)} "
                    f"and {y.dtype}; with batched=True it gets t of shape ({self.members},), one time for each "
                    f"member, and must return dy/dt, shaped and typed like y: t[:, None] * y, for example"
                )
        return leaves

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
            inside = self.timeline.passing(k)
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
            inside = self.timeline.passing(k)
            if inside is not None:
                places, member = inside
                moving.append(asked[member, places])
        return pushed(moving, [t], [rows], Batch(len(rows), self.label))
