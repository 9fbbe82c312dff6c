"""The cheapest plan of a small network over every sequence of verbs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from revolve.actions import Action, Advance, Drop, Load, Record, Reverse, Save
from revolve.graphs import Network, Way

PATIENCE = 10_000
"""So many moments are looked at before a search is given up."""
LONGEST = 5
"""Longer networks are not searched."""


class Moment(NamedTuple):
    """``stop``: the nodes below it are still to be reversed; ``kept``: cuts; ``taped``: nodes, and the way of each, -1 as it
    is; ``at``: the cut of the working state, -1 for none."""

    stop: int
    kept: frozenset[int]
    taped: frozenset[tuple[int, int]]
    at: int


class Searched(NamedTuple):
    """What a search found."""

    actions: tuple[Action, ...] | None
    """Both sweeps; None if it found nothing."""
    ways: dict[int, str]
    whole: bool
    """Whether it came to its end, so that nothing better is left."""


Move = tuple[float, int, Moment, Action]
"""Its cost, the bytes that it needs, and what comes of it."""


def search(network: Network, limit: int | None, better_than: float | None) -> Searched:
    """The cheapest plan that is cheaper than another; without a limit, that of least memory, below that of another.

    Over all sequences of the six verbs, node by node: states are kept, loaded and let go as wholes, and what two of them
    share is kept once. A* search: every node that is not on tape costs one more run at least.
    """
    if len(network.nodes) > LONGEST:
        return Searched(None, {}, False)
    table = _Table(network)
    start = Moment(len(network.nodes), frozenset(), frozenset(), 0)
    none: tuple[float, ...] = (0.0, 0.0) if limit is None else (0.0,)
    best: dict[Moment, tuple[float, ...]] = {start: none}
    came: dict[Moment, tuple[Moment, Action]] = {}
    queue: list[tuple[tuple[float, ...], int, Moment]] = [(none, 0, start)]
    done: set[Moment] = set()
    pushed = 0
    while queue:
        _, _, moment = heapq.heappop(queue)
        if moment.stop == 0:
            actions = _path(came, moment)
            return Searched(actions, table.ways_of(came, moment), True)
        if moment in done:
            continue
        done.add(moment)
        if len(done) > PATIENCE:
            return Searched(None, {}, False)
        spent = best[moment]
        for cost, needs, reached, action in table.moves(moment):
            if limit is None:
                total: tuple[float, ...] = (max(spent[0], needs), spent[1] + cost)
                rank: tuple[float, ...] = (total[0], total[1] + table.ahead(reached))
                if better_than is not None and total[0] >= better_than:
                    continue
            else:
                total = (spent[0] + cost,)
                rank = (total[0] + table.ahead(reached),)
                if needs > limit or (better_than is not None and rank[0] >= better_than * (1 - 1e-9)):
                    continue
            if reached not in best or total < best[reached]:
                best[reached], came[reached] = total, (moment, action)
                done.discard(reached)
                pushed += 1
                heapq.heappush(queue, (rank, pushed, reached))
    return Searched(None, {}, True)


def _path(came: dict[Moment, tuple[Moment, Action]], moment: Moment) -> tuple[Action, ...]:
    """Both sweeps; the first state is kept by whoever loads it."""
    last = [Drop(step) for step in sorted(moment.kept)]
    actions: list[Action] = []
    while moment in came:
        moment, action = came[moment]
        actions.append(action)
    actions = [*reversed(actions), *last]
    if any(isinstance(action, Load) and action.step == 0 for action in actions):
        actions = [Save(0), *actions, Drop(0)]
    reverses = [k for k, action in enumerate(actions) if isinstance(action, Reverse)]
    tail = [action for action in actions[reverses[-1] :] if not isinstance(action, Reverse)]
    return (*actions[: reverses[-1]], *tail, actions[reverses[-1]])


class _Table:
    """Moves, and what moments hold."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._held: dict[tuple[object, ...], int] = {}
        below, total = [0.0], 0.0
        for node in network.nodes:
            total += node.cost
            below.append(total)
        self._below = below

    def ahead(self, moment: Moment) -> float:
        """What is to come at least."""
        return self._below[moment.stop] - sum(self.network.nodes[k].cost for k, _ in moment.taped)

    def way(self, k: int, which: int) -> Way | None:
        return None if which < 0 else self.network.nodes[k].ways[which]

    def held(self, moment: Moment, values: frozenset[int]) -> int:
        """Kept states, tapes, these values, outputs that are made, and cotangents that wait."""
        key = moment.stop, moment.kept, moment.taped, values
        if key not in self._held:
            network, (stop, kept, taped, _) = self.network, moment
            reversing = stop < len(network.nodes)
            together = set(values).union(*(network.live[cut] for cut in kept))
            size = network.noted
            for k, which in taped:
                way = self.way(k, which)
                size += network.nodes[k].tape_bytes if way is None else way.bytes
                together |= network.taped(k) if way is None else network.held_by(way)
            if reversing:
                together |= {network.place[name] for name in network.outputs}
                size += network.waiting(network.live[stop], stop)
            self._held[key] = size + network.size(together)
        return self._held[key]

    def moves(self, moment: Moment) -> Iterator[Move]:
        network, (stop, kept, taped, at) = self.network, moment
        working = network.live[at] if at >= 0 else frozenset()
        on_tape = dict(taped)
        if stop - 1 in on_tape:
            k = stop - 1
            way = self.way(k, on_tape[k])
            after = Moment(k, kept, taped - {(k, on_tape[k])}, -1)
            waiting = network.waiting(network.live[k], k)
            copies = 0 if way is None else way.copies
            needs = self.held(after, network.taped(k)) - waiting + network.reversing(k) + copies
            if way is not None:
                needs = max(needs, self.held(moment, frozenset()) - way.bytes + way.restoring)
            yield 0.0 if way is None else way.cost, max(needs, self.held(after, frozenset())), after, Reverse(k, stop)
        for cut in kept:
            after = moment._replace(kept=kept - {cut})
            yield 0.0, self.held(after, working), after, Drop(cut)
        if stop - 1 in on_tape:
            return
        for cut in (0, *kept):
            if cut < stop and cut != at:
                after = moment._replace(at=cut)
                yield 0.0, self.held(after, network.live[cut]), after, Load(cut)
        if not 0 <= at < stop:
            return
        if at not in kept and network.live[at]:
            after = moment._replace(kept=kept | {at})
            yield 0.0, self.held(after, working), after, Save(at)
        yield from self._runs(moment, working, on_tape)

    def _runs(self, moment: Moment, working: frozenset[int], on_tape: dict[int, int]) -> Iterator[Move]:
        network, (stop, _, taped, at) = self.network, moment
        node, last = network.nodes[at], at == stop - 1
        made = frozenset({at}) if node.name in network.outputs else frozenset()
        before = self.held(moment, network.used(at) if last else working)
        if not last:
            after = moment._replace(at=at + 1)
            needs = before + max(node.bytes + node.running, node.bytes)
            yield node.cost, max(needs, self.held(after, network.live[at + 1])), after, Advance(at, at + 1)
        if at in on_tape:
            return
        for which in range(-1, 0 if last else len(node.ways)):
            way = self.way(at, which)
            after = Moment(stop, moment.kept, taped | {(at, which)}, -1 if last else at + 1)
            needs = before + max(node.recording if way is None else way.recording, node.bytes)
            live = made if last else network.live[at + 1] | made
            yield node.cost, max(needs, self.held(after, live)), after, Record(at, at + 1)

    def ways_of(self, came: dict[Moment, tuple[Moment, Action]], moment: Moment) -> dict[int, str]:
        found: dict[int, str] = {}
        while moment in came:
            for k, which in moment.taped:
                if which >= 0:
                    found[k] = self.network.nodes[k].ways[which].name
            moment, _ = came[moment]
        return found
