"""The only interpreter of actions, and the referee that runs it on plain integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np

from revolve.actions import (
    ADVANCE,
    DROP,
    GIVEN,
    LOAD,
    RECORD,
    REVERSE,
    SAVE,
    Action,
    Report,
    Saved,
    Schedule,
    TierReport,
    encode,
)
from revolve.binomial import whole
from revolve.stores import CheckpointStore, Memory

State = TypeVar("State")
Tape = TypeVar("Tape")
Cotangent = TypeVar("Cotangent")

CACHED_STEPS = 20_000
"""Plans of chains up to this length are kept as arrays between runs (3 MB at most, the last 16)."""


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
    """

    def __init__(
        self,
        schedule: Schedule,
        stepper: Stepper[State, Tape, Cotangent],
        stores: Mapping[int, CheckpointStore[State]] | None = None,
        *,
        given: bool = False,
    ) -> None:
        self.schedule = schedule
        self.steps: int | None = None
        self._stepper = stepper
        self._stores: Mapping[int, CheckpointStore[State]] = defaultdict(Memory) if stores is None else stores
        self._states: set[tuple[int, int]] = set()
        self._tapes: dict[tuple[int, int], Tape] = {}
        self._given = given
        self._first: State | None = None
        self._state: State | None = None
        self._at = -1
        self._reversed = -1
        self._before: tuple[int, State] | None = None
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
        if steps is not None:
            self._execute(_actions(self.schedule, steps, None), None)
            if self._at != steps or self._state is None:
                raise ValueError(f"{self.schedule}: the first sweep ended at {self._at} of {steps}")
            final, self._state, self._at = self._state, None, -1
            return final
        return self._find_end()

    def adopt(self, state: State, steps: int) -> None:
        """Take a chain that has been run already: x_0 is given, and the reverse sweep makes whatever else it needs."""
        if not self._given:
            raise ValueError("adopt() needs a Run made with given=True: the reverse sweep starts from the caller's x_0")
        self._begin(state)
        self.steps = whole("steps", steps, least=1)

    def backward(self, cotangent: Cotangent) -> Cotangent:
        """The reverse sweep: the cotangent of x_0 from that of x_n. Every slot is empty afterwards."""
        if self.steps is None or not (self._states or self._tapes or self._at >= 0):
            raise RuntimeError("there is nothing to reverse: run forward() first (with given=True it may be repeated)")
        self._reversed = self.steps
        result = self._execute(_actions(self.schedule, self.steps, self.saved), cotangent)
        if self._reversed != 0:
            raise ValueError(f"{self.schedule}: the reverse sweep did not reach step 0, but {self._reversed}")
        self._state, self._at, self._loaded = None, -1, None
        self._leave()
        assert result is not None and not self._leaving
        return result

    def _begin(self, state: State) -> None:
        if self._states or self._tapes:
            self.clear()
        self._state, self._at, self._loaded = state, 0, None
        if self._given:
            self._first = state
            self._states.add((0, GIVEN))

    def clear(self) -> None:
        """Give back every slot and tape."""
        for step, tier in self._states:
            if tier != GIVEN:
                self._stores[tier].drop(step)
        self._states.clear()
        self._tapes.clear()
        self._based.clear()
        self._state, self._first, self._before = None, None, None
        self._at, self._loaded = -1, None
        self._leave()

    def _find_end(self) -> State:
        """Follow a schedule that never ends, until the stepper says that a step was the last."""
        for action in self.schedule.forward(None):
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
        assert self._state is not None and self._before is not None
        final, self.steps = self._state, self._at
        if verb == ADVANCE:
            self._at, self._state = self._before
        else:
            self._at, self._state = -1, None
        self._before = None
        return final

    def _execute(self, actions: Iterable[Action | list[int]], cotangent: Cotangent | None) -> Cotangent | None:
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

    def _take(self, step: int) -> State:
        if self._at != step or self._state is None:
            raise ValueError(f"a run from step {step} was asked for, but the working state is at {self._at}")
        return self._state

    def _moved(self, step: int) -> None:
        self._at, self._loaded = step, None
        if self._leaving:
            self._leave()

    def _save(self, step: int, tier: int) -> None:
        if step == 0 and self._given:
            return
        if step == self._at:
            state = self._state
        elif self._before is not None and self._before[0] == step:
            state = self._before[1]
        else:
            raise ValueError(f"Save({step}): the working state is at {self._at}")
        if (step, tier) in self._states:
            raise ValueError(f"Save({step}, tier={tier}): that state is already there")
        assert state is not None
        if (step, tier) in self._leaving:  # saved anew: the old slot goes when the last that uses it lets go
            self._leaving.remove((step, tier))
            self._based = {tape: slot for tape, slot in self._based.items() if slot != (step, tier)}
        try:
            store = self._stores[tier]
        except KeyError:
            raise ValueError(f"Save({step}, tier={tier}): stores holds the tiers {sorted(self._stores)} only") from None
        store.save(step, state)
        self._states.add((step, tier))

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


def _actions(schedule: Schedule, steps: int, saved: Saved | None) -> Iterator[Action | list[int]]:
    """One sweep of a schedule: forward when nothing is saved yet. Short plans are made once and kept as arrays."""
    try:
        hash(schedule)
        cached = steps <= CACHED_STEPS
    except TypeError:  # a schedule with fields that change
        cached = False
    if not cached:
        yield from _sweep(schedule, steps, saved)
    else:
        yield from _rows(schedule, steps, saved).tolist()


def _sweep(schedule: Schedule, steps: int, saved: Saved | None) -> Iterator[Action]:
    return schedule.forward(steps) if saved is None else schedule.backward(steps, saved)


@lru_cache(maxsize=16)
def _rows(schedule: Schedule, steps: int, saved: Saved | None) -> np.ndarray:
    return encode(_sweep(schedule, steps, saved))


class VerificationError(AssertionError):
    """A schedule did what no schedule may do."""


class _Counter:
    """Steps on plain integers: x_k is k, its cotangent is k, and nothing may happen out of order."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.changes = np.zeros(steps + 1, dtype=np.int64)
        self.plain = self.recorded = self.tapes = self.peak_tapes = 0

    def advance(self, state: int, start: int, stop: int) -> int:
        self._run(state, start, stop)
        self.plain += stop - start
        return stop

    def record(self, state: int, start: int, stop: int) -> tuple[int, tuple[int, int]]:
        self._run(state, start, stop)
        self.recorded += stop - start
        self.tapes += stop - start
        self.peak_tapes = max(self.peak_tapes, self.tapes)
        return stop, (start, stop)

    def reverse(self, tape: tuple[int, int], cotangent: int) -> int:
        start, stop = tape
        self.tapes -= stop - start
        return start

    def last(self, step: int) -> bool:
        return step == self.steps - 1

    def _run(self, state: int, start: int, stop: int) -> None:
        if state != start or not start < stop <= self.steps:
            raise VerificationError(f"a run of {start} .. {stop} from the state of step {state}")
        self.changes[start] += 1
        self.changes[stop] -= 1


class _Slots:
    """A tier of integers that counts."""

    lends = False

    def __init__(self) -> None:
        self.states: dict[int, int] = {}
        self.saves = self.loads = self.peak = 0

    def save(self, step: int, state: int) -> None:
        self.states[step] = state
        self.saves += 1
        self.peak = max(self.peak, len(self.states))

    def load(self, step: int) -> int:
        self.loads += 1
        return self.states[step]

    def drop(self, step: int) -> None:
        del self.states[step]

    @property
    def report(self) -> TierReport:
        return TierReport(self.saves, self.loads, self.peak)


def verify(
    schedule: Schedule,
    steps: int,
    *,
    slots: int | Mapping[int, int] | None = None,
    tapes: int | None = None,
    known: bool = True,
) -> Report:
    """Run a schedule on plain integers and count: every step reversed once and in order, nothing loaded that is not
    there, slots (one number for tier 0, or one per tier) and recorded tapes never above what is allowed, all empty at
    the end. Raises VerificationError; ``known=False`` hides the number of steps until the last one has been run.
    """
    steps = whole("steps", steps, least=1)
    stepper = _Counter(steps)
    stores: defaultdict[int, _Slots] = defaultdict(_Slots)
    run = Run(schedule, stepper, stores)
    try:
        end = run.forward(0, steps if known else None)
        if end != steps or run.steps != steps:
            raise VerificationError(f"the first sweep ended at {end} of {steps}")
        run.backward(steps)
    except (ValueError, KeyError) as error:
        raise VerificationError(str(error)) from error
    if stepper.tapes or any(store.states for store in stores.values()):
        raise VerificationError("something is left in a slot or on a tape at the end")
    runs = np.cumsum(stepper.changes[:-1])
    tiers = {tier: store.report for tier, store in sorted(stores.items()) if store.saves}
    report = Report(steps, stepper.plain, stepper.recorded, int(runs.max()), stepper.peak_tapes, tiers)
    _within(report, slots, tapes)
    return report


def _within(report: Report, slots: int | Mapping[int, int] | None, tapes: int | None) -> None:
    if slots is None:
        limits: Mapping[int, int] = {}
    else:
        limits = slots if isinstance(slots, Mapping) else {0: slots}
    for tier, limit in limits.items():
        peak = report.tiers.get(tier, TierReport()).peak_slots
        if peak > limit:
            raise VerificationError(f"{peak} slots used in tier {tier}, {limit} allowed")
    if tapes is not None and report.peak_tapes > tapes:
        raise VerificationError(f"{report.peak_tapes} recorded steps held at once, {tapes} allowed")
