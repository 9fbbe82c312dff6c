"""Many members with steps of their own: against torchode, against steps that all share, and one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adjoint
from benchmarks.measure import Section, interleaved

try:
    import torchode
except ImportError:
    torchode = None

SAMPLE = 4
"""So many members are solved one by one; the time of all is that times the rest."""


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[list[Tensor]], Callable[[Tensor, Tensor], Tensor]]
    """From parameters to f."""
    own: bool
    """Whether each member has a row of parameters."""
    parameters: list[Tensor]
    y0: Tensor
    t: Tensor
    tolerance: float


def predators(parameters: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, y: Tensor) -> Tensor:
        born, eaten, starved, fed = parameters[0].unbind(-1)
        prey, hunters = y.unbind(-1)
        return torch.stack((prey * (born - eaten * hunters), hunters * (fed * prey - starved)), -1)

    return f


def network(parameters: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    inner, bias, outer = parameters
    return lambda t, y: torch.tanh(y @ inner + bias) @ outer - y


def cases(device: str) -> list[Case]:
    torch.manual_seed(0)
    double: dict[str, Any] = {"dtype": torch.float64, "device": device}
    rates = torch.tensor([1.1, 0.4, 0.4, 0.1], **double) * (0.8 + 0.4 * torch.rand(1000, 4, **double))
    prey = 5 + 5 * torch.rand(1000, 2, **double)
    weights = [torch.randn(16, 64, **double) / 2, torch.randn(64, **double), torch.randn(64, 16, **double) / 4]
    end, often = torch.tensor([0.0, 10.0], **double), torch.linspace(0, 10, 50, **double)
    states = 3 * torch.randn(200, 16, **double)
    return [
        Case("Lotka-Volterra, 1000 parameter sets", predators, True, [rates], prey, end, 1e-6),
        Case("the same at 50 times", predators, True, [rates], prey, often, 1e-6),
        Case("the same, 10 parameter sets", predators, True, [rates[:10]], prey[:10], end, 1e-6),
        Case("network 16-64-16, 200 states", network, False, weights, states, end, 1e-6),
    ]


def ours(case: Case, batched: bool, **how: Any) -> adjoint.Solution:
    how = {"method": "tsit5", "rtol": case.tolerance, "atol": case.tolerance} | how
    return adjoint.solve(case.make(case.parameters), case.y0, case.t, batched=batched, **how)


def theirs(case: Case) -> Tensor:
    """torchode with the same method, tolerance and controller."""
    term = torchode.ODETerm(case.make(case.parameters))
    tolerance, coefficients = {"atol": case.tolerance, "rtol": case.tolerance}, {"pcoeff": 0.2, "icoeff": 0.65}
    controller = torchode.PIDController(**tolerance, **coefficients, dcoeff=0.0, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term), controller)
    times = case.t.expand(len(case.y0), -1).contiguous()
    return solver.solve(torchode.InitialValueProblem(y0=case.y0, t_eval=times)).ys.transpose(0, 1)


def one_by_one(case: Case) -> list[Tensor]:
    found = []
    for b in range(SAMPLE):
        parameters = [x[b] if case.own else x for x in case.parameters]
        how = {"method": "tsit5", "rtol": case.tolerance, "atol": case.tolerance}
        ys = adjoint.solve(case.make(parameters), case.y0[b], case.t, **how).ys  # type: ignore[arg-type]
        found += torch.autograd.grad(ys[1:].sum(), case.parameters)
    return found


def gradient(case: Case, solve: Callable[[Case], Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(solve(case)[1:].sum(), case.parameters))


def plainly(run: Callable[[Case], Any], case: Case) -> Callable[[], Any]:
    return torch.no_grad()(lambda: run(case))


def run(device: str) -> Section:
    rows = []
    for case in cases(device):
        for x in case.parameters:
            x.requires_grad_()
        batch, shared = ours(case, True), ours(case, False)
        tries = batch.stats.lockstep / (shared.stats.steps + shared.stats.rejected)
        rival = (lambda case: ours(case, True).ys) if torchode is None else theirs
        torch.testing.assert_close(rival(case), batch.ys, rtol=1e-3, atol=1e-3)
        runs = (
            plainly(rival, case),
            plainly(lambda case: ours(case, True).ys, case),
            plainly(lambda case: ours(case, False).ys, case),
            lambda case=case, rival=rival: gradient(case, rival),
            lambda case=case: gradient(case, lambda case: ours(case, True).ys),
            lambda case=case: gradient(case, lambda case: ours(case, True, slots=8).ys),
            lambda case=case: one_by_one(case),
        )
        times = interleaved(runs, repeats=7, device=device)
        count = len(case.y0)
        missing = torchode is None
        rows.append(
            (
                case.name,
                f"{batch.stats.lockstep}",
                "not installed" if missing else f"{times.of(0) * 1e3:.0f}",
                f"{times.of(1) * 1e3:.0f}",
                "" if missing else f"**{times.ratio(1, 0):.2f}**",
                f"{times.ratio(1, 2) / tries:.2f}",
                "not installed" if missing else f"{times.of(3) * 1e3:.0f}",
                f"{times.of(4) * 1e3:.0f}",
                "" if missing else f"**{times.ratio(4, 3):.2f}**",
                f"{times.of(5) * 1e3:.0f}",
                f"{times.of(6) * 1e3 * count / SAMPLE:.0f}",
            )
        )
    version = "" if torchode is None else f" {torchode.__version__}"
    return Section(
        "Members with steps of their own",
        f"`solve(..., batched=True)` against torchode{version} with the same method (tsit5), tolerance (1e-6) and "
        "controller (PI), float64: values alone, and the gradient of the sum of all states with respect to all "
        "parameters; torchode stores everything, as does adjoint unless it is told `slots=8`. "
        "`a step` is the time of a lock-step step over that of a step of the same state in steps that all members "
        f"share. One by one: {SAMPLE} members measured, times the rest. torchode could not be scripted: "
        "`torch.jit.script` of its solver ends in an internal assertion of this torch. "
        "Milliseconds, medians of 7 taken in turn.",
        (
            "problem",
            "lock-step steps",
            "torchode",
            "adjoint",
            "ratio",
            "a step",
            "torchode, gradient",
            "adjoint, gradient",
            "ratio",
            "slots=8",
            "one by one",
        ),
        tuple(rows),
    )
