"""Every gradient on a stiff problem, a chaotic one, and one whose steps can be undone.

python -m benchmarks compared --out docs/discrete_and_continuous.md
"""

from __future__ import annotations

from adjoint.compare import Row, compare
from adjoint.measure import Recipe, Scales, power
from benchmarks.measure import Section

TITLE = "Every gradient on a stiff and on a chaotic problem"
TEXT = (
    "Each with the tolerance of its column; for discrete gradients and backpropagation that of the solve, for continuous ones "
    "of both. Error: of the gradient in y0 and all parameters, by norm. Time: of solve and gradient, by the clock. "
    "Evaluations: of f, forwards and backwards. Memory: resident, of a child process above its warmed-up start, at the tighter "
    "tolerance. `adjoint compare robertson` makes such a table, of any named problem."
)
TOLERANCES = (1e-4, 1e-7)
HEADER = ("gradient", *(f"error at {power(x)}" for x in TOLERANCES), "time", "evaluations", "memory")
WORK = (
    (
        "robertson",
        "kvaerno5",
        "Stiff: three species, rates nine decades apart, up to t = 400,000. Errors with each number scaled by its input. Steps "
        "are limited to 3,000; explicit methods, and so torchdiffeq, would need some 10^9.",
    ),
    (
        "lorenz",
        "dopri5",
        "Chaotic: Lorenz's attractor up to t = 3; a difference of two states grows by a factor of 15 or so.",
    ),
    (
        "pleiades",
        "dopri8",
        "Seven bodies that pass close by each other. The equation is one in two parts, so steps can be undone: yoshida4, with "
        "steps of 0.1 times the fourth root of the tolerance.",
    ),
)


def run(device: str) -> Section:
    parts = []
    with Scales() as scales:
        for name, method, text in WORK:
            found = compare(Recipe(name), TOLERANCES, scales, method=method, patience=1.0)
            rows = [_row(found.of(way)) for way in found.names]
            failures = sorted({f"{row.way}: {row.failure}" for row in found.rows if row.failure})
            more = "".join(f" *{failure}.*" for failure in failures)
            agreed = f" Both reference gradients agree to {found.agreement:.0e}."
            parts.append(Section(f"{name}: {method}", text + agreed + more, HEADER, tuple(rows)))
    return Section(TITLE, TEXT, parts=tuple(parts))


def _row(rows: list[Row]) -> tuple[str, ...]:
    errors = ["failed" if row.failure else f"{row.error:.0e}" for row in rows]
    last = rows[-1]
    if last.failure:
        return last.way, *errors, "", "", ""
    memory = "" if last.bytes is None else f"{last.bytes / 2**20:.1f} MiB"
    return last.way, *errors, f"{last.seconds:.2g} s", f"{last.evaluations:,}", memory
