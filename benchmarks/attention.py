"""Attention against the length of the sequence: the quadratic matrix kept, made again, or never made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import adjoint
from adjoint.memory import Meter
from benchmarks.measure import Section

WIDTH, HEADS, LAYERS = 64, 4, 4
LENGTHS = (128, 256, 512, 1024)


class Layer(nn.Module):
    """Attention alone: projections in and out, and what is done between them."""

    def __init__(self, mixed: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out, self.mixed = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), mixed

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.into(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        found = self.mixed(query, key, value)
        return x + self.out(found.transpose(1, 2).reshape(batch, length, width))


def spelt_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V: a matrix of length x length for each head."""
    weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=-1)
    return weights @ value


def made_again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same, from Q, K and V in the backward pass."""
    found: Tensor = adjoint.checkpoint(spelt_out, query, key, value)
    return found


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's kernel, which makes the matrix in tiles."""
    return functional.scaled_dot_product_attention(query, key, value)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matrix kept": spelt_out,
    "matrix made again": made_again,
    "fused attention": fused,
}


def weighed(mixed: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, every: int | None) -> tuple[int, float]:
    """Peak of the bytes of tensors of one gradient, and seconds of another."""
    torch.manual_seed(0)
    layers = [Layer(mixed) for _ in range(LAYERS)]
    x = torch.randn(1, length, WIDTH)

    def gradient() -> None:
        y = adjoint.chain(layers, x, every=every) if every else nn.Sequential(*layers)(x)
        y.sum().backward()

    gradient()  # gradients of parameters are there from now on
    with Meter() as meter:
        gradient()
    start = time.process_time()
    gradient()
    return meter.peak, time.process_time() - start


def run(device: str) -> Section:
    if device != "cpu":
        raise SystemExit("attention is weighed tensor by tensor, on the CPU")
    rows, lines = [], {}
    ways = [*((name, mixed, None) for name, mixed in WAYS.items()), ("every layer made again", spelt_out, 1)]
    for name, mixed, every in ways:
        found = [weighed(mixed, length, every) for length in LENGTHS]
        lines[name] = [size for size, _ in found]
        growth = math.log2(found[-1][0] / found[-2][0])
        cells = (f"{size / 1e6:.2f} MB, {1e3 * seconds:.0f} ms" for size, seconds in found)
        rows.append((name, *cells, f"{growth:.2f}"))
    return Section(
        "Attention",
        f"{LAYERS} layers of attention, width {WIDTH}, {HEADS} heads, one sequence, float32: the most bytes of tensors at "
        "once in one gradient, and the processor's time. Growth: the power of the length by which bytes grow at last; 2 "
        "is quadratic. 'matrix made again' keeps query, key and value of each layer; one layer's matrix is there at a time.",
        ("way", *(f"length {length}" for length in LENGTHS), "growth"),
        tuple(rows),
        pictures=(("attention.png", picture(lines)),),
    )


def picture(lines: dict[str, list[int]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, sizes), marker in zip(lines.items(), "osD^", strict=True):
        axes.loglog(LENGTHS, [size / 1e6 for size in sizes], marker=marker, label=name)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.minorticks_off()
    axes.set_xlabel("length of the sequence")
    axes.set_ylabel("peak of tensors, MB")
    axes.set_title(f"One gradient of {LAYERS} layers of attention")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    return figure
