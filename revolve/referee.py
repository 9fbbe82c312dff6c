"""The referee: a schedule run on plain integers, and counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from revolve.actions import Report, Schedule, TierReport
from revolve.binomial import whole
from revolve.run import Run


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
