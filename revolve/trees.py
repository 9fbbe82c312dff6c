"""States as bytes: a line of text that says what they are, and the numbers of their arrays behind it.

A tree is an array, a number, a string, None, or a tuple, list or dict of trees. It comes back with the same types,
shapes, bits and order of axes in memory. Nothing in the text is ever executed.
"""

from __future__ import annotations

import ast
import math
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np

ALIGNED = 64
"""Arrays begin at multiples of so many bytes, as the kernels of numerical libraries like them."""

LENGTH = 8
"""Bytes that say how long the text is."""


class Codec(Protocol):
    """Arrays made smaller on their way into a store."""

    def encode(self, array: np.ndarray) -> np.ndarray | None:
        """Bytes (uint8) from which the array is made again, in full or nearly so; None: leave it as it is."""
        ...

    def decode(self, data: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        """The array from its bytes."""
        ...


def is_lossless(codec: Codec | None) -> bool:
    """Whether arrays come back as they were; a codec says so by its attribute ``lossless``."""
    return codec is None or bool(getattr(codec, "lossless", False))


class Packed(NamedTuple):
    """A tree on its way into bytes."""

    text: bytes
    arrays: list[np.ndarray]
    size: int
    """Bytes in all."""

    def write(self, out: np.ndarray) -> None:
        """Lay everything out in ``out``: uint8, of at least ``size``."""
        out[:LENGTH] = np.frombuffer(len(self.text).to_bytes(LENGTH, "little"), np.uint8)
        out[LENGTH : LENGTH + len(self.text)] = np.frombuffer(self.text, np.uint8)
        place = _aligned(LENGTH + len(self.text))
        for array in self.arrays:
            out[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
            place = _aligned(place + array.nbytes)


def pack(tree: Any, codec: Codec | None = None) -> Packed:
    """A tree ready to be written; TypeError for what is no tree."""
    arrays: list[np.ndarray] = []
    text = repr(_describe(tree, arrays, codec)).encode()
    size = _aligned(LENGTH + len(text))
    for array in arrays:
        size = _aligned(size + array.nbytes)
    return Packed(text, arrays, size)


def unpack(data: np.ndarray, codec: Codec | None = None) -> Any:
    """The tree from its bytes (uint8); its arrays lie in that memory, unless a codec made them."""
    length = int.from_bytes(data[:LENGTH].tobytes(), "little")
    description = ast.literal_eval(data[LENGTH : LENGTH + length].tobytes().decode())
    return _Reader(data, _aligned(LENGTH + length), codec).made(description)


def empty(size: int) -> np.ndarray:
    """So many bytes, their first one aligned."""
    whole = np.empty(size + ALIGNED, np.uint8)
    start = -whole.ctypes.data % ALIGNED
    return whole[start : start + size]


def to_bytes(tree: Any) -> np.ndarray:
    """A tree as one array of bytes."""
    packed = pack(tree)
    out = np.zeros(packed.size, np.uint8)
    packed.write(out)
    return out


def digest(tree: Any) -> bytes:
    """16 bytes that tell a tree from any other."""
    return blake2b(to_bytes(tree).data, digest_size=16).digest()


def _aligned(place: int) -> int:
    return -(-place // ALIGNED) * ALIGNED


def _describe(tree: Any, arrays: list[np.ndarray], codec: Codec | None) -> tuple[Any, ...]:
    """A kind and what belongs to it, all of it literals; the arrays are put aside in order."""
    kind = type(tree)
    if kind is np.ndarray and not _has_objects(tree.dtype):
        descr = np.lib.format.dtype_to_descr(tree.dtype)
        small = None if codec is None else codec.encode(tree)
        if small is not None:
            arrays.append(small)
            return "small", descr, tree.shape, small.nbytes
        axes = tuple(int(i) for i in np.argsort([-abs(s) for s in tree.strides], kind="stable"))
        arrays.append(np.ascontiguousarray(tree.transpose(axes)))
        return "array", descr, tree.shape, axes
    if isinstance(tree, np.generic) and not _has_objects(tree.dtype):
        arrays.append(np.array([tree]))
        return "scalar", np.lib.format.dtype_to_descr(tree.dtype)
    if kind is tuple or kind is list:
        return kind.__name__, [_describe(x, arrays, codec) for x in tree]
    if kind is dict:
        for key in tree:
            if type(key) not in (bool, int, str, bytes):
                raise TypeError(
                    f"a dict with the key {key!r} cannot be kept in a file; give strings or integers as keys"
                )
        return "dict", [(key, _describe(value, arrays, codec)) for key, value in tree.items()]
    if kind is float:
        return "float", tree.hex()
    if kind is complex:
        return "complex", tree.real.hex(), tree.imag.hex()
    if tree is None or kind in (bool, int, str, bytes):
        return "plain", tree
    what = "an array of objects" if kind is np.ndarray else f"{kind.__module__}.{kind.__qualname__}"
    raise TypeError(
        f"{what} cannot be kept in a file; give arrays, numbers, strings, or plain tuples, lists and dicts of these"
    )


def _has_objects(dtype: np.dtype[Any]) -> bool:
    return dtype.hasobject or dtype.kind == "T"


class _Reader:
    """Takes arrays from bytes, one after another."""

    def __init__(self, data: np.ndarray, place: int, codec: Codec | None) -> None:
        self._data, self._place, self._codec = data, place, codec

    def take(self, size: int) -> np.ndarray:
        part = self._data[self._place : self._place + size]
        self._place = _aligned(self._place + size)
        return part

    def made(self, description: tuple[Any, ...]) -> Any:
        match description:
            case "array", descr, shape, axes:
                dtype = np.lib.format.descr_to_dtype(descr)
                part = self.take(math.prod(shape) * dtype.itemsize).view(dtype)
                return part.reshape([shape[i] for i in axes]).transpose(np.argsort(axes).tolist())
            case "small", descr, shape, size:
                assert self._codec is not None
                return self._codec.decode(self.take(size), np.lib.format.descr_to_dtype(descr), shape)
            case "scalar", descr:
                dtype = np.lib.format.descr_to_dtype(descr)
                return self.take(dtype.itemsize).view(dtype)[0]
            case "tuple", items:
                return tuple([self.made(x) for x in items])
            case "list", items:
                return [self.made(x) for x in items]
            case "dict", items:
                return {key: self.made(value) for key, value in items}
            case "float", text:
                return float.fromhex(text)
            case "complex", real, imag:
                return complex(float.fromhex(real), float.fromhex(imag))
            case "plain", value:
                return value
        raise ValueError(f"{description!r} is no tree")
