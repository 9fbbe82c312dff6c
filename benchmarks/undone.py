"""How the error of a gradient grows whose states come back by undoing steps, and what that costs."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import adjoint
from benchmarks.measure import Section

TITLE = "Steps undone in place of states kept"
TEXT = (
    'Leapfrog; the gradient of sum q(T) in q(0) and p(0). "difference": of `Reversible()` from the discrete adjoint with all '
    "tapes kept, over the size of the gradient. Seconds of the processor."
)
HEADER = ("orbit", "steps", "difference", "undone, s", "tapes kept, s", "four slots, s")
STEPS = (100, 1000, 4000)


def _kepler(t: Tensor, q: Tensor) -> Tensor:
    return -q / q.norm() ** 3


def _henon_heiles(t: Tensor, q: Tensor) -> Tensor:
    return -torch.stack((q[0] + 2 * q[0] * q[1], q[1] + q[0] ** 2 - q[1] ** 2))


ORBITS = {
    "Kepler": (_kepler, [1.0, 0.0], [0.0, 0.9], 0.02),
    "Henon-Heiles": (_henon_heiles, [0.0, 0.1], [0.5, 0.0], 0.05),
}


def run(device: str) -> Section:
    rows = []
    for name, (force, q, p, dt) in ORBITS.items():
        for steps in STEPS:
            found, seconds = [], []
            ways: list[dict[str, object]] = [
                {"gradient": adjoint.Reversible()},
                {"slots": "all"},
                {"slots": 4},
            ]
            for how in [ways[0], *ways] if not rows else ways:  # the very first gradient pays for torch's own start
                y0 = tuple(torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in (q, p))
                start = time.process_time()
                s = adjoint.solve((lambda t, p: p, force), y0, [0.0, dt * steps], method="leapfrog", dt=dt, **how)
                found.append(torch.cat(torch.autograd.grad(s.ys[0][-1].sum(), y0)))
                seconds.append(time.process_time() - start)
            found, seconds = found[-len(ways) :], seconds[-len(ways) :]
            off = float((found[0] - found[1]).norm() / found[1].norm())
            rows.append((name, str(steps), f"{off:.1e}", *(f"{x:.2f}" for x in seconds)))
    return Section(TITLE, TEXT, HEADER, tuple(rows))
