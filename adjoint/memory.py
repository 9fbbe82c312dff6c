"""How many bytes: free on a device, and used by a piece of a program."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adjoint.tensors import tensors_in

SHARE = 4
"""Where the caller says nothing, at most one part in this many of the free memory is taken."""


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation on this device could have now."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(reserved)
    return int(psutil.virtual_memory().available)


_ASIDE = ContextVar("aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """Inside, operations only prepare a transpose: a :class:`Meter` weighs them, and does not list them."""
    token = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(token)


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: ``live`` now, ``peak`` at most. Works on meta too."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler (two seconds) on the first call, and lead every call through it."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.made = 0
        """Bytes now, at most, and of all tensors that were made."""
        self.operations: list[str] = []
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _ASIDE.get():
            self.operations.append(str(function))
        for storage in _storages((*args, *(kwargs or {}).values())):
            self._note(storage, 0)  # it was there before
        result = function(*args, **(kwargs or {}))
        for storage in _storages((result,)):
            self._note(storage, storage.nbytes())
        return result

    def restart(self) -> int:
        """Forget the peak and the operations, and return the bytes live now."""
        self.peak, self.operations = self.live, []
        return self.live

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size
            self.live += size
            self.made += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Where the numbers of dense tensors lie; sparse ones are not weighed."""
    return (x.untyped_storage() for x in tensors_in(values) if x.layout == torch.strided)
