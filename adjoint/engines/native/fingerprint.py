"""What a function is, by content: two functions of one fingerprint compute the same, given the same tensors."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from types import BuiltinFunctionType, BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native.cells import Refused
from adjoint.engines.native.trace import Held
from adjoint.reach import ATOMS, LIBRARIES, children, followable

LARGEST = 4096
"""Numbers of a tensor that is no input: beyond, it is too much to be compared at every call."""
MOST = 2000
"""Objects; what leads further cannot be looked at before every call."""
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
KNOWN = (FunctionType, MethodType, BuiltinMethodType, functools.partial, *CONTAINERS, np.ndarray, np.generic)
ELSEWHERE = frozenset(("environ", "getenv", "globals"))
"""Names by which a function looks where nobody can follow it."""
CALLED = (BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket, np.ufunc)


def fingerprint(held: Held) -> tuple[Any, ...]:
    """Of everything that the function reaches, in the order in which it is met. What it says nothing about is refused."""
    root = held.reach.root
    inputs = {id(x): i for i, x in enumerate(held.tensors)}
    places, queue, parts = {id(root): 0}, deque([root]), list[Any]()
    alive = []  # so that no two objects have the same address

    def of(child: Any, names: frozenset[str] = frozenset(), within: tuple[ModuleType, ...] = ()) -> Any:
        if isinstance(child, ModuleType):
            if child.__name__.partition(".")[0] in LIBRARIES or child in within:
                return child.__name__
            found = sorted(name for name in names if name in vars(child))
            return child.__name__, tuple((x, of(vars(child)[x], names, (*within, child))) for x in found)
        if isinstance(child, type) and is_library(child):
            return child
        if isinstance(child, (float, complex)):
            return type(child), repr(child)  # zeros have signs
        if isinstance(child, ATOMS) and not isinstance(child, type):
            return type(child), child
        if id(child) not in places:
            places[id(child)] = len(places)
            queue.append(child)
        return places[id(child)]

    while queue:
        x = queue.popleft()
        alive.append(x)
        if isinstance(x, Tensor):
            parts.append(_tensor(x, inputs.get(id(x))))
            continue
        if len(places) > MOST:
            raise Refused(f"f, which leads to more than {MOST} objects")
        if isinstance(x, type):
            parts.append(x)
            parts.extend((name, of(child)) for name, child in of_class(x))
            continue
        parts.append(_itself(x))
        names = names_in(x.__code__) if isinstance(x, FunctionType) else frozenset()
        parts.extend((label, of(child, names)) for label, child in children(x))
        if not isinstance(x, KNOWN):
            parts.extend((name, of(child)) for name, child in of_class(type(x)))
    return tuple(parts)


@functools.lru_cache(maxsize=1024)
def names_in(code: CodeType) -> frozenset[str]:
    """Every name of a global or an attribute that stands in a function: all that it may look for in a module."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _tensor(x: Tensor, place: int | None) -> Any:
    form = (tuple(x.shape), x.dtype, x.requires_grad, type(x), bool(x.__dict__))
    if place is not None:
        return place, form
    if x.numel() > LARGEST or x.device.type != "cpu" or x.layout != torch.strided:
        raise Refused(f"an f that holds a tensor of {x.dtype} with the shape {tuple(x.shape)}")
    return form, x.detach().flatten().tolist().__repr__()


def _itself(x: Any) -> Any:
    if isinstance(x, FunctionType):
        if ELSEWHERE & names_in(x.__code__):
            raise Refused(f"an f that looks at {', '.join(sorted(ELSEWHERE & names_in(x.__code__)))}")
        return x.__code__, x.__module__, x.__qualname__
    if isinstance(x, (MethodType, BuiltinMethodType, functools.partial, *CONTAINERS)):
        return type(x), len(x) if isinstance(x, CONTAINERS) else 0
    if isinstance(x, CALLED):
        return type(x), x
    if isinstance(x, np.ndarray) and x.dtype.kind in "fiub" and x.size <= LARGEST:
        return x.dtype.str, x.shape, x.tobytes()
    if isinstance(x, (np.generic, torch.Size)):
        return type(x), repr(x)
    if not (hasattr(x, "__dict__") or hasattr(type(x), "__slots__")) or not followable(x):
        raise Refused(f"an f that holds a {type(x).__module__}.{type(x).__qualname__}, which cannot be looked into")
    return (type(x),)


def is_library(kind: type) -> bool:
    """Whether a class is not the caller's own, so that nothing in it changes."""
    return (kind.__module__ or "").partition(".")[0] in LIBRARIES


def of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class of the caller's own holds, by itself and for all its instances: functions and values."""
    for c in kind.__mro__:
        if (c.__module__ or "").partition(".")[0] in LIBRARIES:
            continue
        for name, value in vars(c).items():
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            own = not (name.startswith("__") or name == "_abc_impl" or hasattr(type(value), "__get__"))
            if isinstance(value, FunctionType) or own:
                yield f"{c.__qualname__}.{name}", value
