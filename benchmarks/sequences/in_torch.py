"""This library, a loop over torch operations, and torch.utils.checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import revolve
from adjoint import linear_scan, scan
from benchmarks.sequences.problem import STATES, numbers, segment, thirds

Gradient = Callable[[], Sequence[np.ndarray]]
RUNS: list[int] = []
"""Rows of each chunk as it was computed, by this library."""


def leaves(length: int) -> list[Tensor]:
    return [torch.tensor(x, requires_grad=True) for x in numbers(length)]


def zero() -> Tensor:
    return torch.zeros(STATES, dtype=torch.float64)


def gradient(length: int, outputs: Callable[..., Tensor]) -> Gradient:
    wanted = leaves(length)

    def run() -> Sequence[np.ndarray]:
        loss = 0.5 * outputs(*wanted).square().sum()
        return [g.numpy() for g in torch.autograd.grad(loss, wanted)]

    return run


def by_chunks(chunk: int | None, size: int, slots: int | str) -> Callable[..., Tensor]:
    """Chunks of ``size`` rows, ``chunk`` of them at a time in parallel."""

    def outputs(u: Tensor, w: Tensor, c: Tensor, v: Tensor, r: Tensor) -> Tensor:
        def rows(h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            RUNS.append(len(u))
            gate = torch.sigmoid(u[:, None] * w + c)
            states = linear_scan(gate, (1 - gate) * v * u[:, None], h, chunk=chunk)
            return states[-1], states @ r

        return scan(rows, zero(), u, chunk=size, parallel=True, slots=slots)[1]

    return outputs


def kept(length: int) -> int:
    """So many chunks run plainly at most twice."""
    return revolve.fewest_slots(steps=length // segment(length), repetitions=2)


def parallel(length: int) -> Gradient:
    return gradient(length, by_chunks(None, segment(length), kept(length)))


def every_chunk(length: int) -> Gradient:
    return gradient(length, by_chunks(None, segment(length), length // segment(length)))


def sequential(length: int) -> Gradient:
    return gradient(length, by_chunks(1, segment(length), kept(length)))


def all_tapes(length: int) -> Gradient:
    return gradient(length, by_chunks(None, segment(length), "all"))


def all_tapes_sequential(length: int) -> Gradient:
    return gradient(length, by_chunks(1, segment(length), "all"))


def row(h: Tensor, u: Tensor, w: Tensor, c: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(u * w + c)
    h = gate * h + (1 - gate) * v * u
    return h, h @ r


def any_step(length: int) -> Gradient:
    """A step as one would write it, of which nothing is known."""
    slots = revolve.fewest_slots(steps=length, repetitions=2)
    return gradient(length, lambda u, *p: scan(row, zero(), u, args=p, slots=slots)[1])


def loop_over(h: Tensor, u: Tensor, *p: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for x in u.unbind(0):
        h, y = row(h, x, *p)
        outputs.append(y)
    return h, torch.stack(outputs)


def loop(length: int) -> Gradient:
    return gradient(length, lambda u, *p: loop_over(zero(), u, *p)[1])


def checkpointed(length: int) -> Gradient:
    """Two levels of segments, near the cube root of the length each.

    The reentrant kind: the other one keeps a graph of every operation, a gigabyte for 100,000 rows.
    """
    size = thirds(length)
    number = max(1, length // size // thirds(length))

    def inner(h: Tensor, u: Tensor, *p: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for part in u.split(size):
            h, y = checkpoint(loop_over, h, part, *p, use_reentrant=True, preserve_rng_state=False)
            outputs.append(y)
        return h, torch.cat(outputs)

    def outputs(u: Tensor, *p: Tensor) -> Tensor:
        h, found = zero(), []
        for part in u.split(length // number):
            h, y = checkpoint(inner, h, part, *p, use_reentrant=True, preserve_rng_state=False)
            found.append(y)
        return torch.cat(found)

    wanted = leaves(length)

    def run() -> Sequence[np.ndarray]:
        for x in wanted:
            x.grad = None
        (0.5 * outputs(*wanted).square().sum()).backward()
        return [x.grad.numpy() for x in wanted if x.grad is not None]

    return run
