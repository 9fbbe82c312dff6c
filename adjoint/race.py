"""One gradient by several engines: who took the steps, why, how fast, and how far apart the results are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adjoint.measure import Differentiated, Recipe, quickest

SECONDS = 3.0
"""For the repetitions of one engine."""


@dataclass(frozen=True)
class Race:
    engine: str
    first: Differentiated
    """With whatever it takes to trace and to compile."""
    best: Differentiated

    @property
    def said(self) -> str:
        """Which engine it was, and why."""
        return str(self.best.solution.engine)

    def off_by(self, other: Race) -> float:
        """The largest difference of the gradients, relative to the largest number in each of them."""
        pairs = [(g, other.best.gradient[name]) for name, g in self.best.gradient.items()]
        return max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300) for a, b in pairs)

    def facts(self, eager: Race) -> dict[str, Any]:
        seconds = {"first_seconds": self.first.seconds, "seconds": self.best.seconds}
        return {"said": self.said, **seconds, "off_by": self.off_by(eager)}


def raced(recipe: Recipe, engine: str) -> Race:
    """A first gradient, and the quickest of a few more."""
    chosen = recipe.but(engine=engine)
    first = chosen(chosen.case())
    case = chosen.case()
    return Race(engine, first, quickest(lambda: chosen(case), SECONDS))
