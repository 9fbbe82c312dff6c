"""Tapes that are kept otherwise than as they are: in a file, on the host, in a lower precision, or in part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.selective import Chosen, Results, Selective
from adjoint.shelves import Elsewhere
from adjoint.tiers import Device, Files, Host, Kind
from revolve import Cast

Tapes = Selective | Kind
"""How tapes may be kept, as the caller says it."""
Kept = Chosen | Kind
"""How the tape of one block is kept."""


class Partly(NamedTuple):
    """A block that has run, and will run again with what its dear operations gave."""

    chosen: Chosen
    results: Results
    arguments: list[Any]
    versions: list[int]


class Moved:
    """Tensors that lie elsewhere until they are wanted: memory by memory, so that views of one are that again."""

    def __init__(self, tier: Kind, tensors: Iterable[tuple[int, Tensor]], stays: set[int]) -> None:
        """``tensors``: numbered; ``stays``: storages of parameters and of what the caller holds, which are left out."""
        self._shelf = Elsewhere(tier, lambda step: False)
        lines: dict[Any, Tensor] = {}
        self._views: dict[int, tuple[Any, Any, Any, Any]] = {}
        for number, x in tensors:
            storage = x.untyped_storage()
            if storage._cdata not in stays and movable(x):
                key = str((storage._cdata, x.dtype))
                lines.setdefault(key, line_of(x))
                self._views[number] = key, x.shape, x.stride(), x.storage_offset()
        self._shelf.save(0, lines)
        self._shelf.finish(0)  # the next block may write to what lies there

    @property
    def numbers(self) -> Iterable[int]:
        return self._views.keys()

    def back(self) -> dict[int, Tensor]:
        """By their numbers, the tensors; once."""
        lines = self._shelf.load(0)
        found = {
            number: lines[key].as_strided(shape, strides, offset)
            for number, (key, shape, strides, offset) in self._views.items()
        }
        self._shelf.drop(0)
        return found


def movable(x: Tensor) -> bool:
    return x.layout == torch.strided and x.numel() > 0 and not x.is_conj() and not x.is_neg()


def line_of(x: Tensor) -> Tensor:
    """All the memory that a tensor is a part of."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return x.detach().as_strided((size,), (1,), 0)


def stored_bytes(tier: Kind, lines: Iterable[Tensor]) -> int:
    """What these take on the device while they lie in this tier; a host that is the device itself gives nothing."""
    if isinstance(tier, Files):
        return 0
    found = 0
    for x in lines:
        small = torch.empty(0, dtype=getattr(torch, tier.codec.precision)).element_size() if tier.codec else 8
        each = min(small, x.element_size()) if x.is_floating_point() else x.element_size()
        found += 0 if isinstance(tier, Host) and x.device.type != "cpu" else x.numel() * each
    return found


def named(tier: Kind) -> str:
    """What a tape kept there is called in plans."""
    precision = tier.codec.precision if isinstance(tier.codec, Cast) else None
    where = {Device: "", Host: "host", Files: "file"}[type(tier)]
    return " ".join(filter(None, (where, precision)))


def check_tapes(tapes: Any) -> tuple[Tapes, ...]:
    """One or several ways, as a tuple."""
    found = tuple(tapes) if isinstance(tapes, (list, tuple)) else (tapes,)
    for kind in found:
        if not isinstance(kind, (Selective, Device, Host, Files)):
            raise TypeError(
                f"tapes={kind!r} is no way to keep tapes; give Selective(), Host(), Files() or a Device(codec=)"
            )
        if isinstance(kind, Device) and kind.codec is None:
            raise ValueError(
                "tapes=Device() keeps tapes as they are anyway; give it a codec=, as revolve.Cast('bfloat16')"
            )
        if not isinstance(kind, Selective) and kind.codec is not None and not isinstance(kind.codec, Cast):
            raise ValueError(
                f"tapes={kind!r}: tapes can be kept in a lower precision (revolve.Cast), not by this codec"
            )
    return found
