"""Trees of tensors, and the tensors that a function captures.

A gradient that silently misses a tensor is the worst bug this library can have. So the static reach of a function is
walked (closures, defaults, globals, modules, containers, plain objects), every tensor found is replaced by an alias in
a private copy of whatever leads to it, and what is used without having been found is refused by name.
"""

from __future__ import annotations

import copy
import dis
import functools
import gc
import re
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "matplotlib", "torchdiffeq", "adjoint"}
"""Functions of these packages hold no tensors of the user's in their globals."""

LARGEST = 10_000
"""Containers longer than this are not searched; a tensor hidden in one is refused when it is used."""

ATOMS = (int, float, complex, str, bytes, bool, type(None), type, ModuleType, torch.dtype, torch.device)

State = tuple[Tensor, ...]


class UntrackedTensorError(RuntimeError):
    """A function used a tensor that requires grad and that could not be followed."""


@dataclass(frozen=True)
class Structure:
    """The shape of a tree: nested tuples, lists, dicts (whatever torch's pytree knows) with tensors as leaves."""

    spec: pytree.TreeSpec
    single: bool

    @classmethod
    def of(cls, tree: Any, name: str) -> tuple[Structure, State]:
        """The structure and its leaves; TypeError if a leaf is not a tensor."""
        if type(tree) is Tensor:
            return SINGLE, (tree,)
        leaves, spec = pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} holds {leaf!r} ({type(leaf).__name__}); every leaf must be a torch tensor")
        if not leaves:
            raise TypeError(f"{name}={tree!r} holds no tensor")
        return cls(spec, isinstance(tree, Tensor)), tuple(leaves)

    def flatten(self, tree: Any, name: str) -> State:
        """The leaves of a tree of this structure; TypeError if it has another."""
        if self.single and isinstance(tree, Tensor):
            return (tree,)
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise TypeError(f"{name} has the structure {spec}, expected {self.spec}")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} holds {leaf!r} ({type(leaf).__name__}); every leaf must be a torch tensor")
        return tuple(leaves)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return leaves[0] if self.single else pytree.tree_unflatten(list(leaves), self.spec)


SINGLE = Structure(pytree.tree_structure(0), True)
"""Of a tensor alone."""


def check_dense(state: State, name: str) -> None:
    for x in state:
        if x.layout != torch.strided or x.is_nested:
            kind = "is nested" if x.is_nested else f"has the layout {x.layout}"
            raise TypeError(f"{name} {kind}; states are dense tensors, such as {name}.to_dense()")


def leaves_of(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among these values, and in the trees among them."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
        elif type(x) in pytree.SUPPORTED_NODES:
            found += [y for y in leaves_of(x) if isinstance(y, Tensor)]
    return found


def map_tree(function: Callable[..., Any], *trees: Any) -> Any:
    return pytree.tree_map(function, *trees)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def versions_of(state: State) -> list[int]:
    """How often each leaf has been written to."""
    return [0 if x.is_inference() else x._version for x in state]


def refuse_writing(what: str) -> NoReturn:
    """Raise for a function that writes to its arguments."""
    raise RuntimeError(
        f"{what} in place; recomputed steps would differ. Return a new tensor instead (y = y * 2, not y.mul_(2))"
    )


def added(total: Tensor, start: int, part: Tensor) -> Tensor:
    """``total`` with ``part`` added from index ``start`` on: in place, unless many cotangents come in one batch."""
    if _is_single(part):
        total[start : start + len(part)] += part
        return total
    stop = start + len(part)
    return torch.cat((total[:start], total[start:stop] + part, total[stop:]))


def scattered(total: Tensor, column: Tensor, part: Tensor) -> Tensor:
    """``total`` with ``part`` added at one column of each row, as :func:`added` does."""
    return total.scatter_add_(1, column, part) if _is_single(part) else total.scatter_add(1, column, part)


def _is_single(part: Tensor) -> bool:
    return is_plain(part) and not torch._C._functorch.is_legacy_batchedtensor(part)


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


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


SMALL = 256
"""Tensors of so many numbers may be held by who only wants to know them again."""


class Known:
    """Tensors by identity. Small ones are held; larger ones weakly, because that takes time but no memory."""

    def __init__(self) -> None:
        self._small: dict[int, Tensor] = {}
        self._large: dict[int, weakref.ref[Tensor]] = {}

    def add(self, x: Tensor) -> None:
        if x.numel() <= SMALL:
            self._small[id(x)] = x
        else:
            self._large[id(x)] = weakref.ref(x)

    def __contains__(self, x: Tensor) -> bool:
        return id(x) in self._small or (id(x) in self._large and self._large[id(x)]() is x)


class Touched(TorchFunctionMode):
    """Notes every tensor that comes from outside and is handed to a torch function while the mode is on."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.outside: dict[int, Tensor] = {}
        self.inside = Known()
        """What was known, and what was made while the mode was on."""
        self.derived = Known()
        """What was known, and what was made from that."""
        for x in known:
            self.inside.add(x)
            self.derived.add(x)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tensors_in((*args, *kwargs.values()) if kwargs else args) if is_plain(x)]
        self.outside.update([(id(x), x) for x in given if x not in self.inside])
        result = function(*args, **kwargs) if kwargs else function(*args)
        derived = any(x in self.derived for x in given) and not _makes_anew(function)
        for x in tensors_in((result,)):
            if id(x) not in self.outside:
                self.inside.add(x)
                if derived and differentiable(x):
                    self.derived.add(x)
        return result


def _makes_anew(function: Any) -> bool:
    """Whether a torch function takes no numbers from its argument: zeros_like, new_ones and so on."""
    name = getattr(function, "__name__", "")
    return name.endswith("_like") or name.startswith("new_")


def is_plain(x: Tensor) -> bool:
    """Whether it is not a wrapper that a torch.func transform inside the function made for the moment."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def leaves_behind(results: Iterable[Tensor]) -> dict[int, Tensor]:
    """The leaves of torch's graph that these results depend on."""
    found = {id(x): x for x in results if x.grad_fn is None and x.requires_grad}
    seen: set[Any] = {None}
    stack: list[Any] = [x.grad_fn for x in results if x.grad_fn not in seen]
    seen.update(stack)
    while stack:
        node = stack.pop()
        edges = node.next_functions
        if not edges:
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = variable
        for following, _ in edges:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def refuse(tensors: Iterable[Tensor], name: str) -> None:
    """Raise for tensors that require grad and cannot be followed."""
    described = "; ".join(f"shape {tuple(x.shape)}, {x.dtype}{_whereabouts(x)}" for x in tensors)
    raise UntrackedTensorError(
        f"{name} uses a tensor that requires grad and that cannot be followed ({described}); "
        f"its gradient would be lost. Pass it through args=, or hold it in a closure, a module, a list or a dict"
    )


def refuse_kept(x: Tensor, name: str) -> NoReturn:
    """Raise for a tensor that a function made in one call and used in another."""
    raise UntrackedTensorError(
        f"{name} keeps a tensor (shape {tuple(x.shape)}, {x.dtype}) from one call for the next; "
        f"its gradient would be lost. Compute it before the solve and pass it through args=, or anew in each call"
    )


def refuse_late(x: Tensor, name: str, when: str) -> NoReturn:
    """Raise for a tensor that a function did not use at first, cannot be followed, and may have been kept."""
    raise UntrackedTensorError(
        f"{name} uses {when} a tensor (shape {tuple(x.shape)}, {x.dtype}{_whereabouts(x)}) that it did not use at first "
        f"and that cannot be followed; if an earlier call made it, its gradient would be lost. Compute it anew in each "
        f"call, or before the solve and pass it through args= or hold it in a closure, a module, a list or a dict"
    )


def _whereabouts(tensor: Tensor) -> str:
    for holder in gc.get_referrers(tensor):
        if isinstance(holder, dict):
            for key, value in holder.items():
                if value is tensor and isinstance(key, str):
                    owner = holder.get("__name__")
                    for candidate in gc.get_referrers(holder) if owner is None else ():
                        if getattr(candidate, "__dict__", None) is holder:
                            owner = type(candidate).__name__
                    return f", {key!r}" + (f" of {owner}" if owner else "")
    return ""
