"""Tensors that a function uses without having been found, and the sentences that refuse them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor
from torch.overrides import TorchFunctionMode

from adjoint.tensors import differentiable, is_plain, tensors_in


class UntrackedTensorError(RuntimeError):
    """A function used a tensor that requires grad and that could not be followed."""


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
