"""Views of a solve: the polynomial of every step, or that of the step in which an event happens first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from adjoint.interpolate import Polynomials
from adjoint.steppers.stages import Stages
from adjoint.tensors import State, Structure, refuse_writing, versions_of

EventFunction = Callable[[Tensor, Any], Tensor]


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
        """The time of the event and the state there, as functions of the solution and of all that the event depends on.

        By the implicit function theorem on the interpolant u: 0 = e(t, u(t; p), p), so that
        dt/dp = -(e_p + e_y u_p) / (e_t + e_y u'(t)). It is Newton's iteration from the root itself: one round makes
        first derivatives exact, a second one those up to order 3, the third those up to 7.
        """
        t = torch.tensor(self.time, dtype=u.times.dtype, device=u.times.device)
        y = u.at(t)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*y, self.value(t, y))):
            return t, y
        t.requires_grad_()
        for _ in range(3):
            value = self.value(t, u.at(t))[self.component]
            (slope,) = torch.autograd.grad(value, t, create_graph=True, allow_unused=True)
            along = 0.0 if slope is None else slope.item()
            if along == 0 or not math.isfinite(along):
                raise ValueError(
                    f"event_fn touches zero at t={self.time:.6g} without crossing it (its derivative along the solution "
                    f"is {along}): the time of the event has no derivative. "
                    f"Solve under torch.no_grad(), or give an event that crosses zero"
                )
            t = t - (value - value.detach()) / slope
        return t, u.at(t)
