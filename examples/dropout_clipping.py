"""Dropout and clipping: how often gradients are clipped when randomness is kept, and when it is not.

A network with dropout is trained with its blocks run again in the backward pass. If a block draws other random numbers
the second time, the gradient is that of no network at all: its tapes belong to one set of dropped units, and its
result to another. Nothing fails, the loss still falls, but clipping by the gradient's norm triggers at other steps.
Here the same training runs plainly, with adjoint.chain, and with torch's checkpoint told to forget random states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adjoint

LIMIT = 3.0
"""Gradients of a larger norm are clipped."""


def forgetful(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Every block is run again with whatever random numbers come."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    return x


RUNS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "plain": lambda blocks, x: blocks(x),
    "kept": lambda blocks, x: adjoint.chain(blocks, x, every=1),
    "not kept": forgetful,
}


def trained(run: Callable[[nn.Sequential, Tensor], Tensor], steps: int) -> Tensor:
    """The norm of the gradient at each step, before clipping."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        nn.Linear(8, 64),
        *(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Tanh()) for _ in range(4)),
        nn.Linear(64, 1),
    )
    optimizer = torch.optim.SGD(blocks.parameters(), 0.05)
    norms = []
    for _ in range(steps):
        x = torch.randn(64, 8)
        loss = (run(blocks, x) - 3 * torch.sin(x.sum(dim=1, keepdim=True))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(blocks.parameters(), LIMIT))
        optimizer.step()
    return torch.stack(norms)


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    """Train three times; the run that keeps randomness has the norms of the plain one, bit for bit."""
    steps = 60 if quick else 300
    norms = {name: trained(run, steps) for name, run in RUNS.items()}
    clipped = {name: int((found > LIMIT).sum()) for name, found in norms.items()}
    gap = float((norms["kept"] - norms["plain"]).abs().max())
    save(picture(norms, clipped), out, "dropout_clipping")
    return confirm(
        {
            "steps clipped, randomness kept": Recovered(clipped["kept"], clipped["plain"], 0),
            "largest gap of a norm, kept": Recovered(gap, 0.0, 0.0),
            "norms in common, not kept": Recovered(float((norms["not kept"] == norms["plain"]).sum()), 0.0, 0.0),
        }
    )


def picture(norms: dict[str, Tensor], clipped: dict[str, int]) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, found), color, style in zip(norms.items(), (GREY, BLUE, ORANGE), ("-", ":", "-"), strict=True):
        axes.plot(found, style, color=color, linewidth=1.2, label=f"{name}: clipped {clipped[name]} times")
    axes.axhline(LIMIT, color="black", linewidth=0.6)
    axes.legend(frameon=False)
    tidy(axes, "Norms of the gradient, with random states kept and not kept", "step", "norm before clipping")
    return figure


if __name__ == "__main__":
    command_line(main)
