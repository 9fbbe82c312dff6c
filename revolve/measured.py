"""What a step, a write and a read take: measured on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from time import perf_counter
from typing import Any

from revolve.binomial import whole
from revolve.budget import Prices
from revolve.run import Stepper
from revolve.stores import CheckpointStore


def calibrate(
    stepper: Stepper[Any, Any, Any],
    state: Any,
    cotangent: Any,
    stores: Mapping[int, CheckpointStore[Any]] | None = None,
    *,
    repeats: int = 3,
) -> Prices:
    """Measured seconds of step 0, run, recorded and reversed, and of a write and a read in each store.

    The least of ``repeats`` times each. The steps are a deep copy's, so that what the stepper adds up (cotangents of
    parameters, say) stays as it is; TypeError if it cannot be copied.
    """
    repeats = whole("repeats", repeats, least=1)
    try:
        stepper = deepcopy(stepper)
    except Exception as error:
        raise TypeError(
            f"the stepper cannot be copied ({error}), and measuring it would add to its own sums; give it a "
            f"__deepcopy__, or one of its kind that can be copied"
        ) from error
    step, record, reverse = [], [], []
    for _ in range(repeats):
        before = perf_counter()
        stepper.advance(state, 0, 1)
        ran = perf_counter()
        _, tape = stepper.record(state, 0, 1)
        recorded = perf_counter()
        stepper.reverse(tape, cotangent)
        step.append(ran - before)
        record.append(recorded - ran)
        reverse.append(perf_counter() - recorded)
    moved = {tier: store_seconds(store, state, repeats) for tier, store in (stores or {}).items()}
    tiers = [moved.get(tier, (0.0, 0.0)) for tier in range(max(moved, default=-1) + 1)]
    return Prices(min(step), min(record), min(reverse), tuple(w for w, _ in tiers), tuple(r for _, r in tiers))


def store_seconds(
    store: CheckpointStore[Any], state: Any, repeats: int = 3, finished: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Measured seconds of a write, until the state is where it goes, and of a read; the least of ``repeats``.

    ``finished`` returns when a device has done what it was asked.
    """
    writes, reads = [], []
    for _ in range(repeats):
        before = perf_counter()
        store.save(0, state)
        if hasattr(store, "settle"):
            store.settle()
        finished()
        saved = perf_counter()
        store.load(0)
        finished()
        writes.append(saved - before)
        reads.append(perf_counter() - saved)
        store.drop(0)
    if hasattr(store, "release"):
        store.release()
    return min(writes), min(reads)
