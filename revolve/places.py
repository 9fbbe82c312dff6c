"""Which bytes of a file hold what: the parts that are free, and the index of a file that stays."""

from __future__ import annotations

import os
import struct
from bisect import insort
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

Part = tuple[int, int]
"""(place, size)"""


class Record(NamedTuple):
    """Where something lies, in one part or several, and what it must be."""

    parts: tuple[Part, ...]
    digest: bytes

    @property
    def size(self) -> int:
        return sum(size for _, size in self.parts)


class Space:
    """Which parts of a file are free. What fits no single part is cut, so that no room is lost between records."""

    def __init__(self) -> None:
        self.end = 0
        self._free: list[Part] = []

    @property
    def free(self) -> int:
        return sum(size for _, size in self._free)

    def extend(self, size: int) -> None:
        """So many bytes more at the end."""
        self.end += size
        self.give([(self.end - size, size)])

    def take(self, size: int) -> tuple[Part, ...]:
        """Room for so many bytes, of which there are enough: the smallest part that holds them, else the largest."""
        taken: list[Part] = []
        while size:
            fitting = [part for part in self._free if part[1] >= size]
            part = min(fitting, key=lambda p: p[1]) if fitting else max(self._free, key=lambda p: p[1])
            place, room = part
            used = min(size, room)
            self._free.remove(part)
            if room > used:
                insort(self._free, (place + used, room - used))
            taken.append((place, used))
            size -= used
        return tuple(taken)

    def give(self, parts: Iterable[Part]) -> None:
        """Free again, and one part with their neighbours."""
        for place, size in parts:
            for start, length in list(self._free):
                if start + length == place or place + size == start:
                    self._free.remove((start, length))
                    place, size = min(place, start), size + length
            insort(self._free, (place, size))

    def reserve(self, parts: Iterable[Part]) -> None:
        """Take these very parts, beyond the end if need be."""
        for place, size in parts:
            if place + size > self.end:
                self.extend(place + size - self.end)
            start, length = next((s, n) for s, n in self._free if s <= place and place + size <= s + n)
            self._free.remove((start, length))
            for rest in ((start, place - start), (place + size, start + length - place - size)):
                if rest[1]:
                    insort(self._free, rest)


class Index:
    """What lies where, in a file of its own: 64 bytes for each part, with a checksum that only this run can make."""

    ENTRY = struct.Struct("<4sqHHQQ16s16s")
    MAGIC = b"rev1"

    def __init__(self, path: Path, key: bytes) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._key = key
        self._rows: dict[int, list[int]] = {}
        self._unused: list[int] = []
        self._end = 0

    def read(self) -> dict[int, Record]:
        """The records that are there as a whole; half-written entries and those of other runs are not."""
        size = self.ENTRY.size
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        found: dict[int, dict[int, tuple[int, int, Part, bytes]]] = {}
        self._end = len(data) // size
        for row in range(self._end):
            entry = data[row * size : (row + 1) * size]
            magic, number, part, parts, place, length, digest, check = self.ENTRY.unpack(entry)
            if magic == self.MAGIC and check == self._check(entry):
                found.setdefault(number, {})[part] = row, parts, (place, length), digest
        records = {}
        for number, pieces in found.items():
            rows, counts, parts, digests = zip(*(pieces[part] for part in sorted(pieces)), strict=True)
            if set(counts) == {len(pieces)} and len(set(digests)) == 1:
                records[number], self._rows[number] = Record(tuple(parts), digests[0]), list(rows)
        self._unused = sorted(set(range(self._end)) - {row for rows in self._rows.values() for row in rows})
        return records

    def add(self, number: int, record: Record) -> None:
        """An entry for each part; until the last one is written there is no such record."""
        rows = self._rows[number] = []
        for part, (place, length) in enumerate(record.parts):
            entry = self.ENTRY.pack(
                self.MAGIC, number, part, len(record.parts), place, length, record.digest, bytes(16)
            )
            if not self._unused:
                self._unused.append(self._end)
                self._end += 1
            rows.append(self._unused.pop())
            os.pwrite(self._fd, entry[:-16] + self._check(entry), rows[-1] * self.ENTRY.size)

    def remove(self, number: int) -> None:
        for row in self._rows.pop(number):
            os.pwrite(self._fd, bytes(self.ENTRY.size), row * self.ENTRY.size)
            self._unused.append(row)

    def close(self) -> None:
        os.close(self._fd)

    def _check(self, entry: bytes) -> bytes:
        return blake2b(entry[:-16], digest_size=16, key=self._key).digest()
