"""The cheapest plan of a short chain over every legal sequence of moves."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from revolve.actions import Action, Advance, Drop, Load, Record, Reverse, Save


class _Chain(NamedTuple):
    """Sizes and costs, one a step."""

    budget: int
    costs: Sequence[float]
    states: Sequence[int]
    tapes: Sequence[int]
    running: Sequence[int]
    recording: Sequence[int]


Machine = tuple[int, frozenset[int], frozenset[int], int]
"""The step to be reversed next, the kept states, the kept tapes, the working state."""


def cheapest(
    steps: int,
    budget: int,
    costs: Sequence[float],
    states: Sequence[int],
    tapes: Sequence[int],
    running: Sequence[int],
    recording: Sequence[int],
) -> tuple[Action, ...] | None:
    """The whole plan of least cost of runs (Dijkstra's search); None if the budget is too small for any."""
    chain = _Chain(budget, costs, states, tapes, running, recording)
    start: Machine = (steps, frozenset(), frozenset(), 0)
    best = {start: 0.0}
    came: dict[Machine, tuple[Machine, tuple[Action, ...]]] = {}
    queue: list[tuple[float, int, Machine]] = [(0.0, 0, start)]
    pushed = 0
    while queue:
        spent, _, machine = heapq.heappop(queue)
        if machine[0] == 0:
            return _path(came, machine)
        if spent > best[machine]:
            continue
        for cost, reached, actions in _moves(chain, machine):
            if spent + cost < best.get(reached, float("inf")):
                best[reached] = spent + cost
                came[reached] = machine, actions
                pushed += 1
                heapq.heappush(queue, (spent + cost, pushed, reached))
    return None


def _path(came: dict[Machine, tuple[Machine, tuple[Action, ...]]], machine: Machine) -> tuple[Action, ...]:
    pieces: list[tuple[Action, ...]] = [tuple(map(Drop, sorted(machine[1])))]
    while machine in came:
        machine, actions = came[machine]
        pieces.append(actions)
    return tuple(action for piece in reversed(pieces) for action in piece)


def _moves(chain: _Chain, machine: Machine) -> Iterator[tuple[float, Machine, tuple[Action, ...]]]:
    """Every legal move: its cost, the machine after it, and its actions."""
    stop, kept, taped, at = machine
    budget, costs, states, tapes, running, recording = chain
    free = budget - sum(states[step] for step in kept) - sum(tapes[step] for step in taped)
    for step in kept:
        yield 0.0, (stop, kept - {step}, taped, at), (Drop(step),)
        if step < stop:
            yield 0.0, (stop, kept, taped, step), (Load(step),)
    if stop - 1 in taped and recording[stop - 1] - tapes[stop - 1] <= free:
        yield 0.0, (stop - 1, kept, taped - {stop - 1}, -1), (Reverse(stop - 1, stop),)
    if not 0 <= at < stop:
        return
    if at not in kept and states[at] <= free:
        yield 0.0, (stop, kept | {at}, taped, at), (Save(at),)
    cost = costs[at]
    if at == stop - 1:
        if recording[at] <= free:
            yield cost, (stop - 1, kept, taped, -1), (Record(at, stop), Reverse(at, stop))
    elif running[at] <= free:
        yield cost, (stop, kept, taped, at + 1), (Advance(at, at + 1),)
        if at not in taped and tapes[at] <= free:
            yield cost, (stop, kept, taped | {at}, at + 1), (Record(at, at + 1),)
