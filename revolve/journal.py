"""A long run that survives its process: where it stands is written to a folder, and another process goes on from there.

Two points are kept, each the newest of its kind: how far the first sweep went (the state, and what the stepper has
put together), and how far the reverse sweep came (the cotangent, and the stepper's sums). States kept in a
:class:`Disk` of the same journal are found again. The rest is computed again, so the result has the same bits.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from revolve.files import SlotFile, StoreError, lock
from revolve.trees import digest, empty, to_bytes, unpack

SHARE = 20
"""Points take at most one part in this many of the time."""

DIGEST = 16


class Point(NamedTuple):
    """Where a sweep stands: a state at its step, or the cotangent of it; and what the stepper holds by then."""

    step: int
    value: Any
    stepper: Any


class Journal:
    """The folder of one run; a second process that makes the same run with it goes on where the first one was killed.

    The stepper needs two methods more: ``snapshot()`` returns all that it has put together so far (sums of cotangents,
    outputs) as a tree of arrays and numbers, or None; ``restore(tree)`` takes that up again.

    ``about``: whatever else decides the numbers (parameters, step sizes), as such a tree; a run with another first
    state, another length or another ``about`` is refused. ``every``: seconds between two points; 0 writes one after
    every step. The files ``run``, ``lock``, ``forward``, ``reverse`` and ``states-*`` go when step 0 is reached again.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        about: Any = None,
        every: float = 30.0,
    ) -> None:
        if not every >= 0:
            raise ValueError(f"every={every} is no time between two points; give seconds, or 0 for every step")
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"journal={folder!r} is no folder; give its path")
        self.folder, self.about, self.every = Path(folder), about, every
        self.details: Any = None
        """What a door adds to ``about`` by itself."""
        self.convert(lambda x: x, lambda x: x)
        self._files: list[SlotFile] = []
        self._given, self._busy = 0, False
        self._lock: int | None = None
        self._open()

    def convert(self, to_tree: Callable[[Any], Any], from_tree: Callable[[Any], Any]) -> None:
        """States, cotangents and snapshots that are no trees become trees, and back, by these."""
        self._to_tree, self._from_tree = to_tree, from_tree

    def _open(self) -> None:
        """Take the folder, and the key of what lies in it."""
        if not self.folder.parent.is_dir():
            raise StoreError(f"there is no folder {self.folder.parent} to make {self.folder.name} in; make it first")
        try:
            self.folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise StoreError(f"{self.folder} is no folder to keep a journal in; give another") from error
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be made ({error.strerror}); give another folder") from error
        self._lock = lock(self.folder / "lock")
        if self._lock is None:
            raise StoreError(f"{self.folder} is in use by a run that is still going on; give another folder")
        path = self.folder / "run"
        if path.exists():
            self._key, identity = self._unsealed(path, b"")
        else:
            self._key, identity = secrets.token_bytes(DIGEST), None
            self._seal(path, (self._key, None), b"")
        self._identity: dict[str, Any] | None = identity
        self._frontier, self._cotangent = 0, b""
        self._length, self._took, self._last = 1, 0.0, perf_counter()
        for file in self._files:
            file.stay(self._key)

    @property
    def active(self) -> bool:
        """Whether points are written: until the run has been finished."""
        return self._lock is not None

    @property
    def goes_on(self) -> bool:
        """Whether an earlier process left a point."""
        return any((self.folder / name).exists() for name in ("forward", "reverse"))

    def copy(self, state: Any) -> Any:
        """The same state in memory of its own."""
        return self._from_tree(unpack(to_bytes(self._to_tree(state))))

    def file(self, slots: int | None) -> SlotFile:
        """A file for states that stays as long as the run is not finished; files are told apart by their order."""
        if not self.active:
            self._open()
        if self._given == len(self._files):
            self._files.append(SlotFile(self.folder, slots=slots, name=f"states-{self._given}", key=self._key))
        self._given += 1
        return self._files[self._given - 1]

    def begin(self, state: Any, steps: int | None) -> Point | None:
        """Where the first sweep of this run stood; ValueError if the folder holds another run."""
        if self._busy:
            raise ValueError(
                f"the journal in {self.folder} follows a run that is not finished; close() it first, or take another"
            )
        if not self.active:
            self._open()
        identity = {
            "first state": self._digest(state),
            "number of steps": steps,
            "about": self._digest((self.about, self.details)),
        }
        if self._identity is None:
            self._identity = identity
            self._seal(self.folder / "run", (self._key, identity), b"")
        others = [name for name, value in identity.items() if self._identity[name] != value]
        if others:
            raise ValueError(
                f"{self.folder} holds a run that differs in: {', '.join(others)}; to begin anew delete that folder, "
                f"or give another"
            )
        self._frontier, self._busy = 0, True
        point = self._read("forward")
        if point is not None:
            self._frontier = point.step
        return point

    def returned(self, cotangent: Any) -> Point | None:
        """Where the reverse sweep of this run stood; ValueError if it was begun with another cotangent."""
        self._cotangent = self._digest(cotangent)
        point = self._read("reverse")
        if point is None:
            return None
        begun, snapshot = point.stepper
        if begun != self._cotangent:
            raise ValueError(
                f"{self.folder} holds a reverse sweep that began with another cotangent of the last state; to begin it "
                f"anew delete the file 'reverse' in that folder"
            )
        return point._replace(stepper=snapshot)

    def finish(self) -> None:
        """The run is over: remove every file, and the folder if nothing else is in it."""
        if not self.active:
            return
        for file in self._files:
            file.stay(None)
        for name in ("forward", "reverse", "run", "forward.new", "reverse.new", "run.new", "lock"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        self._given, self._busy = 0, False
        self._unlock()

    def pause(self) -> None:
        """The run is interrupted; what was written stays, and the same run may begin again."""
        for file in self._files:
            file.close()
        self._given, self._busy = 0, False

    def close(self) -> None:
        """Let go of the folder as it is; another process, or this one, may go on from there."""
        self.pause()
        self._unlock()

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- called while the steps are taken

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """A run of steps in parts between which a point may be written: several in the time between two points."""
        while start < stop:
            end = min(stop, start + self._length)
            began = perf_counter()
            yield start, end
            took, start = perf_counter() - began, end
            if took < self.every / 16:
                self._length *= 2
            elif took > self.every / 4:
                self._length = max(1, self._length // 2)

    def went(self, step: int, state: Any, stepper: Any) -> None:
        """The first sweep has reached x_step."""
        if step > self._frontier:
            self._frontier = step
            if self._due():
                self._write("forward", step, state, stepper.snapshot)

    def came(self, step: int, cotangent: Any, stepper: Any) -> None:
        """The reverse sweep has come back to x_step."""
        if self._due():
            self._write("reverse", step, cotangent, lambda: (self._cotangent, stepper.snapshot()))

    def is_new(self, stop: int) -> bool:
        """Whether a run up to here takes steps of the first sweep."""
        return stop > self._frontier

    # -- points in files

    def _due(self) -> bool:
        since = perf_counter() - self._last
        return self.active and since >= self.every and (not self.every or since >= SHARE * self._took)

    def _write(self, name: str, step: int, value: Any, snapshot: Callable[[], Any]) -> None:
        began = perf_counter()
        for file in self._files:
            file.settle()
        self._seal(self.folder / name, (step, self._to_tree((value, snapshot()))), self._key)
        self._last = perf_counter()
        self._took = self._last - began

    def _read(self, name: str) -> Point | None:
        path = self.folder / name
        if not path.exists():
            return None
        step, tree = self._unsealed(path, self._key)
        return Point(step, *self._from_tree(tree))

    def _seal(self, path: Path, tree: Any, key: bytes) -> None:
        """Write a file that is there as a whole or not at all."""
        data, new = to_bytes(tree).data, path.with_name(f"{path.name}.new")
        try:
            with new.open("wb") as file:
                file.write(blake2b(data, digest_size=DIGEST, key=key).digest())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise StoreError(f"{path} cannot be written: {error.strerror}") from error

    def _unsealed(self, path: Path, key: bytes) -> Any:
        with path.open("rb") as file:
            seal, data = file.read(DIGEST), empty(max(0, path.stat().st_size - DIGEST))
            file.readinto(data.data)
        if blake2b(data.data, digest_size=DIGEST, key=key).digest() != seal:
            raise StoreError(
                f"{path} was cut off or altered, and this run cannot be continued; delete the folder to begin anew"
            )
        return unpack(data)

    def _digest(self, value: Any) -> bytes:
        return digest(self._to_tree(value))


class Watched:
    """A stepper whose progress goes into a journal; its longer runs are cut into pieces, which changes no number."""

    def __init__(self, stepper: Any, journal: Journal) -> None:
        for name in ("snapshot", "restore"):
            if not hasattr(stepper, name):
                raise TypeError(
                    f"{type(stepper).__name__} has no {name}(); a run that can be continued needs snapshot(), which "
                    f"returns what the stepper has added up so far (or None), and restore() to take it up again"
                )
        self._stepper, self._journal = stepper, journal

    def advance(self, state: Any, start: int, stop: int) -> Any:
        if not self._journal.is_new(stop):
            return self._stepper.advance(state, start, stop)
        for begin, end in self._journal.pieces(start, stop):
            state = self._stepper.advance(state, begin, end)
            self._journal.went(end, state, self._stepper)
        return state

    def record(self, state: Any, start: int, stop: int) -> tuple[Any, list[tuple[int, Any]]]:
        tape = []
        for begin, end in self._journal.pieces(start, stop):
            state, piece = self._stepper.record(state, begin, end)
            tape.append((begin, piece))
            self._journal.went(end, state, self._stepper)
        return state, tape

    def reverse(self, tape: list[tuple[int, Any]], cotangent: Any) -> Any:
        while tape:
            begin, piece = tape.pop()
            cotangent = self._stepper.reverse(piece, cotangent)
            self._journal.came(begin, cotangent, self._stepper)
        return cotangent

    def last(self, step: int) -> bool:
        return bool(self._stepper.last(step))

    def restore(self, snapshot: Any) -> None:
        self._stepper.restore(snapshot)
