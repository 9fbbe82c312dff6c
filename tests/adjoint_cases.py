"""Problems, ways to solve them and comparisons that the tests of adjoint share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adjoint import METHODS, Device, Files, Host, Solution, solve
from revolve import Multistage

TIMES = (0.0, 0.5, 1.2)
FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
MEMORY: tuple[dict[str, Any], ...] = (
    *({"slots": slots} for slots in ("all", 1, 2, 3, 5)),
    {"budget": "1 GB"},
    {},
    {"tiers": [Device(slots=1), Host(slots=1, write=0.0, read=0.0), Files(slots=2)]},
    {"schedule": Multistage(1, 2), "tiers": [Device(), Files()]},
)
"""What a gradient must not depend on."""

ROUNDING = 4500
"""Two correct orders of summation differ by a few epsilons a step; 4500 epsilons are 1e-12 in double precision."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same normal numbers for the same seed, on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def steps_of(method: str) -> dict[str, Any]:
    """Few steps: laws about gradients hold for any step size."""
    if METHODS[method].adaptive:
        return {"method": method, "rtol": 1e-2, "atol": 1e-3}
    return {"method": method, "dt": 0.27}


@dataclass
class Case:
    """A right-hand side, where to start, and what to differentiate with respect to."""

    f: Callable[..., Any]
    y0: Any
    t: Any
    wanted: list[Tensor]
    args: tuple[Any, ...] = ()

    def solve(self, **how: Any) -> Solution:
        return solve(self.f, self.y0, self.t, args=self.args, **how)


def loss_of(tree: Any) -> Tensor:
    """A number that depends on every entry of every leaf, linearly and quadratically, each in its own way."""
    leaves = [x for x in pytree.tree_leaves(tree) if x.is_floating_point() or x.is_complex()]
    total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for seed, x in enumerate(leaves):
        weights = numbers(*x.shape, seed=seed, dtype=x.dtype).to(x.device)
        total = total + ((weights * x).sum().real + (x.abs() ** 2).sum() / 2).double()
    return total


def gradients(case: Case, **how: Any) -> list[Tensor | None]:
    """dL/dx for every wanted tensor x."""
    return list(torch.autograd.grad(loss_of(case.solve(**how).ys), case.wanted, allow_unused=True))


def assert_close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], places: float = ROUNDING) -> None:
    """Equal but for rounding, relative to the largest entry; None and zero are the same gradient."""
    coarse = max(
        torch.finfo(x.dtype).eps for x in expected if x is not None and (x.is_floating_point() or x.is_complex())
    )
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            rest = a if b is None else b
            assert rest is None or not rest.any()
        else:
            assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
            if not (b.is_floating_point() or b.is_complex()):
                assert torch.equal(a, b)
            elif b.numel():
                assert float((a - b).detach().abs().max()) <= places * coarse * float(b.detach().abs().max())


def assert_same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


PROBLEMS: dict[str, Callable[[torch.device], Case]] = {}
"""One table: every method meets every problem."""


def problem(make: Callable[[torch.device], Case]) -> Callable[[torch.device], Case]:
    PROBLEMS[make.__name__] = make
    return make


def leaf(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, on: torch.device, scale: float = 1.0
) -> Tensor:
    return (scale * numbers(*shape, seed=seed, dtype=dtype)).to(on).requires_grad_()


def times(on: torch.device, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values or TIMES, dtype=dtype, device=on).requires_grad_()


@problem
def scalar(on: torch.device) -> Case:
    """y' = -p y sin(3 t)"""
    p, y0, t = leaf(on=on, seed=1), leaf(on=on, seed=2), times(on)
    return Case(lambda t, y: -p * y * torch.sin(3 * t), y0, t, [p, y0, t])


@problem
def vector(on: torch.device) -> Case:
    """Lotka and Volterra."""
    p = torch.tensor([1.1, 0.4, 0.4, 0.1], dtype=torch.float64, device=on).requires_grad_()
    y0, t = torch.tensor([2.0, 1.0], dtype=torch.float64, device=on).requires_grad_(), times(on)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack((y[0] * (p[0] - p[1] * y[1]), y[1] * (p[3] * y[0] - p[2])))

    return Case(f, y0, t, [p, y0, t])


@problem
def matrix(on: torch.device) -> Case:
    """A Riccati equation, Y' = A Y + Y A^T - Y B Y."""
    a, b, y0 = (leaf(3, 3, seed=i, on=on, scale=0.3) for i in range(3))
    return Case(lambda t, y: a @ y + y @ a.T - y @ b @ y, y0, times(on), [a, b, y0])


@problem
def other_kernels(on: torch.device) -> Case:
    """A product for which torch takes another kernel when something requires grad."""
    w, y0 = leaf(6, 6, seed=1, on=on, scale=0.3), leaf(3, 6, 2, seed=2, on=on)
    return Case(lambda t, y: torch.tanh(w @ y), y0, TIMES, [w, y0])


@problem
def pair(on: torch.device) -> Case:
    """A tuple of leaves of different shapes, with parameters passed through args."""
    p, a, b = leaf(3, seed=1, on=on), leaf(3, seed=2, on=on), leaf(2, 2, seed=3, on=on)

    def f(t: Tensor, y: tuple[Tensor, Tensor], q: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return -q["rate"] * y[0] + y[1].sum(), torch.cos(y[1]) * y[0].prod()

    return Case(f, (a, b), times(on), [p, a, b], ({"rate": p},))


@problem
def nested(on: torch.device) -> Case:
    """A dict of lists, with a leaf that needs no gradient."""
    p, a, b = leaf(3, seed=1, on=on), leaf(3, seed=2, on=on), numbers(3, seed=3).to(on)

    def f(t: Tensor, y: dict[str, Any]) -> dict[str, Any]:
        return {"x": [torch.sin(y["z"]) * p], "z": -y["x"][0] * t}

    return Case(f, {"x": [a], "z": b}, times(on), [p, a])


@problem
def oscillator(on: torch.device) -> Case:
    """Complex: y' = (i w - |y|^2) y, with a complex parameter."""
    w = leaf(2, seed=1, dtype=torch.complex128, on=on)
    y0, t = leaf(2, seed=2, dtype=torch.complex128, on=on, scale=0.5), times(on)
    return Case(lambda t, y: (1j * w - y.abs() ** 2) * y, y0, t, [w, y0, t])


@problem
def mixed_dtypes(on: torch.device) -> Case:
    """float32, float64 and complex128 in one state."""
    p, a = leaf(3, seed=1, on=on), leaf(3, seed=2, on=on, dtype=torch.float32)
    b, c = leaf(3, seed=3, on=on), leaf(3, seed=4, on=on, dtype=torch.complex128)

    def f(t: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return -y[0] * p.float(), torch.sin(y[1] * p) + y[2].real, 1j * y[2] * y[0].double()

    return Case(f, (a, b, c), times(on), [p, a, b, c])


@problem
def single_precision(on: torch.device) -> Case:
    """float32 throughout, times included."""
    p, y0 = leaf(3, seed=1, on=on, dtype=torch.float32), leaf(3, seed=2, on=on, dtype=torch.float32)
    t = times(on, dtype=torch.float32)
    return Case(lambda t, y: torch.sin(p * y) - y * t, y0, t, [p, y0, t])


@problem
def fine_times(on: torch.device) -> Case:
    """Times more precise than the state."""
    p, y0 = leaf(3, seed=1, on=on, dtype=torch.float32), leaf(3, seed=2, on=on, dtype=torch.float32)
    t = times(on)
    return Case(lambda t, y: (torch.sin(p * y) - y * t).float(), y0, t, [p, y0, t])


@problem
def coarse_times(on: torch.device) -> Case:
    """Times less precise than the state."""
    p, y0, t = leaf(3, seed=1, on=on), leaf(3, seed=2, on=on), times(on, dtype=torch.float32)
    return Case(lambda t, y: torch.sin(p * y) - y * t, y0, t, [p, y0, t])


@problem
def forced(on: torch.device) -> Case:
    """A control held constant over intervals: each step touches some of its entries."""
    control, y0 = leaf(5, seed=1, on=on), leaf(seed=2, on=on)
    return Case(lambda t, y: control[int(4 * t / 1.2)] - y, y0, TIMES, [control, y0])


@problem
def network(on: torch.device) -> Case:
    """A small network over a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double().to(on)
    y0 = leaf(4, 3, seed=1, on=on)
    return Case(lambda t, y: net(y) - y, y0, times(on), [*net.parameters(), y0])


@problem
def backwards(on: torch.device) -> Case:
    """From a later time to an earlier one."""
    p, y0, t = leaf(3, seed=1, on=on), leaf(3, seed=2, on=on), times(on, 1.2, 0.7, -0.1)
    return Case(lambda t, y: p * torch.cos(t) * y, y0, t, [p, y0, t])


@problem
def strided(on: torch.device) -> Case:
    """y0 is a transposed view, and so is what f returns."""
    p, base = leaf(2, 3, seed=1, on=on), leaf(2, 3, seed=2, on=on)
    return Case(lambda t, y: (p * torch.sin(y.T)).T, base.T, TIMES, [p, base])


@problem
def expanded(on: torch.device) -> Case:
    """The rows of y0 share their memory."""
    p, row = leaf(4, 3, seed=1, on=on), leaf(3, seed=2, on=on)
    return Case(lambda t, y: torch.tanh(p * y), row.expand(4, 3), TIMES, [p, row])


@problem
def shared(on: torch.device) -> Case:
    """y0 is also a parameter, and so is t."""
    p, t = leaf(3, seed=1, on=on, scale=0.5), times(on)
    return Case(lambda s, y: torch.cos(p * y) * t[2], p, t, [p, t])


def method_problem_pairs() -> Iterator[tuple[str, str]]:
    return itertools.product(METHODS, PROBLEMS)
