"""Steps in which events happen: the state changes there, and the next step starts at the time of the event.

For an event e(t, y, p) = 0 with the reset y+ = R(t, y, p), in a step whose interpolant is u, the root t_e of
e(t, u(t), p) and the state R(t_e, u(t_e)) are functions of the step's own numbers, and are transposed with it:

    lam- = R_y^T lam+ - alpha e_y,    alpha = (tbar_e + tau+ + lam+^T (R_t + R_y u'(t_e))) / (e_t + e_y u'(t_e))

The time from which the next step starts is a part of the state of the chain; later times stay where they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.autograd import Step
from adjoint.events import At, Event
from adjoint.interpolate import Polynomials
from adjoint.steppers.crossings import Crossings, Found
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.happening import Happening
from adjoint.steppers.stages import Stages
from adjoint.tensors import State
from adjoint.timeline import CutTimeline, SolveError

Pin = tuple[int, int] | None
"""What moves the end of a step: (i, j) for the j-th time of events[i], (-1, j) for the j-th asked time."""


class Note(NamedTuple):
    """What became of a step: frozen as soon as it has been taken."""

    stop: float
    pin: Pin
    found: tuple[Found, ...]
    """Events inside of it, in order; the last may be the one that cuts it."""
    cut: float | None
    known: tuple[tuple[int, int], ...]
    """(i, j): the j-th time of events[i] is the end of the step."""
    row: int
    """The first of the rows of outputs that it fills."""

    @property
    def rows(self) -> int:
        return 2 * (len(self.found) + len(self.known))


@dataclass
class Log:
    """The notes of all steps; those of an earlier solve are used again while steps are frozen."""

    notes: list[Note] = field(default_factory=list)
    frozen: tuple[Note, ...] | None = None

    def moved_along(self, noted: Log) -> Log:
        self.frozen = tuple(noted.notes)
        return self


class EventfulProgram:
    """The steps of ``inner`` with events. ``function`` is (f, args, None, (t, what each event holds)).

    The state is that of ``inner`` with one leaf more: the time from which the last restart goes on. Outputs are the leaves
    of y and a time: at the asked times, and then two rows (before, after) for everything that happens.
    """

    label = "f"
    series: State = ()
    inputs: tuple[Tensor, ...] = ()

    def __init__(self, inner: ExplicitProgram, events: Sequence[Event | At], t: Tensor, log: Log) -> None:
        self.inner, self.events, self.log = inner, tuple(events), log
        self.initial = inner.initial
        """None: the state has parts that no output has, and the first step shows y0."""
        self.asked = inner.asked
        self._times = [x.times.tolist() if isinstance(x, At) and isinstance(x.times, Tensor) else [] for x in events]
        self.ended = False
        self.finished_early = False
        """Whether a terminal event ended the solve."""
        self.rows = 2 * len(self.known_at(inner.asked.t[0]))
        self._trial = False
        self._t_moves = t.requires_grad
        self._moves = [isinstance(x, At) and isinstance(x.times, Tensor) and x.times.requires_grad for x in events]
        self._asked_times = set(self.asked.t)
        self._crossings = Crossings(self.events)
        self._hold: tuple[Tensor, Any] | None = None
        self._stages: Stages | None = None

    @property
    def timeline(self) -> Any:
        return self.inner.timeline

    @property
    def control(self) -> Any:
        return self.inner.control

    @property
    def evaluations(self) -> int:
        return self.inner.evaluations

    @evaluations.setter
    def evaluations(self, count: int) -> None:
        self.inner.evaluations = count

    @property
    def rejected(self) -> int:
        return self.inner.rejected

    @property
    def taken(self) -> int:
        return len(self.log.notes)

    @property
    def outputs(self) -> int:
        return len(self.asked.t) + (0 if self._trial else self.rows)

    @property
    def done(self) -> bool:
        timeline = self.inner.timeline
        if self.ended:
            return True
        return self.taken == timeline.steps if isinstance(timeline, CutTimeline) else timeline.done

    @property
    def reached(self) -> float:
        """How far the solve went."""
        if not self.taken:
            return self.asked.t[0]
        note = self.log.notes[-1]
        return note.stop if note.cut is None else note.cut

    def first(self, state: State, t: Tensor) -> State:
        """The first state of the chain."""
        return (*self.inner.first(state), t.to(device=self.inner.device, dtype=self.inner.wide))

    def unstarted(self, state: State) -> list[Tensor]:
        """The outputs if not even one step could be taken."""
        leaves, rest = (*state[: self.inner.leaves], state[-1]), self.outputs - 1
        return [torch.cat((x[None], x.detach().new_full((rest, *x.shape), torch.nan))) for x in leaves]

    def settled(self, function: Any, t: Tensor, state: State, what: str) -> State:
        """The first state of the equation; if something happens right there, that is what makes it consistent."""
        return state if self.known_at(self.asked.t[0]) else self.inner.settled(function, t, state, what)

    def begin(self, function: Any, state: State) -> None:
        self.inner.begin(function[:2], state[:-1])

    def sample(self) -> EventfulProgram:
        other = copy.copy(self)
        other.inner, other.log = self.inner.sample(), Log()
        other._trial = True
        return other

    def on_graph(self) -> EventfulProgram:
        return self

    def begin_reverse(self) -> None:
        self.inner.begin_reverse()

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None:
        """Leaves made for Newton's iteration carry nothing."""

    def input_cotangents(self) -> Sequence[Tensor | None]:
        return ()

    def begin_tangents(self, directions: Sequence[Tensor | None]) -> None:
        pass

    def tangents(self, k: int, leaves: int) -> Sequence[Tensor | None]:
        return (None,) * leaves

    def known_at(self, t: float) -> tuple[tuple[int, int], ...]:
        """The known times that are this one."""
        return tuple((i, j) for i, times in enumerate(self._times) for j, x in enumerate(times) if x == t)

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        f, args, _, (t, held) = function
        size = self.inner.leaves
        y, carry, since = state[:size], state[size:-1], state[-1]
        here = Happening(self.inner, held, f, args, since)
        rows: list[tuple[int, State]] = []
        if k == 0 and self.initial is None:
            rows.append((0, (*y, since)))
        known = () if k or self._trial else self.known_at(self.asked.t[0])
        for row, which in enumerate(known):
            y = self._known(rows, len(self.asked.t) + 2 * row, which, here, y)
        first = k == self.taken and not self._trial
        if first and k == 0:
            self._crossings.begin(here.value, self.asked.t[0], y)
        self._hold = since, (t, held)
        step, stages = self._plain_step((f, args), k, (*y, *carry), recording, outputs)
        new, carry = step.state[:size], step.state[size:]
        if self._trial:
            return Step((*step.state, since), (*rows, *self._asked(step, None, since)), ())
        if first:
            self._note(stages, new, here)
        note = self.log.notes[k]
        new, since, leaves = self._happen(note, stages, new, rows, here, recording)
        if first:
            self._after(note, new, here)
        seen = (*self._asked(step, note.cut, since), *rows) if outputs else ()
        return Step((*new, *carry, since), seen, leaves)

    def _plain_step(self, function: Any, k: int, y: State, recording: bool, outputs: bool) -> tuple[Step, Stages]:
        """The step as if nothing happened in it. Nothing of it is held on to: a cycle would keep its graph alive."""
        self.inner.moving, self.inner.watch, self.inner.restarts = self._numbers, self._seen, self._restarts
        try:
            step = self.inner.step(function, k, y, recording, outputs)
            assert self._stages is not None
            return step, self._stages
        finally:
            self.inner.moving = self.inner.watch = self.inner.restarts = self._stages = self._hold = None

    def _seen(self, stages: Stages) -> None:
        self._stages = stages

    def _restarts(self, k: int) -> bool:
        """Whether the state, or f, may have changed where step k begins."""
        if self._trial or k == 0:
            return False
        last = self.log.notes[k - 1]
        return last.cut is not None or bool(last.known)

    def _numbers(self, stages: Stages) -> Tensor | None:
        """The times of a step, on the graph, if any of them moves."""
        assert self._hold is not None
        since, (t, held) = self._hold

        def pinned(pin: Pin) -> Tensor | None:
            if pin is None or not (self._t_moves if pin[0] < 0 else self._moves[pin[0]]):
                return None
            return (t if pin[0] < 0 else held[pin[0]][2])[pin[1]].to(since)

        k = stages.k
        last = self.log.notes[k - 1] if k and not self._trial else None
        if last is None:
            start = since if self._t_moves and not self._trial else None
        else:
            start = pinned(last.pin) if last.cut is None else since
        stop = pinned(self._pin(stages.stop))
        if start is None and stop is None and not (self._t_moves and len(stages.inner)):
            return None
        start = since.new_tensor(stages.start) if start is None else start
        stop = since.new_tensor(stages.stop) if stop is None else stop
        asked = t[stages.inner.start : stages.inner.stop].to(since)
        return torch.cat((start[None], stop[None], asked))

    def _pin(self, stop: float) -> Pin:
        known = self.known_at(stop)
        if known:
            return next((x for x in known if self._moves[x[0]]), known[0])
        if stop == self.asked.t[-1] or (self.inner.timeline.landing and stop in self._asked_times):
            return -1, self.asked.t.index(stop)
        return None

    def _note(self, stages: Stages, new: State, here: Happening) -> None:
        """Look for events in a step that has just been taken, and freeze what was found."""
        k, timeline = stages.k, self.inner.timeline
        if not all(bool(torch.isfinite(x).all()) for x in new):
            self._refuse_nonfinite(stages)
        with torch.no_grad():
            u = self._polynomials(stages)
        known, row = self.known_at(stages.stop), self.rows
        if self.log.frozen is not None:
            noted = self.log.frozen[k]
            found = tuple(self._crossings.again(x, here.value, u) for x in noted.found)
            cut = None if noted.cut is None else found[-1].time
            note = Note(stages.stop, self._pin(stages.stop), found, cut, noted.known, row)
        else:
            found, cut = self._crossings.look(here.value, u, stages.start, stages.stop, new)
            if cut is not None:
                self._check_apart(found[-1], stages, known)
            known = known if cut is None else ()
            note = Note(stages.stop, self._pin(stages.stop), found, cut, known, row)
        self.log.notes.append(note)
        self.rows += note.rows
        if isinstance(timeline, CutTimeline):
            timeline.take(k, note.cut)
            if note.cut is not None:
                self.inner.forget_times()
        elif note.cut is not None:
            assert isinstance(timeline, AdaptiveTimeline)
            timeline.cut(note.cut)

    def _after(self, note: Note, new: State, here: Happening) -> None:
        """Whether that was the end; and the signs from which the next step starts."""
        for found in note.found:
            event = self.events[found.event]
            assert isinstance(event, Event)
            count = sum(x.event == found.event for past in self.log.notes for x in past.found)
            if event.terminal and count >= int(event.terminal):
                self.ended = self.finished_early = True
        if self.log.frozen is not None:
            self.ended = self.taken == len(self.log.frozen)
        elif not self.ended:
            t = note.stop if note.cut is None else note.cut
            changed = note.cut is not None or bool(note.known)
            self._crossings.go_on(here.value, t, tuple(x.detach() for x in new), changed)

    def _happen(
        self,
        note: Note,
        stages: Stages,
        new: State,
        rows: list[tuple[int, State]],
        here: Happening,
        recording: bool,
    ) -> tuple[State, Tensor, State]:
        """The state and the restart time behind the step, and the leaves that finding them needed."""
        leaves: list[Tensor] = []
        row, since = len(self.asked.t) + note.row, here.since
        u = cache(lambda: self._polynomials(stages))
        for found in note.found:
            t, y = here.moment(found, u, recording, leaves)
            after, acts = y, note.cut is not None and found is note.found[-1]
            if acts:
                after = here.reset(found.event, t, y)
                new, since = after, t
            rows += [(row, (*y, t)), (row + 1, (*after, t))]
            row += 2
        for which in note.known:
            new = self._known(rows, row, which, here, new)
            since = here.known_time(*which)
            row += 2
        return new, since, tuple(leaves)

    def _known(
        self, rows: list[tuple[int, State]], row: int, which: tuple[int, int], here: Happening, y: State
    ) -> State:
        t = here.known_time(*which)
        after = here.reset(which[0], t, y)
        rows += [(row, (*y, t)), (row + 1, (*after, t))]
        return after

    def _polynomials(self, stages: Stages) -> Polynomials:
        """That of this step, on its graph."""
        if stages.leaf is not None:
            ends = stages.leaf[:2]
        else:
            ends = torch.tensor([stages.start, stages.stop], dtype=self.inner.wide, device=self.inner.device)
        return Polynomials(ends, [x[None] for x in stages.polynomial()])

    def _asked(self, step: Step, cut: float | None, since: Tensor) -> tuple[tuple[Any, State], ...]:
        """Outputs at asked times behind the first, up to a cut, each with its time."""
        sign = 1.0 if self.asked.t[-1] >= self.asked.t[0] else -1.0
        found: list[tuple[Any, State]] = []
        for j, values in step.outputs:
            assert isinstance(j, int)
            time = self.asked.t[j]
            if j and (cut is None or sign * time <= sign * cut):
                found.append((j, (*values, since.new_tensor(time))))
        return tuple(found)

    def _check_apart(self, found: Found, stages: Stages, known: tuple[tuple[int, int], ...]) -> None:
        """Of two changes of the state at once nobody knows the derivative."""
        near, start = resolution(stages.start, stages.stop), self.asked.t[0]
        last = self.log.notes[-1] if stages.k else Note(start, None, (), None, self.known_at(start), 0)
        if abs(found.time - stages.stop) <= near:
            others = [i for i, _ in known]
        elif abs(found.time - stages.start) <= near:
            others = [i for i, _ in last.known] if last.cut is None else [last.found[-1].event]
        else:
            others = []
        if others:
            raise ValueError(
                f"events[{min(others[0], found.event)}] and events[{max(others[0], found.event)}] happen at once, at "
                f"t={found.time:.6g}: which comes first has no derivative. Give one event that does what both do, or move one"
            )

    def _refuse_nonfinite(self, stages: Stages) -> None:
        raise SolveError(
            "nonfinite",
            f"the solution is not finite at t={stages.stop:.6g}, after step {stages.k} from t={stages.start:.6g}. The steps "
            f"are too long for the problem, or f or a reset is undefined there: try a smaller dt or an adaptive method",
            t=stages.start,
            step=stages.k,
            state=tuple(x.detach() for x in stages.state),
        )


def resolution(start: float, stop: float) -> float:
    """Events nearer than this happen at once."""
    return 16 * math.ulp(max(abs(start), abs(stop)))
