"""A long memory: a state-space model of 32,768 tokens, differentiated in the memory of a few of its states.

    h_k = a h_{k-1} + x_k  (a diagonal of complex numbers, each one mode),      y_k = Re(c . h_k)

Modes ring and fade: a = exp(-1/memory + 2 pi i / period), with memories of 60, 600 and 6000 tokens. From the noise
that goes in and what comes out (with noise of its own), the memories and periods are found. Each step of
``adjoint.scan`` takes a chunk of 128 tokens, whose insides are three matrix products, as fast state-space layers do;
a step of one token gives the same numbers. The gradient does not depend on the slots, bit for bit: only memory and
time do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _fitting import minimise
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint
import revolve

TOKENS, CHUNK, SEQUENCES = 32_768, 128, 4
MEMORIES = torch.tensor([60.0, 600.0, 6000.0], dtype=torch.float64)
PERIODS = torch.tensor([40.0, 300.0, 2500.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)


def transitions(memories: Tensor, periods: Tensor) -> Tensor:
    """The diagonal a."""
    return torch.exp(torch.complex(-1 / memories, 2 * torch.pi / periods))


def token_by_token(a: Tensor, x: Tensor, slots: int | str | None = None) -> Tensor:
    """y of shape (tokens, sequences): one step per token."""

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = a * h + x[:, None]
        return h, (h.real * WEIGHTS).sum(1)

    nothing = torch.zeros(x.shape[1], len(a), dtype=a.dtype)
    return adjoint.scan(step, nothing, x, slots=slots)[1]


def chunk_by_chunk(a: Tensor, x: Tensor, slots: int | str | None = None, counted: list[int] | None = None) -> Tensor:
    """The same y. Inside a chunk y = seen h + kernel x, and the chunk leaves behind h a^CHUNK + gathered x."""
    powers = a[:, None] ** torch.arange(CHUNK + 1)  # (modes, tokens)
    seen = WEIGHTS[:, None] * powers[:, 1:]
    response = (WEIGHTS[:, None] * powers[:, :-1]).real.sum(0)
    lag = torch.arange(CHUNK) - torch.arange(CHUNK)[:, None]  # from token (row) to token (column)
    kernel = torch.where(lag >= 0, response[lag.clamp(min=0)], 0.0)
    gathered, whole = powers[:, :-1].flip(1).T, powers[:, -1]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if counted is not None:
            counted.append(1)
        y = (h @ seen).real + x @ kernel
        return h * whole + x.to(h.dtype) @ gathered, y

    chunks = x.reshape(-1, CHUNK, x.shape[1]).transpose(1, 2).contiguous()
    nothing = torch.zeros(x.shape[1], len(a), dtype=a.dtype)
    return adjoint.scan(step, nothing, chunks, slots=slots)[1].transpose(1, 2).reshape(x.shape)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    tokens = TOKENS // 4 if quick else TOKENS
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, SEQUENCES, generator=generator, dtype=torch.float64)
    clean = chunk_by_chunk(transitions(MEMORIES, PERIODS), x)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    y = clean + 0.3 * clean.std() * noise

    def loss(logarithms: Tensor, slots: int | str = 16, counted: list[int] | None = None) -> Tensor:
        memories, periods = logarithms.exp()
        return (chunk_by_chunk(transitions(memories, periods), x, slots, counted) - y).square().mean()

    start = torch.stack((MEMORIES / 3, PERIODS * 1.2)).log()
    found = torch.tensor(minimise(loss, start, iterations=100).x).reshape(2, -1)
    memories, periods = found.exp().tolist()
    results = {}
    for name, true, value in zip(("short", "middle", "long"), MEMORIES.tolist(), memories, strict=True):
        results[f"{name} memory"] = Recovered(value, true, 0.05 * true)
    for name, true, value in zip(("short", "middle", "long"), PERIODS.tolist(), periods, strict=True):
        results[f"{name} period"] = Recovered(value, true, 0.01 * true)
    results["chunks against tokens, relative"] = Recovered(
        chunks_against_tokens(start, x[: 2048 if quick else 10_240]), 0, 1e-9
    )
    sweep = slots_against_time(
        loss, start, tokens // CHUNK, (3, 16, "all") if quick else (2, 3, 5, 8, 16, 32, 64, "all")
    )
    save(picture(start, found, sweep, tokens // CHUNK), out, "long_memory")
    return confirm(results)


def chunks_against_tokens(logarithms: Tensor, x: Tensor) -> float:
    """The relative difference of two gradients: by steps of one token in 30 slots, and by steps of a chunk in 5."""
    gradients = []
    for model, slots in ((token_by_token, 30), (chunk_by_chunk, 5)):
        p = logarithms.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(transitions(*p.exp()), x, slots).square().mean(), p)[0])
    return float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())


class Row(NamedTuple):
    """One gradient."""

    slots: int
    runs: float
    """Of each step, as predicted and as counted."""
    seconds: float


def slots_against_time(loss: Callable[..., Tensor], at: Tensor, steps: int, choices: Sequence[int | str]) -> list[Row]:
    """The same gradient in different numbers of slots, equal bit for bit."""
    rows, gradients = [], []
    for slots in choices:
        p, counted = at.clone().requires_grad_(), []
        begin = time.perf_counter()
        gradients.append(torch.autograd.grad(loss(p, slots, counted), p)[0])
        seconds = time.perf_counter() - begin
        predicted = revolve.plan(steps=steps, slots=slots).report.runs
        assert predicted <= len(counted) <= predicted + 5, "a few trials of the first step are all that comes on top"
        rows.append(Row(steps if slots == "all" else slots, predicted / steps, seconds))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients), "a gradient depends on its slots"
    return rows


def picture(start: Tensor, found: Tensor, sweep: list[Row], steps: int) -> Figure:
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1, 1.1])
    lag = torch.logspace(0, 4.4, 2000, dtype=torch.float64)
    truth = torch.stack((MEMORIES, PERIODS)).log()
    looks: list[dict[str, Any]] = [
        {"color": GREY, "linestyle": ":", "marker": "x", "markersize": 7, "label": "start"},
        {"color": ORANGE, "alpha": 0.4, "linewidth": 5, "marker": "o", "markersize": 14, "label": "true"},
        {"color": BLUE, "linewidth": 1.2, "marker": "o", "markersize": 6, "label": "recovered"},
    ]
    for p, look in zip((start, truth, found), looks, strict=True):
        left.plot(
            lag, (WEIGHTS * torch.exp(lag[:, None] * transitions(*p.exp()).log())).real.sum(1), **look | {"marker": ""}
        )
        middle.plot(*p.exp(), **look | {"linestyle": ""})
    for before, after in zip(start.exp().T, found.exp().T, strict=True):
        middle.annotate(
            "", after, before, arrowprops={"arrowstyle": "->", "color": GREY, "linewidth": 0.8, "shrinkB": 8}
        )
    left.legend(frameon=False)
    tidy(left, "What remains of an impulse", "tokens later", "response")
    tidy(middle, "The three modes", "memory (tokens)", "period (tokens)")
    *bounded, _ = revolve.sweep(steps, range(2, steps))
    right.plot(
        [plan.slots for plan in bounded], [plan.report.runs / steps for plan in bounded], color=BLUE, label="predicted"
    )
    right.plot(
        [row.slots for row in sweep], [row.runs for row in sweep], "o", color=ORANGE, label="counted, with its time"
    )
    for row in sweep:
        right.annotate(f"{row.seconds:.2f} s", (row.slots, row.runs), (5, 5), textcoords="offset points", fontsize=9)
    right.annotate("all tapes kept", (steps, 1), (-8, -4), textcoords="offset points", ha="right", color=GREY)
    right.legend(frameon=False, loc="upper right")
    right.set_xlim(1.6, 3.2 * steps)
    for axes in (left, middle, right):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    for axes in (middle, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    tidy(right, f"One gradient through {steps} chunks", "states kept (slots)", "runs of each step")
    return figure


if __name__ == "__main__":
    command_line(main)
