"""The only interpreter of actions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from revolve.actions import (
    ADVANCE,
    DROP,
    GIVEN,
    LOAD,
    RECORD,
    REVERSE,
    SAVE,
    Saved,
    Schedule,
)
from revolve.binomial import whole
from revolve.journal import Journal, Point, Watched
from revolve.stores import CheckpointStore, Memory
from revolve.sweeps import Row, actions_of, with_next_load

State = TypeVar("State")
Tape = TypeVar("Tape")
Cotangent = TypeVar("Cotangent")


class Stepper(Protocol[State, Tape, Cotangent]):
    """How to take steps and how to transpose them.

    It never writes to the state it is given, which may be the caller's x_0 or still to be kept: it returns another.
    The stepper owns outputs, cotangents of outputs and parameters; a schedule and its interpreter know none of them.
    """

    def advance(self, state: State, start: int, stop: int) -> State:
        """Steps start .. stop-1 from x_start, keeping nothing."""
        ...

    def record(self, state: State, start: int, stop: int) -> tuple[State, Tape]:
        """The same steps, and the tape from which they can be transposed."""
        ...

    def reverse(self, tape: Tape, cotangent: Cotangent) -> Cotangent:
        """The cotangent of x_start from that of x_stop."""
        ...

    def last(self, step: int) -> bool:
        """Whether the step just taken was the last; asked only when the number of steps is unknown."""
        ...


class Run(Generic[State, Tape, Cotangent]):
    """One chain, run forward and reversed by a schedule. States are opaque: only the stepper and the stores touch them.

    ``stores``: one for each tier that the schedule names; without them every tier is a dictionary in memory.
    ``given=True``: the caller keeps x_0 himself. It is never copied, it still counts as one of the slots, and the
    reverse sweep can be repeated, from x_0 alone.
    ``journal``: the run can be continued by another process that makes the same calls.
    """

    def __init__(
        self,
        schedule: Schedule,
        stepper: Stepper[State, Tape, Cotangent],
        stores: Mapping[int, CheckpointStore[State]] | None = None,
        *,
        given: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self.schedule = schedule
        self.steps: int | None = None
        self._journal = journal
        self._stepper: Stepper[State, Any, Cotangent] = stepper if journal is None else Watched(stepper, journal)
        self._stores: Mapping[int, CheckpointStore[State]] = defaultdict(Memory) if stores is None else stores
        self._states: set[tuple[int, int]] = set()
        self._tapes: dict[tuple[int, int], Any] = {}
        self._given = given
        self._first: State | None = None
        self._state: State | None = None
        self._at = -1
        self._reversed = -1
        self._before: tuple[int, State] | None = None
        self._resumed: tuple[int, State] | None = None
        self._loaded: tuple[int, int] | None = None
        self._leaving: set[tuple[int, int]] = set()
        self._based: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def saved(self) -> Saved:
        """What a reverse sweep would start from now."""
        return Saved(frozenset(self._states), tuple(sorted(self._tapes)), self._at)

    def forward(self, state: State, steps: int | None = None) -> State:
        """The first sweep from x_0; returns x_n. With ``steps=None`` the stepper says which step was the last."""
        if steps is not None:
            steps = whole("steps", steps, least=1)
        self._begin(state)
        self.steps = steps
        point = None if self._journal is None else self._journal.begin(state, steps)
        with self._undone():
            start = 0 if self._journal is None else self._go_on(state, point)
            actions: Iterable[Row]
            actions = self.schedule.forward(None) if steps is None else actions_of(self.schedule, steps, None)
            if self._journal is not None:
                actions = self._left(actions, start)
            if steps is None:
                return self._find_end(actions, start)
            self._execute(actions, None)
            if self._at != steps or self._state is None:
                raise ValueError(f"{self.schedule}: the first sweep ended at {self._at} of {steps}")
            final, self._state, self._at = self._state, None, -1
            return final

    def adopt(self, state: State, steps: int) -> None:
        """Take a chain that has been run already: x_0 is given, and the reverse sweep makes whatever else it needs."""
        if not self._given:
            raise ValueError("adopt() needs a Run made with given=True: the reverse sweep starts from the caller's x_0")
        self._begin(state)
        self.steps = whole("steps", steps, least=1)
        if self._journal is not None:
            self._go_on(state, None)

    def backward(self, cotangent: Cotangent) -> Cotangent:
        """The reverse sweep: the cotangent of x_0 from that of x_n. Every slot is empty afterwards."""
        if self.steps is None or not (self._states or self._tapes or self._at >= 0 or self._first is not None):
            raise RuntimeError("there is nothing to reverse: run forward() first (with given=True it may be repeated)")
        with self._undone():
            result = self._backward(self.steps, cotangent)
        if self._journal is not None:
            self._journal.finish()
        for store in self._stores.values():
            if hasattr(store, "release"):
                store.release()
        return result

    def _backward(self, steps: int, cotangent: Cotangent) -> Cotangent:
        if self._first is not None and not any(step == 0 for step, _ in self._states):
            self._states.add((0, GIVEN))
        point = self._journal.returned(cotangent) if self._journal is not None and self._journal.active else None
        self._reversed, saved, found = steps, self.saved, cotangent
        if point is not None:
            found, saved = point.value, self._come_back(point, steps)
        actions = actions_of(self.schedule, steps, saved)
        if point is not None:
            done = (REVERSE, point.step, steps)
            actions = (action for action in actions if tuple(action) != done)
        result = self._execute(self._foreseen(actions), found)
        if self._reversed != 0:
            raise ValueError(f"{self.schedule}: the reverse sweep did not reach step 0, but {self._reversed}")
        self._state, self._at, self._loaded = None, -1, None
        self._leave()
        if not self._given:
            self._first = None
            self._states.discard((0, GIVEN))
        assert result is not None and not self._leaving
        return result

    def reversing(self) -> Iterator[tuple[int, int, Tape]]:
        """The reverse sweep for a caller who transposes by himself: (start, stop, tape) when the turn of a tape comes."""
        assert self.steps is not None
        if self._first is not None and not any(step == 0 for step, _ in self._states):
            self._states.add((0, GIVEN))
        self._reversed = self.steps
        with self._undone():
            for verb, a, b in self._foreseen(actions_of(self.schedule, self.steps, self.saved)):
                if verb != REVERSE:
                    self._execute(([verb, a, b],), None)
                    continue
                self._state, self._at = None, -1
                yield a, b, self._tapes.pop((a, b))
                self._reversed = a
                self._based.pop((a, b), None)
                self._leave()

    # -- going on where an earlier process was

    def _go_on(self, state: State, point: Point | None) -> int:
        """Take up what an earlier process left of this run: the states in stores that stay, and how far it came."""
        assert self._journal is not None
        for tier, store in self._stores.items():
            if getattr(store, "stays", False):
                self._states |= {(step, tier) for step in store.steps}  # type: ignore[attr-defined]
        if self._first is None and self._journal.goes_on:
            self._first = self._journal.copy(state)  # its place may have been on a tape that is lost
        if point is None:
            return 0
        self._stepper.restore(point.stepper)  # type: ignore[attr-defined]
        self._resumed = point.step, point.value
        return point.step

    def _left(self, actions: Iterable[Row], start: int) -> Iterator[Row]:
        """Of a first sweep, what is left to do from ``start``, where some states are there already and some are lost."""
        for action in actions:
            verb, a, b = action
            if verb in (ADVANCE, RECORD):
                if b > start:
                    self._resume()
                    yield [verb, max(a, start), b]
            elif verb == SAVE:
                if self._at_hand(a) is not None and (a, b) not in self._states:
                    yield action
            elif (a, b) in self._states:
                yield action
        self._resume()

    def _resume(self) -> None:
        """From x_0, which the schedule may have wanted to keep, to where the earlier process was."""
        if self._resumed is not None:
            (self._at, self._state), self._resumed = self._resumed, None

    def _come_back(self, point: Point, steps: int) -> Saved:
        """Below a point of the reverse sweep: the steps above it count as a tape that is reversed already."""
        self._stepper.restore(point.stepper)  # type: ignore[attr-defined]
        for step, tier in [slot for slot in self._states if slot[0] >= point.step and slot[1] != GIVEN]:
            self._states.remove((step, tier))
            self._stores[tier].drop(step)
        self._tapes = {tape: held for tape, held in self._tapes.items() if tape[1] <= point.step}
        self._based = {tape: slot for tape, slot in self._based.items() if tape in self._tapes}
        self._state, self._at, self._reversed = None, -1, point.step
        return Saved(frozenset(self._states), (*sorted(self._tapes), (point.step, steps)), -1)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Whatever goes wrong, no slot stays full: what is to be continued alone is left where it is."""
        try:
            yield
        except BaseException:
            first = self._first
            self._forget(staying=False)
            if self._given and first is not None:
                self._first = first
                self._states.add((0, GIVEN))
            if self._journal is not None:
                self._journal.pause()
            raise

    def _begin(self, state: State) -> None:
        if self._states or self._tapes:
            self._forget(staying=False)
        self._state, self._at, self._loaded = state, 0, None
        if self._given:
            self._first = state
            self._states.add((0, GIVEN))

    def clear(self) -> None:
        """Give back every slot and tape."""
        self._forget(staying=True)

    def _forget(self, *, staying: bool) -> None:
        """Give back every slot and tape; states in stores that stay only if told to."""
        for step, tier in self._states:
            if tier != GIVEN and (staying or not getattr(self._stores[tier], "stays", False)):
                self._stores[tier].drop(step)
        self._states.clear()
        self._tapes.clear()
        self._based.clear()
        self._state, self._first, self._before, self._resumed = None, None, None, None
        self._at, self._loaded = -1, None
        self._leave()
        for store in self._stores.values():
            if hasattr(store, "release"):
                store.release()

    def _find_end(self, actions: Iterable[Row], begun: int) -> State:
        """Follow a schedule that never ends, until the stepper says that a step was the last."""
        if begun and self._stepper.last(begun - 1):
            self._resume()
            return self._end(RECORD)
        for action in actions:
            verb, start, stop = action
            before = self._state
            self._execute((action,), None)
            if verb in (ADVANCE, RECORD):
                assert before is not None
                if stop != start + 1:
                    raise ValueError(f"{action} with an unknown end: one step at a time")
                self._before = (start, before)
                if self._stepper.last(start):
                    return self._end(verb)
        raise ValueError(f"{self.schedule} stopped before the end was found")

    def _end(self, verb: int) -> State:
        """The step just taken was the last: x_{n-1} is the working state again, unless that step was recorded."""
        assert self._state is not None
        final, self.steps = self._state, self._at
        if verb == ADVANCE:
            assert self._before is not None
            self._at, self._state = self._before
        else:
            self._at, self._state = -1, None
        self._before = None
        return final

    def _execute(self, actions: Iterable[Row], cotangent: Cotangent | None) -> Cotangent | None:
        stepper, tapes = self._stepper, self._tapes
        for verb, a, b in actions:
            if verb == ADVANCE:
                self._state = stepper.advance(self._take(a), a, b)
                self._moved(b)
            elif verb == RECORD:
                self._state, tapes[a, b] = stepper.record(self._take(a), a, b)
                if self._loaded is not None:
                    self._based[a, b] = self._loaded
                self._moved(b)
            elif verb == REVERSE:
                if cotangent is None:
                    raise ValueError(f"Reverse({a}, {b}) has no cotangent: only the reverse sweep has one")
                if (a, b) not in tapes:
                    raise ValueError(f"Reverse({a}, {b}): no tape of exactly these steps is held")
                if b != self._reversed:
                    raise ValueError(f"Reverse({a}, {b}) when the steps from {self._reversed} on are reversed")
                self._state, self._at, self._reversed = None, -1, a
                cotangent = stepper.reverse(tapes.pop((a, b)), cotangent)
                self._based.pop((a, b), None)
                if self._leaving:
                    self._leave()
            elif verb == SAVE:
                self._save(a, b)
            elif verb == LOAD:
                self._load(a, b)
            elif verb == DROP:
                self._drop(a, b)
        return cotangent

    def _foreseen(self, actions: Iterable[Row]) -> Iterable[Row]:
        """The actions; the next state to be loaded is on its way early, if its store can do that."""
        early = {tier for tier, store in self._stores.items() if hasattr(store, "prefetch")}
        return with_next_load(actions, early, self._fetch) if early else actions

    def _fetch(self, step: int, tier: int) -> bool:
        if (step, tier) not in self._states:
            return False
        self._stores[tier].prefetch(step)  # type: ignore[attr-defined]
        return True

    def _take(self, step: int) -> State:
        """The working state, handed over: it is let go as soon as the stepper needs it no more."""
        if self._at != step or self._state is None:
            raise ValueError(f"a run from step {step} was asked for, but the working state is at {self._at}")
        state, self._state = self._state, None
        return state

    def _moved(self, step: int) -> None:
        self._at, self._loaded = step, None
        if self._leaving:
            self._leave()

    def _save(self, step: int, tier: int) -> None:
        if step == 0 and self._given:
            return
        state = self._at_hand(step)
        if state is None:
            raise ValueError(f"Save({step}): the working state is at {self._at}")
        if (step, tier) in self._states:
            raise ValueError(f"Save({step}, tier={tier}): that state is already there")
        if (step, tier) in self._leaving:  # saved anew: the old slot goes when the last that uses it lets go
            self._leaving.remove((step, tier))
            self._based = {tape: slot for tape, slot in self._based.items() if slot != (step, tier)}
        try:
            store = self._stores[tier]
        except KeyError:
            raise ValueError(f"Save({step}, tier={tier}): stores holds the tiers {sorted(self._stores)} only") from None
        store.save(step, state)
        self._states.add((step, tier))
        if self._loaded is not None and hasattr(store, "settle"):
            store.settle()  # the state may lie in a slot that is used again before a slow store has copied it

    def _at_hand(self, step: int) -> State | None:
        """The working state, or the one before it, if it is that of this step."""
        if step == self._at:
            return self._state
        return self._before[1] if self._before is not None and self._before[0] == step else None

    def _load(self, step: int, tier: int) -> None:
        if (step, tier) not in self._states:
            raise ValueError(f"Load({step}, tier={tier}): nothing is kept there")
        self._state, self._at, self._loaded = None, -1, (step, tier)
        self._leave()
        self._state = self._first if tier == GIVEN else self._stores[tier].load(step)
        self._at = step

    def _drop(self, step: int, tier: int) -> None:
        """A slot is given back when neither the working state nor a tape may share its memory any more."""
        if (step, tier) not in self._states or tier == GIVEN:
            raise ValueError(f"Drop({step}, tier={tier}): nothing to drop there")
        self._states.remove((step, tier))
        if not getattr(self._stores[tier], "lends", True):
            self._stores[tier].drop(step)
            return
        self._leaving.add((step, tier))
        if self._loaded != (step, tier) or self._state is None:
            self._leave()

    def _leave(self) -> None:
        """Give back every dropped slot that is not in use."""
        for step, tier in self._leaving - {self._loaded, *self._based.values()}:
            self._leaving.remove((step, tier))
            self._stores[tier].drop(step)
