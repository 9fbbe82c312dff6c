"""What happens on the way: events and known times, at which the state may change; the polynomials of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjoint.steppers.stages import Stages
from adjoint.tensors import State

EventFunction = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Event:
    """What happens where ``function(t, y, *args)``, one real number, crosses zero along the solution.

    Its sign is compared at both ends of each step and at ``samples`` times in between. One that is zero at the start, or
    right after a reset, counts as having the sign that it takes next.
    """

    function: Callable[..., Tensor]
    reset: Callable[..., Any] | None = None
    """The state from there on, ``reset(t, y, *args)``, a tree like y; None: nothing changes, the event is only noted."""
    terminal: bool | int = False
    """True: the solve ends there, after the reset. A number n: it ends when this happens for the n-th time."""
    direction: int = 0
    """1: only where the function rises, -1: only where it falls, 0: both."""
    samples: int = 3

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function={self.function!r} of an event must be a function of (t, y, *args)")
        _check_reset(self.reset)
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction={self.direction!r} of an event: give 1 (rising), -1 (falling) or 0 (both)")
        for name, least in (("terminal", 0), ("samples", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name}={number!r} of an event must be a whole number, {least} or more")

    @property
    def acts(self) -> bool:
        """Whether it changes the solution, or may end it."""
        return self.reset is not None or bool(self.terminal)


@dataclass(frozen=True)
class At:
    """What happens at known times: the state becomes ``reset(t, y, *args)``, or f jumps there.

    A step ends at each of the times and the next one begins there, with f seen from its own side. If ``times`` is a tensor
    that requires grad, its gradient is that of moving a dose, or the switching time of a piecewise input.
    """

    times: Tensor | Sequence[float]
    reset: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        _check_reset(self.reset)
        times = self.times if isinstance(self.times, Tensor) else torch.tensor(self.times, dtype=torch.float64)
        if times.ndim != 1 or not times.is_floating_point():
            raise ValueError(
                f"times of shape {tuple(times.shape)}, {times.dtype}: give a series, such as At([1.0], ..)"
            )
        if not bool(torch.isfinite(times.detach()).all()):
            raise ValueError(f"times={times.tolist()} must be finite")
        if len(set(times.tolist())) < len(times):
            raise ValueError(
                f"times={times.tolist()} holds a time twice; give each once, with a reset that does it all"
            )
        object.__setattr__(self, "times", times)


def _check_reset(reset: Any) -> None:
    if reset is not None and not callable(reset):
        raise TypeError(f"reset={reset!r} must be a function of (t, y, *args) that returns the state from there on")


@dataclass(frozen=True)
class Occurrences:
    """When one of ``events`` happened, in order, and the states there: trees like y, the times' dimension leading."""

    ts: Tensor
    before: Any
    after: Any
    """Behind the reset; the same as ``before`` if there is none."""

    def __len__(self) -> int:
        return len(self.ts)


class EveryStep:
    """The polynomials of all steps, in order."""

    done = False

    def count(self, steps: int) -> int:
        return max(steps, 1)

    def look(self, stages: Stages) -> tuple[tuple[int, State], ...]:
        return ((stages.k, stages.polynomial()),)

    def afresh(self) -> EveryStep:
        return self


def root_on_graph(value: Callable[[Tensor], Tensor], t: Tensor, name: str) -> Tensor:
    """The root t (a leaf that requires grad) of a function of time, as a function of all that this depends on.

    By the implicit function theorem on the interpolant u: 0 = e(t, u(t; p), p), so that
    dt/dp = -(e_p + e_y u_p) / (e_t + e_y u'(t)). It is Newton's iteration from the root itself: one round makes first
    derivatives exact, a second one those up to order 3, the third those up to 7.
    """
    time = t.item()
    for _ in range(3):
        found = value(t)
        slope: Tensor | None = None
        if found.requires_grad:
            (slope,) = torch.autograd.grad(found, t, create_graph=True, allow_unused=True)
        along = 0.0 if slope is None else slope.item()
        if slope is None or along == 0 or not math.isfinite(along):
            raise ValueError(
                f"{name} touches zero at t={time:.6g} without crossing it (its derivative along the solution "
                f"is {along}): the time of the event has no derivative. "
                f"Solve under torch.no_grad(), or give an event that crosses zero"
            )
        t = t - (found - found.detach()) / slope
    return t
