"""Nonlinear recurrences: any cell over a sequence; cells that are differential equations between two rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adjoint.names import named
from adjoint.scan import scan
from adjoint.state_space.model import check_sequence, over_rows
from adjoint.tableaus import METHODS


class Recurrent(nn.Module):
    """A cell, h = cell(u, h), over sequences (batch, length, features) to states (batch, length, states).

    Any module of torch's form will do (nn.GRUCell, nn.RNNCell), and those below. Cells in continuous time are called as
    cell(u, h, elapsed) when ``elapsed`` is given.
    """

    def __init__(self, cell: nn.Module, features: int, states: int) -> None:
        super().__init__()
        self.cell, self.features, self.states = cell, features, states

    def start(self, batch: int) -> Tensor:
        """Zero, (batch, states)."""
        return next(self.cell.parameters(), torch.empty(0)).new_zeros(batch, self.states)

    def step(self, state: Tensor, u: Tensor, elapsed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Recurrent mode: the next state, which is also the output, from a state and one input (batch, features)."""
        new = self.cell(u, state) if elapsed is None else self.cell(u, state, elapsed)
        return new, new

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        **memory: Any,
    ) -> tuple[Tensor, Tensor]:
        """States (batch, length, states), and the last one, which may go into the next call.

        ``elapsed``: (batch, length), the time from one row to the next. ``lengths``: for each member how many rows are
        its own. ``memory``: chunk, slots, budget, random, biased_truncation and so on of :func:`adjoint.scan`.
        """
        check_sequence(u, self.features)
        if elapsed is not None and elapsed.shape != u.shape[:2]:
            raise ValueError(
                f"elapsed has the shape {tuple(elapsed.shape)}; give (batch, length), {tuple(u.shape[:2])}"
            )
        inputs = (u,) if elapsed is None else (u, elapsed.unsqueeze(-1))
        state = self.start(len(u)) if state is None else state
        last, y = scan(over_rows(self.step), state, inputs, batch_first=True, lengths=lengths, **memory)
        return y, last


class LiquidCell(nn.Module):
    """A liquid time constant: dx/dt = -(1/tau + f) x + f A, with f = sigmoid(W x + U u + bias).

    ``substeps`` steps of the fused solver, x <- (x + dt f A) / (1 + dt (1/tau + f)), which is stable for any dt.
    Source: Hasani, Lechner, Amini, Rus & Grosu (2021), AAAI, arXiv:2006.04439, equations 1 and 3.
    """

    def __init__(self, features: int, states: int, substeps: int = 6) -> None:
        super().__init__()
        self.substeps = substeps
        self.of_input, self.of_state = nn.Linear(features, states), nn.Linear(states, states, bias=False)
        self.log_tau = nn.Parameter(torch.zeros(states))
        self.a = nn.Parameter(torch.randn(states))

    def forward(self, u: Tensor, x: Tensor, elapsed: float | Tensor = 1.0) -> Tensor:
        dt, driven, leak = elapsed / self.substeps, self.of_input(u), (-self.log_tau).exp()
        for _ in range(self.substeps):
            f = torch.sigmoid(driven + self.of_state(x))
            x = (x + dt * f * self.a) / (1 + dt * (leak + f))
        return x


class ODECell(nn.Module):
    """dx/dt = g(x, u), u held between two rows, with g a network tanh of one hidden layer.

    ``substeps`` steps by an explicit method of :data:`adjoint.METHODS`. Source: Chen, Rubanova, Bettencourt & Duvenaud
    (2018), arXiv:1806.07366, with an input as in Rubanova, Chen & Duvenaud (2019), arXiv:1907.03907.
    """

    def __init__(self, features: int, states: int, hidden: int = 32, method: str = "rk4", substeps: int = 1) -> None:
        super().__init__()
        self.substeps = substeps
        self.tableau = named("method", method, METHODS)
        self.field = nn.Sequential(nn.Linear(states + features, hidden), nn.Tanh(), nn.Linear(hidden, states))

    def forward(self, u: Tensor, x: Tensor, elapsed: float | Tensor = 1.0) -> Tensor:
        dt = elapsed / self.substeps
        for _ in range(self.substeps):
            slopes: list[Tensor] = []
            for row in self.tableau.a:
                at = x
                for weight, slope in zip(row, slopes, strict=False):
                    at = at + dt * weight * slope
                slopes.append(self.field(torch.cat((at, u), -1)))
            for weight, slope in zip(self.tableau.b, slopes, strict=True):
                x = x + dt * weight * slope
        return x
