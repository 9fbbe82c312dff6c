"""Where kept states lie. A tier is three methods."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from revolve.files import Buffers, SlotFile
from revolve.journal import Journal
from revolve.trees import Codec, empty, is_lossless, pack, unpack

State = TypeVar("State")


class CheckpointStore(Protocol[State]):
    """One tier of slots, addressed by step.

    What ``load`` gives may share the slot's memory: a dropped slot is given back when neither the working state nor a
    tape recorded from it is in use any more. A store whose loads are copies says ``lends = False`` and is told at once.

    Three methods more are called where a store has them: ``prefetch(step)`` when that state is the next to be loaded, so
    that reading can begin; ``settle()`` when what was saved must be copied now, because its memory may be used again;
    ``release()`` when a run is over and the memory of empty slots is wanted no more.
    """

    def save(self, step: int, state: State) -> None:
        """Keep a state; what the caller does to it afterwards must not show."""
        ...

    def load(self, step: int) -> State:
        """The state kept for this step; KeyError if there is none."""
        ...

    def drop(self, step: int) -> None:
        """Give the slot back; KeyError if there is none."""
        ...


class Memory(Generic[State]):
    """States in a dictionary, copied on the way in and out (``copy=lambda x: x`` for immutable states)."""

    lends = False

    def __init__(self, copy: Callable[[State], State] = deepcopy) -> None:
        self._copy = copy
        self._states: dict[int, State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def save(self, step: int, state: State) -> None:
        self._states[step] = self._copy(state)

    def load(self, step: int) -> State:
        return self._copy(self._states[step])

    def drop(self, step: int) -> None:
        del self._states[step]


class _Coming(NamedTuple):
    """A state on its way from the file."""

    step: int
    buffers: Future[Buffers]


class Disk(Generic[State]):
    """States in one file: arrays, numbers, and plain tuples, lists and dicts of these.

    A state is copied and then written while the steps go on; the next one to be loaded is read ahead. Memory holds one
    state on its way to the file and one on its way back. Every state is checked when it comes back: StoreError if the
    file was cut off or altered, or if there is no room for it.

    ``folder``: where the file lies, by default the system's folder for temporary files. It is there from the first state
    to the last; what a killed process left goes when the next run begins there. ``slots``: room for so many states is
    set aside at the start. ``codec``: makes states smaller (:class:`Cast`, or ``revolve.zfp.Zfp``); unless that loses
    nothing the gradient is another one. ``journal``: the file lies there, and the states in it outlive the process.
    """

    lends = False

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        slots: int | None = None,
        codec: Codec | None = None,
        journal: Journal | None = None,
    ) -> None:
        if folder is not None and journal is not None:
            raise ValueError(f"folder={str(folder)!r} beside a journal: the file lies in the folder of the journal")
        if journal is not None and not is_lossless(codec):
            raise ValueError(f"codec={codec} beside a journal: a run continued from less exact states has other bits")
        self._codec = codec
        place = Path(tempfile.gettempdir() if folder is None else folder)
        self._file = SlotFile(place, slots=slots) if journal is None else journal.file(slots)
        self._stage = np.empty(0, np.uint8)
        self._coming: _Coming | None = None

    def __len__(self) -> int:
        return len(self._file.numbers)

    @property
    def path(self) -> Path | None:
        """Where the file is; None while there is none."""
        return self._file.path

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
        packed = pack(state, self._codec)
        self._file.settle()
        if len(self._stage) < packed.size:
            self._stage = empty(packed.size)
        part = self._stage[: packed.size]
        packed.write(part)
        self._file.write(step, lambda: [part])

    def prefetch(self, step: int) -> None:
        if step in self._file.numbers and (self._coming is None or self._coming.step != step):
            self._coming = _Coming(step, self._read(step))

    def load(self, step: int) -> Any:
        self._file.settle()
        self.prefetch(step)
        coming, self._coming = self._coming, None
        if coming is None or coming.step != step:
            raise KeyError(step)
        (data,) = coming.buffers.result()
        return unpack(data, self._codec)

    def drop(self, step: int) -> None:
        if self._coming is not None and self._coming.step == step:
            self._coming = None
        self._file.free(step)

    def settle(self) -> None:
        """Wait until all that was saved is written; raises StoreError if it cannot be."""
        self._file.settle()

    def release(self) -> None:
        self._file.release()
        if not self._file.numbers:
            self._stage = np.empty(0, np.uint8)

    def close(self) -> None:
        """Remove the file with all that it holds."""
        self._coming = None
        self._file.close()

    def __enter__(self) -> Disk[State]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, step: int) -> Future[Buffers]:
        return self._file.read(step, lambda size: [empty(size)])
