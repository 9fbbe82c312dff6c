"""Random numbers that a function draws: steps that are computed again would draw others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adjoint import randomness
from adjoint.captured import Captured
from adjoint.randomness import Source
from adjoint.tensors import State

TRIES = 3
"""So many more runs tell whether it was another thread that drew random numbers."""


class Drawing(TorchDispatchMode):
    """Sees whether this thread runs an operation of torch that draws random numbers."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


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
        if not randomness.same(source.get(), old):
            drawn.append(source)
            source.restore(old)


def _generators(state: State, captured: Captured) -> list[Source]:
    """Those that the function may draw from."""
    devices = {x.device for x in state if x.is_cuda}
    return [*randomness.ambient(), *map(randomness.of_device, devices), *randomness.held(captured.objects)]
