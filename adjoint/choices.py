"""What it would cost to keep the tape of a block otherwise than as it is: measured, for a budget to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.passage import fleeting
from adjoint.put_away import Kept, Moved, Tapes, line_of, movable, named, stored_bytes
from adjoint.selective import Chosen, Selective, Timing
from adjoint.tensors import bytes_of
from adjoint.tiers import Kind
from revolve import Way

LEVELS = 4
"""So many selections of operations are offered for each block."""


class Tape(NamedTuple):
    """What is known of a block and its tape. Sizes are in bytes."""

    cost: float
    """Of one run."""
    output: int
    running: int
    recording: int
    arguments: int
    """Of the saved outputs of earlier nodes."""
    saved_output: bool
    used: tuple[str, ...]
    """The names that it uses."""


class Choice(NamedTuple):
    """A way, and how it is done."""

    way: Way
    kept: Kept


def selections(kind: Selective, tape: Tape, run: Any, rate: float) -> list[Choice]:
    """Operations to keep, the dearest for their bytes first; ``run()`` runs the block; ``rate``: see :class:`Timing`."""
    timing = Timing(frozenset(kind.keep), rate)

    def pack(x: Tensor) -> Tensor:
        timing.saved()
        return x.detach()

    with torch.enable_grad(), fleeting(True), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), timing:
        result = run()
    del result
    found = sorted(timing.operations, key=lambda op: op.cost / op.bytes, reverse=True)
    spent = timing.needed + 1e-12
    counts = sorted({-(-len(found) * level // LEVELS) for level in range(1, LEVELS + 1)} - {0})
    choices = []
    for count in counts:
        kept = found[:count]
        size, saved = sum(op.bytes for op in kept), sum(op.cost for op in kept)
        way = Way(
            f"selective, {count} of {len(found)} operations",
            bytes=size,
            cost=tape.cost * max(0.0, 1 - saved / spent),
            saves=tape.used,
            recording=tape.output + tape.running + size,
            restoring=size + max(tape.recording, tape.output),
            copies=tape.output if tape.saved_output else 0,
        )
        choices.append(Choice(way, Chosen(frozenset(kind.keep), frozenset(op.key for op in kept))))
    return choices


def elsewhere(kind: Kind, tape: Tape, run: Any, stays: set[int]) -> list[Choice]:
    """The whole tape in a file, on the host or in a lower precision, moved there once to see."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in stays:
            saved.append(x.detach())
        return x.detach()

    with torch.enable_grad(), fleeting(True), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    del result
    lines = {(x.untyped_storage()._cdata, x.dtype): line_of(x) for x in saved if movable(x)}
    if not lines:
        return []
    whole, small = bytes_of(lines.values()), stored_bytes(kind, lines.values())
    if small >= whole:
        return []
    on_meta = any(x.is_meta for x in lines.values())
    cost = tape.cost if on_meta else _moved(kind, saved)
    way = Way(
        named(kind),
        bytes=small,
        cost=cost,
        recording=tape.recording + tape.output + whole,
        restoring=small + 2 * whole,
        copies=tape.arguments + (tape.output if tape.saved_output else 0),
    )
    return [Choice(way, kind)]


def _moved(kind: Kind, saved: Sequence[Tensor]) -> float:
    """Seconds there and back."""
    start = perf_counter()
    Moved(kind, list(enumerate(saved)), set()).back()
    for device in {x.device for x in saved if x.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
    return perf_counter() - start


def choices(kinds: Sequence[Tapes], tape: Tape, run: Any, stays: set[int], rate: float) -> list[Choice]:
    """Every way that is worth a thought; ``stays``: storages that no way moves."""
    found: list[Choice] = []
    for kind in kinds:
        found += selections(kind, tape, run, rate) if isinstance(kind, Selective) else elsewhere(kind, tape, run, stays)
    return found
