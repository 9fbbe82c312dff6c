"""Sizes of what does not fit: on meta, and the same as of a network that is there."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import adjoint
from adjoint import cli
from adjoint.estimate import TransformerBlock


def test_sizes_on_meta_are_those_of_the_same_network_on_the_cpu() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.LayerNorm(32))

    found = adjoint.estimate(block, lambda: torch.empty(64, 32), 6, budget="200 KiB")
    blocks = [block() for _ in range(6)]
    for name, memory in (
        ("all tapes", {"slots": "all"}),
        ("every block", {"every": 1}),
        ("every 2. block", {"every": 2}),
    ):
        plan = found.plans[name]
        assert not isinstance(plan, str)
        module = adjoint.checkpointed([Whole(block) for block in blocks], **memory)  # a block is not cut
        assert plan.bytes == pytest.approx(module.measure(torch.ones(64, 32)).bytes, rel=0.01)
    assert found.parameters == sum(p.numel() * 4 for block in blocks for p in block.parameters())
    assert (found.gradients, found.optimizer) == (found.parameters, 2 * found.parameters)
    assert found.runs["all tapes"] == 1 < found.runs["least memory"]


class Whole(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(x)
        return found


def test_the_command_sizes_a_large_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--layers", "12", "--budget", "4GiB", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    block = sum(p.numel() for p in TransformerBlock(64, 4).parameters())
    assert block == 12 * 64**2 + 13 * 64
    assert facts["parameters"] == 12 * 2 * (12 * 4096**2 + 13 * 4096)
    assert facts["activations"]["budget 4GiB"] <= 4 * 2**30 < facts["activations"]["all tapes"]
    assert facts["runs"]["every block"] == pytest.approx(2 - 1 / 12)
    assert cli.main(["estimate", "--heads", "3"]) == 2
