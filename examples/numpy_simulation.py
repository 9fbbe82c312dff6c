"""A numpy simulation with a transpose of its own, driven by ``revolve`` alone: no torch anywhere.

Burgers' equation u_t + (u^2 / 2)_x = viscosity u_xx on a ring, as weather services do it (4D-Var): 16 stations report
the wind every tenth step, with noise, and the 128 numbers of the initial state and the viscosity are to be found. The
simulation is a ``revolve.Stepper``: a step, and beside it the step's transpose. Any schedule drives it, and all give
the same gradient, bit for bit. Observations belong to the stepper: each step is transposed exactly once, so that is
where it adds the misfit of its state to the cost and to the cotangent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure

from revolve import Binomial, Memory, Periodic, Run, Schedule, StoreAll, StoreNothing, verify

Array = np.ndarray
CELLS, STEPS, DT = 128, 500, 1e-3
STATIONS, EVERY = np.arange(4, CELLS, 8), 10
X = np.arange(CELLS) / CELLS
RIGHT, LEFT = np.roll(np.arange(CELLS), -1), np.roll(np.arange(CELLS), 1)
VISCOSITY, NOISE = 0.01, 0.01
SMOOTHNESS = 1e-5
SCHEDULES: dict[str, Schedule] = {
    "store all": StoreAll(),
    "every 23rd state": Periodic(every=23),
    "12 slots": Binomial(12),
    "4 slots": Binomial(4),
    "store nothing": StoreNothing(),
}


def slope(u: Array) -> Array:
    """(u_{i+1} - u_{i-1}) / 2 dx; its transpose is its negative."""
    return (u[RIGHT] - u[LEFT]) * (CELLS / 2)


def bend(u: Array) -> Array:
    """(u_{i+1} - 2 u_i + u_{i-1}) / dx^2; its own transpose."""
    return (u[RIGHT] - 2 * u + u[LEFT]) * CELLS**2


@dataclass
class Burgers:
    """One step of the simulation, its transpose, and what the stations reported: one row for every tenth step."""

    viscosity: float
    reports: Array
    cost: float = 0.0
    of_viscosity: float = 0.0

    def step(self, u: Array) -> Array:
        return u + DT * (self.viscosity * bend(u) - slope(u * u / 2))

    def derivative(self, u: Array, du: Array) -> Array:
        return du + DT * (self.viscosity * bend(du) - slope(u * du))

    def transpose(self, u: Array, cotangent: Array) -> Array:
        return cotangent + DT * (self.viscosity * bend(cotangent) + u * slope(cotangent))

    def misfit(self, step: int, u: Array) -> Array:
        """Adds the misfit at the start of a step to the cost, and returns its derivative."""
        if step == 0 or step % EVERY:
            return np.zeros(CELLS)
        error = u[STATIONS] - self.reports[step // EVERY - 1]
        self.cost += 0.5 * float(error @ error)
        cotangent = np.zeros(CELLS)
        cotangent[STATIONS] = error
        return cotangent

    # The protocol of revolve.Stepper; a tape is the list of the states that steps began from.

    def advance(self, state: Array, start: int, stop: int) -> Array:
        for _ in range(start, stop):
            state = self.step(state)
        return state

    def record(self, state: Array, start: int, stop: int) -> tuple[Array, list[tuple[int, Array]]]:
        tape = []
        for step in range(start, stop):
            tape.append((step, state))
            state = self.step(state)
        return state, tape

    def reverse(self, tape: list[tuple[int, Array]], cotangent: Array) -> Array:
        for step, state in reversed(tape):
            self.of_viscosity += DT * float(cotangent @ bend(state))
            cotangent = self.transpose(state, cotangent) + self.misfit(step, state)
        return cotangent

    def last(self, step: int) -> bool:
        return step == STEPS - 1


def cost_and_gradient(initial: Array, viscosity: float, reports: Array, schedule: Schedule) -> tuple[float, Array]:
    """The misfit to the reports, and its derivatives by the initial state and, last, by the viscosity."""
    stepper = Burgers(viscosity, reports)
    run = Run(schedule, stepper, {0: Memory(copy=lambda x: x)})  # no state is ever written to
    final = run.forward(initial, STEPS)
    cotangent = run.backward(stepper.misfit(STEPS, final))
    return stepper.cost, np.append(cotangent, stepper.of_viscosity)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    random = np.random.default_rng(0)
    truth = 1 + 0.5 * np.sin(2 * np.pi * X) + 0.25 * np.sin(6 * np.pi * X + 1)
    history = [truth]
    for _ in range(STEPS):
        history.append(Burgers(VISCOSITY, np.empty(0)).step(history[-1]))
    field = np.array(history)
    reports = field[EVERY::EVERY, STATIONS]
    reports += NOISE * random.standard_normal(reports.shape)

    gradients = [cost_and_gradient(np.ones(CELLS), 0.02, reports, schedule)[1] for schedule in SCHEDULES.values()]
    assert all(np.array_equal(gradient, gradients[0]) for gradient in gradients), "a gradient depends on its schedule"
    results = {"dot test": Recovered(dot_test(random), 0, 1e-14)}

    def cost(x: Array) -> tuple[float, Array]:
        """Misfit and a little smoothness, of 128 velocities and the logarithm of the viscosity."""
        value, gradient = cost_and_gradient(x[:-1], float(np.exp(x[-1])), reports, Binomial(12))
        gradient[-1] *= np.exp(x[-1])
        gradient[:-1] -= SMOOTHNESS * bend(x[:-1])
        return value - 0.5 * SMOOTHNESS * float(x[:-1] @ bend(x[:-1])), gradient

    start = np.append(np.ones(CELLS), np.log(0.02))
    stable = [(0.0, 2.2)] * CELLS + [(np.log(0.004), np.log(0.027))]  # beyond these the steps themselves blow up
    options = {"maxiter": 40 if quick else 100}
    fit = scipy.optimize.minimize(cost, start, jac=True, method="L-BFGS-B", bounds=stable, options=options)
    initial, viscosity = fit.x[:-1], float(np.exp(fit.x[-1]))
    off = float(np.linalg.norm(initial - truth) / np.linalg.norm(truth - truth.mean()))
    results["viscosity"] = Recovered(viscosity, VISCOSITY, 0.05 * VISCOSITY)
    results["initial state, relative error"] = Recovered(off, 0, 0.04)
    save(picture(field, truth, initial), out, "numpy_simulation")
    return confirm(results)


def dot_test(random: np.random.Generator) -> float:
    """(J v, w) = (v, J^T w), relative to the length of what was multiplied."""
    stepper = Burgers(VISCOSITY, np.empty(0))
    u, v, w = random.standard_normal((3, CELLS))
    left, right = stepper.derivative(u, v) @ w, v @ stepper.transpose(u, w)
    return float(abs(left - right) / (np.linalg.norm(stepper.derivative(u, v)) * np.linalg.norm(w)))


def picture(field: Array, truth: Array, initial: Array) -> Figure:
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1.1, 1])
    image = left.imshow(field, origin="lower", aspect="auto", extent=(0, 1, 0, STEPS * DT), cmap="viridis")
    times = np.arange(EVERY, STEPS + 1, EVERY) * DT
    left.plot(*np.meshgrid(X[STATIONS], times), "w.", markersize=1.5)
    figure.colorbar(image, ax=left, label="velocity u")
    tidy(left, "The truth, and where it is observed (dots)", "position x", "time")
    left.grid(False)
    middle.plot(X, np.ones(CELLS), color=GREY, linestyle=":", label="first guess")
    middle.plot(X, truth, color=ORANGE, alpha=0.4, linewidth=5, label="true")
    middle.plot(X, initial, color=BLUE, linewidth=1.4, label="recovered")
    middle.legend(frameon=False, loc="upper right")
    tidy(middle, "The initial state", "position x", "velocity u at time 0")
    for name, schedule in SCHEDULES.items():
        report = verify(schedule, STEPS)
        held, runs = report.peak_slots + report.peak_tapes, report.runs / STEPS
        right.plot(held, runs, "o", color=BLUE)
        right.annotate(name, (held, runs), (7, 4), textcoords="offset points")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlim(1, 4000)
    right.xaxis.set_major_formatter("{x:g}")
    right.yaxis.set_major_formatter("{x:g}")
    tidy(right, "One gradient, five prices", "states held at once", "runs of each step")
    return figure


if __name__ == "__main__":
    command_line(main)
