"""Two ends of one idea: backpropagation through a state-space model, and the adjoint equation that it discretises.

    dx/dt = A x + B u(t),   J = 1/2 integral of (C x - z(t))^2 dt        the model in continuous time
    -dlam/dt = A^T lam + C^T (C x - z),  lam(T) = 0,  dJ/dA = integral of lam x^T dt        its adjoint

Sampled with a step dt, the model is a recurrence, and what backpropagation sends along it is the recurrence backwards:
lam_k = A'^T lam_{k+1} + the error at step k. As dt goes to 0 it becomes lam(t): with the first order if the input is held
(zero-order hold), with the second by the trapezoidal rule. The gradient follows. The discrete gradient is exact all the
while for the numbers that were computed; it is the model that comes nearer. scipy solves the continuous equations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.integrate
import torch
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adjoint import linear_scan
from adjoint.state_space import bilinear_of_matrices, zero_order_hold_of_matrices

END = 8.0
A = torch.tensor([[0.0, 1.0], [-4.0, -0.5]], dtype=torch.float64)
B = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
C = torch.tensor([1.0, 0.2], dtype=torch.float64)
RULES = {"held": zero_order_hold_of_matrices, "trapezoidal": bilinear_of_matrices}


def drive(t: np.ndarray) -> np.ndarray:
    return np.sin(1.3 * t) + 0.5 * np.cos(2.9 * t)


def target(t: np.ndarray) -> np.ndarray:
    return 0.3 * np.cos(0.8 * t)


def discrete(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times 0 .. T, lam there, and dJ/dA, from one reverse sweep; the cost is the trapezoidal sum."""
    dt, t = END / steps, np.linspace(0, END, steps + 1)
    u = drive(t)
    u = torch.tensor(u[:-1] if rule == "held" else (u[:-1] + u[1:]) / 2)
    a = A.clone().requires_grad_()
    one, held = RULES[rule](a, B, torch.tensor(dt, dtype=torch.float64))
    pushes = u[:, None] * held[:, 0]
    x = linear_scan(one[None], pushes)
    error = torch.cat((x.new_zeros(1, 2), x)) @ C - torch.tensor(target(t))
    weights = torch.full((steps + 1,), dt, dtype=torch.float64)
    weights[[0, -1]] /= 2
    lam, of_a = torch.autograd.grad(0.5 * (weights * error.square()).sum(), (pushes, a))
    with torch.no_grad():
        half = dt / 2 * error[:, None] * C  # at a step the cost comes in by halves: lam(t) is between them
        lam = torch.cat(((one.T @ lam[0] + half[0])[None], lam - half[1:]))
    return t, lam.numpy(), of_a.numpy()


def continuous() -> tuple[scipy.integrate.OdeSolution, np.ndarray]:
    """lam(t), backwards in time from the end, and dJ/dA."""
    a, b, c = A.numpy(), B.numpy()[:, 0], C.numpy()
    exact = {"rtol": 1e-11, "atol": 1e-13, "dense_output": True, "method": "DOP853"}
    x = scipy.integrate.solve_ivp(lambda t, x: a @ x + b * drive(t), (0, END), np.zeros(2), **exact).sol

    def back(s: float, y: np.ndarray) -> np.ndarray:
        t = END - s
        return np.concatenate((a.T @ y[:2] + c * (c @ x(t) - target(t)), np.outer(y[:2], x(t)).ravel()))

    found = scipy.integrate.solve_ivp(back, (0, END), np.zeros(6), **exact)
    return found.sol, found.y[2:, -1].reshape(2, 2)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    solution, of_a = continuous()
    counts = [40, 80, 160, 320, 640, *([] if quick else [1280, 2560])]
    errors: dict[str, list[tuple[float, float]]] = {}
    for rule in RULES:
        for steps in counts:
            t, lam, found = discrete(rule, steps)
            off = np.abs(lam - solution(END - t)[:2].T).max(), np.abs(found - of_a).max() / np.abs(of_a).max()
            errors.setdefault(rule, []).append(off)
    orders = {rule: np.log2(np.divide(*np.array(rows)[-2:])) for rule, rows in errors.items()}
    results = {}
    for rule, order in (("held", 1), ("trapezoidal", 2)):
        results[f"order of the adjoint, {rule}"] = Recovered(float(orders[rule][0]), order, 0.1)
        results[f"order of the gradient, {rule}"] = Recovered(float(orders[rule][1]), order, 0.1)
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_adjoints(left, solution)
    for (rule, rows), colour in zip(errors.items(), (ORANGE, BLUE), strict=True):
        of_lam, of_gradient = zip(*rows, strict=True)
        steps = [END / n for n in counts]
        right.loglog(steps, of_lam, "o-", color=colour, label=f"lam, {rule}")
        right.loglog(steps, of_gradient, "s--", color=colour, label=f"dJ/dA, {rule}")
    right.legend(frameon=False, fontsize=8)
    tidy(right, "Away from the continuous adjoint: order 1 and 2", "dt", "largest difference")
    save(figure, out, "continuous_limit")
    return confirm(results)


def draw_adjoints(axes: Axes, solution: scipy.integrate.OdeSolution) -> None:
    fine = np.linspace(0, END, 400)
    axes.plot(fine, solution(END - fine)[1], color=GREY, label="lam(t), the adjoint equation")
    for steps, colour in ((16, ORANGE), (40, BLUE)):
        t, lam, _ = discrete("held", steps)
        axes.plot(t, lam[:, 1], "o", markersize=3.5, color=colour, label=f"backpropagation, dt = {END / steps:.2g}")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "What is sent back along the sequence", "t", "derivative of J by the velocity at t")


if __name__ == "__main__":
    command_line(main)
