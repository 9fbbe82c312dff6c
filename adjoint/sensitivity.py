"""Forward sensitivities: the state carries its derivatives in every number that a gradient is wanted of.

    S_{k+1} = A_k S_k + B_k,    S_0 = d(x_0)/d(x_0, p),    A_k, B_k: derivatives of step k in the state and in p

Exact for the numbers that were computed, like the discrete adjoint, and equal to it but for rounding. Time grows with
the number of parameters; memory does not grow with the number of steps, and no step is run again in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.discrete import only_first, prepare, tried_and_run, without_gradient
from adjoint.join import join
from adjoint.problem import Outcome, Problem, Stats
from adjoint.tangents import Directions, Linearisation
from adjoint.tensors import State, differentiable
from adjoint.tiers import Store
from revolve import Schedule


def _nowhere(pair: State) -> tuple[Schedule, dict[int, Store]]:
    raise AssertionError("sensitivities are carried forwards; nothing is kept")


@dataclass(frozen=True)
class Tangent:
    """Derivatives carried along, for few parameters. ``chunk``: so many directions are carried in one sweep."""

    chunk: int = 64

    def __post_init__(self) -> None:
        if not self.chunk >= 1:
            raise ValueError(f"chunk={self.chunk} carries nothing; give at least 1 direction to a sweep")

    def __call__(self, problem: Problem) -> Outcome:
        problem.keep_nothing("tangent")
        stepper, state, inputs = prepare(problem)
        if not (stepper.tracking and any(x.requires_grad for x in inputs)):
            return without_gradient(problem, stepper, state)
        ambient = Ambient()
        with ambient.entered():
            final, failure = tried_and_run(problem, stepper, state)
            stats = Stats(stepper.program, stepper, stepper.frontier)
            if stepper.frontier == 0:
                return Outcome(only_first(problem, stepper), final, stats, None, failure)
            values = stepper.outputs.finished(stepper.program.outputs)
            linear = Linearisation(stepper, state, _nowhere, ambient)
            sensitivities = Sensitivities.of(linear, inputs, self.chunk)
        last = final if problem.wants_final else None
        outputs, last = join(sensitivities, values, last, inputs)
        return Outcome(outputs, last, stats, None, failure)


@dataclass
class Sensitivities:
    """Derivatives of the results in every number of the inputs: rows of one matrix, the numbers' directions first."""

    stepper: AutogradStepper
    inputs: Sequence[Tensor]
    outputs: list[Tensor]
    """(numbers, outputs, ...) for each leaf."""
    state: list[Tensor]

    @classmethod
    def of(cls, linear: Linearisation, inputs: Sequence[Tensor], chunk: int) -> Sensitivities:
        found = [linear.push(directions, count) for directions, count in _units(inputs, chunk)]
        outputs = [torch.cat(rows) for rows in zip(*(outputs for outputs, _ in found), strict=True)]
        state = [torch.cat(rows) for rows in zip(*(state for _, state in found), strict=True)]
        return cls(linear.stepper, inputs, outputs, state)

    def check(self) -> None:
        """Nothing is needed any more but what is here."""

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        """The transposed matrix times the cotangents."""
        pairs = zip((*self.outputs, *self.state), (*of_outputs, *of_state), strict=False)
        parts = [
            _product(_real(rows), _real(c[None])[0]) for rows, c in pairs if c is not None and differentiable(rows)
        ]
        found: list[Tensor | None] = []
        total, start = sum(parts[1:], start=parts[0]), 0
        for x in self.inputs:
            if not x.requires_grad:
                found.append(None)
                continue
            size = x.numel() * (2 if x.is_complex() else 1)
            part, start = total[start : start + size], start + size
            found.append(_like(part, x))
        return found

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        """The matrix times a direction."""
        moving = [(x, v) for x, v in zip(self.inputs, directions, strict=True) if x.requires_grad]
        weights = torch.cat([_real(torch.zeros_like(x)[None] if v is None else v[None])[0] for x, v in moving])
        return [_combined(weights, rows) for rows in self.outputs], tuple(
            _combined(weights, rows) for rows in self.state
        )


def _units(inputs: Sequence[Tensor], chunk: int) -> Iterator[tuple[list[Tensor | None], int]]:
    """Unit directions for every number of the inputs that require grad, at most ``chunk`` at a time."""
    for x in inputs:
        if x.requires_grad and x.layout != torch.strided:
            raise TypeError(f"gradient='tangent' takes no directions in a tensor of layout {x.layout}; use 'discrete'")
    places = [
        (i, j, unit)
        for i, x in enumerate(inputs)
        if x.requires_grad
        for unit in ((1.0, 1j) if x.is_complex() else (1.0,))
        for j in range(x.numel())
    ]
    for start in range(0, len(places), chunk):
        some = places[start : start + chunk]
        directions: list[Any] = [None] * len(inputs)
        for row, (i, j, unit) in enumerate(some):
            if directions[i] is None:
                directions[i] = inputs[i].new_zeros((len(some), *inputs[i].shape), requires_grad=False)
            directions[i].view(len(some), -1)[row, j] = unit
        yield directions, len(some)


def _real(rows: Tensor) -> Tensor:
    """Each row as real numbers: real parts, then imaginary ones."""
    flat = rows.reshape(len(rows), -1)
    return torch.cat((flat.real, flat.imag), 1) if flat.is_complex() else flat


def _product(rows: Tensor, cotangent: Tensor) -> Tensor:
    """Where the cotangent is zero, a row may be anything: a member of a batch that failed, say."""
    found = rows @ cotangent
    return found if bool(torch.isfinite(found).all()) else torch.where(cotangent == 0, 0, rows) @ cotangent


def _like(part: Tensor, x: Tensor) -> Tensor:
    if x.is_complex():
        real, imaginary = part.view(2, -1).to(x.real.dtype)
        return torch.complex(real, imaginary).view(x.shape)
    return part.to(x.dtype).view(x.shape)


def _combined(weights: Tensor, rows: Tensor) -> Tensor:
    if not differentiable(rows):
        return rows[0]
    return (weights.to(rows.dtype) @ rows.reshape(len(rows), -1)).view(rows.shape[1:])
