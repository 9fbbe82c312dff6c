"""Networks with skip connections: a graph of nodes becomes a chain whose state is what is live at each cut.

The nodes are taken in the order in which they are given. Between node k-1 and node k lies cut k; its state x_k is the
set of outputs made before it and used after it. A skip is a part of every state that it crosses, so that no plan can
forget it: it is kept where a state is kept, once for all kept states that have it in common, and made again with
whatever else is made again, whichever is cheaper. Step k runs node k and lets go of what no later node uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from revolve.actions import ADVANCE, RECORD, Action, Record, Reverse
from revolve.binomial import whole
from revolve.budget import BudgetError, Plan, counted, fitting, format_bytes, parse_bytes
from revolve.chains import Differing, weigh
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
    """What its transpose needs."""
    running: int = 0
    """What one run needs for a moment, besides inputs and output."""
    recording: int = 0
    """What recording and reversing it needs at most, tape and cotangents included."""


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
            for name in node.dependencies:
                if self.place.get(name, -1) >= k:
                    raise ValueError(
                        f"node {node.name!r} uses {name!r}, which comes later; give nodes in an order in which they can run"
                    )
        for name in self.outputs:
            if name not in self.place:
                raise ValueError(f"outputs names {name!r}, which no node makes; known are {', '.join(self.place)}")
        self.live = tuple(self._live(k) for k in range(len(self.nodes) + 1))

    def _live(self, cut: int) -> frozenset[int]:
        return frozenset(k for k in range(cut) if self.last_use.get(self.nodes[k].name, -1) >= cut)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that no node makes, in the order of their first use."""
        used = (name for node in self.nodes for name in node.dependencies)
        return tuple(dict.fromkeys(name for name in used if name not in self.place))

    def crossing(self, step: int) -> int:
        """Bytes of what is made before this node and used after it: its cotangents wait while the node is reversed."""
        return sum(self.nodes[k].bytes for k in self.live[step] & self.live[step + 1])

    def chain(self, budget: int) -> Differing:
        """The chain under a budget in bytes for kept outputs, tapes and what a run needs."""
        nodes, steps = self.nodes, range(len(self.nodes))
        parts = Parts(tuple(self.live[k] for k in steps), tuple(whole("bytes", node.bytes) for node in nodes))
        return Differing(
            costs=tuple(node.cost for node in nodes),
            states=(),
            budget=budget,
            tapes=tuple(node.tape_bytes for node in nodes),
            running=tuple(node.bytes + node.running for node in nodes),
            recording=tuple(self.crossing(k) + max(nodes[k].recording, nodes[k].tape_bytes) for k in steps),
            parts=parts,
        )

    def runs(self, plan: Plan) -> dict[str, int]:
        """How often a plan runs each node, its one recorded run included."""
        count = np.zeros(len(self.nodes), dtype=int)
        for verb, start, stop in plan.array():
            if verb in (ADVANCE, RECORD):
                count[start:stop] += 1
        return {node.name: int(runs) for node, runs in zip(self.nodes, count, strict=True)}


def plan_graph(nodes: Iterable[Node] | Network, budget: int | str, outputs: Sequence[str] | None = None) -> Plan:
    """The cheapest plan (of those that keep to the end, see :class:`Differing`) within a budget in bytes.

    ``nodes``: in an order in which they can run. Inputs of the network are the caller's, and cost nothing. Nothing runs
    twice if all tapes fit. Raises :class:`BudgetError`, which knows the smallest budget that works.
    """
    network = nodes if isinstance(nodes, Network) else Network(nodes, outputs)
    limit, steps = parse_bytes(budget, "budget"), len(network.nodes)
    chain = network.chain(limit)
    smallest = chain.smallest(steps)
    if smallest > limit:
        raise BudgetError(f"budget={budget!r} cannot reverse a network of {counted(steps, 'node')}", smallest)
    total, everything = sum(chain.costs), store_all_bytes(chain)
    if everything <= limit:
        return Plan(steps, StoreAll(), working_bytes=everything, given=True, why=f"{fitting(steps)} the budget.")
    again = chain.cost(steps) / total - 1 if total else 0.0
    return Plan(
        steps,
        chain,
        given=True,
        why=f"All tapes at once would take {format_bytes(everything)}; what is run again costs {again:.0%} of one run of "
        f"everything. A skip is kept or made again with the states that it crosses.",
    )


def store_all_bytes(chain: Differing) -> int:
    """The peak when every tape is kept."""
    steps = len(chain.costs)
    rows: list[Action] = [Record(k, k + 1) for k in range(steps)]
    rows += [Reverse(k, k + 1) for k in reversed(range(steps))]
    return weigh(rows, chain.costs, chain.states, chain.tapes, chain.running, chain.recording, chain.parts)[1]
