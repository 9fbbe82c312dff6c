"""Air pollution: which of 25 reactions the ozone of an hour depends on, from one reverse sweep.

Verwer (1994, SIAM J. Sci. Comput. 15, 1243-1250) tests stiff solvers with the chemistry of a Dutch air pollution
model: 20 species, 25 reactions, rates from 9e-4 to 4e11 a minute. Each reaction i makes its species at the speed

    k_i [first] [second],

and the question is how much ozone there is after an hour, and d log(ozone) / d log(k_i) for all i: a rate that is one
per cent larger makes so many per cent more ozone. Species 16 lives for 2e-12 minutes; a Rosenbrock method takes 74
steps for the hour. The values are held against the published reference, the largest sensitivities against solves with
the rate changed. Species: 1 NO2, 2 NO, 3 O, 4 ozone, 5 HO2, 6 OH, 7 HCHO, 8 CO, ..
"""

from __future__ import annotations

from pathlib import Path

import torch
from _workbench import BLUE, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint

RATES = """0.35 26.6 1.23e4 8.6e-4 8.2e-4 1.5e4 1.3e-4 2.4e4 1.65e4 9e3 0.022 1.2e4 1.88 1.63e4 4.8e6 3.5e-4 0.0175 1e8
4.44e11 1.24e3 2.1 5.78 0.0474 1.78e3 3.12"""
FROM = "1 2,4 5,2 7 7 7,6 9 9,6 11,2 11,1 13 10,2 14 1,6 3 4 4 16 16 17,6 19 19 1,4 19,1 20"
TO = "2,3 1 1,6 5,5,8 8 5,8 5,8,10 11 1,10,12 13 1,11 1,14 5,7 15 4 16 3 6,6 3 5,18 2 1,3 19 20 1,19"
"""Species of each reaction, before and after; 5,5 is two of it."""
FIRST = {2: 0.2, 4: 0.04, 7: 0.1, 8: 0.3, 9: 0.01, 17: 0.007}
SPECIES, OZONE, HOUR = 20, 3, 60.0


def of_species(words: str) -> list[list[int]]:
    return [[int(x) - 1 for x in word.split(",")] for word in words.split()]


def balance() -> Tensor:
    """How many of each species a reaction makes, (25, 20); negative: uses up."""
    made = torch.zeros(25, SPECIES, dtype=torch.float64)
    for sign, words in ((-1, FROM), (1, TO)):
        for i, species in enumerate(of_species(words)):
            for j in species:
                made[i, j] += sign
    return made


MADE = balance()
PARTNERS = torch.tensor([(*x, SPECIES)[:2] for x in of_species(FROM)])
"""The species that meet in each reaction; the last index stands for none."""


def chemistry(t: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    with_one = torch.cat((y, torch.ones(1, dtype=y.dtype)))
    return (logs.exp() * with_one[PARTNERS].prod(1)) @ MADE


def after_an_hour(logs: Tensor, rtol: float) -> Tensor:
    y0 = torch.zeros(SPECIES, dtype=torch.float64)
    for species, amount in FIRST.items():
        y0[species - 1] = amount
    return adjoint.solve(chemistry, y0, [0.0, HOUR], args=(logs,), method="rodas5p", rtol=rtol, atol=1e-5 * rtol).ys[-1]


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    logs = torch.tensor([float(x) for x in RATES.split()], dtype=torch.float64).log().requires_grad_()
    last = after_an_hour(logs, rtol=1e-6)
    (sensitivity,) = torch.autograd.grad(last[OZONE].log(), logs)
    ranked = sensitivity.abs().argsort(descending=True)
    found = last.detach()
    results = {
        "NO2 after an hour": Recovered(float(found[0]), 0.05646255480022769, 1e-8),
        "NO after an hour": Recovered(float(found[1]), 0.1342484130422339, 1e-8),
        "ozone after an hour": Recovered(float(found[OZONE]), 0.005523140207484359, 1e-8),
    }
    with torch.no_grad():
        for i in ranked[: 1 if quick else 4]:
            moved = [after_an_hour(logs + h * torch.eye(25, dtype=logs.dtype)[i], 1e-8)[OZONE] for h in (1e-3, -1e-3)]
            difference = float(moved[0].log() - moved[1].log()) / 2e-3
            results[f"sensitivity to reaction {int(i) + 1}"] = Recovered(float(sensitivity[i]), difference, 1e-4)
    draw(sensitivity, ranked, out)
    return confirm(results)


def draw(sensitivity: Tensor, ranked: Tensor, out: Path | str | None) -> None:
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    shown = ranked[:15].flip(0)
    values = sensitivity[shown].tolist()
    axes.barh(range(len(values)), values, color=[BLUE if x > 0 else ORANGE for x in values])
    names = [
        f"{' + '.join(str(x + 1) for x in of_species(FROM)[i])} → {' + '.join(str(x + 1) for x in of_species(TO)[i])}"
        for i in shown.tolist()
    ]
    axes.set_yticks(range(len(values)), [f"{int(i) + 1}:  {name}" for i, name in zip(shown, names, strict=True)])
    tidy(axes, "Ozone after an hour", "per cent more ozone for a rate that is one per cent larger", "reaction")
    save(figure, out, "air_pollution")


if __name__ == "__main__":
    command_line(main)
