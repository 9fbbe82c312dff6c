"""Networks with skip connections: a graph of nodes becomes a chain whose state is what is live at each cut.

The nodes are taken in the order in which they are given. Between node k-1 and node k lies cut k; its state x_k is the
set of outputs made before it and used after it. A skip is a part of every state that it crosses, so that no plan can
forget it: it is kept where a state is kept, once for all kept states that have it in common, and made again with
whatever else is made again, whichever is cheaper. Step k runs node k and lets go of what no later node uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from revolve.actions import ADVANCE, RECORD, Action, Advance, Drop, Load, Record, Reverse, Save, Schedule, decode
from revolve.binomial import whole
from revolve.budget import BudgetError, Plan, counted, fitting, format_bytes, parse_bytes
from revolve.chains import Differing
from revolve.schedules import StoreAll
from revolve.sizes import Parts


class Node(NamedTuple):
    """One node of a network, with what it costs and takes. Sizes are in bytes."""

    name: str
    dependencies: tuple[str, ...]
    """Names of earlier nodes; any other name is an input of the network, which the caller holds."""
    cost: float = 1.0
    """Of one run: seconds, operations, or any other unit."""
    bytes: int = 0
    """Of the output."""
    tape_bytes: int = 0
    """What its transpose needs, besides outputs of nodes."""
    running: int = 0
    """What one run needs for a moment, besides what it uses and its output."""
    recording: int = 0
    """What recording it needs at most, besides what it uses: output, tape and what passes."""
    reversing: int = 0
    """What reversing it needs at most, besides outputs that it saves: tape, cotangents and what passes."""
    saves: tuple[str, ...] = ()
    """Nodes (itself, or some that it uses) whose outputs its transpose needs too."""
    cotangents: tuple[int, ...] = ()
    """Of each dependency, the memory that its cotangent keeps alive: more than its own, if it is a part of another
    tensor; as much as the dependency if nothing is said."""


class Network:
    """The nodes as steps of a chain.

    ``live[k]``: the nodes whose outputs are live at cut k, 0 .. n; ``outputs``: those that the caller gets and holds.
    ValueError for a name given twice, used before it is made, or unknown among the outputs.
    """

    def __init__(self, nodes: Iterable[Node], outputs: Sequence[str] | None = None) -> None:
        self.nodes = tuple(nodes)
        if not self.nodes:
            raise ValueError("nodes=() is no network; give at least one node")
        self.place = {node.name: k for k, node in enumerate(self.nodes)}
        if len(self.place) < len(self.nodes):
            names = [node.name for node in self.nodes]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"node {twice!r} is given twice; names must differ")
        self.outputs = tuple(outputs) if outputs is not None else (self.nodes[-1].name,)
        self.last_use = {name: k for k, node in enumerate(self.nodes) for name in node.dependencies}
        """Where each name is used last."""
        for k, node in enumerate(self.nodes):
            unknown = set(node.saves) - {node.name, *node.dependencies}
            if unknown:
                raise ValueError(f"node {node.name!r} saves {min(unknown)!r}; it can save what it uses or makes")
            for name in node.dependencies:
                if self.place.get(name, -1) >= k:
                    raise ValueError(
                        f"node {node.name!r} uses {name!r}, which comes later; give nodes in an order in which they can run"
                    )
        for name in self.outputs:
            if name not in self.place:
                raise ValueError(f"outputs names {name!r}, which no node makes; known are {', '.join(self.place)}")
        self._uses: list[list[tuple[int, int]]] = [[] for _ in self.nodes]
        for k, node in enumerate(self.nodes):
            sizes = node.cotangents or (None,) * len(node.dependencies)
            for name, size in zip(node.dependencies, sizes, strict=True):
                if name in self.place:
                    made = self.place[name]
                    self._uses[made].append((k, self.nodes[made].bytes if size is None else size))
        self.live = tuple(self._live(k) for k in range(len(self.nodes) + 1))

    def _live(self, cut: int) -> frozenset[int]:
        return frozenset(k for k in range(cut) if self.last_use.get(self.nodes[k].name, -1) >= cut)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that no node makes, in the order of their first use."""
        used = (name for node in self.nodes for name in node.dependencies)
        return tuple(dict.fromkeys(name for name in used if name not in self.place))

    def size(self, values: Iterable[int]) -> int:
        """Bytes of these outputs."""
        return sum(self.nodes[k].bytes for k in values)

    def used(self, step: int) -> frozenset[int]:
        """The nodes whose outputs this one uses."""
        return frozenset(self.place[name] for name in self.nodes[step].dependencies if name in self.place)

    def crossing(self, step: int) -> int:
        """Bytes of cotangents that wait while a node is reversed: of what is made before it and used after it."""
        return self.waiting(self.live[step] & self.live[step + 1], step + 1)

    def waiting(self, values: Iterable[int], stop: int) -> int:
        """Bytes of the cotangents of these outputs, when the nodes from ``stop`` on are reversed."""
        return sum(self._cotangent(k, stop) for k in values)

    def _cotangent(self, value: int, stop: int) -> int:
        """What one use hands back, or the sum of what several did."""
        uses = [use for use in self._uses[value] if use[0] >= stop]
        return uses[0][1] if len(uses) == 1 else self.nodes[value].bytes

    def taped(self, step: int) -> frozenset[int]:
        """The outputs that the tape of this node holds."""
        return frozenset(self.place[name] for name in self.nodes[step].saves if name in self.place)

    def chain(self, budget: int) -> Differing:
        """The chain under a budget in bytes for kept outputs, tapes and what a run needs."""
        nodes, steps = self.nodes, range(len(self.nodes))
        parts = Parts(tuple(self.live[k] for k in steps), tuple(whole("bytes", node.bytes) for node in nodes))
        return Differing(
            costs=tuple(node.cost for node in nodes),
            states=(),
            budget=budget,
            tapes=tuple(nodes[k].tape_bytes + self.size(self.taped(k)) for k in steps),
            running=tuple(node.bytes + node.running for node in nodes),
            recording=tuple(self._at_once(k) for k in steps),
            parts=parts,
        )

    def _at_once(self, step: int) -> int:
        """What recording and reversing a node at once needs, with the cotangents that wait beside it."""
        node = self.nodes[step]
        before = self.size(self.live[step + 1]) + self.size(self.used(step)) + max(node.recording, node.bytes)
        return max(before, self.size(self.taped(step)) + self.reversing(step))

    def reversing(self, step: int) -> int:
        """What reversing a node needs besides outputs that it saves, with the cotangents that wait beside its own."""
        return self.crossing(step) + max(self.nodes[step].reversing, self.nodes[step].tape_bytes)

    def weigh(self, actions: Iterable[Action]) -> tuple[float, int]:
        """Cost and peak of both sweeps, value by value: what several hold counts once, and cotangents wait."""
        cost, peak, stop, reversing = 0.0, 0, len(self.nodes), False
        working: frozenset[int] = frozenset()
        kept: dict[int, frozenset[int]] = {}
        tapes: set[int] = set()
        returned: set[int] = set()

        def held(*values: Iterable[int]) -> int:
            """Kept states, tapes and these values, the outputs, and cotangents that wait for the reverse sweep."""
            together = frozenset().union(returned, *kept.values(), *map(self.taped, tapes), *values)
            waiting = self.waiting(self.live[stop], stop) if reversing else 0
            return self.size(together) + sum(self.nodes[k].tape_bytes for k in tapes) + waiting

        for action in actions:
            match action:
                case Advance(start, end) | Record(start, end):
                    for k in range(start, end):
                        cost += self.nodes[k].cost
                        node, used = self.nodes[k], working if k < stop - 1 else self.used(k)
                        needs = node.recording if isinstance(action, Record) else node.bytes + node.running
                        peak = max(peak, held(used) + max(needs, node.bytes))
                        if node.name in self.outputs:
                            returned.add(k)
                        working = (working | {k}) & self.live[k + 1] if k < stop - 1 else frozenset()
                        if isinstance(action, Record):
                            tapes.add(k)
                case Reverse(start, end):
                    working, reversing = frozenset(), True
                    for k in reversed(range(start, end)):
                        tapes.remove(k)
                        stop = k
                        waiting = self.waiting(self.live[k], k)
                        peak = max(peak, held(self.taped(k)) - waiting + self.reversing(k))
                case Save(step):
                    kept[step] = self.live[step]
                case Load(step):
                    working = self.live[step]
                case Drop(step):
                    del kept[step]
            peak = max(peak, held(working))
        return cost, peak

    def plan(self, schedule: Schedule, why: str = "") -> Plan:
        """The plan of any schedule on this network, priced."""
        steps = len(self.nodes)
        made = Plan(steps, schedule, given=True, why=why)
        return replace(made, peak_bytes=self.weigh(decode(made.array()))[1])

    def runs(self, plan: Plan) -> dict[str, int]:
        """How often a plan runs each node, its one recorded run included."""
        count = np.zeros(len(self.nodes), dtype=int)
        for verb, start, stop in plan.array():
            if verb in (ADVANCE, RECORD):
                count[start:stop] += 1
        return {node.name: int(runs) for node, runs in zip(self.nodes, count, strict=True)}


def plan_graph(nodes: Iterable[Node] | Network, budget: int | str, outputs: Sequence[str] | None = None) -> Plan:
    """The cheapest plan within a budget in bytes, of those that keep what they keep until it is needed no more.

    ``nodes``: in an order in which they can run. Inputs of the network are the caller's, and cost nothing. Nothing runs
    twice if all tapes fit. Raises :class:`BudgetError`, which knows the smallest budget that works.

    :class:`Differing` proposes plans: it counts what a tape and a state have in common twice, and does not know which
    cotangents wait. Each is weighed value by value, and the cheapest that fits is taken.
    """
    network = nodes if isinstance(nodes, Network) else Network(nodes, outputs)
    limit, steps = parse_bytes(budget, "budget"), len(network.nodes)
    everything = network.plan(StoreAll(), f"{fitting(steps)} the budget.")
    if everything.bytes <= limit:
        return everything
    least = network.chain(0).smallest(steps)
    small = [network.plan(network.chain(int(least * share))) for share in (1.0, 1.1, 1.25, 1.5)]
    smallest = min(plan.bytes for plan in (*small, everything))
    if smallest > limit:
        raise BudgetError(f"budget={budget!r} cannot reverse a network of {counted(steps, 'node')}", smallest)
    near = {int(limit * share) for share in (0.7, 0.85, 0.95, 1.0, 1.1, 1.25, 1.5)}
    plans = [*small, *(network.plan(network.chain(proposed)) for proposed in near if proposed >= least)]
    best = min((plan for plan in plans if plan.bytes <= limit), key=lambda plan: (_cost(network, plan), plan.bytes))
    total = sum(node.cost for node in network.nodes)
    again = _cost(network, best) / total - 1 if total else 0.0
    return replace(
        best,
        why=f"All tapes at once would take {format_bytes(everything.bytes)}; what is run again costs {again:.0%} of one run "
        f"of everything. A skip is kept or made again with the states that it crosses.",
    )


def _cost(network: Network, plan: Plan) -> float:
    return sum(node.cost * runs for node, runs in zip(network.nodes, network.runs(plan).values(), strict=True))
