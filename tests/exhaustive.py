"""The least cost of reversing a short chain, over every legal sequence of moves: what claims of optimality must meet."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


@dataclass(frozen=True)
class Rules:
    """A machine: what it can keep, and what its moves cost."""

    tiers: tuple[tuple[int, float, float], ...] = ((0, 0.0, 0.0),)
    """(slots, price of a write, price of a read) of each."""
    step: float | tuple[float, ...] = 1.0
    """The price of a plain run of each step; its one recorded run is in no cost."""
    memory: int | None = None
    """Units that kept states of the first tier and kept tapes share, in place of its slots; no tape is kept if None."""
    state: int | tuple[int, ...] = 1
    tape: int | tuple[int, ...] = 1
    running: int | tuple[int, ...] = 0
    """Units that a run needs besides, and below, one that is transposed at once, or whose tape is."""
    recording: int | tuple[int, ...] = 0
    holds_end: bool = False
    """The end of a step can be had from its tape."""
    read_once: bool = False
    """A state in another tier than the first is gone once it has been read."""


class Machine(NamedTuple):
    stop: int
    """The step below which everything is still to be reversed."""
    kept: tuple[frozenset[int], ...]
    taped: frozenset[int]
    at: int
    """The step of the working state, -1 if there is none."""


@cache
def least(steps: int, rules: Rules) -> float:
    """Dijkstra's search. Moves: run a step plainly, or record it and keep its tape; keep the working state; drop a kept
    state; load one; transpose the topmost step, from its tape or recorded at once."""
    start = Machine(steps, tuple(frozenset[int]() for _ in rules.tiers), frozenset(), 0)
    best = {start: 0.0}
    queue = [(0.0, 0, start)]
    pushed = 0
    while queue:
        spent, _, machine = heapq.heappop(queue)
        if machine.stop == 0:
            return spent
        if spent > best[machine]:
            continue
        for price, reached in moves(machine, rules):
            reached = useful(reached)
            if spent + price < best.get(reached, float("inf")):
                best[reached] = spent + price
                pushed += 1
                heapq.heappush(queue, (spent + price, pushed, reached))
    return float("inf")


def useful(machine: Machine) -> Machine:
    """Without what lies above the steps still to be reversed: dropping it is free."""
    stop, kept, taped, at = machine
    below = tuple(frozenset(step for step in states if step < stop) for states in kept)
    return Machine(stop, below, frozenset(step for step in taped if step < stop), at if at < stop else -1)


def moves(machine: Machine, rules: Rules) -> Iterator[tuple[float, Machine]]:
    stop, kept, taped, at = machine
    for k, (_, _, read) in enumerate(rules.tiers):
        for step in kept[k]:
            without = changed(kept, k, kept[k] - {step})
            yield 0.0, machine._replace(kept=without)
            yield read, machine._replace(kept=without if k and rules.read_once else kept, at=step)
    if rules.holds_end:
        for step in taped:
            yield 0.0, machine._replace(at=step + 1)
    free = room(machine, rules)
    if stop - 1 in taped and of(rules.recording, stop - 1) <= free + of(rules.tape, stop - 1):
        yield 0.0, Machine(stop - 1, kept, taped - {stop - 1}, -1)
    if at < 0:
        return
    for k, (slots, write, _) in enumerate(rules.tiers):
        shared = k == 0 and rules.memory is not None
        if at not in kept[k] and (of(rules.state, at) <= free if shared else len(kept[k]) < slots):
            yield write, machine._replace(kept=changed(kept, k, kept[k] | {at}))
    if at == stop - 1:
        if of(rules.recording, at) <= free:
            yield 0.0, Machine(stop - 1, kept, taped, -1)
    elif of(rules.running, at) <= free:
        yield of(rules.step, at), machine._replace(at=at + 1)
        if rules.memory is not None and at not in taped and of(rules.tape, at) <= free:
            yield 0.0, machine._replace(taped=taped | {at}, at=at + 1)


def changed(kept: tuple[frozenset[int], ...], k: int, states: frozenset[int]) -> tuple[frozenset[int], ...]:
    return (*kept[:k], states, *kept[k + 1 :])


def room(machine: Machine, rules: Rules) -> float:
    """Units that are free; as many as one likes where no tape is kept."""
    if rules.memory is None:
        return float("inf")
    states, tapes = (sum(of(sizes, s) for s in steps) for sizes, steps in
                     ((rules.state, machine.kept[0]), (rules.tape, machine.taped)))  # fmt: skip
    return rules.memory - states - tapes


def of(value: float | tuple[float, ...], step: int) -> float:
    """One number for all steps, or one for each."""
    return value[step] if isinstance(value, tuple) else value
