"""What a function captures: its tensors, two aliases of each, and the function rebound to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adjoint.kept import Listener
from adjoint.reach import Reach
from adjoint.tensors import differentiable


class Captured:
    """The tensors that a function holds, and the function rebound to aliases of them: two aliases, made once.

    ``plain`` uses aliases without grad, so that whatever still comes out requiring grad was not found; ``recorded``
    uses leaves, so that hooks and other paths of the caller's graph see nothing of the steps.
    """

    def __init__(self, function: Any, label: str) -> None:
        _refuse_transforms(label)
        self.label = label
        self.original = function
        self._reach = Reach(function, label)
        found = self._reach.requiring_grad
        self.names = [name for name, _ in found]
        self.tensors = [x for _, x in found]
        self.leaves = [_alias(x, True) for x in self.tensors]
        self.without = [_alias(x, False) for x in self.tensors]
        self.constants = [x for _, x in self._reach.tensors.values() if not x.requires_grad]
        self.plain = self._reach.rebind({id(x): a for x, a in zip(self.tensors, self.without, strict=True)})
        self.vetted: list[Tensor] = []
        """Tensors from outside that the first step used; those that it made itself hold no numbers of its arguments."""
        self.alike = True
        """Whether torch takes the same operations with and without grad; if not, plain steps are recorded ones."""
        self.recorded = self._reach.rebind({id(x): a for x, a in zip(self.tensors, self.leaves, strict=True)})
        self.suspected = False
        """Whether random numbers were drawn in the first sweep, maybe by another thread."""
        self.versions: list[tuple[str, Tensor, int]] = []
        """Of all that :meth:`check` looks at, with what to call it."""
        for name, x in self._reach.tensors.values():
            self.watch(name, x)

    def watch(self, name: str, x: Tensor) -> None:
        """Take part in :meth:`check`."""
        if not x.is_inference():
            spoken = name.replace(f"{self.label}[0]", self.label, 1).replace(f"{self.label}[1]", "args", 1)
            spoken = spoken.replace(f"{self.label}[2]", "observe", 1).replace(f"{self.label}[3]", "events", 1)
            self.versions.append((spoken, x, x._version))

    def arrivals(self) -> dict[int, Tensor]:
        """Tensors that the function reaches now, and did not when it was looked at first."""
        now = Reach(self.original, self.label).tensors
        then = self._reach.tensors.keys() | {id(x) for x in self.vetted}
        return {key: x for key, (_, x) in now.items() if key not in then}

    def listener(self, *known: Tensor) -> Listener:
        """What runs the recorded function and refuses what it may have kept; asked anew for each reverse sweep."""
        return Listener(self.recorded, (*self.leaves, *self.constants, *self.vetted, *known), self.label)

    @property
    def reach(self) -> Reach:
        """Everything that the function leads to."""
        return self._reach

    @property
    def objects(self) -> Iterable[Any]:
        """Everything that the function reaches."""
        return self._reach.objects

    def lend(self, rows: int, donor: int) -> None:
        """Let recorded steps find the numbers of one row where a tensor with so many rows (or columns) holds NaN.

        A step that comes out finite takes no number from a NaN; but in its transpose zero times NaN is NaN.
        """
        aliases = {id(x): lent(x, rows, donor) for x in self.constants}
        aliases = {key: x for key, x in aliases.items() if key != id(x)}
        self.constants += aliases.values()
        self.leaves = [_alias(x, True, lent(x, rows, donor)) for x in self.leaves]
        aliases |= {id(x): a for x, a in zip(self.tensors, self.leaves, strict=True)}
        self.recorded = self._reach.rebind(aliases)

    def check_unwritten(self) -> None:
        """Raise if the function itself writes to a tensor that it holds."""
        for name, x, version in self.versions:
            if x._version != version:
                raise RuntimeError(
                    f"{name} (shape {tuple(x.shape)}) is changed in place by {self.label} itself; recomputed steps would "
                    f"differ. Put modules that keep statistics in eval() mode, or make the tensor a part of the state"
                )

    def check(self) -> None:
        """Raise if a tensor changed since it was first used: the recomputed steps would be others."""
        check_versions(self.versions)


def check_versions(versions: Iterable[tuple[str, Tensor, int]]) -> None:
    """Raise if a tensor is not of the version that it was."""
    for name, x, version in versions:
        if x._version != version:
            raise RuntimeError(
                f"{name} (shape {tuple(x.shape)}) was changed in place between the forward and the reverse sweep; "
                f"call backward() before changing it, or work on a clone"
            )


def lent(x: Tensor, rows: int, donor: int) -> Tensor:
    """The tensor with the numbers of one row in place of NaN; itself if it holds none, or has not so many rows."""
    if not differentiable(x) or x.is_meta or rows not in x.shape or not bool(x.isnan().any()):
        return x
    for dim in (i for i, size in enumerate(x.shape) if size == rows):
        x = torch.where(x.isnan(), x.select(dim, donor).unsqueeze(dim), x)
    return x


def _alias(x: Tensor, requires_grad: bool, numbers: Tensor | None = None) -> Tensor:
    """The same numbers (or these) outside of every graph; a parameter stays one, for functions that ask."""
    alias = (x if numbers is None else numbers).detach()
    if isinstance(x, torch.nn.Parameter):
        alias = torch.nn.Parameter(alias, requires_grad)
    alias.__dict__.update(x.__dict__)
    return alias.requires_grad_(requires_grad)


def transformed() -> bool:
    """Whether tensors may be wrapped here by a torch.func transform, or carry tangents."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forwards()


def forwards() -> bool:
    """Whether forward mode is on."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def _refuse_transforms(label: str) -> None:
    """Detached aliases would lose what transforms do."""
    if transformed():
        raise NotImplementedError(
            f"{label} is differentiated inside a torch.func transform or in forward mode, which this call cannot follow; "
            f"use gradient='backprop' and a fixed-step method, or torch.autograd.grad without transforms"
        )
