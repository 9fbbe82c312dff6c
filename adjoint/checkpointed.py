"""A module that measures its blocks, plans what to keep, and says what it will do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adjoint.chain import (
    Memory,
    Wires,
    measured,
    passage_of,
    plainly,
    plan_of,
    refuse_transforms,
    signature,
    wired,
    wires_of,
)
from adjoint.passage import Passage, Wiring
from adjoint.put_away import Tapes
from adjoint.tiers import Kind
from adjoint.weights import Weighed
from revolve import Network, Plan, Schedule, format_bytes


class Checkpointed(nn.Module):
    """The same function as ``module``, whose gradient keeps only what the plan keeps; made by :func:`checkpointed`."""

    def __init__(self, module: nn.Module, wiring: Wiring, memory: Memory, check: bool) -> None:
        super().__init__()
        self.module = module
        self.plan: Plan | None = None
        """Of the last call that was differentiated; None before."""
        self._wiring, self._memory, self._check = wiring, memory, check
        self._plans: dict[Any, tuple[Weighed, Plan]] = {}
        self._weighed: Weighed | None = None
        self._last: Passage | None = None

    def forward(self, *inputs: Any) -> Any:
        named, outputs = self._named(inputs), self._wiring.network.outputs
        if not torch.is_grad_enabled():
            found = plainly(self._wiring, named)
        else:
            refuse_transforms()
            weighed, self.plan = self._planned(named)
            self._last = passage_of(self._wiring, named, self.plan, self._memory, weighed, self._check)
            found = self._last.forward()
        return found[outputs[0]] if len(outputs) == 1 else found

    def _named(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        names = self._wiring.network.inputs
        if len(inputs) != len(names):
            raise TypeError(f"{len(inputs)} inputs were given; the network takes {len(names)}: {', '.join(names)}")
        return dict(zip(names, inputs, strict=True))

    def _planned(self, named: dict[str, Any]) -> tuple[Weighed | None, Plan]:
        steps = len(self._wiring)
        if self._memory.budget is None:
            return self._weighed, Plan(steps, self._memory.schedule_for(steps), given=True)
        return self._measured(named)

    def _measured(self, named: dict[str, Any]) -> tuple[Weighed, Plan]:
        kind = signature(self._wiring, named)
        if kind not in self._plans:
            weighed = measured(self._wiring, named, self._memory.tapes if self._memory.budget is not None else ())
            self._plans[kind] = weighed, plan_of(weighed, self._memory)
        self._weighed = self._plans[kind][0]
        return self._plans[kind]

    def measure(self, *inputs: Any) -> Plan:
        """Weigh every block on a sample, whatever says what is kept, and price the plan for inputs like it."""
        return self._measured(self._named(inputs))[1]

    @property
    def network(self) -> Network:
        """The blocks as nodes, with what they cost and take once they are measured."""
        return self._wiring.network if self._weighed is None else self._weighed.network

    def runs(self) -> dict[str, int]:
        """How often each block ran for the last call, so far."""
        if self._last is None:
            return {}
        return {node.name: runs for node, runs in zip(self._wiring.network.nodes, self._last.runs, strict=True)}

    def report(self) -> str:
        """A line for each block (seconds, bytes of output and of tape, planned runs), and the plan in words."""
        if self._weighed is None:
            return "Nothing is measured yet: call the module, or measure(x), on a sample."
        network, plan = self._weighed.network, plan_of(self._weighed, self._memory)
        runs = network.runs(plan)
        lines = [f"{'block':<40} {'seconds':>9} {'output':>9} {'tape':>9} {'runs':>5}"]
        for node, block in zip(network.nodes, self._wiring.blocks, strict=True):
            sizes = (format_bytes(node.bytes), format_bytes(node.tape_bytes))
            lines.append(f"{block.name:<40.40} {node.cost:>9.2g} {sizes[0]:>9} {sizes[1]:>9} {runs[node.name]:>5}")
        return "\n".join([*lines, plan.explain()])


def checkpointed(
    module: nn.Module | Iterable[nn.Module] | Wires,
    *,
    budget: int | str | None = None,
    slots: int | str | None = None,
    every: int | None = None,
    schedule: Schedule | None = None,
    tier: Kind | None = None,
    tapes: Tapes | Sequence[Tapes] = (),
    outputs: Sequence[str] | None = None,
    check: bool = False,
) -> Checkpointed:
    """The module with its gradient within a memory budget; arguments as in :func:`adjoint.chain`.

    ``module``: an ``nn.Sequential``, cut into its blocks (those of sequences inside it too), blocks in their order, or
    the nodes of a graph as in :func:`adjoint.graph`, called with its inputs in the order of their first use.
    Time and bytes of each block are measured on the first input of each shape; ``report()`` says what is kept and how
    often each block runs.
    """
    memory = Memory(slots, budget, every, schedule, tier, tapes)  # type: ignore[arg-type]
    if isinstance(module, Mapping):
        held = {id(wire[0]): wire[0] for wire in module.values() if isinstance(wire[0], nn.Module)}
        return Checkpointed(nn.ModuleList(held.values()), wired(module, outputs), memory, check)
    if outputs is not None:
        raise ValueError(f"outputs={outputs!r} belongs to a graph; a chain has one output, that of its last block")
    if isinstance(module, nn.Module):
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            raise TypeError(
                f"module is a {type(module).__name__}, whose blocks cannot be seen from outside; give an nn.Sequential or "
                f"a list of blocks, or write its forward with adjoint.chain or adjoint.graph"
            )
        whole: nn.Sequential | nn.ModuleList = module
    else:
        whole = nn.ModuleList(module)
    blocks = list(_cut(whole))
    if not blocks:
        raise ValueError("module has no blocks; give at least one")
    return Checkpointed(whole, wired(wires_of(blocks), None), memory, check)


def _cut(module: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """The blocks of a sequence, and of the sequences in it that nothing listens to."""
    for block in module:
        listened = block._forward_hooks or block._forward_pre_hooks or block._backward_hooks
        if type(block) is nn.Sequential and len(block) and not listened:
            yield from _cut(block)
        else:
            yield block
