"""What all sequence models here have in common: (batch, length, features) in and out, in chunks, within a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adjoint.linear_scan import linear_scan
from adjoint.scan import scan

CHUNK = 256


class Model(nn.Module):
    """A linear recurrence between two maps that need no memory: states in parallel inside of chunks, chunks in turn.

    A model says where a state starts (:meth:`start`), and what the recurrence is made of (:meth:`coefficients`) and
    read by (:meth:`read`). Between chunks one state is kept, or fewer as ``slots`` say: a gradient holds all that a
    chunk is made of for one chunk at a time.
    """

    features: int

    def start(self, batch: int) -> Tensor:
        """The state before the first row: zero, (batch, ...)."""
        raise NotImplementedError

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of h_k = a_k h_{k-1} + b_k, from inputs (rows, batch, features)."""
        raise NotImplementedError

    def read(self, h: Tensor, u: Tensor) -> Tensor:
        """Outputs (rows, batch, features) from states (rows, batch, ...) and inputs."""
        raise NotImplementedError

    def rows(self, state: Tensor, u: Tensor, there: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state after a chunk of rows, and their outputs. ``there``: (rows, batch), False where there is no row."""
        if there is not None:
            u = torch.where(there.unsqueeze(-1), u, 0)
        a, b = self.coefficients(u)
        if there is not None:
            here = there.view(*there.shape, *[1] * (b.ndim - 2))
            a, b = torch.where(here, a, 1), torch.where(here, b, 0)
        h = linear_scan(a, b, state)
        y = self.read(h, u)
        return h[-1], y if there is None else torch.where(there.unsqueeze(-1), y, 0)

    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Recurrent mode: the next state and the output, (batch, features), from a state and one input."""
        state, y = self.rows(state, u.unsqueeze(0))
        return state, y[0]

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        chunk: int = CHUNK,
        **memory: Any,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (batch, length, features), and the last state, which may go into the next call.

        ``lengths``: for each member how many rows are its own; beyond, outputs are zero and the state stays.
        ``memory``: slots, budget, tiers, schedule, gradient and so on of :func:`adjoint.scan`.
        """
        check_sequence(u, self.features)
        state = self.start(len(u)) if state is None else state
        u = u.transpose(0, 1)
        inputs = (u,) if lengths is None else (u, rows_there(lengths, u))
        last, y = scan(over_rows(self.rows), state, inputs, chunk=chunk, parallel=True, **memory)
        return y.transpose(0, 1), last


def over_rows(rows: Callable[..., Any]) -> Callable[..., Any]:
    """A step of a scan from a function of (state, *inputs)."""

    def step(state: Any, inputs: tuple[Tensor, ...]) -> Any:
        return rows(state, *inputs)

    return step


def check_sequence(u: Tensor, features: int) -> None:
    if u.ndim != 3 or u.shape[-1] != features:
        raise ValueError(f"u has the shape {tuple(u.shape)}; give (batch, length, {features})")


def rows_there(lengths: Any, u: Tensor) -> Tensor:
    """(length, batch): where each member has a row."""
    own = torch.as_tensor(lengths, device=u.device)
    if own.shape != u.shape[1:2] or own.is_floating_point() or bool(((own < 0) | (own > len(u))).any()):
        raise ValueError(f"lengths={lengths} must be {u.shape[1]} integers between 0 and {len(u)}, one for each member")
    return torch.arange(len(u), device=u.device)[:, None] < own


def pairs(z: Tensor) -> nn.Parameter:
    """Complex numbers as a parameter of real ones, (..., 2), which a change of dtype reaches."""
    return nn.Parameter(torch.view_as_real(z.resolve_conj()).to(torch.get_default_dtype()).contiguous())


def complex_normal(*shape: int) -> Tensor:
    """Complex numbers of variance 1."""
    return torch.randn(*shape, dtype=torch.complex128)


def log_uniform(least: float, most: float, *shape: int) -> Tensor:
    """Logarithms of numbers spread evenly by size."""
    if not 0 < least <= most:
        raise ValueError(f"dt={(least, most)} is no range of step sizes; give two positive numbers, as in (0.001, 0.1)")
    first, last = (torch.tensor(x).log() for x in (least, most))
    return first + (last - first) * torch.rand(*shape)
