"""Where one gradient keeps its states: the plan over its kinds of memory, their prices, and the stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from adjoint.autograd import AutogradStepper
from adjoint.captured import Captured
from adjoint.memory import SHARE, free_bytes
from adjoint.probe import Nowhere, Unmarked, Weights
from adjoint.problem import Problem
from adjoint.stores import Form, OnTape, precision_of
from adjoint.tensors import State, differentiable
from adjoint.tiers import Device, Kind, Store
from revolve import (
    BudgetError,
    Cast,
    Journal,
    Mixed,
    Online,
    Plan,
    Prices,
    Stages,
    StoreAll,
    Tier,
    TierReport,
    format_bytes,
    parse_bytes,
    plan,
)
from revolve.measured import store_seconds
from revolve.mixed import ON_TAPE
from revolve.trees import is_lossless

MOST_ONLINE = 500
"""With more slots an online schedule thinks too long about each step."""


class Memories:
    """Where one gradient keeps its states: its plan for a number of steps, and the stores of that plan."""

    def __init__(
        self, problem: Problem, captured: Captured, state: State, weights: Weights, journal: Journal | None
    ) -> None:
        self._problem, self._captured, self._state, self._probed = problem, captured, state, weights
        self.journal, self._device = journal, state[0].device
        self._tiers: tuple[Kind, ...] = tuple(problem.tiers or (Device(),))
        self._forms = [Form(state, precision_of(tier.codec)) for tier in self._tiers]
        moving = sum(not isinstance(tier, Device) for tier in self._tiers)
        self._moving = weights.state * (moving + 1) if moving else 0
        """States on their way: one out for each store, one in."""
        self._prices: Prices | None = None
        self._limit = 0
        """Bytes that may be used, while the number of steps is being found."""
        if journal is not None and not self.exact:
            raise ValueError(
                "journal= promises the same bits, and a codec= that loses some cannot; leave one of them out"
            )

    def of_pairs(self, pair: State) -> Memories:
        """The same memory for pairs of a state and its tangent."""
        other = Memories(self._problem, self._captured, pair, self._probed.of_pairs(), None)
        if len(self._tiers) > 1:
            prices = self._measured()
            other._prices = replace(prices, write=_twice(prices.write), read=_twice(prices.read))
        return other

    @property
    def _weights(self) -> Weights:
        """What was probed, and what is known of the steps by now: the outputs inside of the fullest one."""
        inside = getattr(self._problem.program, "inside_bytes", 0)
        return replace(self._probed, working=self._probed.working + inside) if inside else self._probed

    @property
    def exact(self) -> bool:
        """Whether states come back as they were."""
        lossless = (isinstance(tier.codec, Cast) or is_lossless(tier.codec) for tier in self._tiers)
        return all(form.exact for form in self._forms) and all(lossless)

    def check(self) -> None:
        """Raise at once if there is no room for even one state and one tape."""
        problem = self._problem
        if problem.budget is not None or (problem.tiers is not None and problem.schedule is None):
            try:
                self.plan(2)
            except BudgetError as error:
                raise BudgetError(
                    error.sentence.replace("reverse 2 steps", "reverse even 2 steps"), error.smallest
                ) from None

    def plan(self, steps: int, *, recorded: bool = False) -> Plan:
        """The plan that the caller asked for, or the cheapest; ``recorded``: all tapes are held already."""
        problem, weights = self._problem, self._weights
        if recorded:
            working = weights.working + weights.each * steps + getattr(problem.program, "inside_kept", 0)
            sizes = weights.state, weights.tape, working
            return self._made(Plan(steps, StoreAll(), *sizes, given=True))
        if problem.schedule is not None:
            tape, working = weights.tape, weights.working + self._moving
            if isinstance(problem.schedule, Stages):  # a kept tape is stages; the latest step is on its graph besides
                tape, working = problem.schedule.stages * weights.state, working + tape
            return self._made(Plan(steps, problem.schedule, weights.state, tape, working, given=True))
        if problem.tiers is None:
            return weights.plan(steps, problem.slots, problem.budget, self._device)
        return self._tiered(steps)

    def one_sweep(self) -> Online | None:
        """The schedule that places states while the number of steps is still being found, if it can be used."""
        problem = self._problem
        plain = problem.schedule is None and problem.tiers is None and self.journal is None
        return Online(problem.slots) if plain and isinstance(problem.slots, int) else None

    def online_within(self, steps: int) -> Online | None:
        """The same once the tapes of so many steps have filled the memory, with as many states in their place as fit."""
        problem, weights = self._problem, self._weights
        if problem.tiers is not None or self.journal is not None or weights.each or not weights.state:
            return None
        room = self._limit - weights.working - weights.tape
        slots = min(1 + room // weights.state, MOST_ONLINE)  # x_0 takes a slot and no memory
        return Online(slots) if slots > 1 and steps else None

    def settled(self, online: Online, steps: int) -> Plan | None:
        """The plan of a finished sweep by ``online``, unless beginning again from x_0 takes fewer runs."""
        again = self.plan(steps)
        plan = replace(again, schedule=online)
        rest, anew = plan.report.plain_runs - (steps - 1), again.report.plain_runs
        too_large = self._problem.slots is None and plan.bytes > self._limit
        if rest > anew or too_large:
            return None
        return replace(
            plan,
            why=f"The number of steps was found on the way, and states were placed meanwhile: {rest} plain runs are left; "
            f"placing them now, from the first state on, would take {anew}.",
        )

    def most_tapes(self) -> int | None:
        """How many steps may be recorded before the number of steps is known; None: all."""
        problem = self._problem
        if problem.slots == "all":
            return None
        if problem.slots is not None or problem.schedule is not None or self._tiers[0].slots is not None:
            return 0
        if problem.tiers is None:
            budget = problem.budget
            self._limit = free_bytes(self._device) // SHARE if budget is None else parse_bytes(budget)
            return self._weights.most_tapes(self._limit, self._device)
        return self._weights.most_tapes(self._tiers[0].room(self._device), self._device)

    def stores(self, plan: Plan) -> dict[int, Store]:
        """A store for each tier that the plan keeps states in, and one for the first in any case."""
        used = plan.tiers
        if isinstance(plan.schedule, (Mixed, Stages)):
            if len(self._tiers) > 1:
                raise ValueError(
                    f"{plan.schedule} keeps states and tapes in the first tier alone; leave the others out"
                )
            first = self._tiers[0].open(self._state, used.get(0, TierReport()).peak_slots, self.journal)
            return {0: first, ON_TAPE: OnTape(self._state)} if ON_TAPE in used else {0: first}
        if used and max(used) >= len(self._tiers):
            raise ValueError(
                f"{plan.schedule} keeps states in tier {max(used)}, and tiers= names {len(self._tiers)}; "
                f"name one for each, as in tiers=[Device(), Files()]"
            )
        slots = {tier: report.peak_slots for tier, report in used.items()}
        chosen = {k: tier for k, tier in enumerate(self._tiers) if k in slots or k == 0}
        return {k: tier.open(self._state, slots.get(k), self.journal) for k, tier in chosen.items()}

    def all_stores(self) -> dict[int, Store]:
        """A store for every tier, for a chain of unknown length."""
        return {k: tier.open(self._state, tier.slots, self.journal) for k, tier in enumerate(self._tiers)}

    def _working(self, steps: int) -> int:
        return self._weights.working + self._weights.each * steps + self._moving

    def _made(self, plan: Plan) -> Plan:
        prices = plan.prices if len(self._tiers) > 1 else None
        return replace(plan, tier_states=tuple(form.bytes for form in self._forms), prices=prices)

    def _tiered(self, steps: int) -> Plan:
        weights, first, state = self._weights, self._tiers[0], self._forms[0].bytes
        working = self._working(steps)
        sizes = [form.bytes for form in self._forms]
        rooms = [None if tier.slots is not None else tier.room(self._device) for tier in self._tiers]
        if rooms[0] is not None:
            least = weights.tape + working + (state if steps > 1 and len(rooms) == 1 else 0)
            if rooms[0] < least:
                raise BudgetError(
                    f"tiers[0]={first} cannot hold one tape and what a step needs ({format_bytes(rooms[0])})", least
                )
            everything = self.plan(steps, recorded=True)
            if everything.bytes <= rooms[0]:
                return everything
            rooms[0] -= weights.tape + working - (state if len(rooms) == 1 else 0)  # x_0 takes a slot and no memory
        slots = [
            tier.slots if tier.slots is not None else (room or 0) // size if size else steps
            for tier, room, size in zip(self._tiers, rooms, sizes, strict=True)
        ]
        if steps > 1 and not sum(slots):
            raise ValueError(
                f"tiers={list(self._tiers)} hold no state of {format_bytes(max(sizes))}; give one more room"
            )
        prices = self._measured()
        kinds = [Tier(c, w, r) for c, w, r in zip(slots, prices.write, prices.read, strict=True)]
        made = plan(
            steps=steps,
            tiers=kinds,
            state_bytes=weights.state,
            tape_bytes=weights.tape,
            working_bytes=working,
            given=True,
            prices=prices,
        )
        return self._made(made)

    def _measured(self) -> Prices:
        """Seconds of a step, and of a write and a read in each tier, unless the caller gave them; measured once."""
        if self._prices is None:
            steps = step_prices(self._problem, self._captured, self._state) if len(self._tiers) > 1 else Prices()
            moved = [self._moved(tier) for tier in self._tiers]
            self._prices = replace(steps, write=tuple(w for w, _ in moved), read=tuple(r for _, r in moved))
        return self._prices

    def _moved(self, tier: Kind) -> tuple[float, float]:
        if isinstance(tier, Device):
            return 0.0, 0.0
        if tier.write is not None and tier.read is not None:
            return tier.write, tier.read
        write, read = store_seconds(tier.open(self._state, None, None), self._state, finished=_finished(self._device))
        return write if tier.write is None else tier.write, read if tier.read is None else tier.read


def _twice(seconds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(2 * x for x in seconds)


def _finished(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


def step_prices(problem: Problem, captured: Captured, state: State, repeats: int = 3) -> Prices:
    """Measured seconds of step 0, run plainly, recorded and reversed; the least of a few."""
    finished = _finished(state[0].device)
    rows: list[list[float]] = []
    seeds: list[Any] = [torch.ones_like(x) if differentiable(x) else None for x in state]
    for _ in range(repeats):
        stepper = AutogradStepper(problem.program.sample(), captured)
        stepper.outputs = Nowhere(problem.program.outputs, problem.program.label)
        stepper.marks = Unmarked(problem.program.label)
        marks = [perf_counter()]
        stepper.advance(state, 0, 1)
        finished()
        marks.append(perf_counter())
        _, tape = stepper.record(state, 0, 1)
        finished()
        marks.append(perf_counter())
        outputs = max((len(values) for r in tape for step in r.steps for _, values in step.outputs), default=0)
        stepper.begin_reverse([None] * outputs)
        stepper.reversed = 1
        stepper.reverse(tape, seeds)
        finished()
        marks.append(perf_counter())
        rows.append([after - before for before, after in pairwise(marks)])
    step, record, reverse = (min(column) for column in zip(*rows, strict=True))
    return Prices(step, record, reverse)
