"""Robertson, HIRES and Pollution for any library: right-hand sides of lists of numbers, and members of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adjoint.cases import Case, NamedProblem
from adjoint.problems import problem_named
from adjoint.stiff_problems import OZONE, pollution_reactions

RTOL = 1e-8
SPREAD = 0.05
"""By how much the logarithms of the inputs of a batch vary; the first member has the nominal ones."""
Numbers = Sequence[Any]
Array = np.ndarray[Any, Any]


def robertson(y: Numbers, p: Numbers) -> list[Any]:
    slow, fast, back = p[0] * y[0], p[1] * y[1] * y[1], p[2] * y[1] * y[2]
    return [back - slow, slow - back - fast, fast]


def hires(y: Numbers, p: Numbers) -> list[Any]:
    k1, k2, k3, k4, k5, k6, plus, minus, star, oks = (p[i] for i in range(10))
    binding, leaving = plus * y[5] * y[7], (k2 + minus + star) * y[6]
    return [
        k2 * y[1] + k6 * y[2] + oks - k1 * y[0],
        k1 * y[0] - (k2 + k3) * y[1],
        k2 * y[3] + k5 * y[4] - (k6 + k1) * y[2],
        k3 * y[1] + k1 * y[2] - (k4 + k2) * y[3],
        k2 * (y[5] + y[6]) - (k1 + k5) * y[4],
        k4 * y[3] + k1 * y[4] + minus * y[6] - k2 * y[5] - binding,
        binding - leaving,
        leaving - binding,
    ]


def pollution(y: Numbers, p: Numbers) -> list[Any]:
    found: list[Any] = [0.0] * 20
    for i, (used, made) in enumerate(pollution_reactions()):
        speed = p[i]
        for j in used:
            speed = speed * y[j]
        for j in used:
            found[j] = found[j] - speed
        for j in made:
            found[j] = found[j] + speed
    return found


def reactions() -> tuple[Array, Array]:
    """Of "pollution": the species that meet, (25, 2), 20 for none; how many of each are made, (25, 20)."""
    made = np.zeros((25, 20))
    for i, sides in enumerate(pollution_reactions()):
        for sign, side in zip((-1, 1), sides, strict=True):
            np.add.at(made[i], side, sign)
    return np.array([(*used, 20)[:2] for used, _ in pollution_reactions()]), made


@dataclass(frozen=True)
class Stiff:
    """A problem, and its loss as the number of the state that is looked at."""

    name: str
    f: Callable[[Numbers, Numbers], list[Any]]
    seen: int
    logarithm: bool = False
    """Whether the loss is the logarithm of that number."""
    seed: float = 1.0
    """What the loss is multiplied with for CVODES, whose tolerances are those of the state for the adjoint as well."""

    @property
    def named(self) -> NamedProblem:
        return problem_named(self.name)

    @property
    def case(self) -> Case:
        return self.named.case()

    @property
    def end(self) -> float:
        return float(self.case.t[-1])

    @property
    def tolerances(self) -> dict[str, float]:
        return self.named.tolerances(RTOL)

    def inputs(self, members: int) -> tuple[Array, Array]:
        """y_0, (members, n), and the parameters, (members, m)."""
        case = self.case
        y0 = case.y0.detach().numpy()
        p = np.concatenate([x.detach().numpy().ravel() for x in case.args])
        draw = np.random.default_rng(0)
        changes = np.exp(SPREAD * draw.standard_normal((members, len(y0) + len(p))))
        changes[0] = 1
        return y0 * changes[:, : len(y0)], p * changes[:, len(y0) :]


PROBLEMS = {
    problem.name: problem
    for problem in (
        Stiff("robertson", robertson, 0),
        Stiff("hires", hires, 5),
        Stiff("pollution", pollution, OZONE, logarithm=True, seed=1e-8),
    )
}
