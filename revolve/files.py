"""One file of records: preallocated, every record checked, written and read beside the computation.

A record is as many bytes as it was given. Its place and its checksum (BLAKE2b, 16 bytes) are kept in memory; a file
that stays has an index beside it, from which another process finds its records. Whatever comes back is what was
written, or a StoreError says why not: a full disk, a file that was cut off or altered under us.

A temporary file is named ``revolve-*`` and locked while it is in use. It goes when it is closed, at the latest when
the process ends; what a killed process leaves behind goes when the next one opens a file in that folder.
"""

from __future__ import annotations

import errno
import importlib
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from revolve.places import Index, Part, Record, Space

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

Result = TypeVar("Result")
Buffers = Sequence[np.ndarray]
"""Contiguous arrays of uint8, to be written or read one behind the other."""

PREFIX = "revolve-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreError(OSError):
    """A state could not be kept, or did not come back as it was."""


class RecordFile:
    """The file itself; its methods run in one thread at a time."""

    def __init__(self, folder: Path, slots: int | None, name: str | None, key: bytes) -> None:
        self.folder, self.slots = folder, slots
        self._process = os.getpid()
        self.records: dict[int, Record] = {}
        self.space = Space()
        self.path, self._fd = (folder / name, _open(folder / name)) if name is not None else _temporary(folder)
        self.index = Index(folder / f"{name}.index", key) if name is not None else None
        if self.index is not None:
            self.records = self.index.read()
            for record in self.records.values():
                self.space.reserve(record.parts)

    def write(self, number: int, buffers: Buffers) -> None:
        self.free(number)
        size, digest = sum(part.nbytes for part in buffers), blake2b(digest_size=16)
        parts = self._room(size)
        try:
            for place, view in _pairs(parts, buffers):
                done = 0
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], place + done)
            for buffer in buffers:
                digest.update(buffer.data)
            record = Record(parts, digest.digest())
            if self.index is not None:
                self.index.add(number, record)
        except OSError as error:
            self.space.give(parts)
            raise self._refusal(error, size) from error
        self.records[number] = record

    def read(self, number: int, into: Callable[[int], Buffers]) -> Buffers:
        if number not in self.records:
            raise StoreError(f"the state of step {number} was never written to {self.path}")
        record = self.records[number]
        buffers, digest = into(record.size), blake2b(digest_size=16)
        for place, view in _pairs(record.parts, buffers):
            done = 0
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], place + done)
                if count == 0:
                    raise StoreError(
                        f"{self.path} was cut off: the state of step {number} is gone, and with it this run"
                    )
                done += count
        for buffer in buffers:
            digest.update(buffer.data)
        if digest.digest() != record.digest:
            raise StoreError(
                f"{self.path} was altered: the state of step {number} is not what was written. "
                f"Keep files of a run out of reach of other programs; begin this run anew"
            )
        return buffers

    def free(self, number: int) -> None:
        record = self.records.pop(number, None)
        if record is None:
            return
        if self.index is not None:
            self.index.remove(number)
        self.space.give(record.parts)

    def close(self, *, remove: bool) -> None:
        os.close(self._fd)
        if self.index is not None:
            self.index.close()
        if remove and os.getpid() == self._process:  # a forked child leaves its parent's file alone
            for path in (self.path, *([self.path.with_name(f"{self.path.name}.index")] if self.index else [])):
                path.unlink(missing_ok=True)

    def _room(self, size: int) -> tuple[Part, ...]:
        """Room for a record: that of all slots is made when the first one comes, and more where it is not enough."""
        missing = size * (self.slots or 1) if not self.space.end else size - self.space.free
        if missing > 0:
            self._extend(missing)
        return self.space.take(size)

    def _extend(self, size: int) -> None:
        try:
            if size > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, self.space.end, size)
            else:
                os.ftruncate(self._fd, self.space.end + size)
        except OSError as error:
            raise self._refusal(error, size) from error
        self.space.extend(size)

    def _refusal(self, error: OSError, wanted: int) -> StoreError:
        if error.errno in FULL:
            free = shutil.disk_usage(self.folder).free
            return StoreError(
                f"no room for {wanted} bytes more in {self.folder}, where {free} are free ({error.strerror}); "
                f"give another folder, or fewer slots"
            )
        return StoreError(f"{self.path} cannot be written: {error.strerror or error}")


class SlotFile:
    """Records by number in one file; what is asked for runs in a thread of its own, in order.

    ``slots``: how many records there are at once, at most: room for so many like the first is set aside, so that a disk
    which is too small says so at the start. ``name`` and ``key``: a file that stays, to be opened again with the same
    key; without them it is a temporary one, there from the first record to the last.
    """

    def __init__(
        self, folder: Path, *, slots: int | None = None, name: str | None = None, key: bytes | None = None
    ) -> None:
        if fcntl is None:
            raise StoreError("states in files need the locks of a POSIX system; keep them in memory here")
        if not folder.is_dir():
            raise StoreError(f"there is no folder {folder} to keep states in; make it, or give another")
        self.folder, self.slots, self.name = folder, slots, name
        self._key: bytes | None = None
        self._file: RecordFile | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._gone: Any = None
        self.peak = 0
        """The most bytes that the file had."""
        self.numbers: set[int] = set()
        """The records that are there."""
        if key is not None:
            self.stay(key)

    @property
    def stays(self) -> bool:
        """Whether the file outlives the process."""
        return self._key is not None

    def stay(self, key: bytes | None) -> None:
        """From now on this is a file that stays, with the records that are found in it; or, without a key, is not."""
        self.close(remove=not self.stays or key is None)
        self._key = key
        if key is not None:
            self.numbers |= set(self._opened().records)

    @property
    def path(self) -> Path | None:
        return None if self._file is None else self._file.path

    def write(self, number: int, parts: Callable[[], Buffers]) -> None:
        """Begin to write; ``parts`` is called in the thread, and what it gives must stay as it is meanwhile.

        Waits for the record before, and raises what went wrong with that.
        """
        self.settle()
        file = self._opened()
        self.numbers.add(number)
        self._writing = self._begin(lambda: file.write(number, parts()))

    def read(self, number: int, into: Callable[[int], Buffers]) -> Future[Buffers]:
        """Begin to read into the buffers that ``into`` makes for so many bytes, in the thread."""
        if number not in self.numbers:
            raise KeyError(number)
        file = self._opened()
        return self._begin(lambda: file.read(number, into))

    def free(self, number: int) -> None:
        """Give a record's place back."""
        self.numbers.remove(number)
        file = self._opened()
        self._begin(lambda: file.free(number))

    def settle(self) -> None:
        """Wait until all is written; raises what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        if self._file is not None:
            self.peak = max(self.peak, self._file.space.end)

    def release(self) -> None:
        """Remove a temporary file that holds nothing."""
        if not self.numbers and not self.stays:
            self.close()

    def close(self, *, remove: bool = False) -> None:
        """End all work. A temporary file goes, with what it holds; one that stays only if told to."""
        with suppress(StoreError):
            self.settle()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        if self._file is not None:
            self._gone.detach()
            self._file.close(remove=remove or not self.stays)
            self._file = None
        if remove or not self.stays:
            self.numbers.clear()

    def _opened(self) -> RecordFile:
        if self._file is None:
            folder = self.folder if self.stays or self.name is None else self.folder.parent
            name = self.name if self.stays else None
            self._file = RecordFile(folder, self.slots, name, self._key or b"")
            self._gone = weakref.finalize(self, RecordFile.close, self._file, remove=not self.stays)
        return self._file

    def _begin(self, job: Callable[[], Result]) -> Future[Result]:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="revolve-file")
        return self._worker.submit(self._do, job)

    def _do(self, job: Callable[[], Result]) -> Result:
        """A method, so that the file is not closed before its jobs are done."""
        return job()


def _pairs(parts: Iterable[Part], buffers: Buffers) -> Iterator[tuple[int, memoryview]]:
    """Which bytes of the buffers, taken as one, lie where."""
    views = [buffer.data for buffer in buffers if buffer.nbytes]
    for place, size in parts:
        while size:
            piece = views[0][:size]
            yield place, piece
            views[:1] = [views[0][len(piece) :]] if len(piece) < len(views[0]) else []
            place, size = place + len(piece), size - len(piece)


def lock(path: Path) -> int | None:
    """A file that is this process's alone until the descriptor is closed; None if another has it."""
    while True:
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if os.fstat(fd).st_nlink:  # else its owner has removed it meanwhile
            return fd
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _temporary(folder: Path) -> tuple[Path, int]:
    """A new file, locked; those of processes that are no more are removed first."""
    for old in folder.glob(f"{PREFIX}*.states"):
        with suppress(OSError):
            fd = os.open(old, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old.unlink()
            finally:
                os.close(fd)
    while True:
        path = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(6)}.states"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            raise StoreError(f"{path} cannot be made and locked ({error.strerror}); give another folder") from error
        if os.fstat(fd).st_nlink:  # nobody took it for an old one before it was locked
            return path, fd
        os.close(fd)
