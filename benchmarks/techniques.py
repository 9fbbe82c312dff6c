"""One number for each technique of the field, on one network: the most bytes at once, and the time, beside plain torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import adjoint
import revolve
from adjoint.memory import Meter
from benchmarks.attention import Layer, made_again, spelt_out
from benchmarks.attention import fused as fused_attention
from benchmarks.measure import Section

BLOCKS, WIDTH, ROWS = 9, 64, 1024
REPEATS = 3


def blocks(activation: Callable[[], nn.Module] = nn.GELU, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    wide = 4 * WIDTH
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, wide), activation(), nn.Dropout(dropout), nn.Linear(wide, WIDTH)
            )
            for _ in range(BLOCKS)
        )
    )


class Uneven(nn.Module):
    """An encoder and a decoder with skips between them, each level half as wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(256 >> k, 128 >> k), nn.Tanh()) for k in range(3))
        self.up = nn.ModuleList(nn.Sequential(nn.Linear(2 * (128 >> k), 256 >> k), nn.Tanh()) for k in range(3))

    def nodes(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        below = "x"
        for k, layer in enumerate(self.down):
            found[f"down {k}"], below = (layer, below), f"down {k}"
        for k in reversed(range(3)):
            found[f"join {k}"] = (lambda a, b: torch.cat([a, b], 1), below, f"down {k}")
            found[f"up {k}"], below = (self.up[k], f"join {k}"), f"up {k}"
        return found


Run = Callable[[Tensor], Tensor]


def weighed(run: Run, x: Tensor, parts: int = 1) -> tuple[int, float]:
    """The most bytes of tensors at once in one gradient, gradients of parameters apart; the least seconds of some."""
    pieces = x.chunk(parts)

    def gradient() -> None:
        for piece in pieces:
            run(piece).sum().backward()

    gradient()
    with Meter() as meter:
        gradient()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        gradient()
        seconds.append(time.process_time() - start)
    return meter.peak, min(seconds)


def chained(model: nn.Sequential, **memory: Any) -> Run:
    return lambda x: adjoint.chain(model, x, **memory)


def chains() -> list[tuple[str, str, str]]:
    """Techniques on the chain of blocks."""
    model, x = blocks(), torch.randn(ROWS, WIDTH)
    plain = weighed(model, x)
    whole = adjoint.checkpointed(list(model), slots="all").measure(x).bytes
    root = math.isqrt(BLOCKS)
    layers = [layer for block in model for layer in block]
    ways: dict[str, Run] = {
        "store-all": chained(model, slots="all"),
        "store-nothing": chained(model, slots=1),
        "every sqrt(L)-th": chained(model, every=root),
        "every 2nd": chained(model, every=2),
        "block boundaries": chained(model, every=1),
        "selective per operation": chained(model, tapes=adjoint.Selective()),
        "dynamic programming": adjoint.checkpointed(layers, budget=whole // 4),
        "profiling-driven": adjoint.checkpointed(
            layers, budget=whole // 2, tapes=[adjoint.Selective(), adjoint.Files()]
        ),
        "binomial": chained(model, slots=root),
        "bisection": chained(model, schedule=revolve.Bisection()),
        "host offload": chained(model, every=1, tier=adjoint.Host()),
        "disk offload of states": chained(model, every=1, tier=adjoint.Files()),
        "disk offload of tapes": chained(model, tapes=adjoint.Files()),
        "tapes in bfloat16": chained(model, tapes=adjoint.Device(codec=revolve.Cast("bfloat16"))),
    }
    rows = [("plain torch", _megabytes(plain[0]), "1")]
    rows += [(name, *_beside(weighed(run, x), plain)) for name, run in ways.items()]
    rows.append(("gradient accumulation, 4 parts", *_beside(weighed(model, x, parts=4), plain)))

    def mixed(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    rows.append(("mixed precision (bfloat16 on this CPU)", *_beside(weighed(mixed, x), plain)))
    return rows


def skips() -> list[tuple[str, str, str]]:
    model, x = Uneven(), torch.randn(ROWS, 256)
    nodes = model.nodes()
    plain = weighed(adjoint.checkpointed(nodes, slots="all"), x)
    least = adjoint.checkpointed(nodes, slots="all")
    least.measure(x)
    try:
        revolve.plan_graph(least.network, 0)
    except revolve.BudgetError as error:
        smallest = error.smallest
    return [
        (
            "skip connections, the smallest budget",
            *_beside(weighed(adjoint.checkpointed(nodes, budget=smallest), x), plain),
        )
    ]


def attention() -> list[tuple[str, str, str]]:
    x = torch.randn(1, 512, 64)
    runs = {
        name: nn.Sequential(*(Layer(mixed) for _ in range(4)))
        for name, mixed in (
            ("plain", spelt_out),
            ("attention recomputation", made_again),
            ("fused attention", fused_attention),
        )
    }
    plain = weighed(runs.pop("plain"), x)
    return [(f"{name}, length 512", *_beside(weighed(run, x), plain)) for name, run in runs.items()]


def activations() -> list[tuple[str, str, str]]:
    """ReLU keeps its result, GELU what it gets."""
    x = torch.randn(ROWS, WIDTH)
    gelu = weighed(blocks(nn.GELU, 0.0), x)
    rows = []
    for name, kind in (("ReLU", nn.ReLU), ("ReLU in place", lambda: nn.ReLU(inplace=True))):
        rows.append((f"{name} for GELU", *_beside(weighed(blocks(kind, 0.0), x), gelu)))
        again = weighed(chained(blocks(kind, 0.0), every=1), x)
        rows.append(
            (
                f"{name} for GELU, every block made again",
                *_beside(again, weighed(chained(blocks(nn.GELU, 0.0), every=1), x)),
            )
        )
    return rows


def overhead() -> list[tuple[str, str, str]]:
    """What one more run of every block costs, and what the ratio of backward to forward says."""
    model, x = blocks(), torch.randn(ROWS, WIDTH)
    forward, backward = [], []
    for _ in range(5):
        start = time.process_time()
        y = model(x).sum()
        middle = time.process_time()
        y.backward()
        forward.append(middle - start)
        backward.append(time.process_time() - middle)
    rho = min(backward) / min(forward)
    again = weighed(chained(model, schedule=revolve.Segments(tuple(range(BLOCKS)), last=True)), x)
    measured = again[1] / weighed(model, x)[1] - 1
    return [
        ("one run more of everything", f"rho = {rho:.2f}: {1 / (1 + rho):+.0%} by 1/(1+rho)", f"{1 + measured:.2f}")
    ]


def _beside(found: tuple[int, float], plain: tuple[int, float]) -> tuple[str, str]:
    return f"{_megabytes(found[0])} ({found[0] / plain[0]:.0%})", f"{found[1] / plain[1]:.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def run(device: str) -> Section:
    if device != "cpu":
        raise SystemExit("techniques are weighed tensor by tensor, on the CPU")
    parts = (
        (
            "A chain of blocks",
            f"{BLOCKS} blocks (LayerNorm, {WIDTH} to {4 * WIDTH}, GELU, dropout, back), {ROWS} rows.",
            chains(),
        ),
        ("Skips", "Three levels down, three up, beside the same with all tapes kept.", skips()),
        ("Attention", "Four layers, beside the matrix spelt out and kept.", attention()),
        ("Activations", "The same chain without dropout, beside GELU.", activations()),
        ("Overhead", "Every block of the chain run once more, the last one too.", overhead()),
    )
    header = ("technique", "tensors at most (of plain)", "time (plain: 1)")
    return Section(
        "Techniques",
        "One gradient: the most bytes of tensors at once, gradients of parameters apart, and the least of three times, the "
        "processor's, on one thread and beside other work: good to about a fifth. What each is and how to ask for it: "
        "[techniques](techniques.md).",
        parts=tuple(Section(title, text, header, tuple(rows)) for title, text, rows in parts),
    )
