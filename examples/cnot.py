"""Quantum control: a pulse that turns two coupled spins by a CNOT gate, found by following the gradient (GRAPE).

    i dU/dt = H(t) U,    H(t) = Z1 Z2 + u_1(t) X1 + u_2(t) Y1 + u_3(t) X2 + u_4(t) Y2,    U(0) = 1

The four controls are constant in pieces, and U is a complex matrix, solved as such. The fidelity |tr(CNOT^* U(T))|^2 / 16 is
to be 1 (the phase of the whole does not matter); its gradient in all amplitudes comes from one reverse sweep, as
in Khaneja et al. (2005), J. Magn. Reson. 172, 296-305. The pulse is then tried with exact exponentials of each piece, which
share nothing with the solver, and the derivatives are held against differences of those.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _fitting import minimise
from _workbench import BLUE, GREEN, ORANGE, PINK, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

C = torch.complex128
PIECES, END, STEPS = 12, 2.2, 10
"""STEPS of rk4 to a piece."""
ONE = torch.eye(2, dtype=C)
X = torch.tensor([[0, 1], [1, 0]], dtype=C)
Y = torch.tensor([[0, -1j], [1j, 0]], dtype=C)
Z = torch.tensor([[1, 0], [0, -1]], dtype=C)
COUPLING = torch.kron(Z, Z)
CONTROLS = torch.stack([torch.kron(X, ONE), torch.kron(Y, ONE), torch.kron(ONE, X), torch.kron(ONE, Y)])
CNOT = torch.eye(4, dtype=C)[[0, 1, 3, 2]]
EDGES = torch.linspace(0, END, PIECES + 1, dtype=torch.float64)


def fidelity(u: Tensor) -> Tensor:
    """Of a unitary matrix with CNOT, whatever the phase: 0 to 1."""
    return (CNOT.conj().T @ u).diagonal(dim1=-2, dim2=-1).sum(-1).abs() ** 2 / 16


def turned(pulse: Tensor, times: Tensor = EDGES[[0, -1]]) -> Tensor:
    """U at these times, by the solver; pulse: (pieces, 4)."""
    signal = adjoint.Signal(EDGES[:-1], pulse, "constant")

    def change(t: Tensor, u: Tensor) -> Tensor:
        return -1j * ((COUPLING + (signal(t)[:, None, None] * CONTROLS).sum(0)) @ u)

    how = {"method": "rk4", "dt": END / PIECES / STEPS, "jumps": signal.jumps, "slots": 12}
    return adjoint.solve(change, torch.eye(4, dtype=C), times, **how).ys


def exactly(pulse: Tensor) -> Tensor:
    """U(T) as the product of the pieces' exponentials."""
    u = torch.eye(4, dtype=C)
    for amplitudes in pulse:
        u = torch.matrix_exp(-1j * END / PIECES * (COUPLING + (amplitudes[:, None, None] * CONTROLS).sum(0))) @ u
    return u


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    draw = torch.Generator().manual_seed(1)
    start = 0.5 * torch.randn((PIECES, 4), generator=draw, dtype=torch.float64)
    climbed: list[float] = []

    def loss(pulse: Tensor) -> Tensor:
        value = 1 - fidelity(turned(pulse)[-1])
        climbed.append(1 - float(value.detach()))
        return value

    pulse = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(pulse), pulse)
    moved = [float(1 - fidelity(exactly(start + s * 1e-5 * slope))) for s in (1, -1)]
    difference = (moved[0] - moved[1]) / 2e-5 / float(slope.square().sum())
    best = torch.tensor(minimise(loss, start, iterations=25 if quick else 80, tolerance=1e-15).x)
    best = best.reshape(PIECES, 4)
    results = {
        "fidelity at first": Recovered(climbed[0], 0.0, 0.6),
        "fidelity of the pulse found": Recovered(climbed[-1], 1.0, 1e-4),
        "fidelity with exact exponentials": Recovered(float(fidelity(exactly(best))), 1.0, 1e-4),
        "slope by differences of exponentials, over that by the adjoint": Recovered(difference, 1.0, 1e-4),
    }

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.semilogy(1 - torch.tensor(climbed).cummax(0).values, color=BLUE)
    tidy(left, f"1 - fidelity, down to {1 - max(climbed):.0e}", "gradients", "")
    for row, colour, name in zip(best.T, (BLUE, ORANGE, GREEN, PINK), ("X1", "Y1", "X2", "Y2"), strict=True):
        middle.stairs(row.numpy(), EDGES.numpy(), color=colour, label=name, baseline=None)
    middle.legend(frameon=False, ncols=4, fontsize=8)
    tidy(middle, "The pulse", "time", "amplitude")
    times = torch.linspace(0, END, 121, dtype=torch.float64)
    with torch.no_grad():
        along = turned(best, times)
    for column, (colour, name) in enumerate(zip((BLUE, ORANGE, GREEN, PINK), ("00", "01", "10", "11"), strict=True)):
        right.plot(times, along[:, 3, column].abs() ** 2, color=colour, label=f"from {name}")
    right.legend(frameon=False, fontsize=8)
    tidy(right, "Population of 11: 10 and 11 change places", "time", "")
    save(figure, out, "cnot")
    return confirm(results)


if __name__ == "__main__":
    command_line(main)
