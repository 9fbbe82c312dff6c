"""Kinds of memory for kept states, as the caller names them: the device, the host, files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import psutil
import torch

from adjoint.memory import SHARE, free_bytes
from adjoint.stores import FileSlots, HostSlots, Slots
from adjoint.tensors import State
from revolve import Cast, Journal, parse_bytes
from revolve.binomial import whole
from revolve.files import SlotFile
from revolve.trees import Codec

Store = Slots | FileSlots
Size = int | str | None


@dataclass(frozen=True)
class Device:
    """The states' own device, where the tapes and the working state are too.

    ``bytes`` covers all of that, ``slots`` the kept states alone; with neither it is a quarter of what is free.
    ``codec=Cast("float32")`` keeps states in a lower precision: the gradient is another one, see
    :func:`adjoint.check.lossy`.
    """

    bytes: Size = None
    slots: int | None = None
    codec: Cast | None = None

    def __post_init__(self) -> None:
        _check(self)

    def room(self, device: torch.device) -> int:
        return parse_bytes(self.bytes, "bytes") if self.bytes is not None else free_bytes(device) // SHARE

    def open(self, like: State, slots: int | None, journal: Journal | None) -> Store:
        return Slots(like, slots, self.codec)


@dataclass(frozen=True)
class Host:
    """Memory of the host: pinned, and copied to and from beside the steps, if the states lie on a CUDA device.

    ``write``, ``read``: seconds for a state; measured if not given.
    """

    bytes: Size = None
    slots: int | None = None
    codec: Cast | None = None
    write: float | None = None
    read: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    def room(self, device: torch.device) -> int:
        free = int(psutil.virtual_memory().available) // SHARE
        return parse_bytes(self.bytes, "bytes") if self.bytes is not None else free

    def open(self, like: State, slots: int | None, journal: Journal | None) -> Store:
        return HostSlots(like, slots, self.codec)


@dataclass(frozen=True)
class Files:
    """A file in ``folder``, checked, written behind the steps and read ahead of them. It is gone afterwards.

    Without a folder it lies where the journal is, or in the system's folder for temporary files, which may be memory.
    ``codec``: a lower precision, or ``revolve.zfp.Zfp(...)``. ``write``, ``read``: seconds for a state; measured if not
    given.
    """

    bytes: Size = None
    slots: int | None = None
    folder: str | Path | None = None
    codec: Codec | None = None
    write: float | None = None
    read: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def place(self) -> Path:
        return Path(tempfile.gettempdir() if self.folder is None else self.folder)

    def room(self, device: torch.device) -> int:
        if self.bytes is not None:
            return parse_bytes(self.bytes, "bytes")
        return shutil.disk_usage(self.place).free // SHARE if self.place.is_dir() else 0

    def open(self, like: State, slots: int | None, journal: Journal | None) -> Store:
        if like[0].is_meta:
            raise ValueError(
                "the states are on the meta device and hold no numbers; there is nothing to write to a file"
            )
        file = SlotFile(self.place, slots=slots) if journal is None or self.folder is not None else journal.file(slots)
        return FileSlots(like, file, self.codec)


Kind = Device | Host | Files


def _check(tier: Kind) -> None:
    name = type(tier).__name__
    if tier.bytes is not None and tier.slots is not None:
        raise ValueError(f"{name}(bytes={tier.bytes!r}, slots={tier.slots}): one of them decides; leave the other out")
    if tier.bytes is not None:
        parse_bytes(tier.bytes, "bytes")
    if tier.slots is not None:
        whole("slots", tier.slots)
    for price in ("write", "read"):
        value = getattr(tier, price, None)
        if value is not None and not 0 <= value < inf:
            raise ValueError(f"{name}({price}={value}) is no time; give seconds for one state, 0 or more, and finite")


def check_tiers(tiers: Sequence[Kind] | None) -> None:
    """Raise for tiers that make no sense whatever the chain is."""
    if tiers is None:
        return
    if not isinstance(tiers, Sequence) or not tiers:
        raise TypeError(f"tiers={tiers!r} must be a series of memories, as in tiers=[Device('1 GiB'), Files('1 TiB')]")
    for k, tier in enumerate(tiers):
        if not isinstance(tier, Kind):
            raise TypeError(f"tiers[{k}]={tier!r} is no kind of memory; give a Device, Host or Files")
        if isinstance(tier, Device) != (k == 0):
            raise ValueError(
                f"tiers[{k}]={tier}: the first tier, and it alone, is the Device, where tapes are too; "
                f"write tiers=[Device(slots=0), ...] to keep no state there"
            )
