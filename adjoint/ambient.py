"""What surrounds a computation, to be entered again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class Ambient:
    """What surrounds a computation and changes its numbers: autocast, default dtype and default device.

    Autocast keeps no casts: one cast used twice adds up its cotangents in low precision, two casts do not.
    """

    def __init__(self) -> None:
        self._dtype, self._device = torch.get_default_dtype(), torch.get_default_device()
        kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        self._casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            if torch.get_default_dtype() != self._dtype:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self._dtype)
            if torch.get_default_device() != self._device:
                stack.enter_context(self._device)
            for kind, dtype, enabled in self._casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield
