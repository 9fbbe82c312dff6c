"""The Nile, 1871-1970: how much its level wanders, and when it dropped, by maximum likelihood.

The flow at Aswan in 10^8 cubic metres a year (Cobb 1978, Biometrika 65(2), table 1) is the textbook's local level,

    flow_k = level_k + observation error,      level_{k+1} = level_k + wandering,

whose two variances are fitted by L-BFGS on the likelihood of a Kalman filter, with its gradient from the reverse sweep.
Held against Durbin and Koopman (Time Series Analysis by State Space Methods, 2nd edition, section 2.10: 15099 and
1469.1), and against scipy alone, to which the differences of the flow are one Gaussian vector. With a drop allowed in
1899, when the dam at Aswan was begun, the level does not wander at all, and the drop is the difference of two means
(Cobb's -248). Decades blotted out as missing show what the filter makes of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from _fitting import minimise
from _workbench import BLUE, GREY, ORANGE, Recovered, Results, command_line, confirm, save, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adjoint.state_space import Filtered, kalman_filter

FLOW = torch.tensor(
    [
        *(
            1120,
            1160,
            963,
            1210,
            1160,
            1160,
            813,
            1230,
            1370,
            1140,
            995,
            935,
            1110,
            994,
            1020,
            960,
            1180,
            799,
            958,
            1140,
        ),
        *(1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969),
        *(831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759),
        *(781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890),
        *(744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740),
    ],
    dtype=torch.float64,
)
YEARS = np.arange(1871, 1971)
DAM = 1899 - 1871
PUBLISHED = {"observation error": 15099.0, "wandering": 1469.1}
SCALE = 100.0
BOUNDS = ((-3.0, 3.0), (-6.0, 3.0), (-9.0, 9.0))


def filtered(flow: Tensor, error: Tensor, wandering: Tensor) -> Filtered:
    """Of all years but the first, which says where the level is: no other knowledge of it goes in."""
    one = torch.eye(1, dtype=torch.float64)
    return kalman_filter(
        flow[1:, None],
        transition=one,
        observation=one,
        process_noise=wandering * one,
        observation_noise=error * one,
        mean=flow[:1],
        covariance=(error + wandering) * one,
    )


def fit(drops: bool) -> tuple[Tensor, float]:
    """Variances of error and wandering and the drop in 1899, and the logarithm of the likelihood."""
    after = (torch.arange(len(FLOW)) >= DAM).double()

    def loss(x: Tensor) -> Tensor:
        flow = FLOW - (SCALE * x[2] * after if drops else 0)
        return -filtered(flow, *(SCALE * x[:2].exp()).square()).log_likelihood

    found = minimise(
        loss, torch.tensor([0.0, -1.0, -1.0], dtype=torch.float64), iterations=25, bounds=BOUNDS, tolerance=1e-11
    )
    error, wandering, drop = found.x
    return torch.tensor([np.exp(2 * error) * SCALE**2, np.exp(2 * wandering) * SCALE**2, drop * SCALE]), -found.fun


def log_density(differences: np.ndarray, error: float, wandering: float) -> float:
    """The likelihood with nothing of this library: differences are Gaussian, with a covariance of three diagonals."""
    count = len(differences)
    beside = np.eye(count, k=1) + np.eye(count, k=-1)
    covariance = (wandering + 2 * error) * np.eye(count) - error * beside
    return float(scipy.stats.multivariate_normal(cov=covariance).logpdf(differences))


def fit_by_scipy() -> tuple[np.ndarray, float]:
    """Variances of error and wandering, and the logarithm of the likelihood."""
    differences = np.diff(FLOW.numpy())
    found = scipy.optimize.minimize(
        lambda x: -log_density(differences, *np.exp(2 * x) * SCALE**2), np.array([0.0, -1.0]), method="BFGS"
    )
    return np.exp(2 * found.x) * SCALE**2, -found.fun


def main(out: Path | str | None = None, quick: bool = False) -> Results:
    (error, wandering, _), likelihood = fit(drops=False)
    others, by_scipy = fit_by_scipy()
    (error_then, wandering_then, drop), likelihood_then = fit(drops=True)
    after = drop.numpy() * (np.arange(len(YEARS)) >= DAM)
    then = log_density(np.diff(FLOW.numpy() - after), float(error_then), float(wandering_then))
    means = float(FLOW[DAM:].mean() - FLOW[:DAM].mean())
    results = {
        "observation error, published": Recovered(float(error), PUBLISHED["observation error"], 1.0),
        "wandering, published": Recovered(float(wandering), PUBLISHED["wandering"], 1.0),
        "observation error, by scipy": Recovered(float(error), float(others[0]), 1e-3 * float(others[0])),
        "wandering, by scipy": Recovered(float(wandering), float(others[1]), 1e-3 * float(others[1])),
        "logarithm of the likelihood, by scipy": Recovered(likelihood, by_scipy, 1e-5),
        "drop in 1899, the difference of the means": Recovered(float(drop), means, 0.5),
        "wandering beside a drop, of the error": Recovered(float(wandering_then / error_then), 0.0, 1e-4),
        "logarithm of the likelihood with a drop, by scipy": Recovered(likelihood_then, then, 1e-5),
    }
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    with torch.no_grad():
        whole = filtered(FLOW, error, wandering)
        gaps = FLOW.clone()
        gaps[20:40] = gaps[60:80] = torch.nan
        missing = filtered(gaps, error, wandering)
    draw(left, FLOW, whole, f"The level: error {error:.0f}, wandering {wandering:.0f}")
    level = FLOW[:DAM].mean() + (torch.arange(100) >= DAM) * drop
    left.plot(YEARS, level, color=ORANGE, label=f"a drop of {-drop:.0f} in 1899")
    left.legend(frameon=False)
    draw(right, gaps, missing, "Two decades of years missing, twice")
    save(figure, out, "nile")
    return confirm(results)


def draw(axes: Axes, flow: Tensor, found: Filtered, title: str) -> None:
    mean, deviation = found.mean[:, 0].numpy(), found.covariance[:, 0, 0].sqrt().numpy()
    axes.plot(YEARS, flow, ".", color=GREY)
    axes.plot(YEARS[1:], mean, color=BLUE, label="level, and 95 %")
    axes.fill_between(YEARS[1:], mean - 1.96 * deviation, mean + 1.96 * deviation, color=BLUE, alpha=0.2, linewidth=0)
    tidy(axes, title, "year", "flow, 10^8 m^3")


if __name__ == "__main__":
    command_line(main)
