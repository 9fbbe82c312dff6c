"""Networks with skip connections: a graph of nodes becomes a chain whose state is what is live at each cut.

The nodes are taken in the order in which they are given. Between node k-1 and node k lies cut k; its state x_k is the
set of outputs made before it and used after it. A skip is a part of every state that it crosses, so that no plan can
forget it: it is kept where a state is kept, once for all kept states that have it in common, and made again with
whatever else is made again, whichever is cheaper. Step k runs node k and lets go of what no later node uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from revolve.actions import ADVANCE, RECORD, Action, Advance, Drop, Load, Record, Reverse, Save, Schedule, decode
from revolve.binomial import whole
from revolve.budget import Plan
from revolve.chains import Differing
from revolve.sizes import Other, Parts


class Way(NamedTuple):
    """A way to keep the tape of a node from its first run to its reverse, other than as it is. Sizes are in bytes."""

    name: str
    bytes: int
    """Held meanwhile, besides the outputs in ``saves``."""
    cost: float
    """Of having the tape back: what is run again, cast or moved."""
    saves: tuple[str, ...] = ()
    """Nodes whose outputs are held meanwhile: of those that it uses."""
    recording: int = 0
    """What its first run needs at most, besides what it uses."""
    restoring: int = 0
    """What having the tape back needs at most, ``bytes`` included."""
    copies: int = 0
    """Outputs of nodes that the tape then holds for itself alone."""


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
    notes: int = 0
    """What its first run leaves to the end, for a second run to be the same: buffers as they were."""
    ways: tuple[Way, ...] = ()
    """How its tape may be kept, besides as it is."""


Ways = Mapping[int, Way]
"""By the place of a node, how its tape is kept."""


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
        self.noted = sum(node.notes for node in self.nodes)
        """What first runs leave to the end."""
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
            budget=max(0, budget - self.noted),
            tapes=tuple(nodes[k].tape_bytes + self.size(self.taped(k)) for k in steps),
            running=tuple(node.bytes + node.running for node in nodes),
            recording=tuple(self._at_once(k) for k in steps),
            parts=parts,
        )

    def others(self, step: int) -> tuple[Other, ...]:
        """The ways to keep the tape of a node as a chain counts them."""
        used = self.size(self.live[step + 1]) + self.size(self.used(step))
        return tuple(
            Other(
                way.bytes + self.size(self.held_by(way)),
                max(
                    used + max(way.recording, self.nodes[step].bytes),
                    self.size(self.held_by(way)) + self.waiting(self.live[step + 1], step + 1) + way.restoring,
                    self._at_once(step) + way.copies,
                ),
                way.cost,
            )
            for way in self.nodes[step].ways
        )

    def held_by(self, way: Way) -> frozenset[int]:
        """The outputs that a tape kept in this way holds."""
        return frozenset(self.place[name] for name in way.saves if name in self.place)

    def way(self, step: int, name: str) -> Way:
        """The way of this name to keep the tape of a node."""
        return next(way for way in self.nodes[step].ways if way.name == name)

    def _at_once(self, step: int) -> int:
        """What recording and reversing a node at once needs, with the cotangents that wait beside it."""
        node = self.nodes[step]
        before = self.size(self.live[step + 1]) + self.size(self.used(step)) + max(node.recording, node.bytes)
        return max(before, self.size(self.taped(step)) + self.reversing(step))

    def reversing(self, step: int) -> int:
        """What reversing a node needs besides outputs that it saves, with the cotangents that wait beside its own."""
        return self.crossing(step) + max(self.nodes[step].reversing, self.nodes[step].tape_bytes)

    def weigh(self, actions: Iterable[Action], ways: Ways = MappingProxyType({})) -> tuple[float, int]:
        """Cost and peak of both sweeps, value by value: what several hold counts once, and cotangents wait.

        ``ways``: how tapes are kept that are not kept as they are.
        """
        cost, peak, stop, reversing = 0.0, 0, len(self.nodes), False
        working: frozenset[int] = frozenset()
        kept: dict[int, frozenset[int]] = {}
        tapes: dict[int, frozenset[int]] = {}
        returned: set[int] = set()
        noted = self.noted

        def held(*values: Iterable[int]) -> int:
            """Kept states, tapes and these values, the outputs, and cotangents that wait for the reverse sweep."""
            together = frozenset().union(returned, *kept.values(), *tapes.values(), *values)
            waiting = self.waiting(self.live[stop], stop) if reversing else 0
            taped = sum(ways[k].bytes if k in ways else self.nodes[k].tape_bytes for k in tapes)
            return self.size(together) + taped + waiting + noted

        for action in actions:
            match action:
                case Advance(start, end) | Record(start, end):
                    for k in range(start, end):
                        node, used = self.nodes[k], working if k < stop - 1 else self.used(k)
                        cost += node.cost
                        needs = node.bytes + node.running
                        if isinstance(action, Record):
                            needs = ways[k].recording if k in ways else node.recording
                        peak = max(peak, held(used) + max(needs, node.bytes))
                        if node.name in self.outputs:
                            returned.add(k)
                        working = (working | {k}) & self.live[k + 1] if k < stop - 1 else frozenset()
                        if isinstance(action, Record):
                            tapes[k] = self.held_by(ways[k]) if k in ways else self.taped(k)
                case Reverse(start, end):
                    working, reversing = frozenset(), True
                    for k in reversed(range(start, end)):
                        way, copies = ways.get(k), 0
                        if way is not None:
                            cost, copies = cost + way.cost, way.copies
                            peak = max(peak, held() - way.bytes + way.restoring)
                        del tapes[k]
                        stop = k
                        waiting = self.waiting(self.live[k], k)
                        peak = max(peak, held(self.taped(k)) - waiting + self.reversing(k) + copies)
                case Save(step):
                    kept[step] = self.live[step]
                case Load(step):
                    working = self.live[step]
                case Drop(step):
                    del kept[step]
            peak = max(peak, held(working))
        return cost, peak

    def plan(self, schedule: Schedule, why: str = "", ways: Mapping[int, str] = MappingProxyType({})) -> Plan:
        """The plan of any schedule on this network, priced; ``ways``: by step, the way to keep its tape."""
        steps = len(self.nodes)
        names = tuple(ways.get(k) for k in range(steps)) if ways else ()
        made = Plan(steps, schedule, given=True, why=why, ways=names)
        return replace(made, peak_bytes=self.weigh(decode(made.array()), self.ways(made))[1])

    def ways(self, plan: Plan) -> dict[int, Way]:
        """How a plan keeps the tapes that it does not keep as they are."""
        return {k: self.way(k, name) for k, name in enumerate(plan.ways) if name is not None}

    def cost(self, plan: Plan) -> float:
        """Of all runs, and of having tapes back."""
        return self.weigh(decode(plan.array()), self.ways(plan))[0]

    def runs(self, plan: Plan) -> dict[str, int]:
        """How often a plan runs each node, its one recorded run included."""
        count = np.zeros(len(self.nodes), dtype=int)
        for verb, start, stop in plan.array():
            if verb in (ADVANCE, RECORD):
                count[start:stop] += 1
        return {node.name: int(runs) for node, runs in zip(self.nodes, count, strict=True)}
