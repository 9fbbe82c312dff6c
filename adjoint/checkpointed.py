"""A module that measures its blocks, plans what to keep, and says what it will do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from adjoint.chain import Memory, X, measured, passage_of, plainly, plan_of, refuse_transforms, signature, wired
from adjoint.passage import Passage, Wiring
from adjoint.tiers import Kind
from adjoint.weights import Weighed
from revolve import Plan, Schedule, format_bytes


class Checkpointed(nn.Module):
    """The same function as ``module``, whose gradient keeps only what the plan keeps; made by :func:`checkpointed`."""

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], memory: Memory, check: bool) -> None:
        super().__init__()
        self.module = module
        self.plan: Plan | None = None
        """Of the last call that was differentiated; None before."""
        self._memory, self._check = memory, check
        names = [X, *(f"block {k}" for k in range(len(blocks)))]
        self._wiring: Wiring = wired({names[k + 1]: (block, names[k]) for k, block in enumerate(blocks)}, None)
        self._plans: dict[Any, tuple[Weighed, Plan]] = {}
        self._weighed: Weighed | None = None
        self._last: Passage | None = None

    def forward(self, x: Any) -> Any:
        wiring = self._wiring
        last = wiring.network.outputs[0]
        if not torch.is_grad_enabled():
            return plainly(wiring, {X: x})[last]
        refuse_transforms()
        weighed, self.plan = self._planned(x)
        self._last = passage_of(wiring, {X: x}, self.plan.schedule, self._memory, weighed, self._check)
        return self._last.forward()[last]

    def _planned(self, x: Any) -> tuple[Weighed | None, Plan]:
        steps = len(self._wiring)
        if self._memory.budget is None:
            return self._weighed, Plan(steps, self._memory.schedule_for(steps), given=True)
        kind = signature(self._wiring, {X: x})
        if kind not in self._plans:
            weighed = measured(self._wiring, {X: x})
            self._plans[kind] = weighed, plan_of(weighed, self._memory)
        self._weighed = self._plans[kind][0]
        return self._plans[kind]

    def measure(self, x: Any) -> Plan:
        """Weigh every block on a sample, whatever says what is kept, and price the plan for inputs like it."""
        self._weighed = measured(self._wiring, {X: x})
        return plan_of(self._weighed, self._memory)

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
    module: nn.Module | Iterable[nn.Module],
    *,
    budget: int | str | None = None,
    slots: int | str | None = None,
    every: int | None = None,
    schedule: Schedule | None = None,
    tier: Kind | None = None,
    check: bool = False,
) -> Checkpointed:
    """The module with its gradient within a memory budget; arguments as in :func:`adjoint.chain`.

    ``module``: an ``nn.Sequential``, cut into its blocks (those of sequences inside it too), or blocks in their order.
    Time and bytes of each block are measured on the first input of each shape; ``report()`` says what is kept and how
    often each block runs.
    """
    memory = Memory(slots, budget, every, schedule, tier)
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
    return Checkpointed(whole, blocks, memory, check)


def _cut(module: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """The blocks of a sequence, and of the sequences in it that nothing listens to."""
    for block in module:
        listened = block._forward_hooks or block._forward_pre_hooks or block._backward_hooks
        if type(block) is nn.Sequential and len(block) and not listened:
            yield from _cut(block)
        else:
            yield block
