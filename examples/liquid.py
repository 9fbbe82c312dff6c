"""Liquid time constants: three neurons whose speed depends on what they see, found from samples at uneven times.

Each state follows dx/dt = -(1/tau + f) x + f A, with f = sigmoid(W x + U u + bias): the larger f is, the faster x moves
(Hasani et al. 2021, AAAI, equation 1). A network of three of them, with time constants 0.5, 1.5 and 4, is driven by random
inputs and watched, with noise, at times that are anything but regular. Another one, which starts with all time constants
1 and with other weights, is fitted to that by L-BFGS: the gradient reaches tau, A and all weights through
`state_space.Recurrent`, in a few slots. Then both are driven by something new.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _workbench import BLUE, GREEN, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adjoint.state_space import LiquidCell, Recurrent

torch.set_num_threads(1)
TAU = torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64)
NOISE = 0.005
START = torch.zeros(3, dtype=torch.float64)


def network(seed: int) -> Recurrent:
    torch.manual_seed(seed)
    return Recurrent(LiquidCell(1, 3, substeps=2), 1, 3).double()


def true_network() -> Recurrent:
    made = network(0)
    with torch.no_grad():
        made.cell.log_tau.copy_(TAU.log())
        made.cell.a.copy_(torch.tensor([1.0, -1.5, 2.0]))
        made.cell.of_input.weight.mul_(2)
    return made


def drive(members: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (members, rows, 1), each held until the next row, and the uneven times between rows."""
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(members, rows, 1, generator=random, dtype=torch.float64).cumsum(1) * 0.7
    elapsed = 0.1 + torch.rand(members, rows, generator=random, dtype=torch.float64) ** 3 * 1.5
    return torch.sin(u) * 2, elapsed


def fit(model: Recurrent, u: Tensor, elapsed: Tensor, seen: Tensor, rounds: int) -> list[float]:
    """The misfit after each evaluation."""
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=rounds, max_eval=2 * rounds, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )
    misfits = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (model(u, elapsed=elapsed, slots=12)[0] - seen).square().mean() * 100
        loss.backward()
        misfits.append(float((loss.detach() / 100).sqrt()))
        return loss

    optimiser.step(closure)
    return misfits


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    truth, model = true_network(), network(0)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype))
        model.cell.log_tau.zero_()
    u, elapsed = drive(16, 30 if quick else 60, seed=2)
    with torch.no_grad():
        seen = truth(u, elapsed=elapsed)[0]
        seen = seen + NOISE * torch.randn(seen.shape, generator=torch.Generator().manual_seed(3), dtype=seen.dtype)
    misfits = fit(model, u, elapsed, seen, 60 if quick else 150)
    found = model.cell.log_tau.detach().exp()
    new, times = drive(1, 80, seed=4)
    with torch.no_grad():
        pairs = truth(new, elapsed=times)[0], model(new, elapsed=times)[0]
    off = float((pairs[0] - pairs[1]).square().mean().sqrt())
    within = 0.3 if quick else 0.05
    results = {
        f"time constant {k + 1}": Recovered(float(found[k]), float(TAU[k]), within * float(TAU[k])) for k in range(3)
    }
    results["misfit, of the noise's"] = Recovered(misfits[-1] / NOISE, 1.0, 0.5 if quick else 0.05)
    results["error under a new input"] = Recovered(off, 0.0, NOISE)
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    draw_states(left, times, *pairs)
    right.semilogy(misfits, color=BLUE)
    right.axhline(NOISE, color=ORANGE, linestyle="--", label="noise")
    right.legend(frameon=False)
    tidy(right, "tau found: " + ", ".join(f"{x:.2f}" for x in found.tolist()), "evaluation", "misfit")
    save(figure, out, "liquid")
    return confirm(results)


def draw_states(axes: Axes, elapsed: Tensor, truth: Tensor, found: Tensor) -> None:
    t = elapsed[0].cumsum(0)
    for k, colour in enumerate((BLUE, GREEN, ORANGE)):
        axes.plot(t, truth[0, :, k], color=colour, label=f"tau = {TAU[k]:.1f}")
        axes.plot(t, found[0, :, k], "o", markersize=3, color=GREY)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "Under an input that was never tried: the true network, and (dots) the one found", "t", "state")


if __name__ == "__main__":
    command_line(main)
