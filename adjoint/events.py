"""What happens on the way: events and known times, at which the state may change; the polynomials of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from adjoint.interpolate import Polynomials
from adjoint.steppers.stages import Stages
from adjoint.tensors import State, Structure, refuse_writing, versions_of

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


class FirstEvent:
    """The polynomial of the step in which an event function first changes its sign; the solve ends there.

    Of several components each counts as positive at the start, and the first to reach zero is the event. Signs are
    compared at the ends of steps only, like torchdiffeq's: an event that comes and goes within a step is missed.
    """

    def __init__(self, event: EventFunction, structure: Structure) -> None:
        self.event, self.structure = event, structure
        self.step: int | None = None
        self.component = 0
        self.time = math.nan
        self._signs: Tensor | None = None
        self._next = 0
        self._on_trial = False

    def count(self, steps: int) -> int:
        return 1

    @property
    def done(self) -> bool:
        return self.step is not None

    def afresh(self) -> FirstEvent:
        """For a step on trial, whose polynomial is shown whatever happens in it."""
        other = FirstEvent(self.event, self.structure)
        other._on_trial = True
        return other

    def look(self, stages: Stages) -> tuple[tuple[int, State], ...]:
        k = stages.k
        if not self._on_trial and self.step is None and k == self._next:
            self._next = k + 1
            with torch.no_grad():
                if self._happens(stages):
                    self.step = k
        return ((0, stages.polynomial()),) if self._on_trial or k == self.step else ()

    def value(self, t: Tensor, state: State) -> Tensor:
        """The event function's components, flat; its own graph is kept."""
        seen = tuple(state)
        versions = versions_of(seen)
        found = self.event(t, self.structure.unflatten(seen))
        if versions_of(seen) != versions:
            refuse_writing("event_fn changed its state")
        if not isinstance(found, Tensor) or not found.is_floating_point() or not found.numel():
            raise TypeError(f"event_fn gave {found!r}; it must give a tensor of real numbers that change sign")
        return found.reshape(-1)

    def _happens(self, stages: Stages) -> bool:
        if self._signs is None:
            self._signs = torch.sign(self._checked(stages.start, stages.state))
            if bool((self._signs == 0).any()):
                self.time, self.component = stages.start, int((self._signs == 0).to(torch.int64).argmax())
                return True
        if float(self._least(stages.stop, stages.new)[0]) > 0:
            return False
        self.time = self._root(stages)
        return True

    def _checked(self, t: float, state: State) -> Tensor:
        found = self.value(self._time(t, state), tuple(x.detach() for x in state))
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"event_fn gave {found.tolist()} at t={t:.6g}; it must be finite wherever the solution is")
        return found

    def _least(self, t: float, state: State) -> tuple[Tensor, int]:
        """The least component, counted as positive at the start, and which one it is."""
        assert self._signs is not None
        found = self._checked(t, state) * self._signs
        component = int(found.argmin())
        return found[component], component

    def _root(self, stages: Stages) -> float:
        """Where the least component of the interpolant is zero, as nearly as time can be told."""
        start, stop = stages.start, stages.stop
        ends = torch.tensor([start, stop], dtype=torch.float64, device=stages.state[0].device)
        u = Polynomials(ends, [x.detach()[None] for x in stages.polynomial()])

        def least(t: float) -> float:
            return float(self._least(t, u.at(self._time(t, stages.state)))[0])

        if least(stop) > 0:  # by a rounding error
            root = stop
        else:
            root = float(brentq(least, start, stop, xtol=4 * math.ulp(max(abs(start), abs(stop))), rtol=8.9e-16))
        self.component = self._least(root, u.at(self._time(root, stages.state)))[1]
        return root

    @staticmethod
    def _time(t: float, state: State) -> Tensor:
        return torch.tensor(t, dtype=torch.float64, device=state[0].device)

    def moment(self, u: Polynomials) -> tuple[Tensor, State]:
        """The time of the event and the state there, as functions of the solution and of all that the event depends on."""
        t = torch.tensor(self.time, dtype=u.times.dtype, device=u.times.device)
        y = u.at(t)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*y, self.value(t, y))):
            return t, y
        t = root_on_graph(lambda t: self.value(t, u.at(t))[self.component], t.requires_grad_(), "event_fn")
        return t, u.at(t)


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
