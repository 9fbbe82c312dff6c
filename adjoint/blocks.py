"""A block of a network that is run again as if it were run for the first time.

The first run notes what a second one would find changed: the states of generators that it drew from, buffers that it
wrote to, attributes that it set, and which parameters its modules held. A second run finds all that as it was, and
afterwards everything is as if there had been no second run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adjoint import randomness
from adjoint.randomness import Source
from adjoint.reach import Reach
from adjoint.touched import Touched

_NONE = object()


@dataclass
class Notes:
    """What a first run found and changed."""

    drawn: list[tuple[Source, Any]] = field(default_factory=list)
    """Generators that it drew from, with their states before."""
    held: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Parameters and buffers of each module, as they were."""
    written: dict[int, Tensor] = field(default_factory=dict)
    """By the id of each buffer that it wrote to, the numbers before."""
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    """Attributes that it set, with their values before."""
    versions: list[tuple[str, Tensor, int]] = field(default_factory=list)
    """Tensors that must not change until the block is run again."""


class Block:
    """A callable, and what it holds: modules, generators, other tensors."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        if not callable(function):
            raise TypeError(f"{name} is {function!r}; a block must be callable")
        self.function = function
        self.name = f"{name} ({_kind(function)})"
        if isinstance(function, nn.Module):
            modules: list[nn.Module] = [function]
            self._tensors: list[tuple[str, Tensor]] = []
            objects: list[Any] = []
        else:
            reach = Reach(function, name)
            objects = list(reach.objects)
            modules = [x for x in objects if isinstance(x, nn.Module)]
            self._tensors = list(reach.tensors.values())
        self.modules = list(dict.fromkeys(m for top in modules for m in top.modules()))
        objects += [value for m in self.modules for value in vars(m).values() if not isinstance(value, (dict, bool))]
        self._generators = randomness.held({id(x): x for x in objects}.values())
        self._wide = not isinstance(function, nn.Module)
        """Whether it may reach more than it uses."""
        self.sharded = any(kind.__name__ == "FSDPModule" for m in self.modules for kind in type(m).__mro__)
        """Whether its parameters come and go by themselves."""
        self.noted_bytes = 0
        """What the notes of a first run hold of buffers, as a run aside found."""

    def sources(self) -> list[Source]:
        return [*randomness.ambient(), *randomness.of_accelerators(), *self._generators]

    @property
    def captures(self) -> bool:
        """Whether it holds tensors with gradients outside of modules."""
        return any(x.requires_grad for _, x in self._tensors)

    def owned(self) -> list[Tensor]:
        """Parameters and buffers, and whatever else it holds."""
        inside = (x for m in self.modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None)
        return [*inside, *(x for _, x in self._tensors)]

    def first(self, arguments: Sequence[Any]) -> tuple[Any, Notes]:
        """One run, and notes of it."""
        notes, sources = self.noted()
        states = [source.get() for source in sources]
        before = {id(x): (x, _version(x)) for _, _, buffers in notes.held for x in buffers.values() if x is not None}
        attributes = [dict(vars(m)) for m in self.modules]
        others = [(name, x, _version(x)) for name, x in self._tensors]
        with Touched(()) if self._wide else nullcontext() as touched:
            result = self.function(*arguments)
        for name, x, version in others:
            if _version(x) != version and id(x) not in before:
                raise RuntimeError(
                    f"{self.name} writes to {name} (shape {tuple(x.shape)}), which cannot be put back for a second run; "
                    f"make it a buffer of a module (register_buffer), or write to a copy"
                )
        notes.drawn = [(s, old) for s, old in zip(sources, states, strict=True) if not randomness.same(s.get(), old)]
        changed = {key for key, (x, version) in before.items() if _changed(x, version, notes.written[key])}
        notes.written = {key: x for key, x in notes.written.items() if key in changed}
        for m, old in zip(self.modules, attributes, strict=True):
            now = vars(m)
            notes.attributes += [(m, key, old.get(key, _NONE)) for key in now if now[key] is not old.get(key, _NONE)]
        fixed = [("a buffer", x) for key, (x, _) in before.items() if key not in changed]
        if not self.sharded:
            fixed += [
                (f"parameter {key!r}", x) for _, held, _ in notes.held for key, x in held.items() if x is not None
            ]
        notes.versions = [
            (name, x, _version(x))
            for name, x in (*fixed, *self._tensors)
            if id(x) not in changed and (touched is None or id(x) in touched.outside)
        ]
        return result, notes

    def noted(self) -> tuple[Notes, list[Source]]:
        """Notes as of now, in which every buffer counts as written to."""
        notes = Notes(held=[(m, dict(m._parameters), dict(m._buffers)) for m in self.modules])
        for _, _, buffers in notes.held:
            notes.written.update((id(x), _copy(x)) for x in buffers.values() if x is not None)
        return notes, self.sources()

    def again(self, arguments: Sequence[Any], notes: Notes) -> Any:
        """The same run once more; RuntimeError if a parameter or buffer has changed since."""
        for name, x, version in notes.versions:
            if _version(x) != version:
                raise RuntimeError(
                    f"{name} of {self.name} (shape {tuple(x.shape)}) was changed in place between its run and its second "
                    f"run in the backward pass; call backward() before changing it"
                )
        with self._as_before(notes):
            return self.function(*arguments)

    def aside(self, arguments: Sequence[Any], aliases: Mapping[int, Tensor] | None = None) -> Any:
        """A run that leaves nothing behind; ``aliases``: what to take in place of parameters, by their ids."""
        notes, _ = self.noted()
        if aliases:
            for _, parameters, _ in notes.held:
                parameters.update((key, aliases.get(id(x), x)) for key, x in parameters.items())
        with self._as_before(notes) as scratch:
            versions = {key: _version(x) for key, x in scratch.items()}
            result = self.function(*arguments)
            changed = (x for key, x in scratch.items() if _changed(x, versions[key], notes.written[key]))
            self.noted_bytes = sum(x.numel() * x.element_size() for x in changed)
        return result

    @contextmanager
    def _as_before(self, notes: Notes) -> Iterator[dict[int, Tensor]]:
        sources = self.sources()
        states = [source.get() for source in sources]
        now = [(m, dict(m._parameters), dict(m._buffers), dict(vars(m))) for m in self.modules]
        scratch = {key: _copy(x) for key, x in notes.written.items()}
        try:
            for source, state in notes.drawn:
                source.restore(state)
            for m, parameters, buffers in notes.held:
                if not self.sharded:
                    m._parameters.update(parameters)
                m._buffers.update((key, scratch.get(id(x), x)) for key, x in buffers.items())
            for m, key, value in notes.attributes:
                _set(m, key, value)
            yield scratch
        finally:
            for m, parameters, buffers, attributes in now:
                if not self.sharded:
                    _restore(m._parameters, parameters)
                _restore(m._buffers, buffers)
                _restore(vars(m), attributes)
            for source, state in zip(sources, states, strict=True):
                if not randomness.same(source.get(), state):
                    source.restore(state)


def _set(module: nn.Module, key: str, value: Any) -> None:
    if value is _NONE:
        vars(module).pop(key, None)
    else:
        vars(module)[key] = value


def _restore(now: dict[str, Any], then: dict[str, Any]) -> None:
    for key in now.keys() - then.keys():
        del now[key]
    for key, value in then.items():
        if now.get(key, _NONE) is not value:
            now[key] = value


def _changed(x: Tensor, version: int, before: Tensor) -> bool:
    """Whether a buffer was written to. Running statistics change without a new version, and looking at numbers on
    another device would wait for it: there they count as changed."""
    if _version(x) != version:
        return True
    return not x.is_meta and (x.device.type != "cpu" or not torch.equal(x, before))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def _kind(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
