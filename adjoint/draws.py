"""Random numbers that a function draws: steps that are computed again would draw others."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adjoint.captured import Captured
from adjoint.tensors import State

TRIES = 3
"""So many more runs tell whether it was another thread that drew random numbers."""


class Drawing(TorchDispatchMode):
    """Sees whether this thread runs an operation of torch that draws random numbers."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class Source(NamedTuple):
    """A generator of random numbers: how to get and set its state."""

    get: Callable[[], Any]
    restore: Callable[[Any], Any]
    shared: bool = False
    """Whether all threads draw from it."""
    torchs: bool = False
    """Whether operations of torch draw from it, and nothing else."""


@contextmanager
def unchanging(state: State, captured: Captured, again: Callable[[], Any] | None = None) -> Iterator[None]:
    """Raise if what runs inside draws random numbers; those drawn are given back.

    Another thread may have drawn them. ``again`` runs the same once more: what draws again is to blame, of torch's own
    generators if one of its random operations is seen. Without it, where there are several threads, the generators
    that all share tell nothing: recorded steps are watched from then on, and marks compare what is computed again.
    """
    generators = _generators(state, captured)
    with _given_back(generators) as drawn:
        yield
    tries = TRIES
    while drawn and again is not None and tries:
        tries -= 1
        with _given_back(generators) as drawn, Drawing() as drawing:
            again()
        if not drawing.drew:
            drawn = [source for source in drawn if not source.torchs]
    if again is None and threading.active_count() > 1 and all(source.shared for source in drawn):
        captured.suspected |= bool(drawn)
    elif drawn:
        refuse_draws(captured.label)


def refuse_draws(label: str) -> NoReturn:
    raise RuntimeError(
        f"{label} draws random numbers (unless another thread did); recomputed steps would differ. "
        f"Draw them before the solve and pass them through args= (or as inputs of a scan; or let "
        f"scan keep torch's draws with random=True)"
    )


@contextmanager
def _given_back(generators: Sequence[Source]) -> Iterator[list[Source]]:
    """Fills a list with the generators that were drawn from inside; each gets its state back."""
    kept = [source.get() for source in generators]
    drawn: list[Source] = []
    yield drawn
    for source, old in zip(generators, kept, strict=True):
        if not _same(source.get(), old):
            drawn.append(source)
            source.restore(old)


def _generators(state: State, captured: Captured) -> list[Source]:
    """Those that the function may draw from."""
    found = [
        Source(torch.get_rng_state, torch.set_rng_state, True, True),
        Source(random.getstate, random.setstate, True),
        Source(partial(np.random.get_state, legacy=False), np.random.set_state, True),
    ]
    for on in {x.device for x in state if x.is_cuda}:
        get, restore = partial(torch.cuda.get_rng_state, on), partial(torch.cuda.set_rng_state, device=on)
        found.append(Source(get, restore, True, True))
    for held in captured.objects:
        if isinstance(held, torch.Generator):
            found.append(Source(held.get_state, held.set_state))
        elif isinstance(held, np.random.RandomState):
            found.append(Source(partial(held.get_state, legacy=False), held.set_state))
        elif isinstance(held, random.Random):
            found.append(Source(held.getstate, held.setstate))
        elif isinstance(held, np.random.Generator):
            bits = held.bit_generator
            found.append(Source(partial(getattr, bits, "state"), partial(setattr, bits, "state")))
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    return bool(a == b)
