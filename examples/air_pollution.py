"""Air pollution: which of 25 reactions the ozone of an hour depends on, from one reverse sweep.

Verwer (1994, SIAM J. Sci. Comput. 15, 1243-1250) tests stiff solvers with the chemistry of a Dutch air pollution
model: 20 species, 25 reactions, rates from 9e-4 to 4e11 a minute. Each reaction i makes its species at the speed

    k_i [first] [second],

and the question is how much ozone there is after an hour, and d log(ozone) / d log(k_i) for all i: a rate that is one
per cent larger makes so many per cent more ozone. An excited oxygen atom (O1D) lives for 2e-12 minutes; a Rosenbrock
method takes 74 steps for the hour. Values and sensitivities are held against references computed in two ways to
thirteen digits, the largest sensitivities against solves with the rate changed as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _workbench import BLUE, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint
from adjoint.problems import problem_named, reference_of
from adjoint.stiff_problems import OZONE, POLLUTION_SPECIES, pollution_reactions

PROBLEM = problem_named("pollution")


def after_an_hour(logs: Tensor, rtol: float) -> Tensor:
    case = PROBLEM.case()
    how = PROBLEM.tolerances(rtol) | {"method": "rodas5p", "args": (logs.exp(),)}
    return adjoint.solve(case.f, case.y0.detach(), case.t, **how).ys[-1]


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    logs = PROBLEM.case().parameters["rates"].detach().log().requires_grad_()
    last = after_an_hour(logs, rtol=1e-6)
    (sensitivity,) = torch.autograd.grad(last[OZONE].log(), logs)
    ranked = sensitivity.abs().argsort(descending=True)
    found = last.detach()
    known = reference_of("pollution")
    assert known is not None
    names = {"NO2": 0, "NO": 1, "ozone": OZONE}
    results = {f"{x} after an hour": Recovered(float(found[i]), float(known.state[i]), 1e-8) for x, i in names.items()}
    exact = known.gradient["rates"] * logs.detach().exp()
    results["largest error of a sensitivity"] = Recovered(float((sensitivity - exact).abs().max()), 0.0, 1e-6)
    with torch.no_grad():
        for i in ranked[: 1 if quick else 4]:
            moved = [after_an_hour(logs + h * torch.eye(25, dtype=logs.dtype)[i], 1e-8)[OZONE] for h in (1e-3, -1e-3)]
            difference = float(moved[0].log() - moved[1].log()) / 2e-3
            results[f"sensitivity to reaction {int(i) + 1}"] = Recovered(float(sensitivity[i]), difference, 1e-4)
    draw(sensitivity, ranked, out)
    return confirm(results)


def draw(sensitivity: Tensor, ranked: Tensor, out: Path | str | None) -> None:
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    shown = ranked.flip(0)
    values = sensitivity[shown].tolist()
    axes.barh(range(len(values)), values, color=[BLUE if x > 0 else ORANGE for x in values])
    sides = [[" + ".join(POLLUTION_SPECIES[x] for x in side) for side in both] for both in pollution_reactions()]
    reactions = [" → ".join(both) for both in sides]
    names = [reactions[i] for i in shown.tolist()]
    axes.set_yticks(range(len(values)), [f"{int(i) + 1}:  {name}" for i, name in zip(shown, names, strict=True)])
    tidy(axes, "Ozone after an hour", "per cent more ozone for a rate that is one per cent larger", "reaction")
    save(figure, out, "air_pollution")


if __name__ == "__main__":
    command_line(main)
