"""Where random numbers come from: the state of every generator that a function may draw from, and how to put it back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Source(NamedTuple):
    """A generator of random numbers: how to get and set its state."""

    get: Callable[[], Any]
    restore: Callable[[Any], Any]
    shared: bool = False
    """Whether all threads draw from it."""
    torchs: bool = False
    """Whether operations of torch draw from it, and nothing else."""


def ambient() -> list[Source]:
    """Generators that anybody may draw from without holding them: torch's on the CPU, Python's and numpy's."""
    return [
        Source(torch.get_rng_state, torch.set_rng_state, True, True),
        Source(random.getstate, random.setstate, True),
        Source(partial(np.random.get_state, legacy=False), np.random.set_state, True),
    ]


def of_accelerators() -> list[Source]:
    """torch's generator of every accelerator that has been used."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", lambda: False)():
        return []
    return [of_device(torch.device(accelerator.type, k)) for k in range(torch.accelerator.device_count())]


def of_device(device: torch.device) -> Source:
    module = torch.get_device_module(device)
    return Source(partial(module.get_rng_state, device), partial(module.set_rng_state, device=device), True, True)


def held(objects: Iterable[Any]) -> list[Source]:
    """The generators among these objects: torch's, numpy's and Python's."""
    found = []
    for thing in objects:
        if isinstance(thing, torch.Generator):
            found.append(Source(thing.get_state, thing.set_state))
        elif isinstance(thing, np.random.RandomState):
            found.append(Source(partial(thing.get_state, legacy=False), thing.set_state))
        elif isinstance(thing, random.Random):
            found.append(Source(thing.getstate, thing.setstate))
        elif isinstance(thing, np.random.Generator):
            bits = thing.bit_generator
            found.append(Source(partial(getattr, bits, "state"), partial(setattr, bits, "state")))
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two states of a generator are equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(same(a[key], b[key]) for key in a)
    return bool(a == b)
