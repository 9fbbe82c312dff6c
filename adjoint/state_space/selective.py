"""A selective model: the recurrence of Mamba, whose step size and maps depend on the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from adjoint.state_space.model import Model, log_uniform


class Selective(Model):
    """For each feature h_k = exp(dt_k A) h_{k-1} + dt_k B_k u_k, y_k = C_k h_k + D u_k; dt, B and C are functions of u.

    A is real, negative and diagonal, starting at -1 .. -states; dt = softplus of a projection of rank ``rank`` (by
    default a sixteenth of the features). Source: Gu & Dao (2023), arXiv:2312.00752, section 3.2 and algorithm 2; B is
    discretised as dt B, as their program does. The convolution and the gate around it are not part of this.
    """

    def __init__(
        self, features: int, states: int = 16, *, rank: int | None = None, dt: tuple[float, float] = (0.001, 0.1)
    ) -> None:
        super().__init__()
        self.features, self.states = features, states
        self.rank = max(1, math.ceil(features / 16)) if rank is None else rank
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(features, 1))
        self.select = nn.Linear(features, self.rank + 2 * states, bias=False)
        self.widen = nn.Linear(self.rank, features)
        self.d = nn.Parameter(torch.ones(features))
        with torch.no_grad():
            start = log_uniform(*dt, features).exp()
            self.widen.bias.copy_(start + torch.log(-torch.expm1(-start)))  # softplus of this is dt

    def start(self, batch: int) -> Tensor:
        return self.log_decay.new_zeros(batch, self.features, self.states)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        selected = functional.linear(u, self.select.weight[: -self.states])
        low, b = selected.split((self.rank, self.states), -1)
        dt = functional.softplus(self.widen(low))
        return torch.exp(-dt.unsqueeze(-1) * self.log_decay.exp()), (dt * u).unsqueeze(-1) * b.unsqueeze(-2)

    def read(self, h: Tensor, u: Tensor) -> Tensor:
        c = functional.linear(u, self.select.weight[-self.states :])
        return (h @ c.unsqueeze(-1)).squeeze(-1) + self.d * u
