"""What training a network would take, without its numbers: blocks are weighed on the device ``meta``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adjoint.chain import Memory, X, wired, wires_of
from adjoint.tensors import bytes_of
from adjoint.weights import weigh
from revolve import BudgetError, Network, Plan, plan_graph
from revolve.binomial import whole

MOMENTS = 2
"""Numbers that Adam keeps for each parameter."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step, apart: what no plan changes, and a plan for each way to keep tapes."""

    parameters: int
    gradients: int
    optimizer: int
    plans: dict[str, Plan | str]
    """By name; a sentence for one that does not work. ``plan.bytes`` are the activations."""
    runs: dict[str, float]
    """Of each block on average, by the name of the plan."""


def estimate(
    block: Callable[[], nn.Module], sample: Callable[[], Any], layers: int, budget: int | str | None = None
) -> Estimate:
    """What training so many equal blocks on such a sample takes; both are made on ``meta``, where nothing takes memory.

    The plans: all tapes kept, the state before every block, every sqrt(L)-th block, the least memory of a budget, and
    ``budget`` if given. Adam's two moments count as its state.
    """
    layers = whole("layers", layers, least=1)
    with torch.device("meta"):
        blocks, x = [block() for _ in range(3)], sample()
    owned = layers * bytes_of(blocks[0].parameters())
    like = weigh(wired(wires_of(blocks), None), {X: x}).network.nodes[1]  # in the middle
    nodes = [
        like._replace(
            name=f"block {k}",
            dependencies=(X if k == 0 else f"block {k - 1}",),
            saves=tuple(f"block {k - (name != like.name)}" for name in like.saves if k or name == like.name),
        )
        for k in range(layers)
    ]
    network = Network(nodes)
    root = max(1, round(layers**0.5))
    schedules = {
        "all tapes": Memory(slots="all"),
        "every block": Memory(every=1),
        f"every {root}. block": Memory(every=root),
    }
    plans: dict[str, Plan | str] = {
        name: network.plan(memory.schedule_for(layers)) for name, memory in schedules.items()
    }
    try:
        plans["least memory"] = plan_graph(network, 0)
    except BudgetError as error:
        plans["least memory"] = plan_graph(network, error.smallest)
    if budget is not None:
        try:
            plans[f"budget {budget}"] = plan_graph(network, budget)
        except BudgetError as error:
            plans[f"budget {budget}"] = str(error)
    runs = {name: sum(network.runs(plan).values()) / layers for name, plan in plans.items() if isinstance(plan, Plan)}
    return Estimate(owned, owned, MOMENTS * owned, plans, runs)


class TransformerBlock(nn.Module):
    """One layer of a language model: attention (torch's fused one) and a network of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.into(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))
