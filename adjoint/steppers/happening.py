"""The caller's event functions and resets: called, checked, and put on the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjoint.events import root_on_graph
from adjoint.interpolate import Polynomials
from adjoint.steppers.crossings import Found
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tensors import State, refuse_writing, versions_of

Held = tuple[Any, Any, Tensor | None]
"""What an event holds: its function, its reset and its times, as far as it has them."""


class Happening:
    """The events of one step, with its own ``args``: as plain numbers or as recorded ones.

    ``since``: the time from which the step goes on, of the dtype that times have inside.
    """

    def __init__(
        self,
        inner: ExplicitProgram,
        held: tuple[Held, ...],
        f: Callable[..., Any],
        args: tuple[Any, ...],
        since: Tensor,
    ) -> None:
        self.inner, self.structure, self.dtype = inner, inner.structure, inner.dtype
        self.held, self.f, self.args, self.since = held, f, args, since

    def known_time(self, i: int, j: int) -> Tensor:
        """The j-th time of events[i]."""
        times = self.held[i][2]
        assert times is not None
        return times[j].to(self.since)

    def value(self, i: int, t: Tensor, y: State) -> Tensor:
        """events[i] at one time, as a number."""
        versions = versions_of(y)
        found = self.held[i][0](t.to(self.dtype), self.structure.unflatten(y), *self.args)
        if versions_of(y) != versions:
            refuse_writing(f"the function of events[{i}] changed its state")
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.numel() != 1:
            raise TypeError(
                f"the function of events[{i}] gave {found!r}; it must give a tensor of one real number that changes its "
                f"sign. Of several write one Event each"
            )
        return found.reshape(())

    def reset(self, i: int, t: Tensor, y: State) -> State:
        """The state behind events[i]."""
        after = self._reset(i, t, y)
        return self.inner.settled((self.f, self.args), t, after, f"the state behind events[{i}]")

    def _reset(self, i: int, t: Tensor, y: State) -> State:
        reset = self.held[i][1]
        if reset is None:
            return y
        versions, name = versions_of(y), f"the value of the reset of events[{i}]"
        value = reset(t.to(self.dtype), self.structure.unflatten(y), *self.args)
        leaves = self.structure.flatten(value, name)
        if versions_of(y) != versions:
            refuse_writing(f"the reset of events[{i}] changed its state")
        for new, old in zip(leaves, y, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)} and {new.dtype} for a state of shape {tuple(old.shape)} and "
                    f"{old.dtype}; it must be shaped and typed like y"
                )
        return leaves

    def moment(
        self, found: Found, u: Callable[[], Polynomials], recording: bool, leaves: list[Tensor]
    ) -> tuple[Tensor, State]:
        """The time of an event and the state there; on the graph, by the implicit function theorem.

        The leaf that this takes is added to ``leaves``.
        """
        polynomials = u()
        t = torch.tensor(found.time, dtype=polynomials.times.dtype, device=polynomials.times.device)
        if not torch.is_grad_enabled():
            return t, polynomials.at(t)

        def value(t: Tensor) -> Tensor:
            return self.value(found.event, t, polynomials.at(t))

        if not recording and not value(t).requires_grad:
            return t, polynomials.at(t)
        leaf = t.requires_grad_()
        leaves.append(leaf)
        t = root_on_graph(value, leaf, f"the function of events[{found.event}]")
        return t, polynomials.at(t)
