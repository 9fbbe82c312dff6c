"""Right-hand sides made at random from everything that the native engine takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Slope = Callable[[Tensor, Tensor], Tensor]

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sin,
    torch.cos,
    torch.tanh,
    torch.sigmoid,
    torch.relu,
    torch.abs,
    torch.neg,
    torch.square,
    torch.atan,
    torch.asinh,
    torch.erf,
    torch.sgn,
    lambda x: torch.tan(0.3 * torch.tanh(x)),
    lambda x: torch.exp(torch.tanh(x)),
    lambda x: torch.exp2(torch.sin(x)),
    lambda x: torch.expm1(torch.sin(x)),
    lambda x: torch.log(1.5 + x * x),
    lambda x: torch.log2(1.5 + x.abs()),
    lambda x: torch.log10(1.5 + x.abs()),
    lambda x: torch.log1p(x * x),
    lambda x: torch.sqrt(1 + x * x),
    lambda x: torch.rsqrt(1 + x * x),
    lambda x: torch.reciprocal(2 + x * x),
    lambda x: torch.asin(0.9 * torch.sin(x)),
    lambda x: torch.acos(0.9 * torch.sin(x)),
    lambda x: torch.acosh(1.5 + x * x),
    lambda x: torch.atanh(0.9 * torch.sin(x)),
    lambda x: torch.sinh(torch.sin(x)),
    lambda x: torch.cosh(torch.sin(x)),
    lambda x: torch.erfc(x),
    lambda x: (1.5 + x * x) ** 0.7,
    lambda x: 2.0 ** torch.sin(x),
    lambda x: x**3 / (1 + x**2),
    lambda x: (1 + x * x) ** -2,
    lambda x: x.clamp(-0.5, 0.5),
    lambda x: x.clamp(min=0.0) - x.clamp(max=0.25),
    lambda x: x.detach() * x,
    lambda x: x - x.detach().sin(),
    lambda x: torch.where(x > 0.1, x, 0.5 * x),
    lambda x: torch.where(torch.logical_and(x > 0, x < 1) | (x < -0.5), x, -x),
    lambda x: x * x.isfinite() + x.isnan(),
    lambda x: x.masked_fill(x < 0, 0.3),
    lambda x: x - torch.floor(2 * x) * 0.1 + torch.frac(x) + torch.round(x) * 0.1 + torch.trunc(x) + torch.ceil(x),
    lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.6),
    lambda x: nn.functional.silu(x) + nn.functional.softplus(x),
    lambda x: nn.functional.gelu(x) + nn.functional.elu(x) + nn.functional.leaky_relu(x),
    lambda x: nn.functional.hardtanh(x) - nn.functional.logsigmoid(x),
    lambda x: 1.5 - x,
    lambda x: torch.rsub(x, 1.0, alpha=2),
    lambda x: x / 3 + 2 / (1 + x * x),
    lambda x: torch.nan_to_num(x),
    lambda x: no_grad(torch.sin, x) + x,
    lambda x: x.mul(torch.full_like(x, 0.5)).add(torch.ones_like(x), alpha=0.1),
    lambda x: in_place(x),
]
"""Of a vector, to a vector of the same length."""

BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    torch.minimum,
    torch.fmax,
    torch.fmin,
    lambda x, y: torch.sub(x, y, alpha=0.3),
    lambda x, y: x / (1.5 + y * y),
    lambda x, y: torch.atan2(x, 1.5 + y * y),
    lambda x, y: torch.hypot(x + 3, y),
    lambda x, y: (1.2 + x * x) ** torch.sin(y),
    lambda x, y: torch.addcmul(x, x, y, value=0.2),
    lambda x, y: torch.addcdiv(x, x, 2 + y * y, value=0.2),
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: torch.where(x < y, x, y.detach()),
    lambda x, y: torch.maximum(x, x) + y,  # a tie
    lambda x, y: torch.copysign(x.abs() + 1, y.detach() + 3),
    lambda x, y: torch.outer(x, y).sum(0),
    lambda x, y: torch.outer(x, y) @ x,
    lambda x, y: torch.dot(x, y) * torch.ones_like(x),
    lambda x, y: torch.einsum("i,j->ij", x, y).tril().sum(1),
    lambda x, y: torch.stack((x, y)).mean(0) + torch.cat((x, y))[: len(x)],
    lambda x, y: torch.logaddexp(x, y),
    lambda x, y: torch.clamp(x, y.detach() - 1, y.detach() + 1),
]

WHOLE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x - x.mean(),
    lambda x: x * x.sum(),
    lambda x: x / (1 + x.norm()),
    lambda x: x - x.amax(),
    lambda x: x * x.amin().detach(),
    lambda x: x + x.max() - x.min(),
    lambda x: torch.cumsum(x, 0),
    lambda x: torch.roll(x, 1) - torch.flip(x, (0,)),
    lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    lambda x: x.index_select(0, torch.zeros(len(x), dtype=torch.int64)),
    lambda x: torch.gather(x, 0, torch.arange(len(x)).roll(1)),
    lambda x: torch.softmax(x, 0),
    lambda x: torch.log_softmax(x, 0),
    lambda x: torch.diff(x, prepend=x[:1]),
    lambda x: nn.functional.pad(x[1:], (1, 0)),
    lambda x: torch.diag_embed(x).sum(0),
    lambda x: x.unfold(0, 1, 1).squeeze(1),
    lambda x: x.repeat(2)[: len(x)] + x.expand(3, -1).sum(0),
    lambda x: x.view(-1, 1).squeeze(-1) * x.unbind()[0],
    lambda x: torch.stack([v * i for i, v in enumerate(x)]),
    lambda x: x.new_zeros(len(x)).index_add(0, torch.arange(len(x)), x, alpha=0.5),
    lambda x: torch.zeros_like(x).scatter_add(0, torch.zeros(len(x), dtype=torch.int64), x),
    lambda x: torch.func.vmap(torch.sin)(x),
    lambda x: x.var(unbiased=False) + x,
    lambda x: (x > 0).sum() * x,
    lambda x: x * x[0],
    lambda x: nn.functional.layer_norm(x, x.shape),
]


def no_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


def in_place(x: Tensor) -> Tensor:
    z = x.clone()
    z[0] = 0.5
    z[1:] += x[:-1]
    z *= 0.5
    z[-1].sub_(x[0])
    out = torch.zeros_like(x)
    out[:] = z
    return out


class Layer(nn.Module):
    """A module with a parameter that is shared, a buffer, and a list."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, 3)
        self.second = nn.Linear(3, size, bias=False)
        self.register_buffer("scale", torch.rand(size))
        self.rest = nn.ParameterList([nn.Parameter(torch.rand(size))])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale + self.rest[0] * x


def slope(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Slope, Tensor, list[Tensor]]:
    """A right-hand side, a first state, and what it holds that requires grad."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size = draw.randint(2, 4)
    held = [torch.randn(size, dtype=dtype).requires_grad_(), torch.tensor(0.7, dtype=dtype).requires_grad_()]
    fixed = {"shift": torch.randn(size, dtype=dtype), "rate": 0.25}
    words: list[tuple[int, Any]] = []
    for _ in range(draw.randint(2, 4)):
        kind = draw.randrange(3)
        words.append((kind, draw.choice([UNARY, BINARY, WHOLE][kind])))
    module = Layer(size).to(dtype) if draw.random() < 0.2 else None
    with_time, ends_detached = draw.random() < 0.5, draw.random() < 0.1

    def f(t: Tensor, y: Tensor) -> Tensor:
        x, kept = y * held[1] + fixed["shift"], [y, held[0]]
        for i, (kind, word) in enumerate(words):
            x = word(x, kept[i % len(kept)]) if kind == 1 else word(x)
            kept.append(x)
        if module is not None:
            x = x + module(y)
        if with_time:
            x = x * torch.cos(t)
        if ends_detached:
            x = x.detach()
        return torch.tanh(x) - fixed["rate"] * y

    parameters = [*held, *(module.parameters() if module is not None else ())]
    return f, torch.randn(size, dtype=dtype).requires_grad_(), parameters
