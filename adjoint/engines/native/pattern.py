"""What a function was when it was compiled, as a question that is asked quickly: is it still that?

As strict as :func:`fingerprint` or stricter: everything that is reached is looked at again, by content, and nothing of it
is kept alive. Where the answer is no, or there is no pattern, the fingerprint decides.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native.fingerprint import CALLED, KNOWN, LARGEST, is_library, names_in, of_class
from adjoint.engines.native.trace import Held
from adjoint.reach import ATOMS, LIBRARIES, children, followable, global_names, slots_of

MOST = 500
"""Objects; the pattern of more takes as long as the fingerprint."""


class _Unlike(Exception):
    """Something is no longer what it was."""


class NoPattern(Exception):
    """Something that no pattern is made of."""


Question = Callable[[Any, "_Walk"], None]
"""Raises _Unlike."""


class _Walk:
    """What has been met: objects and tensors in the order of the walk, and held tensors by their place."""

    __slots__ = ("every", "ids", "tensors")

    def __init__(self, tensors: int) -> None:
        self.ids: list[int] = []
        self.every: list[Tensor] = []
        self.tensors: list[Any] = [None] * tensors


class Pattern:
    """Of everything that an object reaches."""

    def __init__(self, held: Held) -> None:
        self._count = len(held.tensors)
        self._inputs = {id(x): i for i, x in enumerate(held.tensors)}
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two objects have the same address
        self.order: list[int] = []
        """The addresses of all tensors, in the order of the walk."""
        self._question = self._of(held.reach.root)
        del self._inputs, self._met, self._alive

    def found(self, root: Any) -> tuple[list[Tensor], list[Tensor]] | None:
        """The tensors in the places of the held ones, and all in the order of the walk, if this is the same in all but
        the numbers of the held ones."""
        walk = _Walk(self._count)
        try:
            self._question(root, walk)
        except _Unlike:
            return None
        return (walk.tensors, walk.every) if len(set(walk.ids)) == len(walk.ids) else None

    # -- a question for each kind of object

    def _of(self, x: Any, names: frozenset[str] = frozenset(), within: tuple[ModuleType, ...] = ()) -> Question:
        if isinstance(x, ModuleType):
            return self._module(x, names, within)
        if isinstance(x, ATOMS) and (not isinstance(x, type) or is_library(x)):
            return _atom(x)
        if id(x) in self._met:
            return _again(self._met[id(x)])
        if len(self._met) >= MOST:
            raise NoPattern
        self._met[id(x)] = len(self._met)
        self._alive.append(x)
        if isinstance(x, type):
            return self._class(x)
        if isinstance(x, Tensor):
            return self._tensor(x)
        if type(x) is FunctionType:
            return self._function(x)
        if type(x) is MethodType:
            return self._parts(MethodType, lambda y: (y.__self__, y.__func__), x)
        if type(x) is functools.partial:
            return self._parts(functools.partial, lambda y: (y.func, y.args, y.keywords), x)
        if type(x) in (dict, OrderedDict):
            return self._dict(x)
        if type(x) in (list, tuple, deque) or (isinstance(x, tuple) and not hasattr(x, "__dict__")):
            return self._series(x)
        if isinstance(x, (set, frozenset)):
            if x:
                raise NoPattern
            return self._series(x)
        if isinstance(x, CALLED):
            if isinstance(x, BuiltinFunctionType) and not isinstance(x.__self__, ModuleType | None):
                raise NoPattern
            return _same(x)
        if isinstance(x, np.ndarray) and x.dtype.kind in "fiub" and x.size <= LARGEST:
            return _array(x)
        if isinstance(x, KNOWN) or not followable(x):
            raise NoPattern
        return self._instance(x)

    def _module(self, x: ModuleType, names: frozenset[str], within: tuple[ModuleType, ...]) -> Question:
        if x.__name__.partition(".")[0] in LIBRARIES or x in within:
            name = x.__name__

            def library(y: Any, walk: _Walk) -> None:
                if not isinstance(y, ModuleType) or y.__name__ != name:
                    raise _Unlike

            return library
        wanted = sorted(names)
        there = [n for n in wanted if n in vars(x)]
        questions = [(n, self._of(vars(x)[n], names, (*within, x))) for n in there]

        def module(y: Any, walk: _Walk) -> None:
            if y is not x or [n for n in wanted if n in vars(y)] != there:
                raise _Unlike
            for n, question in questions:
                question(vars(y)[n], walk)

        return module

    def _class(self, x: type) -> Question:
        own = list(of_class(x))
        questions, labels = [self._of(value) for _, value in own], [label for label, _ in own]

        def same(y: Any, walk: _Walk) -> None:
            if y is not x:
                raise _Unlike
            walk.ids.append(id(y))
            _ask_class(x, labels, questions, walk)

        return same

    def _tensor(self, x: Tensor) -> Question:
        kind, shape, dtype, wanted, place = type(x), x.shape, x.dtype, x.requires_grad, self._inputs.get(id(x))
        if x.__dict__ or x.device.type != "cpu" or x.layout != torch.strided or x.is_inference():
            raise NoPattern
        if place is None and x.numel() > LARGEST:
            raise NoPattern
        self.order.append(id(x))
        numbers = "" if place is not None else repr(x.detach().flatten().tolist())

        def tensor(y: Any, walk: _Walk) -> None:
            if (
                type(y) is not kind
                or y.shape != shape
                or y.dtype is not dtype
                or y.requires_grad is not wanted
                or y.__dict__
                or not y.is_cpu
                or y.layout is not torch.strided
                or y.is_inference()
            ):
                raise _Unlike
            walk.ids.append(id(y))
            walk.every.append(y)
            if place is not None:
                walk.tensors[place] = y
            elif repr(y.detach().flatten().tolist()) != numbers:
                raise _Unlike

        return tensor

    def _function(self, x: FunctionType) -> Question:
        code, where, name = x.__code__, x.__module__, x.__qualname__
        names, cells = names_in(code), x.__closure__ or ()
        if (where or "").partition(".")[0] in LIBRARIES:
            wanted: list[str] = []
        else:
            wanted = list(global_names(code))
        missing = [n for n in wanted if n not in x.__globals__]
        inner = [None if _empty(cell) else self._of(cell.cell_contents, names) for cell in cells]
        outer = [(n, self._of(x.__globals__[n], names)) for n in wanted if n not in missing]
        plain = x.__defaults__ is None and x.__kwdefaults__ is None and not x.__dict__
        rest = None if plain else self._parts(FunctionType, _surroundings, x, names)

        def function(y: Any, walk: _Walk) -> None:
            if type(y) is not FunctionType or y.__code__ is not code or y.__module__ != where or y.__qualname__ != name:
                raise _Unlike
            walk.ids.append(id(y))
            if plain and not (y.__defaults__ is None and y.__kwdefaults__ is None and not y.__dict__):
                raise _Unlike
            for question, cell in zip(inner, y.__closure__ or (), strict=True):
                if _empty(cell):
                    if question is not None:
                        raise _Unlike
                elif question is None:
                    raise _Unlike
                else:
                    question(cell.cell_contents, walk)
            space = y.__globals__
            for n, question in outer:
                if n not in space:
                    raise _Unlike
                question(space[n], walk)
            for n in missing:
                if n in space:
                    raise _Unlike
            if rest is not None:
                rest(y, walk)

        return function

    def _parts(
        self, kind: type, parts: Callable[[Any], Sequence[Any]], x: Any, names: frozenset[str] | None = None
    ) -> Question:
        """``names``: of a function, which has been counted already."""
        questions = [self._of(part, names or frozenset()) for part in parts(x)]

        def composed(y: Any, walk: _Walk) -> None:
            if type(y) is not kind:
                raise _Unlike
            if names is None:
                walk.ids.append(id(y))
            found = parts(y)
            if len(found) != len(questions):
                raise _Unlike
            for question, part in zip(questions, found, strict=True):
                question(part, walk)

        return composed

    def _dict(self, x: Any) -> Question:
        kind, keys = type(x), list(x)
        if not all(type(key) in (str, int, bool) for key in keys):
            raise NoPattern
        kinds = list(map(type, keys))
        questions = [self._of(value) for value in x.values()]

        def mapping(y: Any, walk: _Walk) -> None:
            if type(y) is not kind or list(y) != keys or list(map(type, y)) != kinds:
                raise _Unlike
            walk.ids.append(id(y))
            for question, value in zip(questions, y.values(), strict=True):
                question(value, walk)

        return mapping

    def _series(self, x: Any) -> Question:
        kind = type(x)
        questions = [self._of(value) for value in x]
        count = len(questions)

        def series(y: Any, walk: _Walk) -> None:
            if type(y) is not kind or len(y) != count:
                raise _Unlike
            walk.ids.append(id(y))
            for question, value in zip(questions, y, strict=True):
                question(value, walk)

        return series

    def _instance(self, x: Any) -> Question:
        kind, slots = type(x), list(slots_of(x))
        attributes = list(getattr(x, "__dict__", {}))
        questions = [self._of(value) for _, value in children(x)]
        own = list(of_class(kind))
        shared = [self._of(value) for _, value in own]
        labels = [label for label, _ in own]

        def instance(y: Any, walk: _Walk) -> None:
            if type(y) is not kind or list(getattr(y, "__dict__", ())) != attributes or list(slots_of(y)) != slots:
                raise _Unlike
            walk.ids.append(id(y))
            values = [*getattr(y, "__dict__", {}).values(), *(getattr(y, name) for name in slots)]
            for question, value in zip(questions, values, strict=True):
                question(value, walk)
            _ask_class(kind, labels, shared, walk)

        return instance


def _ask_class(kind: type, labels: list[str], questions: list[Question], walk: _Walk) -> None:
    """Whether a class holds what it held."""
    now = list(of_class(kind))
    if [label for label, _ in now] != labels:
        raise _Unlike
    for question, (_, value) in zip(questions, now, strict=True):
        question(value, walk)


def _surroundings(x: FunctionType) -> tuple[Any, ...]:
    """Defaults and attributes of a function, with the names of those that have one."""
    named = {**(x.__kwdefaults__ or {}), **x.__dict__}
    return (*(x.__defaults__ or ()), len(x.__kwdefaults__ or ()), *(y for pair in named.items() for y in pair))


def _empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # nothing is bound to the name yet
        return True
    return False


def _atom(x: Any) -> Question:
    kind = type(x)
    if isinstance(x, type):

        def named(y: Any, walk: _Walk) -> None:
            if y is not x:
                raise _Unlike

        return named
    if isinstance(x, (float, complex)):
        text = repr(x)  # zeros have signs

        def number(y: Any, walk: _Walk) -> None:
            if type(y) is not kind or y != x or repr(y) != text:
                raise _Unlike

        return number

    def atom(y: Any, walk: _Walk) -> None:
        if type(y) is not kind or y != x:
            raise _Unlike

    return atom


def _again(place: int) -> Question:
    def again(y: Any, walk: _Walk) -> None:
        if id(y) != walk.ids[place]:
            raise _Unlike

    return again


def _same(x: Any) -> Question:
    def same(y: Any, walk: _Walk) -> None:
        if y is not x:
            raise _Unlike
        walk.ids.append(id(y))

    return same


def _array(x: np.ndarray[Any, Any]) -> Question:
    dtype, shape, numbers = x.dtype, x.shape, x.tobytes()

    def array(y: Any, walk: _Walk) -> None:
        if type(y) is not np.ndarray or y.dtype != dtype or y.shape != shape or y.tobytes() != numbers:
            raise _Unlike
        walk.ids.append(id(y))

    return array
