"""How many rows of a linear recurrence to do in parallel: measured once for a kind of tensors, and remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

CHUNKS = (64, 256, 1024, 4096)
LARGEST = 2**22
"""Numbers in a chunk beyond which none is tried: the tree makes three times as many."""
ROWS = 64
"""So many rows are timed one by one."""

_known: dict[Any, int] = {}
_lock = threading.RLock()


def fastest_chunk(a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor, int], Any]) -> int:
    """The number of rows to do in parallel, 1 for none; ``run(a, b, chunk)`` takes that way."""
    if b.is_meta:
        return 1
    each = max(a[0].numel(), b[0].numel(), 1)
    candidates = [chunk for chunk in CHUNKS if chunk // 2 < len(b) and chunk * each <= LARGEST]
    same = len(a) == 1
    key = (same, a.shape[1:], b.shape[1:], b.dtype, b.device, torch.get_num_threads(), tuple(candidates))
    with _lock:
        if key not in _known:
            _known[key] = min((1, *candidates), key=lambda chunk: _seconds(a, b, chunk, run))
        return _known[key]


def forget() -> None:
    """Measure anew from here on."""
    with _lock:
        _known.clear()


def _seconds(a: Tensor, b: Tensor, chunk: int, run: Callable[[Tensor, Tensor, int], Any]) -> float:
    """Of one row, the least of three times."""
    rows = ROWS if chunk == 1 else chunk
    with torch._C.DisableTorchFunction(), torch.no_grad():
        like_b = torch.ones((rows, *b.shape[1:]), dtype=b.dtype, device=b.device)
        like_a = torch.full(
            (min(rows, len(a)) if len(a) == 1 else rows, *a.shape[1:]), 0.5, dtype=a.dtype, device=a.device
        )
        times = []
        for _ in range(4):
            start = perf_counter()
            run(like_a, like_b, chunk)
            if b.is_cuda:
                torch.cuda.synchronize(b.device)
            times.append(perf_counter() - start)
    return min(times[1:]) / rows
