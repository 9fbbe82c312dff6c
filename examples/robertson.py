"""Robertson's reactions: the gradient of a stiff system, and how its error follows the tolerance.

    A -> B  (slow, 0.04),     2 B -> B + C  (fast, 3e7),     B + C -> A + C  (back, 1e4)

Three species whose rates lie nine decades apart (Robertson 1966; Hairer & Wanner, Solving ODEs II, section IV.1), from
the first second to four days. An explicit method would take some 1e9 steps. An implicit one takes a hundred, and
one reverse sweep through them says what every rate does to what is left of A. That gradient is held against a
reference computed in two other ways, at tolerances from 1e-3 down, for three families of methods: its error stays
within three times the tolerance that the solve was asked for, and falls with it. Forward sensitivities show which rate
matters when.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor

import adjoint
from adjoint.problems import problem_named, reference_of

PROBLEM, KNOWN = problem_named("robertson"), reference_of("robertson")
METHODS = {"kvaerno5": BLUE, "radau5": GREEN, "rodas5p": ORANGE}
NAMES = ("A -> B", "2 B -> B + C", "B + C -> A + C")
LINES = ("-", "--", "-.")


def solved(logs: Tensor, times: Tensor, rtol: float, **how: str) -> Tensor:
    """A, B and C at these times, for the logarithms of the three rates."""
    case = PROBLEM.case()
    return adjoint.solve(case.f, case.y0.detach(), times, args=tuple(logs.exp()), **PROBLEM.tolerances(rtol), **how).ys


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    assert KNOWN is not None
    case = PROBLEM.case()
    logs = torch.stack(case.args).detach().log().requires_grad_()
    ends = case.t[[0, -1]]
    true = torch.stack(list(KNOWN.gradient.values())[1:]) * logs.detach().exp() / KNOWN.loss
    tolerances = [1e-3, 1e-5] if quick else [10.0**-k for k in range(3, 9)]
    results: Results = {}
    errors: dict[str, list[tuple[float, float]]] = {}
    for method in METHODS:
        errors[method] = []
        for rtol in tolerances:
            left = solved(logs, ends, rtol, method=method)[-1, 0]
            (gradient,) = torch.autograd.grad(left.log(), logs)
            of_state = abs(float(left.detach()) / KNOWN.loss - 1)
            errors[method].append((of_state, float((gradient - true).norm() / true.norm())))
        worst = max(g / rtol for (_, g), rtol in zip(errors[method], tolerances, strict=True))
        results[f"{method}: largest error of the gradient over the tolerance"] = Recovered(worst, 0.0, 3.0)
    results["what is left of A"] = Recovered(float(left.detach()), KNOWN.loss, 1e-6)
    for name, value, expected in zip(NAMES, gradient, true, strict=True):
        results[f"per cent of A for a per cent of {name}"] = Recovered(float(value), float(expected), 1e-4)

    times = torch.cat((torch.zeros(1), torch.logspace(-5, 5.6, 30 if quick else 100))).double()
    ys = solved(logs, times, 1e-3 if quick else 1e-5, method="radau5", gradient="tangent")
    when = torch.stack([torch.autograd.grad(y, logs, retain_graph=True)[0] for y in ys[1:, 0].log()])
    draw(times[1:], ys[1:].detach(), when, tolerances, errors, out)
    return confirm(results)


def draw(
    times: Tensor,
    ys: Tensor,
    when: Tensor,
    tolerances: list[float],
    errors: dict[str, list[tuple[float, float]]],
    out: Path | str | None,
) -> None:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for column, factor, colour, name in ((0, 1, BLUE, "A"), (1, 2e4, ORANGE, "20,000 B"), (2, 1, GREEN, "C")):
        left.semilogx(times, factor * ys[:, column], color=colour, label=name)
    left.legend(frameon=False)
    tidy(left, "Ten decades of time", "seconds", "share")
    for column, (line, name) in enumerate(zip(LINES, NAMES, strict=True)):
        middle.semilogx(
            times, when[:, column], line, color=(BLUE, ORANGE, GREEN)[column], label=name.replace("->", "→")
        )
    middle.legend(frameon=False, fontsize=8, loc="lower left")
    tidy(middle, "Which rate matters when", "seconds", "per cent of A for a per cent of the rate")
    for method, colour in METHODS.items():
        of_states, of_gradients = zip(*errors[method], strict=True)
        right.loglog(tolerances, of_gradients, "o-", color=colour, markersize=4, label=f"{method}, gradient")
        right.loglog(tolerances, of_states, ":", color=colour, label=f"{method}, A itself")
    right.loglog(tolerances, tolerances, color=GREY, linewidth=0.8)
    right.annotate("error = tolerance", (tolerances[0] / 2, tolerances[0]), fontsize=8, color=GREY)
    right.invert_xaxis()
    right.legend(frameon=False, fontsize=8, loc="lower left")
    tidy(right, "The gradient is as good as the solution", "tolerance", "relative error")
    save(figure, out, "robertson")


if __name__ == "__main__":
    command_line(main)
