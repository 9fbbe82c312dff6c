"""A problem to try things out on: an ODE with parameters, times and a loss, as tensors.

The problems themselves are in :mod:`adjoint.problems` and :mod:`adjoint.stiff_problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjoint.implicit_method import Implicit
from adjoint.linear import LinearAlgebra
from adjoint.methods import NAMED, Method
from adjoint.names import named


@dataclass(frozen=True)
class Case:
    """One problem as tensors on a device: dy/dt = f(t, y, *parameters), y(t[0]) = y0, and a loss of the solution."""

    f: Callable[..., Tensor]
    y0: Tensor
    t: Tensor
    parameters: dict[str, Tensor]
    loss: Callable[[Tensor], Tensor]
    """A number from ys, shape (times, *state)."""
    mass: Tensor | None = None
    """M in M dy/dt = f, if it is not the identity."""
    pair: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
    """For a state (q, p) along its first dimension: q' = pair[0](t, p), p' = pair[1](t, q), as splitting methods ask for."""
    linear: LinearAlgebra | None = None
    """How linear systems are best solved, if not densely."""

    @property
    def args(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters.values())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Everything that is differentiated, by name."""
        return {"y0": self.y0, **self.parameters}

    def suited(self, name: str | Method) -> Method:
        """The method of this name with the mass matrix and the linear algebra of this case; ValueError for another."""
        method = named("method", name, NAMED) if isinstance(name, str) else name
        if self.mass is not None and not isinstance(method, Implicit):
            raise ValueError(f"method={method.name!r} knows no mass matrix; give 'radau5' or 'rodas4', say")
        if not isinstance(method, Implicit):
            return method
        return replace(method, mass=self.mass, linear=self.linear or method.linear)

    def on(self, device: torch.device | str, dtype: torch.dtype) -> Case:
        """The same case with fresh leaves, elsewhere or in another precision."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype).requires_grad_()

        parameters = {name: leaf(x) for name, x in self.parameters.items()}
        mass = None if self.mass is None else self.mass.to(device, dtype)
        return replace(self, y0=leaf(self.y0), t=self.t.to(device, dtype), parameters=parameters, mass=mass)

    def with_values(self, values: dict[str, Tensor]) -> Case:
        """The same case at other values of y0 and the parameters, fresh leaves all."""
        leaves = {name: values.get(name, x).detach().clone().requires_grad_() for name, x in self.inputs.items()}
        return replace(self, y0=leaves.pop("y0"), parameters=leaves)

    def beginning(self, share: float) -> Case:
        """The same equation over a small first share of the first interval, with a loss that asks for no data."""
        start, stop = self.t[0], self.t[1]
        t = torch.stack((start, start + share * (stop - start)))
        return replace(self, t=t, loss=lambda ys: ys.square().mean())


@dataclass(frozen=True)
class NamedProblem:
    """A problem with the defaults that suit it."""

    name: str
    description: str
    make: Callable[[int], Case]
    """A case of this size, in double precision on the CPU."""
    size: int = 0
    """0: the problem has one size only."""
    size_is: str = ""
    least: int = 1
    """The smallest size."""
    method: str = "tsit5"
    dt: float | None = None
    small: float | None = None
    """Numbers of the state below this size hardly count: the absolute tolerance is that much times the relative one."""
    dissipative: bool = False
    """Whether states approach each other so fast that solving them backwards loses every digit."""
    stiff: bool = False
    """Whether explicit methods take far more steps than accuracy asks for."""

    def tolerances(self, rtol: float) -> dict[str, float]:
        """rtol and atol, as arguments of ``solve``."""
        return {"rtol": rtol, "atol": rtol * (1.0 if self.small is None else self.small)}

    def case(
        self, size: int | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Case:
        """The problem as tensors; ValueError for a size that it cannot have."""
        if size is not None and not self.size:
            raise ValueError(f"size={size} says nothing to {self.name}, which has one size only; leave it out")
        if size is not None and size < self.least:
            raise ValueError(f"size={size} is too small for {self.name} ({self.size_is}); give at least {self.least}")
        return self.make(size or self.size).on(device, dtype)


def numbers(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def logs(**values: float) -> dict[str, Tensor]:
    return {f"log_{name}": torch.tensor(math.log(value), dtype=torch.float64) for name, value in values.items()}


def grid(stop: float, times: int) -> Tensor:
    return torch.linspace(0, stop, times, dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
