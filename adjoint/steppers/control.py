"""How long the steps of a solve are: tolerances, controllers, and times at which steps end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import Controller
from adjoint.tensors import State


@dataclass(frozen=True)
class Tolerance:
    """The error of a step is measured by err / (atol + rtol max(|y|, |y_new|)), as a root mean square."""

    rtol: float | Tensor | tuple[float | Tensor, ...]
    atol: float | Tensor | tuple[float | Tensor, ...]
    """A number, a tensor that fits the state, or one of these for every leaf."""
    norm: Callable[[State], Any] | None = None
    """In place of the root mean square: a function of the scaled error's leaves."""

    def ratio(self, error: State, before: State, after: State) -> float:
        """1 is just acceptable; not finite if the error is not."""
        return float((self.norm or root_mean_square)(tuple(self.scaled(error, before, after))))

    def worst(self, error: State, before: State, after: State) -> str:
        """Where the error is largest, in words."""
        scaled = list(self.scaled(error, before, after))
        values = [torch.nan_to_num(x, nan=torch.inf).flatten() for x in scaled]
        leaf = max(range(len(values)), key=lambda i: float(values[i].max()) if values[i].numel() else 0.0)
        flat = int(values[leaf].argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), scaled[leaf].shape))
        return f"component {index}" + (f" of leaf {leaf}" if len(values) > 1 else "")

    def scaled(self, error: State, before: State, after: State) -> Sequence[Tensor]:
        """Each error over what is allowed there."""
        return [
            _wide(e.abs()) / (_of_leaf(self.atol, i) + _of_leaf(self.rtol, i) * _wide(torch.maximum(x.abs(), y.abs())))
            for i, (e, x, y) in enumerate(zip(error, before, after, strict=True))
        ]


def _wide(x: Tensor) -> Tensor:
    """Half precision cannot hold an absolute tolerance of 1e-9."""
    return x.float() if x.dtype.itemsize < 4 else x


def root_mean_square(leaves: State) -> float:
    """Over all numbers of all leaves."""
    total: float | Tensor = 0.0
    count = 0
    for x in leaves:
        size = x.abs() if x.is_complex() else x
        total = total + torch.sum(size * size).double()
        count += x.numel()
    return float((total / max(count, 1)) ** 0.5)


def _of_leaf(tolerance: float | Tensor | tuple[float | Tensor, ...], leaf: int) -> float | Tensor:
    return tolerance[leaf] if isinstance(tolerance, tuple) else tolerance


@dataclass(frozen=True)
class Control:
    """How long the steps are: ``dt`` is the longest fixed step, or the first of an adaptive solve."""

    tolerance: Tolerance
    dt: float | None = None
    max_steps: int = 100_000
    controller: Controller = field(default_factory=Controller)
    jumps: tuple[float, ...] = ()
    stops: tuple[float, ...] = ()
    """Times at which controlled steps end, though f is smooth there."""
    perturb: bool = False
    """Whether f is to see a hair inside of every step's ends, as at jumps."""
    time_dtype: torch.dtype | None = None
    """In which f sees the time; None: that of the asked times."""
    rounding: torch.dtype = torch.float64
    """The ends of controlled steps are rounded to it."""
    grid: tuple[float, ...] | None = None
    """Fixed steps between these times, whatever times are asked for; values in between are interpolated."""
    construct: Callable[[Tensor], Tensor] | None = None
    """The grid as a function of the asked times; None: it moves with the first of them."""
    callbacks: Mapping[str, Callable[[Tensor, Any, Tensor], None]] = field(default_factory=dict)
    """"step", "accept", "reject": called with (t, y, |h|) once for each step when it is first tried."""
    twins: Mapping[str, Callable[[Tensor, Any, Tensor], None]] = field(default_factory=dict)
    """The same for the way back: called with (t, (0, y, its cotangent, those of the captured tensors ..), |h|)."""
