"""Real architectures within budgets, and one of them by every way to keep tapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
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


class Children:
    """Measures each model in a process of its own, forked from one that has imported what all of them need."""

    def __init__(self) -> None:
        # large blocks go back to the system as soon as they are free, so that the process shows what is held
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        call = "from benchmarks.networks.child import serve; serve()"
        self._server = subprocess.Popen(
            [sys.executable, "-c", call], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the function of ``child.py`` found, or a sentence."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps([name, arguments]), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def measured(self, model: str, way: str, share: float | None = None) -> dict[str, Any] | str:
        found: dict[str, Any] | str = self.ask("measured", model, way, share)
        if isinstance(found, dict):
            moved = sum(norm > 0 for norm in found["norm"])
            assert moved > 0.9 * len(found["norm"]), "gradients that are zero show nothing"
        return found

    def peak(self, model: str, budget: int | None, size: int) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("peak", model, size, budget)
        assert isinstance(found, dict), found
        return found

    def close(self) -> None:
        self._server.communicate()


def budgets(children: Children) -> Section:
    rows = []
    for model in NAMES:
        plain = children.measured(model, "plain")
        assert isinstance(plain, dict), plain
        for share in SHARES:
            found = children.measured(model, "budget", share)
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


def ways(children: Children, model: str) -> Section:
    plain = children.measured(model, "plain")
    assert isinstance(plain, dict), plain
    rows = []
    for name in WAYS:
        found = plain if name == "plain" else children.measured(model, name)
        assert isinstance(found, dict), found
        gap = max(abs(a - b) / (abs(b) + 1e-30) for a, b in zip(found["norm"], plain["norm"], strict=True))
        same = "the same bits" if found["digest"] == plain["digest"] else f"norms differ by {gap:.1g}"
        runs = f"{found['runs'] / found['blocks']:.2f}" if "runs" in found else "1.00"
        saved, again = plain["tensors"] - found["tensors"], found["operations"] - plain["operations"]
        rows.append(
            (
                name,
                f"{found['tensors'] / 1e6:.1f} MB",
                runs,
                f"{found['seconds'] / plain['seconds'] - 1:+.0%}",
                f"{found['batch'] / found['seconds']:.1f}",
                f"{found['operations'] / found['tensors']:.0f}",
                f"{again / saved:.0f}" if saved > 0.01 * plain["tensors"] else "",
                same,
            )
        )
    header = (
        "kept",
        "tensors",
        "runs a block",
        "overhead",
        "samples/s",
        "operations a byte",
        "again, a byte",
        "results",
    )
    return Section(
        f"One network, every way: {model}",
        "As above. 'binomial' has sqrt(L) slots; 'host', 'file' and 'bfloat16' keep the state before every block there "
        "(on a CPU the host's memory is the device's, and counts). Operations a byte: those of one gradient, in matrix "
        "products and convolutions, for each byte held at most; again: those that are run again for each byte saved.",
        header,
        tuple(rows),
    )


def largest(children: Children) -> Section:
    """The largest batch or depth whose gradient stays under a cap, plainly and with the cap as a budget."""
    rows = []
    for name, small in (("GPT-2, batch", 2), ("ResNet-18, batch", 4), ("ViT, layers", 4)):
        cap = children.ask("peak", name, small, None)["tensors"]
        for way, budget in (("plain torch", None), ("the cap as a budget", cap)):
            size, found = _largest(partial(children.peak, name, budget), small, cap)
            speed = f"{size / found['seconds']:.1f}"
            rows.append((name, f"{cap / 1e6:.1f} MB", way, str(size), f"{found['tensors'] / 1e6:.1f} MB", speed))
    return Section(
        "The largest under a cap",
        "The cap is what plain torch takes with 2 (GPT-2) or 4. It was run and "
        "its tensors were counted; one more of "
        "it does not fit (the plan is refused, or plain torch passes the cap). Speed: batch rows or layers a second, "
        "while tensors are counted, which takes time itself.",
        ("model", "cap", "way", "largest", "tensors", "speed"),
        tuple(rows),
    )


def _largest(peak: Callable[[int], dict[str, Any]], size: int, cap: int) -> tuple[int, dict[str, Any]]:
    """The largest size whose peak is under the cap: where a line through two peaks says, and from there one by one."""
    least = [peak(n)["least"] for n in (size, 2 * size)]
    size = max(1, int(size + size * (cap - least[0]) / (least[1] - least[0])))
    found = peak(size)
    while found["tensors"] > cap:
        size, found = size - 1, peak(size - 1)
    while (more := peak(size + 1))["tensors"] <= cap:
        size, found = size + 1, more
    return size, found


def run(device: str) -> Section:
    if device != "cpu":
        raise SystemExit("networks are measured by the high-water mark of a process, on the CPU alone")
    children = Children()
    try:
        parts = budgets(children), ways(children, "ViT"), ways(children, "ResNet-18"), largest(children)
    finally:
        children.close()
    return Section(
        "Networks",
        "Real architectures with random weights, in training mode, dropout included; one thread, float32; times are the "
        "processor's, of one gradient, beside other work, and good to about a fifth. To install the packages: "
        "`pip install -r benchmarks/networks.txt`; it takes a quarter of an hour.",
        parts=parts,
    )
