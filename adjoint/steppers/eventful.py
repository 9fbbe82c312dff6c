"""Steps in which events happen: the state changes there, and the next step starts at the time of the event.

For an event e(t, y, p) = 0 with the reset y+ = R(t, y, p), in a step whose interpolant is u, the root t_e of
e(t, u(t), p) and the state R(t_e, u(t_e)) are functions of the step's own numbers, and are transposed with it:

    lam- = R_y^T lam+ - alpha e_y,    alpha = (tbar_e + tau+ + lam+^T (R_t + R_y u'(t_e))) / (e_t + e_y u'(t_e))

The time from which the next step starts is a part of the state of the chain; later times stay where they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.events import At, Event, root_on_graph
from adjoint.interpolate import Polynomials
from adjoint.steppers.crossings import Crossings, Found
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.stages import Stages
from adjoint.tensors import State, refuse_writing, versions_of
from adjoint.timeline import AdaptiveTimeline, CutTimeline, SolveError

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

    The state has one leaf more: the time from which the last restart goes on. Outputs are the leaves of y and a time: at
    the asked times, and then two rows (before, after) for everything that happens.
    """

    label = "f"
    initial: int | None = 0
    series: State = ()
    inputs: tuple[Tensor, ...] = ()

    def __init__(self, inner: ExplicitProgram, events: Sequence[Event | At], t: Tensor, log: Log) -> None:
        self.inner, self.events, self.log = inner, tuple(events), log
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
        f, args, _, hold = function
        y, since = state[:-1], state[-1]
        rows: list[tuple[int, State]] = []
        known = () if k or self._trial else self.known_at(self.asked.t[0])
        for row, (i, j) in enumerate(known):
            y = self._known(rows, len(self.asked.t) + 2 * row, (i, j), self._at(hold, i, j, since), y, args, hold)
        first = k == self.taken and not self._trial
        if first and k == 0:
            self._crossings.begin(self._value(hold, args), self.asked.t[0], y)
        self._hold = since, hold
        step, stages = self._plain_step((f, args), k, y, recording, outputs)
        if self._trial:
            return Step((*step.state, since), self._asked(step, None, since, hold), ())
        if first:
            self._note(stages, step, args, hold)
        note = self.log.notes[k]
        new, since, leaves = self._happen(note, stages, step.state, since, rows, args, hold, recording)
        if first:
            self._after(note, new, args, hold)
        seen = (*self._asked(step, note.cut, since, hold), *rows) if outputs else ()
        return Step((*new, since), seen, leaves)

    def _plain_step(self, function: Any, k: int, y: State, recording: bool, outputs: bool) -> tuple[Step, Stages]:
        """The step as if nothing happened in it. Nothing of it is held on to: a cycle would keep its graph alive."""
        self.inner.moving, self.inner.watch = self._numbers, self._seen
        try:
            step = self.inner.step(function, k, y, recording, outputs)
            assert self._stages is not None
            return step, self._stages
        finally:
            self.inner.moving = self.inner.watch = self._stages = self._hold = None

    def _seen(self, stages: Stages) -> None:
        self._stages = stages

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

    def _note(self, stages: Stages, step: Step, args: Any, hold: Any) -> None:
        """Look for events in a step that has just been taken, and freeze what was found."""
        k, timeline = stages.k, self.inner.timeline
        if not all(bool(torch.isfinite(x).all()) for x in step.state):
            self._refuse_nonfinite(stages)
        with torch.no_grad():
            u = self._polynomials(stages)
        value, known, row = self._value(hold, args), self.known_at(stages.stop), self.rows
        if self.log.frozen is not None:
            noted = self.log.frozen[k]
            found = tuple(self._crossings.again(x, value, u) for x in noted.found)
            cut = None if noted.cut is None else found[-1].time
            note = Note(stages.stop, self._pin(stages.stop), found, cut, noted.known, row)
        else:
            found, cut = self._crossings.look(value, u, stages.start, stages.stop, step.state)
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

    def _after(self, note: Note, new: State, args: Any, hold: Any) -> None:
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
            self._crossings.go_on(self._value(hold, args), t, tuple(x.detach() for x in new), changed)

    def _happen(
        self,
        note: Note,
        stages: Stages,
        new: State,
        since: Tensor,
        rows: list[tuple[int, State]],
        args: Any,
        hold: Any,
        recording: bool,
    ) -> tuple[State, Tensor, State]:
        """The state and the restart time behind the step, and the leaves that finding them needed."""
        leaves: list[Tensor] = []
        row = len(self.asked.t) + note.row
        u = self._polynomials(stages) if note.found else None
        for found in note.found:
            assert u is not None
            t, y = self._moment(found, u, args, hold, recording, leaves)
            after, acts = y, note.cut is not None and found is note.found[-1]
            if acts:
                after = self._reset(found.event, t, y, args, hold)
                new, since = after, t
            rows += [(row, (*y, t)), (row + 1, (*after, t))]
            row += 2
        for i, j in note.known:
            t = self._at(hold, i, j, since)
            new = self._known(rows, row, (i, j), t, new, args, hold)
            since = t
            row += 2
        return new, since, tuple(leaves)

    def _known(
        self, rows: list[tuple[int, State]], row: int, which: tuple[int, int], t: Tensor, y: State, args: Any, hold: Any
    ) -> State:
        after = self._reset(which[0], t, y, args, hold)
        rows += [(row, (*y, t)), (row + 1, (*after, t))]
        return after

    def _at(self, hold: Any, i: int, j: int, like: Tensor) -> Tensor:
        return hold[1][i][2][j].to(like)

    def _moment(
        self, found: Found, u: Polynomials, args: Any, hold: Any, recording: bool, leaves: list[Tensor]
    ) -> tuple[Tensor, State]:
        """The time of an event and the state there; on the graph, by the implicit function theorem."""
        t = torch.tensor(found.time, dtype=u.times.dtype, device=u.times.device)
        if not torch.is_grad_enabled():
            return t, u.at(t)
        function, name = hold[1][found.event][0], f"the function of events[{found.event}]"

        def value(t: Tensor) -> Tensor:
            return self._number(function, found.event, t, u.at(t), args)

        if not recording and not value(t).requires_grad:
            return t, u.at(t)
        leaf = t.requires_grad_()
        leaves.append(leaf)
        t = root_on_graph(value, leaf, name)
        return t, u.at(t)

    def _polynomials(self, stages: Stages) -> Polynomials:
        """That of this step, on its graph."""
        if stages.leaf is not None:
            ends = stages.leaf[:2]
        else:
            ends = torch.tensor([stages.start, stages.stop], dtype=self.inner.wide, device=self.inner.device)
        return Polynomials(ends, [x[None] for x in stages.polynomial()])

    def _asked(self, step: Step, cut: float | None, since: Tensor, hold: Any) -> tuple[tuple[Any, State], ...]:
        """Outputs at asked times, up to a cut, each with its time."""
        sign = 1.0 if self.asked.t[-1] >= self.asked.t[0] else -1.0
        found: list[tuple[Any, State]] = []
        for j, values in step.outputs:
            assert isinstance(j, int)
            time = self.asked.t[j]
            if cut is None or sign * time <= sign * cut:
                found.append((j, (*values, since.new_tensor(time))))
        return tuple(found)

    def _value(self, hold: Any, args: Any) -> Callable[[int, Tensor, State], Tensor]:
        """events[i] at one time, as a number."""
        return lambda i, t, y: self._number(hold[1][i][0], i, t, y, args)

    def _number(self, function: Any, i: int, t: Tensor, y: State, args: Any) -> Tensor:
        versions = versions_of(y)
        found = function(t.to(self.inner.dtype), self.inner.structure.unflatten(y), *args)
        if versions_of(y) != versions:
            refuse_writing(f"the function of events[{i}] changed its state")
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.numel() != 1:
            raise TypeError(
                f"the function of events[{i}] gave {found!r}; it must give a tensor of one real number that changes its "
                f"sign. Of several write one Event each"
            )
        return found.reshape(())

    def _reset(self, i: int, t: Tensor, y: State, args: Any, hold: Any) -> State:
        reset = hold[1][i][1]
        if reset is None:
            return y
        versions, name = versions_of(y), f"the value of the reset of events[{i}]"
        value = reset(t.to(self.inner.dtype), self.inner.structure.unflatten(y), *args)
        leaves = self.inner.structure.flatten(value, name)
        if versions_of(y) != versions:
            refuse_writing(f"the reset of events[{i}] changed its state")
        for new, old in zip(leaves, y, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)} and {new.dtype} for a state of shape {tuple(old.shape)} and "
                    f"{old.dtype}; it must be shaped and typed like y"
                )
        return leaves

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


def with_events(inner: ExplicitProgram, events: Sequence[Event | At], t: Tensor, log: Log) -> EventfulProgram:
    """The program whose known times are ends of steps at which f may jump."""
    times = [x for e in events if isinstance(e, At) and isinstance(e.times, Tensor) for x in e.times.tolist()]
    inner.control = replace(inner.control, jumps=(*inner.control.jumps, *times))
    return EventfulProgram(inner, events, t, log)
