"""One model with one way to keep its tapes, in a forked process: bytes, times, runs, and a digest of the gradient."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adjoint
import revolve
from adjoint.memory import Meter
from benchmarks.networks.models import MODELS, SIZED, Case


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


def gradient(run: Any, inputs: Tensor, cotangent: Tensor) -> Tensor:
    torch.manual_seed(1)
    output = logits(run(inputs))
    output.backward(cotangent)
    return output.detach()


def logits(found: Any) -> Tensor:
    """What transformers return holds them; others return them."""
    output: Tensor = getattr(found, "logits", found)
    return output


def measured(model: str, name: str, share: float | None = None) -> dict[str, Any]:
    """One gradient: time, high-water mark, digest of all results, calls; and one more, its tensors and operations counted."""
    torch.manual_seed(0)
    case = MODELS[model]()
    run = way(name, case, share)
    parameters = list(case.model.parameters())
    predicted = run.measure(case.inputs) if isinstance(run, adjoint.Checkpointed) else None
    for p in parameters:
        p.grad = torch.zeros_like(p)
    buffers = [x.clone() for x in case.model.buffers()]
    with torch.no_grad():
        cotangent = torch.ones_like(logits(run(case.inputs)))
    put_back(case, buffers)
    calls = counted(case) if name != "plain" else []
    gc.collect()
    with suppress(OSError):  # where it is forbidden, the mark is that of the measuring before
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    start = time.process_time()
    output = gradient(run, case.inputs, cotangent)
    seconds = time.process_time() - start
    peak = _status("VmHWM") - before
    seen = [output, *(p.grad for p in parameters if p.grad is not None), *case.model.buffers(), torch.rand(2)]
    digest, norm = _digest(seen), _norm(parameters)
    del output, seen
    calls_once = sum(calls)
    put_back(case, buffers)
    with Meter() as meter, FlopCounterMode(display=False) as flops:
        gradient(run, case.inputs, cotangent)
    found: dict[str, Any] = {
        "seconds": seconds,
        "batch": len(case.inputs),
        "measured": peak,
        "tensors": meter.peak,
        "operations": flops.get_total_flops(),
        "digest": digest,
        "norm": norm,
    }
    if isinstance(run, adjoint.Checkpointed) and predicted is not None:
        planned = list(run.network.runs(predicted).values())
        found["predicted"] = predicted.bytes
        found["calls"] = calls_once
        found["planned"] = sum(n for n, part in zip(planned, blocks(case), strict=True) if part)
        found["runs"], found["blocks"] = sum(planned), len(planned)
    return found


def put_back(case: Case, buffers: list[Tensor]) -> None:
    with torch.no_grad():
        for x, old in zip(case.model.buffers(), buffers, strict=True):
            x.copy_(old)


def peak(model: str, size: int, cap: int | None) -> dict[str, Any]:
    """The most bytes of tensors of one gradient of a model of this size; ``cap``: the budget, or None for plain torch.

    ``least``: the smallest budget that works, or what plain torch takes.
    """
    torch.manual_seed(0)
    case = SIZED[model](size)
    run: Any = case.model
    least = 0
    if cap is not None:
        whole = adjoint.checkpointed(case.parts, slots="all")
        whole.measure(case.inputs)
        least = smallest(whole.network)
        if least > cap:
            return {"tensors": least, "least": least, "seconds": 0.0}
        run = adjoint.checkpointed(case.parts, schedule=revolve.plan_graph(whole.network, cap).schedule)
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        cotangent = torch.ones_like(logits(run(case.inputs)))
    start = time.process_time()
    with Meter() as meter:
        gradient(run, case.inputs, cotangent)
    return {"tensors": meter.peak, "least": least or meter.peak, "seconds": time.process_time() - start}


def smallest(network: revolve.Network) -> int:
    """The smallest budget that works."""
    try:
        revolve.plan_graph(network, 0)
    except revolve.BudgetError as error:
        return error.smallest
    return 0


def serve() -> None:
    """Answer lines of JSON (the name of a function here, and its arguments), each in a forked child."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            name, arguments = json.loads(line)
            try:
                answer: Any = {"measured": measured, "peak": peak}[name](*arguments)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), flush=True)
            return
        os.waitpid(child, 0)


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
