"""Newton's method for the stages of many members at once: each ends when its own have been found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adjoint.linear import Factored
from adjoint.steppers.newton import Newton


class MembersFound(NamedTuple):
    """As :class:`adjoint.steppers.newton.Found`, with a number for each member."""

    x: Tensor
    """(stages, members, n)"""
    eta: Tensor
    theta: Tensor
    failed: Tensor
    """Whose stages were not found."""
    iterations: int


def find_members(
    newton: Newton,
    residual: Callable[[Tensor], Tensor],
    guess: Tensor,
    solver: Factored,
    size: Callable[[Tensor, Tensor], Tensor],
    eta: Tensor,
    wanted: Tensor,
    *,
    goal: float,
    floor: Tensor | float,
    anew: Callable[[Tensor], Factored] | None = None,
) -> MembersFound:
    """The same iteration as ``Newton.find`` for every member that is ``wanted``; the others keep their guess.

    ``size(change, x)``: that of each member's change, once added to x.
    """
    x, active, failed = guess, wanted, torch.zeros_like(wanted)
    before, theta, largest = torch.full_like(eta, torch.inf), torch.zeros_like(eta), torch.zeros_like(eta)
    m = 0
    for m in range(newton.most):
        if anew is not None and m:
            solver = anew(x)
        change = solver.solve(residual(x))
        now = size(change, x)
        x = torch.where(active[:, None], x + change, x)
        bad, good = ~torch.isfinite(now), now == 0
        if m:
            theta = now / before
            good = good | ((now <= floor) & (theta >= 0.25))
            going = active & ~(good | bad)
            largest = torch.where(going, torch.maximum(largest, theta), largest)
            if anew is None:
                bad = bad | (~good & (theta >= 1))
                going = going & ~bad
            eta = torch.where(going, torch.where(theta < 1, theta / (1 - theta), torch.inf), eta)
        arrived = active & ~(good | bad) & (eta * now <= goal)
        eta = torch.where(arrived, eta.clamp(min=1e-16) ** 0.8, eta)
        failed = failed | (active & bad & ~good)
        active = active & ~(good | bad | arrived)
        if not bool(active.any()):
            break
        before = now
    return MembersFound(x, eta, largest, failed | active, m + 1)
