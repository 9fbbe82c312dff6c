"""The first event of a solve without an end, as torchdiffeq means it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adjoint.events import Event, EventFunction, root_on_graph
from adjoint.interpolate import Polynomials
from adjoint.steppers.crossings import Crossings
from adjoint.steppers.stages import Stages
from adjoint.tensors import State, Structure, refuse_writing, versions_of


class FirstEvent:
    """The polynomial of the step in which an event function first changes its sign; the solve ends there.

    Of several components the first to reach zero is the event; one that is zero at the start is one at once. Signs are
    compared at the ends of steps only, like torchdiffeq's: an event that comes and goes within a step is missed.
    """

    def __init__(self, event: EventFunction, structure: Structure) -> None:
        self.event, self.structure = event, structure
        self.step: int | None = None
        self.component = 0
        self.time = math.nan
        self._together: tuple[int, ...] = ()
        """Components that reach zero at this very time."""
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
            self._signs = torch.sign(self._finite(stages.start, stages.state))
            zero = (self._signs == 0).nonzero().flatten().tolist()
            if zero:
                self.time, self.component, self._together = stages.start, zero[0], tuple(zero)
                return True
        if torch.equal(torch.sign(self._finite(stages.stop, stages.new)), self._signs):
            return False
        ends = torch.tensor([stages.start, stages.stop], dtype=torch.float64, device=stages.state[0].device)
        u = Polynomials(ends, [x.detach()[None] for x in stages.polynomial()])
        each = [Event(self.event, terminal=True, samples=0)] * len(self._signs)
        crossings = Crossings(each, refuse_ties=False)
        crossings.begin(self._component, stages.start, stages.state)
        found, cut = crossings.look(self._component, u, stages.start, stages.stop, stages.new)
        assert cut is not None
        self.time, self.component = cut, found[-1].event
        self._together = tuple(x.event for x in found)
        return True

    def _component(self, i: int, t: Tensor, state: State) -> Tensor:
        return self.value(t, state)[i]

    def _finite(self, t: float, state: State) -> Tensor:
        at = torch.tensor(t, dtype=torch.float64, device=state[0].device)
        found = self.value(at, tuple(x.detach() for x in state))
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"event_fn gave {found.tolist()} at t={t:.6g}; it must be finite wherever the solution is")
        return found

    def moment(self, u: Polynomials) -> tuple[Tensor, State]:
        """The time of the event and the state there, as functions of the solution and of all that the event depends on."""
        t = torch.tensor(self.time, dtype=u.times.dtype, device=u.times.device)
        y = u.at(t)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*y, self.value(t, y))):
            return t, y
        if len(self._together) > 1:
            first, second, *_ = sorted(self._together)
            raise ValueError(
                f"components {first} and {second} of event_fn are zero at once, at t={self.time:.6g}: which comes first "
                f"has no derivative. Solve under torch.no_grad(), or give one component that does what both do"
            )
        t = root_on_graph(lambda t: self.value(t, u.at(t))[self.component], t.requires_grad_(), "event_fn")
        return t, u.at(t)
