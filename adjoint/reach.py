"""What a function leads to: its closure, defaults, globals, modules, containers, plain objects; and private copies of them.

A gradient that silently misses a tensor is the worst bug this library can have. So the static reach of a function is
walked, every tensor found is replaced by an alias in a private copy of whatever leads to it, and what is used without
having been found is refused by name.
"""

from __future__ import annotations

import copy
import dis
import functools
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "matplotlib", "torchdiffeq", "adjoint"}
"""Functions of these packages hold no tensors of the user's in their globals."""


LARGEST = 10_000
"""Containers longer than this are not searched; a tensor hidden in one is refused when it is used."""


ATOMS = (int, float, complex, str, bytes, bool, type(None), type, ModuleType, torch.dtype, torch.device)


@dataclass
class Reach:
    """Everything that can be followed from an object: its tensors by name, and how to rebind them."""

    root: Any
    name: str
    tensors: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    _objects: dict[int, Any] = field(default_factory=dict)
    _parents: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        queue = deque([(self.name, self.root)])
        self._objects[id(self.root)] = self.root
        while queue:
            name, parent = queue.popleft()
            if isinstance(parent, Tensor):
                self.tensors[id(parent)] = (_readable(name), parent)
                continue
            for label, child in children(parent):
                if isinstance(child, ATOMS):
                    continue
                self._parents.setdefault(id(child), []).append(id(parent))
                if id(child) not in self._objects:
                    self._objects[id(child)] = child
                    queue.append((name + label, child))

    @property
    def requiring_grad(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name, x in self.tensors.values() if x.requires_grad]

    @property
    def objects(self) -> Iterable[Any]:
        """Everything that was met."""
        return self._objects.values()

    def rebind(self, aliases: dict[int, Tensor]) -> Any:
        """A private copy of the root in which the tensors with these ids are replaced by their aliases.

        Only what leads to a replaced tensor is copied; everything else is shared with the original.
        """
        changed = set(aliases)
        queue = deque(aliases)
        while queue:
            for parent in self._parents.get(queue.popleft(), ()):
                if parent not in changed:
                    changed.add(parent)
                    queue.append(parent)
        return _Copy(changed, dict(aliases))(self.root)


def _readable(name: str) -> str:
    return re.sub(r"\._(?:parameters|buffers|modules)\['([^']*)'\]", r".\1", name)


def children(parent: Any) -> Iterator[tuple[str, Any]]:
    """What can be followed from one object, each with the text that leads there."""
    if isinstance(parent, FunctionType):
        yield from ((f" > {name}", value) for name, value in _closure(parent))
        yield from ((f" > default {i}", value) for i, value in enumerate(parent.__defaults__ or ()))
        yield from ((f" > {name}", value) for name, value in (parent.__kwdefaults__ or {}).items())
        yield from ((f".{name}", value) for name, value in parent.__dict__.items())
        yield from ((f" > global {name}", value) for name, value in _globals(parent))
    elif isinstance(parent, MethodType):
        yield from (("", parent.__self__), (f".{parent.__name__}", parent.__func__))
    elif isinstance(parent, BuiltinMethodType):
        if isinstance(parent.__self__, Tensor):
            yield "", parent.__self__
    elif isinstance(parent, functools.partial):
        yield from (("", parent.func), (".args", parent.args), (".keywords", parent.keywords))
    elif isinstance(parent, dict):
        if len(parent) <= LARGEST:
            yield from ((f"[{key!r}]", value) for key, value in parent.items())
    elif isinstance(parent, (list, tuple, set, frozenset, deque)):
        if len(parent) <= LARGEST:
            yield from ((f"[{i}]", value) for i, value in enumerate(parent))
    elif followable(parent):
        yield from ((f".{name}", value) for name, value in _attributes(parent))


def _closure(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the name is bound later, or never
            continue


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    if (function.__module__ or "").partition(".")[0] not in LIBRARIES:
        for name in global_names(function.__code__):
            if name in function.__globals__:
                yield name, function.__globals__[name]


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(global_names(constant))
    return tuple(sorted(names))


def followable(instance: Any) -> bool:
    """Whether an ordinary object may be copied shallowly without anybody noticing."""
    kind = type(instance)
    if isinstance(instance, torch.jit.ScriptModule) or hasattr(kind, "__del__"):
        return False
    if not hasattr(instance, "__dict__") and not hasattr(kind, "__slots__"):
        return False
    if (kind.__module__ or "").partition(".")[0] in LIBRARIES - {"torch", "adjoint"}:
        return False
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def slots_of(instance: Any) -> Iterator[str]:
    for kind in type(instance).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(instance, name):
                yield name


def _attributes(instance: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(instance, "__dict__", {}).items()
    for name in slots_of(instance):
        yield name, getattr(instance, name)


class _Copy:
    """Copies of the objects in ``changed``, made once each; a copy exists before it is filled, so cycles close."""

    def __init__(self, changed: set[int], made: dict[int, Any]) -> None:
        self.changed, self.made = changed, made

    def __call__(self, original: Any) -> Any:
        key = id(original)
        if key not in self.changed:
            return original
        if key not in self.made:
            self._make(key, original)
        return self.made[key]

    def _make(self, key: int, original: Any) -> None:
        if isinstance(original, FunctionType):
            self._function(key, original)
        elif isinstance(original, MethodType):
            self.made[key] = MethodType(self(original.__func__), self(original.__self__))
        elif isinstance(original, BuiltinMethodType):
            self.made[key] = getattr(self(original.__self__), original.__name__)
        elif isinstance(original, functools.partial):
            keywords = {name: self(value) for name, value in original.keywords.items()}
            self.made[key] = type(original)(self(original.func), *map(self, original.args), **keywords)
        elif isinstance(original, dict):
            self.made[key] = shell = copy.copy(original)
            for name, value in original.items():
                shell[name] = self(value)
        elif isinstance(original, (list, deque)):
            self.made[key] = series = copy.copy(original)
            for i, value in enumerate(original):
                series[i] = self(value)
        elif isinstance(original, tuple):
            self.made[key] = made = tuple.__new__(type(original), map(self, original))
            getattr(made, "__dict__", {}).update(getattr(original, "__dict__", {}))
        elif isinstance(original, (set, frozenset)):
            self.made[key] = type(original)(map(self, original))
        else:
            self._instance(key, original)

    def _function(self, key: int, original: FunctionType) -> None:
        closure = original.__closure__ or ()
        cells = tuple(cell if self._stays(cell) else CellType() for cell in closure)  # a nonlocal counter still counts
        names = self._namespace(original)
        shell = FunctionType(original.__code__, names, original.__name__, None, cells)
        self.made[key] = shell
        shell.__defaults__ = tuple(map(self, original.__defaults__)) if original.__defaults__ else None
        shell.__kwdefaults__ = {n: self(v) for n, v in (original.__kwdefaults__ or {}).items()} or None
        shell.__dict__.update({n: self(v) for n, v in original.__dict__.items()})
        shell.__qualname__, shell.__module__ = original.__qualname__, original.__module__
        for cell, old in zip(cells, closure, strict=True):
            if cell is not old:
                cell.cell_contents = self(old.cell_contents)
        if names is not original.__globals__:
            names.update({name: self(value) for name, value in _globals(original)})

    def _stays(self, cell: CellType) -> bool:
        try:
            return id(cell.cell_contents) not in self.changed
        except ValueError:  # nothing is bound to the name yet
            return True

    def _namespace(self, function: FunctionType) -> dict[str, Any]:
        """The function's globals, copied (once for all functions of a module) if one that it uses is replaced."""
        if all(id(value) not in self.changed for _, value in _globals(function)):
            return function.__globals__
        key = id(function.__globals__)
        if key not in self.made:
            self.made[key] = dict(function.__globals__)
        namespace: dict[str, Any] = self.made[key]
        return namespace

    def _instance(self, key: int, original: Any) -> None:
        self.made[key] = shell = object.__new__(type(original))
        if hasattr(original, "__dict__"):
            shell.__dict__.update({name: self(value) for name, value in original.__dict__.items()})
        for name in slots_of(original):
            object.__setattr__(shell, name, self(getattr(original, name)))
