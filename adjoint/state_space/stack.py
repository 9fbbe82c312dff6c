"""Layers on top of each other: a grid of time x depth, in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adjoint.gradients import is_backprop
from adjoint.recurrence import Drawing
from adjoint.scan import generators_of, scan
from adjoint.state_space.model import CHUNK, Model, check_sequence, over_rows, rows_there

States = tuple[Tensor, ...]


class Stack(nn.Module):
    """Models one after another, x <- x + activation(model(norm(x))), with a state and a layer norm of each.

    In time, chunks are differentiated one at a time, as in one model. With ``layers`` fewer than there are, a chunk is
    reversed in groups of so many: what lies between groups is kept for one chunk, the inside of a group computed once
    more. ``revolve.Grid`` says what a tile, chunk x layers, takes, and which one takes least.
    """

    def __init__(self, models: Iterable[Model], activation: Callable[[Tensor], Tensor] = nn.functional.gelu) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.activation = activation
        widths = {model.features for model in self._each()}
        if len(widths) != 1:
            raise ValueError(f"models have the features {sorted(widths)}; give one or more, all of the same width")
        (self.features,) = widths
        self.norms = nn.ModuleList(nn.LayerNorm(self.features) for _ in self.models)

    def _each(self) -> list[Model]:
        return list(self.models)  # type: ignore[arg-type]

    def start(self, batch: int) -> States:
        """The states before the first row: zero, one for each model."""
        return tuple(model.start(batch) for model in self._each())

    def step(self, states: States, u: Tensor) -> tuple[States, Tensor]:
        """Recurrent mode: the next states and the output, (batch, features), from states and one input."""
        new, y = self._rows(len(self.models), states, u.unsqueeze(0))
        return new, y[0]

    def forward(
        self,
        u: Tensor,
        states: States | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        chunk: int = CHUNK,
        layers: int | None = None,
        **memory: Any,
    ) -> tuple[Tensor, States]:
        """Outputs (batch, length, features), and the last states. ``chunk`` rows of ``layers`` models make a tile;
        ``lengths`` and ``memory`` as in :class:`Model`."""
        check_sequence(u, self.features)
        layers = len(self.models) if layers is None else layers
        if layers < 1:
            raise ValueError(f"layers={layers} is no number of models in a tile; give at least 1")
        states = self.start(len(u)) if states is None else states
        u = u.transpose(0, 1)
        inputs = (u,) if lengths is None else (u, rows_there(lengths, u))
        draws = memory.get("random") or is_backprop(memory.get("gradient", "discrete"))
        generators = generators_of(self, (), (u,)) if draws else ()
        rows = over_rows(partial(self._rows, layers, generators=generators))
        last, y = scan(rows, states, inputs, chunk=chunk, parallel=True, **memory)
        return y.transpose(0, 1), last

    def _rows(
        self,
        layers: int,
        states: States,
        x: Tensor,
        there: Tensor | None = None,
        generators: tuple[torch.Generator, ...] = (),
    ) -> tuple[States, Tensor]:
        """A chunk through all models, group by group; what the last group is made of is used at once."""
        new: list[Tensor] = []
        x = x if there is None else torch.where(there.unsqueeze(-1), x, 0)
        for bottom in range(0, len(self.models), layers):
            top = min(bottom + layers, len(self.models))
            group = partial(self._group, bottom, top)
            if top < len(self.models) and torch.is_grad_enabled():
                *found, x = checkpoint(
                    group,
                    states[bottom:top],
                    x,
                    there,
                    use_reentrant=False,
                    preserve_rng_state=False,  # it would miss a torch.Generator of the caller's
                    context_fn=partial(_once_and_again, generators),
                )
            else:
                *found, x = group(states[bottom:top], x, there)
            new += found
        return tuple(new), x if there is None else torch.where(there.unsqueeze(-1), x, 0)

    def _group(self, bottom: int, top: int, states: States, x: Tensor, there: Tensor | None) -> States:
        """The new states of these models, and what goes on to the next."""
        new = []
        for model, norm, state in zip(self._each()[bottom:top], self.norms[bottom:top], states, strict=True):
            after, y = model.rows(state, norm(x), there)
            new.append(after)
            x = x + self.activation(y)
        return *new, x


def _once_and_again(generators: tuple[torch.Generator, ...]) -> tuple[AbstractContextManager[Any], Drawing]:
    """What a group is run in, and run in once more: the same draws."""
    return nullcontext(), Drawing(generators, tuple(g.get_state() for g in generators))
