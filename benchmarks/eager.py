"""The eager engine against a bare loop over ``torch.autograd.grad`` with the same runs, and against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import adjoint
import revolve
from benchmarks.measure import Section, interleaved

Slope = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    f: Slope
    y0: Tensor
    parameters: tuple[Tensor, ...]
    steps: int
    slots: int
    length: float


def lotka_volterra(y: Tensor, p: tuple[Tensor, ...]) -> Tensor:
    a, b, c, d = p[0].unbind()
    prey, predator = y.unbind(-1)
    return torch.stack((a * prey - b * prey * predator, d * prey * predator - c * predator), -1)


def network(y: Tensor, p: tuple[Tensor, ...]) -> Tensor:
    return torch.tanh(y @ p[0] + p[1]) @ p[2] + p[3]


def cases(device: str) -> list[Case]:
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "device": device}
    rates = torch.tensor([1.1, 0.4, 0.4, 0.1], **double)
    weights = (torch.randn(64, 64, **double) / 8, torch.zeros(64, **double))
    return [
        Case("Lotka-Volterra, 1", lotka_volterra, torch.tensor([10.0, 5.0], **double), (rates,), 500, 22, 10.0),
        Case("Lotka-Volterra, 1000", lotka_volterra, 5 + torch.rand(1000, 2, **double), (rates,), 500, 22, 10.0),
        Case("network 64-64-64, batch 64", network, torch.randn(64, 64, **double), weights + weights, 500, 22, 1.0),
    ]


def rk4_step(f: Slope, y: Tensor, p: tuple[Tensor, ...], h: float) -> Tensor:
    k1 = f(y, p)
    k2 = f(torch.add(y, k1, alpha=h / 2), p)
    k3 = f(torch.add(y, k2, alpha=h / 2), p)
    k4 = f(torch.add(y, k3, alpha=h), p)
    total = torch.add(torch.add(torch.add(k1 / 6, k2, alpha=1 / 3), k3, alpha=1 / 3), k4, alpha=1 / 6)
    return torch.add(y, total, alpha=h)


def bare(case: Case, rows: list[list[int]]) -> list[Tensor]:
    """What a careful user would write by hand around the same plan: nothing is checked, nothing is general."""
    h = case.length / case.steps
    plain, leaves = case.parameters, tuple(p.clone().requires_grad_() for p in case.parameters)
    sums = [torch.zeros_like(p) for p in leaves]
    kept: dict[int, Tensor] = {}
    state = leaf = end = cotangent = case.y0
    for verb, a, b in rows:
        if verb == 0:
            with torch.no_grad():
                for _ in range(a, b):
                    state = rk4_step(case.f, state, plain, h)
        elif verb == 1:
            leaf = state.detach().requires_grad_()
            end = rk4_step(case.f, leaf, leaves, h)
            if b == case.steps:
                cotangent = 2 * end.detach()
        elif verb == 2:
            cotangent, *gradients = torch.autograd.grad(end, (leaf, *leaves), cotangent)
            for total, g in zip(sums, gradients, strict=True):
                total += g
        elif verb == 3:
            kept[a] = state.clone()
        elif verb == 4:
            state = kept[a]
        else:
            del kept[a]
    return [cotangent, *sums]


def ours(case: Case, **how: int | str) -> list[Tensor]:
    y0 = case.y0.clone().requires_grad_()
    parameters = tuple(p.clone().requires_grad_() for p in case.parameters)
    solution = adjoint.solve(
        lambda t, y: case.f(y, parameters),
        y0,
        [0.0, case.length],
        method="rk4",
        dt=case.length / case.steps,
        **how,  # type: ignore[arg-type]
    )
    return list(torch.autograd.grad((solution.ys[-1] ** 2).sum(), (y0, *parameters)))


def torch_loop(case: Case) -> list[Tensor]:
    y0 = case.y0.clone().requires_grad_()
    parameters = tuple(p.clone().requires_grad_() for p in case.parameters)
    y = y0
    for _ in range(case.steps):
        y = rk4_step(case.f, y, parameters, case.length / case.steps)
    return list(torch.autograd.grad((y**2).sum(), (y0, *parameters)))


def run(device: str) -> Section:
    rows = []
    for case in cases(device):
        plan = revolve.Binomial(case.slots).array(case.steps).tolist()
        runs = (
            lambda case=case, plan=plan: bare(case, plan),
            lambda case=case: ours(case, slots=case.slots),
            lambda case=case: torch_loop(case),
            lambda case=case: ours(case, slots="all"),
        )
        for mine, other in zip(runs[1](), runs[0](), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        times = interleaved(runs, repeats=15, device=device)
        rows.append(
            (
                case.name,
                f"{case.steps} / {case.slots}",
                f"{times.of(0) * 1e3:.0f}",
                f"{times.of(1) * 1e3:.0f}",
                f"**{times.ratio(1, 0):.2f}**",
                f"{times.of(2) * 1e3:.0f}",
                f"{times.of(3) * 1e3:.0f}",
                f"**{times.ratio(3, 2):.2f}**",
            )
        )
    return Section(
        "The eager engine against loops written by hand",
        "One gradient of |y(T)|^2 with respect to the first state and all parameters, RK4, float64. The bare loop makes "
        'the same plain and recorded runs in the same slots; the torch loop stores everything, as does `slots="all"`. '
        "Milliseconds (of the processor; on a GPU by the clock), medians of 15 taken in turn; ratios of the same round. "
        "A call costs some milliseconds whatever its length: its first step is tried, weighed and reversed beforehand.",
        ("problem", "steps / slots", "bare loop", "adjoint", "ratio", "torch loop", "adjoint, all", "ratio"),
        tuple(rows),
    )
