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
    proposed = list(_proposed(network, limit))
    fitting_ones = [plan for plan in proposed if plan.bytes <= limit]
    best = min(fitting_ones, key=lambda plan: (network.cost(plan), plan.bytes), default=None)
    found = search(network, limit, network.cost(best) if best is not None else None)
    if found.actions is not None:
        best = _made(network, found)
    if best is None:
        smallest = min(plan.bytes for plan in (*proposed, everything))
        least = search(network, None, smallest)
        if least.actions is not None:
            smallest = min(smallest, _made(network, least).bytes)
        raise BudgetError(f"budget={budget!r} cannot reverse a network of {counted(steps, 'node')}", smallest)
    total = sum(node.cost for node in network.nodes)
    again = network.cost(best) / total - 1 if total else 0.0
    least_of_all = " No plan that fits is cheaper." if found.whole else ""
    return replace(
        best,
        why=f"All tapes at once would take {format_bytes(everything.bytes)}; what is run again costs {again:.0%} of one run "
        f"of everything.{least_of_all} A skip is kept or made again with the states that it crosses.",
    )


def _made(network: Network, found: Searched) -> Plan:
    assert found.actions is not None
    return network.plan(Written(found.actions), ways=found.ways)


def _proposed(network: Network, limit: int) -> Iterator[Plan]:
    """Plans of chains that are told to keep within about the limit, and within about the least that works."""
    steps = range(len(network.nodes))
    ways = [network.others(k) for k in steps]
    least = least_with(network.chain(0), ways) + network.noted
    near = {int(limit * share) for share in SHARES} | {int(least * share) for share in (1.0, 1.1, 1.25, 1.5)}
    seen = set()
    for room in sorted(near):
        made = written(network.chain(room), ways) if room >= least else None
        if made is not None and str(made) not in seen:
            seen.add(str(made))
            actions, chosen = made
            names = {k: network.nodes[k].ways[which - 1].name for k, which in enumerate(chosen) if which}
            yield network.plan(Written(actions), ways=names)
