"""One model with one way to keep its tapes, in a process of its own: bytes, times, runs, and a digest of the gradient."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adjoint
import revolve
from adjoint.memory import Meter
from benchmarks.networks.models import MODELS, Case


def way(name: str, case: Case, share: float | None) -> Any:
    """The model as it is, or within what its name says; ``share``: of what keeping all tapes takes."""
    blocks = len(case.parts)
    root = max(1, round(blocks**0.5))
    if name == "plain":
        return case.model
    memories: dict[str, dict[str, Any]] = {
        "all": {"slots": "all"},
        "nothing": {"slots": 1},
        "every block": {"every": 1},
        "every 2nd": {"every": 2},
        "every 4th": {"every": 4},
        "every sqrt(L)th": {"every": root},
        "bisection": {"schedule": revolve.Bisection()},
        "binomial": {"slots": root},
        "host": {"every": 1, "tier": adjoint.Host()},
        "file": {"every": 1, "tier": adjoint.Files()},
        "bfloat16": {"every": 1, "tier": adjoint.Device(codec=revolve.Cast("bfloat16"))},
    }
    if name != "budget":
        return adjoint.checkpointed(case.parts, **memories[name])
    assert share is not None
    whole = adjoint.checkpointed(case.parts, slots="all").measure(case.inputs).bytes
    return adjoint.checkpointed(case.parts, budget=int(share * whole))


def gradient(run: Any, inputs: Tensor, cotangent: Tensor | None) -> Tensor:
    torch.manual_seed(1)
    found = run(inputs)
    output: Tensor = getattr(found, "logits", found)
    output.backward(torch.ones_like(output) if cotangent is None else cotangent)
    return output.detach()


def child(model: str, name: str, share: float | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = MODELS[model]()
    run = way(name, case, share)
    parameters = list(case.model.parameters())
    predicted = None
    if isinstance(run, adjoint.Checkpointed):
        predicted = run.measure(case.inputs)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        output = run(case.inputs)
        cotangent = torch.ones_like(getattr(output, "logits", output))
        del output
    buffers = [x.clone() for x in case.model.buffers()]
    calls = counted(case) if name != "plain" else []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    start = time.process_time()
    output = gradient(run, case.inputs, cotangent)
    seconds = time.process_time() - start
    peak = _status("VmHWM") - before
    seen = [output, *(p.grad for p in parameters if p.grad is not None), *case.model.buffers(), torch.rand(2)]
    digest, norm = _digest(seen), _norm(parameters)
    with torch.no_grad():
        for x, old in zip(case.model.buffers(), buffers, strict=True):
            x.copy_(old)
    del output
    calls_once = sum(calls)
    with Meter() as meter:
        gradient(run, case.inputs, cotangent)
    found: dict[str, Any] = {
        "seconds": seconds,
        "measured": peak,
        "tensors": meter.peak,
        "digest": digest,
        "norm": norm,
    }
    if isinstance(run, adjoint.Checkpointed) and predicted is not None:
        found["predicted"] = predicted.bytes
        planned = list(run.network.runs(predicted).values())
        found["calls"], found["planned"] = (
            calls_once,
            sum(n for n, part in zip(planned, blocks(case), strict=True) if part),
        )
        found["runs"], found["blocks"] = sum(planned), len(planned)
    print(json.dumps(found))


def blocks(case: Case) -> list[nn.Module | None]:
    """The blocks that are modules, in their places."""
    parts = case.parts if isinstance(case.parts, list) else [wire[0] for wire in case.parts.values()]
    return [part if isinstance(part, nn.Module) else None for part in parts]


def counted(case: Case) -> list[int]:
    """Counts the calls of each block, from outside."""
    found = blocks(case)
    calls = [0] * len(found)
    for k, block in enumerate(found):
        if block is not None:
            block.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    return calls


def _digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _norm(parameters: list[nn.Parameter]) -> list[float]:
    return [float(p.grad.double().norm()) for p in parameters if p.grad is not None]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
