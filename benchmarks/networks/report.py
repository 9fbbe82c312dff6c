"""Real architectures within budgets, and one of them by every way to keep tapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.measure import Section

NAMES = ("GPT-2", "U-Net", "DenseNet-121", "VGG-11", "ResNet-18", "ViT")
SHARES = (1.05, 0.7, 0.45, 0.25)
WAYS = (
    "plain",
    "all",
    "every block",
    "every 2nd",
    "every 4th",
    "every sqrt(L)th",
    "bisection",
    "binomial",
    "nothing",
    "host",
    "file",
    "bfloat16",
)


def child(model: str, name: str, share: float | None = None) -> dict[str, Any] | str:
    """What the child found, or the last line of its error."""
    call = f"from benchmarks.networks.child import child; child({model!r}, {name!r}, {share!r})"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert sum(norm > 0 for norm in found["norm"]) > 0.9 * len(found["norm"]), "gradients that are zero show nothing"
    return found


def budgets() -> Section:
    rows = []
    for model in NAMES:
        plain = child(model, "plain")
        assert isinstance(plain, dict), plain
        for share in SHARES:
            found = child(model, "budget", share)
            if isinstance(found, str):
                smallest = found.rpartition("; ")[2]
                rows.append((model, f"{share:.0%}", f"refused: {smallest}", "", "", "", "", "", ""))
                continue
            rows.append(
                (
                    model,
                    f"{share:.0%}",
                    f"{found['predicted'] / 1e6:.1f} MB",
                    f"{found['tensors'] / 1e6:.1f} MB (**{found['tensors'] / found['predicted']:.2f}**)",
                    f"{found['measured'] / 1e6:.1f} MB",
                    f"{found['runs'] / found['blocks']:.2f}",
                    "as planned" if found["calls"] == found["planned"] else f"{found['calls']} of {found['planned']}",
                    "the same bits" if found["digest"] == plain["digest"] else "OTHER BITS",
                    f"{found['seconds'] / plain['seconds']:.2f}",
                )
            )
    header = (
        "model",
        "budget",
        "plan",
        "tensors",
        "process",
        "runs a block",
        "calls",
        "results",
        "time of plain torch",
    )
    return Section(
        "Within a budget",
        "The budget is a share of what keeping every tape takes. Tensors: the most bytes of tensors at once, counted from "
        "outside during one gradient, parameters and their gradients apart, and of the plan. Process: its high-water mark, "
        "in which the scratch memory of convolutions is as well. Calls: of the blocks, counted by hooks. Results: output, "
        "gradients, buffers and the random numbers drawn afterwards, against the plain model.",
        header,
        tuple(rows),
    )


def ways(model: str = "ViT") -> Section:
    plain = child(model, "plain")
    assert isinstance(plain, dict), plain
    rows = []
    for name in WAYS:
        found = plain if name == "plain" else child(model, name)
        assert isinstance(found, dict), found
        gap = max(abs(a - b) / (abs(b) + 1e-30) for a, b in zip(found["norm"], plain["norm"], strict=True))
        same = "the same bits" if found["digest"] == plain["digest"] else f"norms differ by {gap:.1g}"
        runs = f"{found['runs'] / found['blocks']:.2f}" if "runs" in found else "1.00"
        rows.append(
            (name, f"{found['measured'] / 1e6:.1f} MB", runs, f"{found['seconds'] / plain['seconds']:.2f}", same)
        )
    header = ("kept", "tensors", "process", "runs a block", "time of plain torch", "results")
    return Section(
        f"One network, every way: {model}",
        "As above. 'binomial' has sqrt(L) slots; 'host', 'file' and 'bfloat16' keep the state before every block there.",
        header,
        tuple(rows),
    )


def run(device: str) -> Section:
    if device != "cpu":
        raise SystemExit("networks are measured by the high-water mark of a process, on the CPU alone")
    return Section(
        "Networks",
        "Real architectures with random weights, in training mode, dropout included; one thread, float32. "
        "To install them: `pip install -r benchmarks/networks.txt`.",
        parts=(budgets(), ways()),
    )
