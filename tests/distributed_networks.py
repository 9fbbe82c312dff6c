"""Two processes on one machine (gloo): data-parallel, sharded and pipelined training of networks that are run again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import adjoint
from revolve import BudgetError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4)]
    return nn.Sequential(*blocks)


def trained(kind: str, memory: dict[str, int] | None) -> list[Tensor]:
    """Two steps of training, each of two accumulated batches; parameters afterwards, and how often hooks fired."""
    model = network()
    fired: list[int] = []
    if kind == "ddp":
        whole = model if memory is None else adjoint.checkpointed(model, **memory)
        run: nn.Module = DistributedDataParallel(whole)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))
    else:
        for block in model:
            fully_shard(block)
        fully_shard(model)
        run = model
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(2):
        for _ in range(2):
            x = torch.randn(6, 8)
            y = run(x) if kind == "ddp" or memory is None else _sharded(model, x, memory)
            y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(fired)) * 4 == len(fired), "a hook fires once for each backward pass"
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [*(p.detach().clone() for p in found), torch.rand(2)]


def _sharded(model: nn.Sequential, x: Tensor, memory: dict[str, int]) -> Tensor:
    """The root's hooks run around its forward, in which its blocks are a chain."""
    forward = model.forward
    model.forward = lambda x: adjoint.chain(list(model), x, **memory)  # type: ignore[method-assign]
    try:
        return model(x)
    finally:
        model.forward = forward  # type: ignore[method-assign]


def piped(memory: dict[str, Any] | None, kind: type[ScheduleGPipe] | type[Schedule1F1B]) -> list[Tensor]:
    """The gradients of this process's half of a network, four parts of a batch in a pipeline; and what was drawn."""
    rank = dist.get_rank()
    half = network()[2 * rank : 2 * rank + 2]
    blocks = [block for part in half for block in part]
    if memory is not None and "budget" in memory:  # the smallest that works for one part of the batch
        try:
            adjoint.checkpointed(blocks, budget=0).measure(torch.randn(4, 8, requires_grad=rank > 0))
        except BudgetError as error:
            memory = {"budget": error.smallest}
    run = half if memory is None else adjoint.checkpointed(blocks, **memory)
    stage = PipelineStage(run, rank, 2, torch.device("cpu"))
    schedule = kind(stage, 4, loss_fn=lambda y, target: (y - target).square().mean())
    torch.manual_seed(3)
    x, target = torch.randn(16, 8), torch.randn(16, 8)
    torch.manual_seed(4 + rank)
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=target)
    if memory is not None and "budget" in memory:
        assert run.plan.bytes <= memory["budget"] and sum(run.runs().values()) > len(blocks)
    return [*(p.grad for p in half.parameters()), torch.rand(2)]


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(str(Path(folder) / "store"), 2))
    for kind in ("ddp", "fsdp"):
        plain = trained(kind, None)
        for memory in ({"slots": 1}, {"slots": 2}, {"every": 2}):
            found = trained(kind, memory)
            assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True)), f"{kind}, {memory}"
    for kind in (ScheduleGPipe, Schedule1F1B):
        plain = piped(None, kind)
        for memory in ({"slots": 1}, {"budget": 0}, {"tapes": adjoint.Selective()}):
            found = piped(memory, kind)
            assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True)), f"{kind}, {memory}"
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
