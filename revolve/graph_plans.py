"""The cheapest plan of a network within a budget: proposed as a chain, weighed value by value, searched where that is short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from revolve.budget import BudgetError, Plan, counted, fitting, format_bytes, parse_bytes
from revolve.chains import least_with, written
from revolve.graph_search import Searched, search
from revolve.graphs import Network, Node
from revolve.schedules import StoreAll
from revolve.written import Written

SHARES = (0.7, 0.85, 0.95, 1.0, 1.1, 1.25, 1.5)
"""Of the budget, what a chain is told to keep within: it counts some things twice, and others not at all."""

LITTLE = (1.0, 1.1, 1.25, 1.5)
"""Likewise of the least that works."""


def plan_graph(nodes: Iterable[Node] | Network, budget: int | str, outputs: Sequence[str] | None = None) -> Plan:
    """The cheapest plan within a budget in bytes.

    ``nodes``: in an order in which they can run. Inputs of the network are the caller's, and cost nothing. Nothing runs
    twice if all tapes fit. Raises :class:`BudgetError`, which knows the smallest budget that works.

    A chain (:class:`Differing`) proposes plans: it counts what a tape and a state have in common twice, does not know
    which cotangents wait, and keeps what it keeps until it is needed no more. Each is weighed value by value, and the
    cheapest that fits is taken. For networks of up to five nodes every sequence of the verbs is then searched for a
    cheaper one: where ``why`` says so, no plan that keeps, loads and lets go of whole states is cheaper.
    """
    network = nodes if isinstance(nodes, Network) else Network(nodes, outputs)
    limit, steps = parse_bytes(budget, "budget"), len(network.nodes)
    everything = network.plan(StoreAll(), f"{fitting(steps)} the budget.")
    if everything.bytes <= limit:
        return everything
    small = _small(network, everything)
    if min(plan.bytes for plan in small) > limit:
        raise BudgetError(
            f"budget={budget!r} cannot reverse a network of {counted(steps, 'node')}", min(plan.bytes for plan in small)
        )
    proposed = [*small, *_proposed(network, [int(limit * share) for share in SHARES])]
    best = min((p for p in proposed if p.bytes <= limit), key=lambda plan: (network.cost(plan), plan.bytes))
    found = search(network, limit, network.cost(best))
    if found.actions is not None:
        best = _made(network, found)
    total = sum(node.cost for node in network.nodes)
    again = network.cost(best) / total - 1 if total else 0.0
    least_of_all = " No plan that fits is cheaper." if found.whole else ""
    return replace(
        best,
        why=f"All tapes at once would take {format_bytes(everything.bytes)}; what is run again costs {again:.0%} of one run "
        f"of everything.{least_of_all} A skip is kept or made again with the states that it crosses.",
    )


def _small(network: Network, everything: Plan) -> list[Plan]:
    """Plans of little memory, the same whatever the budget and the costs are: the least of them is the least that works.

    Costs are measured, and another time they are others; what is said to work has to work then.
    """
    return [network.plan(plan.schedule, ways=dict(_named(plan))) for plan in _small_ones(_even(network), everything)]


def _even(network: Network) -> Network:
    """The same network with every run as dear as any other."""
    nodes = (n._replace(cost=1.0, ways=tuple(w._replace(cost=1.0) for w in n.ways)) for n in network.nodes)
    return Network(nodes, network.outputs)


def _named(plan: Plan) -> Iterator[tuple[int, str]]:
    return ((k, name) for k, name in enumerate(plan.ways) if name is not None)


def _small_ones(network: Network, everything: Plan) -> list[Plan]:
    ways = [network.others(k) for k in range(len(network.nodes))]
    least = least_with(network.chain(0), ways) + network.noted
    plans, before = [everything, *_proposed(network, [int(least * share) for share in LITTLE])], 0
    found = search(network, None, min(plan.bytes for plan in plans))
    if found.actions is not None:
        plans.append(_made(network, found))
    while not found.whole and (known := min(plan.bytes for plan in plans)) != before:
        before = known
        plans += _proposed(network, [int(known * share) for share in LITTLE])
    return plans


def _made(network: Network, found: Searched) -> Plan:
    assert found.actions is not None
    return network.plan(Written(found.actions), ways=found.ways)


def _proposed(network: Network, rooms: Iterable[int]) -> Iterator[Plan]:
    """Plans of chains that are told to keep within so many bytes, where they can."""
    ways = [network.others(k) for k in range(len(network.nodes))]
    seen = set()
    for room in sorted(set(rooms)):
        made = written(network.chain(room), ways)
        if made is not None and str(made) not in seen:
            seen.add(str(made))
            actions, chosen = made
            names = {k: network.nodes[k].ways[which - 1].name for k, which in enumerate(chosen) if which}
            yield network.plan(Written(actions), ways=names)
