"""The one door: from what is known of a chain and of the memory to the cheapest plan, priced before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple, overload

from revolve import binomial
from revolve.actions import Schedule
from revolve.budget import BudgetError, Plan, Prices, counted, equal_plan, fitting, parse_bytes
from revolve.chains import Differing
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.hierarchy import LONGEST, HRevolve, Tier
from revolve.mixed import Mixed
from revolve.multistage import LONGEST_RANKED, Multistage
from revolve.online import Online
from revolve.schedules import Binomial, StoreAll

Size = int | str
SEARCHED = 7
"""Chains of differing steps up to this length are planned by a search of every sequence of moves."""


class Storage(NamedTuple):
    """One kind of memory: its bytes (None: as much as one likes), and the seconds that a write and a read take."""

    bytes: Size | None
    write: float = 0.0
    read: float = 0.0


@dataclass(frozen=True)
class OpenPlan:
    """A plan for a chain whose end is found on the way; ``at(n)`` is its price if that comes after n steps."""

    schedule: Schedule
    state_bytes: int = 0
    tape_bytes: int = 0
    working_bytes: int = 0
    given: bool = False
    prices: Prices | None = None

    def at(self, steps: int) -> Plan:
        """The price of n steps, but for one plain run: the last step's, which found the end."""
        sizes = self.state_bytes, self.tape_bytes, self.working_bytes
        return Plan(steps, self.schedule, *sizes, self.given, self.prices)

    def explain(self) -> str:
        """Schedule and what to expect of it in a few sentences."""
        text = f"{self.schedule} finds the end on the way"
        if not isinstance(self.schedule, Online):
            return f"{text}."
        slots = self.schedule.slots
        reach = binomial.beta(slots=slots, repetitions=2) + 1
        return (
            f"{text}, with {counted(slots, 'state')} kept. Up to {reach} steps it runs no step more than if the "
            f"end had been known, but the last one once; beyond that a few per cent more."
        )

    __str__ = explain


@overload
def plan(
    *,
    steps: int | None = ...,
    costs: Sequence[float],
    budget: Size,
    state_bytes: Sequence[int],
    tape_bytes: Sequence[int] | None = ...,
    working_bytes: int = ...,
    given: bool = ...,
    prices: Prices | None = ...,
) -> Plan: ...


@overload
def plan(
    *,
    steps: int,
    slots: int | str | None = ...,
    budget: Size | None = ...,
    state_bytes: int | None = ...,
    tape_bytes: int | None = ...,
    working_bytes: int = ...,
    given: bool = ...,
    mixed: bool = ...,
    holds_end: bool = ...,
    tiers: Sequence[Storage] | Sequence[Tier] | None = ...,
    prices: Prices | None = ...,
) -> Plan: ...


@overload
def plan(
    *,
    steps: None,
    slots: int | str | None = ...,
    budget: Size | None = ...,
    state_bytes: int | None = ...,
    tape_bytes: int | None = ...,
    working_bytes: int = ...,
    given: bool = ...,
    prices: Prices | None = ...,
) -> OpenPlan: ...


def plan(
    *,
    steps: int | None = None,
    slots: int | str | None = None,
    budget: Size | None = None,
    state_bytes: Any = None,
    tape_bytes: Any = None,
    working_bytes: int = 0,
    given: bool = False,
    costs: Sequence[float] | None = None,
    mixed: bool = False,
    holds_end: bool = False,
    tiers: Sequence[Storage] | Sequence[Tier] | None = None,
    prices: Prices | None = None,
) -> Plan | OpenPlan:
    """The cheapest plan for a chain, in so many slots, within a budget in bytes, or in several kinds of memory.

    ``steps``: None if the end is found on the way; then the plan is an :class:`OpenPlan`. ``slots``: a number, that of
    x_0 included, or ``"all"``: every tape is kept. ``budget``: bytes, or text like ``"512 MiB"``; it covers all that
    :class:`Plan` counts and needs ``state_bytes`` and ``tape_bytes``. Everything is recorded if all tapes fit, else the
    states share what one tape leaves; with ``mixed`` tapes share it too (``holds_end``: a tape holds the state at its
    step's end, as :class:`Mixed` says). ``costs``: one for each step, with a sequence of sizes each, if the steps
    differ. ``tiers``: memories with prices, the fastest first, which also holds tapes and the rest; as a ``Storage`` in
    bytes, or all of them as a ``Tier`` in slots. ``prices``: measured seconds (:func:`calibrate`), for the predicted
    time, and the price of a run that those of the tiers are weighed against (1 if not given). Raises
    :class:`BudgetError`, a ValueError that knows the smallest budget that works, when nothing fits.
    """
    _agree(steps, slots, budget, state_bytes, costs, mixed, holds_end, tiers)
    if costs is not None:
        assert budget is not None
        made = _differing(costs, budget, state_bytes, tape_bytes, working_bytes, given)
        if steps is not None and steps != made.steps:
            raise ValueError(f"steps={steps}, but there are {len(costs)} costs; leave steps out, or give as many")
    elif tiers is not None:
        assert steps is not None
        return _tiered(steps, tiers, state_bytes, tape_bytes or 0, working_bytes, given, prices)
    elif steps is None:
        return _open(slots, budget, state_bytes, tape_bytes, working_bytes, given, prices)
    else:
        sizes = {"state_bytes": state_bytes, "tape_bytes": tape_bytes, "working_bytes": working_bytes}
        made = equal_plan(steps=steps, slots=slots, budget=budget, **sizes, given=given)
        if mixed and budget is not None:
            made = _with_tapes(made, parse_bytes(budget, "budget"), holds_end)
    return replace(made, prices=prices) if prices is not None else made


def _agree(
    steps: int | None,
    slots: int | str | None,
    budget: Size | None,
    state_bytes: Any,
    costs: Sequence[float] | None,
    mixed: bool,
    holds_end: bool,
    tiers: Sequence[Storage] | Sequence[Tier] | None,
) -> None:
    """Raise for wishes that say nothing together."""
    if costs is not None and (budget is None or slots is not None or tiers is not None):
        raise ValueError("costs= of steps that differ need budget=, with state_bytes= a size for each step")
    if tiers is not None and (steps is None or slots is not None or budget is not None or state_bytes is None):
        raise ValueError("tiers= take the place of slots= and budget=, and need steps= and state_bytes=")
    if costs is None and isinstance(state_bytes, Sequence) and not isinstance(state_bytes, str):
        raise ValueError(
            "state_bytes= has a size for each step, for steps that differ; give costs= as well, or one size"
        )
    if mixed and (costs is not None or budget is None or steps is None):
        raise ValueError("mixed=True shares a budget= of equal steps among states and tapes, and needs steps=")
    if holds_end and not mixed:
        raise ValueError("holds_end=True is about tapes in the budget; give mixed=True as well")


def _open(
    slots: int | str | None,
    budget: Size | None,
    state_bytes: int | None,
    tape_bytes: int | None,
    working_bytes: int,
    given: bool,
    prices: Prices | None,
) -> OpenPlan:
    """What the slots or the budget would buy for two steps, they buy for any number."""
    held: dict[str, Any] = {"state_bytes": state_bytes, "tape_bytes": tape_bytes, "working_bytes": working_bytes}
    try:
        short = equal_plan(steps=2, slots=slots, budget=budget, **held, given=given)
    except BudgetError as error:
        raise BudgetError(error.sentence.replace("2 steps", "a chain of unknown length"), error.smallest) from None
    sizes = short.state_bytes, short.tape_bytes, short.working_bytes
    schedule: Schedule
    if slots == "all":
        schedule = StoreAll()
    elif budget is None:
        schedule = Online(slots)  # type: ignore[arg-type]
    else:
        limit = parse_bytes(budget, "budget")
        alone = short.state_bytes * (1 - given) + short.tape_bytes + short.working_bytes
        if not short.state_bytes:
            raise ValueError("state_bytes=0 lets every state be kept; give slots='all', or the size of a state")
        if alone > limit:
            raise BudgetError(f"budget={budget!r} cannot reverse a chain of unknown length", alone)
        schedule = Online((limit - short.tape_bytes - short.working_bytes) // short.state_bytes + given)
    return OpenPlan(schedule, *sizes, given, prices)


def _differing(costs: Sequence[float], budget: Size, states: Any, tapes: Any, working_bytes: int, given: bool) -> Plan:
    if not isinstance(states, Sequence) or not (tapes is None or isinstance(tapes, Sequence)):
        raise ValueError("costs= of steps that differ need state_bytes= and tape_bytes= as sequences, a size for each")
    limit = parse_bytes(budget, "budget") - working_bytes
    kept = (0, *states[1:]) if given else tuple(states)
    steps = len(costs)

    def schedule(budget: int) -> Differing:
        return Differing(tuple(costs), kept, budget, tapes, recording=tapes, exact=steps <= SEARCHED)  # type: ignore[arg-type]

    smallest = schedule(0).smallest(steps) + working_bytes
    if limit + working_bytes < smallest and not _feasible(schedule(max(0, limit)), steps):
        raise BudgetError(f"budget={budget!r} cannot reverse these {counted(steps, 'step')}", smallest)
    return Plan(steps, schedule(limit), max(kept), max(tapes or (0,)), working_bytes, given)


def _feasible(schedule: Differing, steps: int) -> bool:
    try:
        schedule.cost(steps)
    except ValueError:
        return False
    return True


def _with_tapes(made: Plan, limit: int, holds_end: bool) -> Plan:
    """The same budget with tapes in it, if that runs less, and if the chain is short enough for such a plan."""
    sizes = made.state_bytes, made.tape_bytes
    if isinstance(made.schedule, StoreAll) or not all(sizes):
        return made
    free = limit - made.tape_bytes - made.working_bytes  # the slot of x_0 may become a tape's, whoever holds x_0
    schedule = Mixed.in_bytes(free, *sizes, holds_end=holds_end)
    if schedule.slots < schedule.state or made.steps > schedule.longest:
        return made
    before, runs = made.report.runs, schedule.cost(made.steps)
    if runs >= before:
        return made
    why = f"Keeping tapes in place of some states saves runs here: {runs} in place of {before}."
    return replace(made, schedule=schedule, why=why)


def _tiered(
    steps: int,
    tiers: Sequence[Storage] | Sequence[Tier],
    state: int,
    tape: int,
    working: int,
    given: bool,
    prices: Prices | None,
) -> Plan:
    """The cheapest in time of: every tape in the first tier; the optimum over all tiers; files at a period."""
    if not isinstance(tiers, (list, tuple)) or not tiers:
        raise ValueError(f"tiers={tiers!r} hold nothing; give at least one, as in tiers=[Storage('1 GB')]")
    if all(isinstance(tier, Tier) for tier in tiers):
        return _in_slots(steps, [Tier(*tier) for tier in tiers], state, tape, working, given, prices)
    memories = [_memory(k, tier) for k, tier in enumerate(tiers)]
    first = None if memories[0].bytes is None else parse_bytes(memories[0].bytes, "tiers[0]")
    full = _priced(memories, prices)
    alone = given and len(memories) == 1  # the slot of x_0 takes no memory
    if first is not None and first < tape + working:
        least = tape + working + (state if steps > 1 and len(memories) == 1 and not given else 0)
        raise BudgetError(f"tiers[0]={memories[0].bytes!r} cannot hold one tape and what a step needs", least)
    if first is None or steps * tape + working <= first:
        why = f"{fitting(steps)} the first tier."
        return Plan(steps, StoreAll(), state, tape, working, given, full, why=why)
    rooms = [
        first - tape - working + state * alone,
        *(None if t.bytes is None else parse_bytes(t.bytes, "tiers") for t in memories[1:]),
    ]
    slots = [steps - 1 if room is None or not state else min(steps - 1, room // state) for room in rooms]
    if steps > 1 and not sum(slots):
        least = tape + working + state
        raise BudgetError("tiers hold no state beside one tape in the first", least)
    kinds = [Tier(count, memory.write, memory.read) for count, memory in zip(slots, memories, strict=True)]
    return _cheapest(Plan(steps, StoreAll(), state, tape, working, given, full), kinds)


def _memory(k: int, tier: Any) -> Storage:
    if not isinstance(tier, tuple) or isinstance(tier, Tier) or len(tier) > len(Storage._fields):
        raise ValueError(f"tiers[{k}]={tier!r} is no Storage(bytes, write, read); give all of them so, or all as Tier")
    memory = Storage(*tier)
    if not (0 <= memory.write < inf and 0 <= memory.read < inf):
        raise ValueError(f"tiers[{k}]={memory}: a write and a read take seconds, 0 or more, and finite")
    return memory


def _in_slots(
    steps: int, tiers: Sequence[Tier], state: int, tape: int, working: int, given: bool, prices: Prices | None
) -> Plan:
    full, kinds = _priced(tiers, prices), [t._replace(slots=min(t.slots, max(1, steps - 1))) for t in tiers]
    binomial.check(steps, sum(tier.slots for tier in kinds))
    return _cheapest(Plan(steps, StoreAll(), state, tape, working, given, full), kinds)


def _priced(tiers: Sequence[Storage] | Sequence[Tier], prices: Prices | None) -> Prices:
    """Prices of the tiers beside those of a step."""
    known = prices if prices and prices.step else Prices(1.0, unit="runs")
    return replace(known, write=tuple(t.write for t in tiers), read=tuple(t.read for t in tiers))


def _cheapest(made: Plan, tiers: Sequence[Tier]) -> Plan:
    """The same plan with the schedule that takes least time at its prices, and what the others would take."""
    assert made.prices is not None
    plans = [replace(made, schedule=schedule) for schedule in _candidates(made.steps, tiers, made.prices.step)]
    if not plans:
        raise ValueError(
            f"steps={made.steps} is too long to plan several tiers without a slot in the first; give that one at least"
        )
    best, *others = sorted(plans, key=lambda plan: plan.seconds)
    dearer = " and ".join(f"{plan.schedule} {plan.time}" for plan in others)
    return replace(best, why=f"It is the cheapest here: {dearer} would be predicted." if others else "")


def _candidates(steps: int, tiers: Sequence[Tier], step: float) -> Iterator[Schedule]:
    free, fast = tiers[0].write == tiers[0].read == 0, tiers[0].slots
    if fast or steps == 1:
        yield Binomial(fast)
    unlimited = len(tiers) == 2 and tiers[1].slots >= steps - 1 and free
    if steps > LONGEST:
        if unlimited:
            yield PeriodicDisk(fast, tiers[1].write, tiers[1].read, step)
        elif len(tiers) > 1 and tiers[1].slots and steps <= LONGEST_RANKED:
            yield Multistage(fast, tiers[1].slots, promotes=False)
    elif unlimited:
        yield DiskRevolve(fast, tiers[1].write, tiers[1].read, step)
    elif len(tiers) > 1 or not free:
        yield HRevolve(tuple(tiers), step)
