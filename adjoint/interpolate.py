"""Piecewise polynomials in time: a solution between its steps, as a function of time and of its coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.tensors import State, Structure


class Polynomials:
    """u(t) = sum_m c_m theta^m with theta = (t - t_k) / (t_{k+1} - t_k), from t_k to t_{k+1}.

    ``times``: (steps + 1,), increasing or decreasing. ``coefficients``: for each leaf (steps, degree + 1, *shape).
    Both may be on torch's graph, and so may the times it is asked at.
    """

    def __init__(self, times: Tensor, coefficients: Sequence[Tensor]) -> None:
        self.times, self.coefficients = times, tuple(coefficients)
        known = times.detach()
        self._sign = 1.0 if bool(known[-1] >= known[0]) else -1.0
        self._inner = (self._sign * known[1:-1]).contiguous()

    def at(self, t: Tensor) -> State:
        """The leaves at times of any shape, (*times, *shape); outside of the steps the nearest one is continued.

        A time between two steps belongs to the earlier one.
        """
        t = t.to(self.times)
        step = torch.searchsorted(self._inner, (self._sign * t.detach()).contiguous())
        start, stop = self.times[step], self.times[step + 1]
        theta = (t - start) / (stop - start)
        return tuple([self._leaf(c, step, theta) for c in self.coefficients])

    def slope(self, t: Tensor) -> State:
        """du/dt at one time."""
        step = torch.searchsorted(self._inner, self._sign * t.detach().to(self.times))
        length = self.times[step + 1] - self.times[step]
        theta = (t - self.times[step]) / length
        found = []
        for coefficients in self.coefficients:
            value = torch.zeros_like(coefficients[step, 0])
            for power in range(coefficients.shape[1] - 1, 0, -1):
                value = value * theta.to(value.real.dtype) + power * coefficients[step, power]
            found.append(value / length.to(value.real.dtype))
        return tuple(found)

    def _leaf(self, coefficients: Tensor, step: Tensor, theta: Tensor) -> Tensor:
        of_step = coefficients[0] if len(coefficients) == 1 and step.ndim == 0 else coefficients[step]
        columns = of_step.unbind(step.ndim)
        theta = theta.to(columns[0].real.dtype).reshape((*theta.shape, *[1] * (columns[0].ndim - step.ndim)))
        value = columns[-1]
        for column in reversed(columns[:-1]):
            value = column + theta * value
        return value


class DenseSolution:
    """A solution between two times, called with times of any shape between them: a tree, the times' shape leading."""

    def __init__(self, structure: Structure, polynomials: Polynomials) -> None:
        self._structure, self._polynomials = structure, polynomials

    @property
    def ts(self) -> Tensor:
        """The times between which the steps ran, (steps + 1,)."""
        return self._polynomials.times

    def __call__(self, t: Tensor | float) -> Any:
        times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=self.ts.dtype, device=self.ts.device)
        known = times.detach().to(self.ts)
        first, last = sorted(self.ts[[0, -1]].tolist())
        if known.numel() and not bool(((known >= first) & (known <= last)).all()):
            raise ValueError(f"t={t} is not all between {first:g} and {last:g}, where the solution is known")
        return self._structure.unflatten(self._polynomials.at(times))
