"""The demonstration: a model fitted to real data, what memory buys, and how wrong a continuous adjoint can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from scipy.optimize import minimize
from torch import Tensor

from adjoint import plot, tables
from adjoint.cases import Case
from adjoint.compare import Comparison, compare, ways
from adjoint.measure import Recipe, Scales, Sweep, sweep
from adjoint.problems import pelts, problem_named
from adjoint.progress import bar
from adjoint.solve import solve
from revolve import Binomial
from revolve.plot import draw

MODEL = "lotka_volterra"
POPULATIONS = 2048
"""Solved at once in the sweep, so that memory is worth saving."""
SLOTS = (3, 5, 8, 13, 20, 35, 60, 99)
DRAWN = 5
"""Slots of the schedule in the picture."""
DISSIPATIVE = "gene_ring"
TOLERANCES = (1e-3, 1e-5, 1e-7)
UNITS = {
    "alpha": "births of hares, a year",
    "beta": "hares caught, a year and thousand lynxes",
    "gamma": "deaths of lynxes, a year",
    "delta": "births of lynxes, a year and thousand hares",
}
"""Of the rates; populations are in thousands."""


@dataclass(frozen=True)
class Fit:
    """The parameters found, and the way there."""

    case: Case
    """At the optimum."""
    loss: float
    losses: tuple[float, ...]
    """One for each gradient."""
    converged: str
    """Why the optimiser stopped."""
    seconds: float

    @property
    def parameters(self) -> dict[str, float]:
        """In natural units: the optimiser sees logarithms."""
        hare, lynx = self.case.y0.tolist()
        rates = {name.removeprefix("log_"): x.item() for name, x in self.case.parameters.items()}
        return {name: exp(x) for name, x in ({"hare in 1900": hare, "lynx in 1900": lynx} | rates).items()}

    def populations(self, times: Tensor) -> np.ndarray:
        """Hares and lynxes at these years after 1900, shape (times, 2)."""
        with torch.no_grad():
            return solve(self.case.f, self.case.y0, times, args=self.case.args, dt=0.2, method="rk4").ys.exp().numpy()

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "loss": self.loss,
            "first_loss": self.losses[0],
            "gradients": len(self.losses),
            "seconds": self.seconds,
            "stopped": self.converged,
        }


def fit(tick: Callable[[float], None] = lambda loss: None) -> Fit:
    """Lotka-Volterra rates and first populations from the pelts: L-BFGS on gradients of the discrete adjoint."""
    recipe = Recipe(MODEL)
    case = recipe.case()
    sizes = [x.numel() for x in case.inputs.values()]
    losses: list[float] = []

    def at(flat: np.ndarray) -> Case:
        parts = torch.as_tensor(flat).split(sizes)
        return case.with_values({n: p.reshape(x.shape) for (n, x), p in zip(case.inputs.items(), parts, strict=True)})

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        result = recipe(at(flat))
        losses.append(result.loss)
        tick(result.loss)
        return result.loss, _flat(result.gradient.values())

    start = time.perf_counter()
    found = minimize(loss_and_gradient, _flat(case.inputs.values()), jac=True, method="L-BFGS-B")
    return Fit(at(found.x), float(found.fun), tuple(losses), str(found.message), time.perf_counter() - start)


def _flat(tensors: Iterable[Tensor]) -> np.ndarray:
    return torch.cat([x.detach().reshape(-1) for x in tensors]).numpy()


def parameter_table(fitted: Fit) -> RenderableType:
    made = tables.table("parameter", "value", "", left=1)
    for name, value in fitted.parameters.items():
        made.add_row(name, f"{value:.4g}", UNITS.get(name, "thousands"))
    made.columns[2].justify = "left"
    typical = exp(fitted.loss**0.5)
    words = (
        f"{len(fitted.losses)} gradients in {tables.seconds(fitted.seconds)} took the mean squared residual of the "
        f"logarithms from {fitted.losses[0]:.3g} to {fitted.loss:.4g}: typically a factor of {typical:.3g}."
    )
    return Group(made, tables.note(words))


def residual_table(fitted: Fit) -> RenderableType:
    """Year by year what was traded, what the model says, and the ratio."""
    data = pelts()
    model = fitted.populations(fitted.case.t)
    made = tables.table("year", "hare", "model", "ratio", "lynx", "model", "ratio", left=0)
    for year, hare, lynx, (modelled_hare, modelled_lynx) in zip(data.year, data.hare, data.lynx, model, strict=True):
        numbers = (hare, modelled_hare, hare / modelled_hare, lynx, modelled_lynx, lynx / modelled_lynx)
        made.add_row(str(year), *(f"{x:.2f}" if place % 3 == 2 else f"{x:.1f}" for place, x in enumerate(numbers)))
    return Group(made, tables.note("Thousands of pelts; a ratio above one is more than the model says."))


@dataclass(frozen=True)
class Demonstration:
    """Everything that was found."""

    fitted: Fit
    swept: Sweep
    compared: tuple[Comparison, ...]
    seconds: float

    def pictures(self) -> dict[str, Figure]:
        years = torch.linspace(0, 20, 401, dtype=torch.float64)
        hare, lynx = self.fitted.populations(years).T
        return {
            "fit.png": plot.fit(pelts(), 1900 + years.numpy(), hare, lynx),
            "memory.png": plot.tradeoff(self.swept),
            "compare.png": plot.compare(*self.compared),
            "schedule.png": draw(Binomial(DRAWN), self.swept.steps),
        }

    def facts(self) -> dict[str, Any]:
        return {
            "fit": self.fitted.facts(),
            "sweep": self.swept.facts(),
            "compare": [comparison.facts() for comparison in self.compared],
            "seconds": self.seconds,
        }


def demonstrate(say: Callable[..., None], progress: bool) -> Demonstration:
    """Fit, sweep and compare; ``say`` prints headings and tables on the way."""
    start = time.perf_counter()
    say("[bold]1  A Lotka-Volterra model, fitted to the pelts by gradients of the discrete adjoint[/]\n")
    with bar("fitting", None, progress) as tick:
        fitted = fit(lambda loss: tick(f"loss {loss:.4f}"))
    say(parameter_table(fitted))
    say(residual_table(fitted))
    with Scales() as scales:
        recipe = Recipe(MODEL, POPULATIONS)
        say(f"[bold]2  Slots against recomputation: the same model, {POPULATIONS} populations at once[/]\n")
        with bar("sweeping slots", len(SLOTS) + 1, progress) as tick:
            swept = sweep(recipe, SLOTS, scales, patience=0.3, tick=tick)
        say(tables.sweep_table(swept))
        say("[bold]3  Discrete against continuous adjoint, at equal tolerance[/]\n")
        compared = []
        for name in (MODEL, DISSIPATIVE):
            with bar(f"comparing gradients of {name}", 1 + 5 * len(TOLERANCES), progress) as tick:
                compared.append(compare(Recipe(name), TOLERANCES, scales, patience=0, tick=tick, made=ways(8)))
            say(f"[bold]{name}[/]: {problem_named(name).description}")
            say(tables.compare_table(compared[-1]))
    return Demonstration(fitted, swept, tuple(compared), time.perf_counter() - start)
