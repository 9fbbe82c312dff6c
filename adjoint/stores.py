"""Slots for states of torch tensors: on their own device, in pinned memory of the host, in a file.

Each kind makes its slots when the first state comes, as many as it was told, and uses them again. What it hands out has
the bits that were kept, unless it was told to keep states in a lower precision.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adjoint.lanes import Lane, Ticket, copy, lane_for
from revolve import Cast
from revolve.files import Buffers, SlotFile
from revolve.trees import Codec, empty, pack, unpack

State = tuple[Tensor, ...]


class Form:
    """How states like this one lie in a slot: as they are, or with real numbers of a lower precision."""

    def __init__(self, like: State, precision: str | None = None) -> None:
        self._like = tuple((x.shape, x.dtype) for x in like)
        self._kinds = tuple(_lower(x, precision) for x in like)
        self.device = like[0].device
        self.leaves = len(like)
        self.exact = all(kind is None for kind in self._kinds)

    @property
    def bytes(self) -> int:
        """What a slot takes."""
        return sum(x.numel() * x.element_size() for x in self.empty(torch.device("meta")))

    def empty(self, device: torch.device, *, pinned: bool = False) -> State:
        """A slot, each leaf in memory of its own: aligned as any tensor is, which some kernels look at."""
        return tuple(
            torch.empty(
                (*shape, 2) if kind is not None and dtype.is_complex else shape,
                dtype=dtype if kind is None else kind,
                device=device,
                pin_memory=pinned,
            )
            for (shape, dtype), kind in zip(self._like, self._kinds, strict=True)
        )

    def lower(self, step: int, state: State) -> State:
        """The leaves of a state as a slot holds them; ValueError for another kind of state."""
        return tuple(
            self._lowered(step, x, *like, kind) for x, like, kind in zip(state, self._like, self._kinds, strict=True)
        )

    def lift(self, small: State) -> State:
        """The state from what a slot holds; without a loss of precision those very tensors."""
        return tuple(
            x if kind is None else _lifted(x, dtype)
            for x, (_, dtype), kind in zip(small, self._like, self._kinds, strict=True)
        )

    @staticmethod
    def _lowered(step: int, x: Tensor, shape: torch.Size, dtype: torch.dtype, kind: torch.dtype | None) -> Tensor:
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"the state at step {step} has shape {tuple(x.shape)} and {x.dtype}, "
                f"the first one {tuple(shape)} and {dtype}"
            )
        x = x.detach().resolve_conj().resolve_neg()
        if kind is None:
            return x.contiguous()
        parts = torch.view_as_real(x) if x.is_complex() else x
        small = parts.to(kind).contiguous()
        if bool(torch.isinf(small).any()) and not bool(torch.isinf(parts).any()):
            raise OverflowError(
                f"the state at step {step} holds {float(parts.abs().max()):.3g}, too large for {kind}; "
                f"keep it in a higher precision"
            )
        return small


def _lower(x: Tensor, precision: str | None) -> torch.dtype | None:
    """The lower precision, if this tensor has a higher one."""
    if precision is None or not (x.is_floating_point() or x.is_complex()):
        return None
    kind = getattr(torch, precision)
    assert isinstance(kind, torch.dtype)
    real = x.real if x.is_complex() else x
    return kind if real.element_size() > kind.itemsize else None


def _lifted(small: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_complex:
        return small.to(dtype)
    return torch.view_as_complex(small.to(torch.empty(0, dtype=dtype).real.dtype))


def precision_of(codec: Codec | None) -> str | None:
    """A lower precision is torch's own business; other codecs work on bytes."""
    return codec.precision if isinstance(codec, Cast) else None


class Slots:
    """A tier on the states' own device.

    ``load`` hands out the slot itself; steps never write to their state, and a slot is given back only when the
    working state has moved on.
    """

    def __init__(self, like: State, slots: int | None = None, codec: Cast | None = None) -> None:
        self.form = Form(like, precision_of(codec))
        self.lends = self.form.exact
        self._slots = slots
        self._made = self.peak = 0
        self._free: list[State] = []
        self._used: dict[int, State] = {}

    @property
    def leaves(self) -> int:
        return self.form.leaves

    @property
    def peak_bytes(self) -> int:
        """The most that the slots took."""
        return self.peak * self.form.bytes

    def save(self, step: int, state: State) -> None:
        small = self.form.lower(step, state)
        self._used[step] = slot = self._free_slot()
        copy(slot, small)

    def load(self, step: int) -> State:
        return self.form.lift(self._used[step])

    def drop(self, step: int) -> None:
        self._free.append(self._used.pop(step))

    def release(self) -> None:
        """Give the memory of unused slots back."""
        self._made -= len(self._free)
        self._free.clear()

    def _free_slot(self) -> State:
        if not self._free:
            missing = max(1, (self._slots or 0) - self._made)
            self._free += [self._empty() for _ in range(missing)]
            self._made += missing
            self.peak = max(self.peak, self._made)
        return self._free.pop()

    def _empty(self) -> State:
        return self.form.empty(self.form.device)


class OnTape(Slots):
    """The tier of states that a kept tape holds anyway: it only remembers them."""

    def save(self, step: int, state: State) -> None:
        self._used[step] = state

    def load(self, step: int) -> State:
        return self._used[step]

    def drop(self, step: int) -> None:
        del self._used[step]


class _Coming(NamedTuple):
    """A state on its way back."""

    step: int
    into: State
    ticket: Ticket


class HostSlots(Slots):
    """A tier in the host's memory, pinned if the states lie on a CUDA device: copies go through a lane of their own.

    Saving returns at once; a saved state stays alive until the next one is saved. The next state to be loaded is on its
    way while the steps go on. On the CPU the lane is a thread and the memory is plain. The part for CUDA waits for a
    run on such a device.
    """

    def __init__(self, like: State, slots: int | None = None, codec: Cast | None = None) -> None:
        super().__init__(like, slots, codec)
        self.lends = False
        self._lane: Lane = lane_for(self.form.device)
        self._going: tuple[State, Ticket] | None = None
        self._coming: _Coming | None = None

    def save(self, step: int, state: State) -> None:
        small = self.form.lower(step, state)
        self.settle()
        self._used[step] = slot = self._free_slot()
        self._going = small, self._lane.begin(lambda: copy(slot, small))

    def prefetch(self, step: int) -> None:
        if self._coming is None or self._coming.step != step:
            slot, into = self._used[step], self.form.empty(self.form.device)
            self._stop()
            self._coming = _Coming(step, into, self._lane.begin(lambda: copy(into, slot)))

    def load(self, step: int) -> State:
        self.prefetch(step)
        assert self._coming is not None
        (_, into, ticket), self._coming = self._coming, None
        ticket.wait()
        return self.form.lift(into)

    def drop(self, step: int) -> None:
        if self._coming is not None and self._coming.step == step:
            self._stop()
        super().drop(step)

    def settle(self) -> None:
        """Let go of the state that was saved last, once it is copied."""
        if self._going is not None:
            self._going[1].wait()
            self._going = None

    def release(self) -> None:
        self.settle()
        self._stop()
        if not self._used:
            self._lane.close()
        super().release()

    def _stop(self) -> None:
        """What was on its way is not wanted; its memory is free when the copy is done."""
        if self._coming is not None:
            self._coming.ticket.wait()
            self._coming = None

    def _empty(self) -> State:
        return self.form.empty(torch.device("cpu"), pinned=self.form.device.type == "cuda")


class FileSlots:
    """A tier in one checked file (:class:`revolve.files.SlotFile`), written behind the steps and read ahead of them.

    States on the CPU are written from where they are, and read to where they will be. Those on a CUDA device pass
    through pinned memory, one on its way out and one on its way in; that part waits for a run on such a device.
    ``codec``: a lower precision, or a codec for numpy's arrays such as ``revolve.zfp.Zfp``. ``staged``: whether states
    pass through memory of the host, by default if they lie on another device.
    """

    lends = False

    def __init__(self, like: State, file: SlotFile, codec: Codec | None = None, *, staged: bool | None = None) -> None:
        self.form = Form(like, precision_of(codec))
        self._codec = None if isinstance(codec, Cast) else codec
        self._file = file
        elsewhere = self.form.device.type != "cpu" if staged is None else staged
        self._lane: Lane | None = lane_for(self.form.device) if elsewhere else None
        self._out: State | None = None
        self._coming: tuple[int, State, Future[Buffers]] | None = None

    @property
    def leaves(self) -> int:
        return self.form.leaves

    @property
    def peak_bytes(self) -> int:
        """The most that the file took."""
        return self._file.peak

    @property
    def stays(self) -> bool:
        """Whether the states outlive the process."""
        return self._file.stays

    @property
    def steps(self) -> frozenset[int]:
        """The states that are there."""
        return frozenset(self._file.numbers)

    def save(self, step: int, state: State) -> None:
        small = self.form.lower(step, state)
        if self._lane is None:
            self._file.write(step, lambda: self._parts(small))
            return
        self._file.settle()  # the memory on the way out is free again
        out = self._out = self._out or self._host()
        ticket = self._lane.begin(lambda: copy(out, small))

        def parts() -> Buffers:
            ticket.join()
            return self._parts(out)

        self._file.write(step, parts)
        ticket.wait()

    def prefetch(self, step: int) -> None:
        if step in self._file.numbers and (self._coming is None or self._coming[0] != step):
            into = self.form.empty(self.form.device) if self._lane is None else self._host()
            self._coming = step, into, self._file.read(step, lambda size: self._room(into, size))

    def load(self, step: int) -> State:
        self._file.settle()
        self.prefetch(step)
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != step:
            raise KeyError(step)
        _, into, future = coming
        data = future.result()
        if self._codec is not None:
            arrays = unpack(data[0], self._codec)
            for leaf, array in zip(into, arrays, strict=True):
                leaf.copy_(torch.from_numpy(array).view(leaf.dtype).reshape(leaf.shape))
        if self._lane is not None:
            host, into = into, self.form.empty(self.form.device)
            ticket = self._lane.begin(lambda: copy(into, host))
            ticket.join()
        return self.form.lift(into)

    def drop(self, step: int) -> None:
        if self._coming is not None and self._coming[0] == step:
            self._coming = None
        self._file.free(step)

    def settle(self) -> None:
        """Wait until all that was saved is written; raises StoreError if it cannot be."""
        self._file.settle()

    def release(self) -> None:
        self._file.release()
        self._out = None
        if self._lane is not None and not self._file.numbers:
            self._lane.close()

    def _host(self) -> State:
        return self.form.empty(torch.device("cpu"), pinned=self.form.device.type == "cuda")

    def _parts(self, small: State) -> Buffers:
        if self._codec is None:
            return [_bytes(x) for x in small]
        packed = pack([_array(x) for x in small], self._codec)
        data = empty(packed.size)
        packed.write(data)
        return [data]

    def _room(self, into: State, size: int) -> Buffers:
        return [_bytes(x) for x in into] if self._codec is None else [empty(size)]


def _bytes(x: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, as it is."""
    array: np.ndarray = x.reshape(-1).view(torch.uint8).numpy()
    return array


def _array(x: Tensor) -> Any:
    """The same numbers for numpy; their bytes, where numpy does not know their kind."""
    try:
        return x.numpy()
    except TypeError:
        return _bytes(x)
