"""Tensors that a function keeps from one call for the next: they have lost the way back to what they were made from.

Where a function keeps one can often be followed (:class:`adjoint.tensors.Reach`). Where it cannot, the function is
listened to: a tensor that a call uses, was not given, did not make, and did not use at first either, may be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

from adjoint.tensors import differentiable, is_plain, tensors_in
from adjoint.touched import Touched, UntrackedTensorError, refuse_late

Result = TypeVar("Result")


def heard(k: int) -> bool:
    """Whether call k is listened to: all of the first 4, and 2 between a power of two and the next."""
    return k & ((1 << max(0, k.bit_length() - 2)) - 1) == 0


def refuse_used_again(error: RuntimeError, name: str, step: int) -> None:
    """Say what torch's error means in the transpose of a step: its graph holds a piece of another step's."""
    if "backward through the graph a second time" in str(error):
        raise UntrackedTensorError(
            f"{name} keeps a tensor from one call for the next, and uses it in step {step} when the graph of the call that "
            f"made it is gone; its gradient would be lost. Compute it before the solve and pass it through args=, or anew "
            f"in each call"
        ) from error


def times_noted(function: Any, touched: Touched) -> Any:
    """(f, args, ...) such that what is made of the times that f gets counts as made of what a gradient may reach."""
    f, args, *others = function

    def noted(inner: Callable[..., Any], t: Any, *given: Any) -> Any:
        t = t.view_as(t)  # a step may hand out its own tensor again and again
        touched.inside.add(t)
        touched.derived.add(t)
        return inner(t, *given)

    return _through(noted, f), args, *(_through(noted, g) for g in others)


class Listener:
    """Runs a function (f, args, ...) and refuses what it may have kept. ``known``: what it may use.

    Behind args stand more functions, or tuples of functions and of tensors.
    """

    def __init__(self, function: Any, known: Iterable[Tensor], name: str) -> None:
        self._function, self._name = function, name
        self._known = {id(x): x for x in known}

    def run(self, run: Callable[[Any], Result], when: str) -> Result:
        """``run(function)``, and once more if it used something unknown: what is made anew is another tensor then."""
        result, first = self._listen(run)
        if first:
            _, again = self._listen(run)
            for key in first.keys() & again.keys():
                refuse_late(first[key], self._name, when)
        return result

    def _listen(self, run: Callable[[Any], Result]) -> tuple[Result, dict[int, Tensor]]:
        f, args, *others = self._function
        mode = _Listening(self._known)

        def listened(function: Callable[..., Any], *given: Any) -> Any:
            mode.known.update((id(x), x) for x in tensors_in((given,)))
            with mode:
                return function(*given)

        result = run((_through(listened, f), args, *(_through(listened, g) for g in others)))
        return result, {key: x for key, x in mode.unknown.items() if is_plain(x) and differentiable(x) and x.numel()}


def _through(listened: Callable[..., Any], held: Any) -> Any:
    """Functions, and those in tuples, called by ``listened``."""
    if isinstance(held, tuple):
        return tuple([_through(listened, x) for x in held])
    return partial(listened, held) if callable(held) else held


class _Listening(TorchFunctionMode):
    """Notes tensors that are handed to torch functions and are neither known nor made while the mode is on."""

    def __init__(self, known: dict[int, Tensor]) -> None:
        super().__init__()
        self.known, self.unknown = dict(known), dict[int, Tensor]()
        self._made: set[int] = set()
        """Names alone: what an earlier call kept is there all the time, so that nothing made now has its name."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known, made = self.known, self._made
        for x in tensors_in(args if kwargs is None else (*args, *kwargs.values())):
            if id(x) not in made and id(x) not in known:
                self.unknown[id(x)] = x
        result = function(*args, **kwargs) if kwargs else function(*args)
        made.update([id(x) for x in tensors_in((result,)) if id(x) not in self.unknown])
        return result
