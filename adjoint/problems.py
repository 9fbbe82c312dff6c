"""Named problems: small ODEs with parameters, times and a loss, to try things out on.

A new problem is one function that makes a :class:`adjoint.cases.Case` and one more line in ``PROBLEMS``.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from adjoint.cases import Case, NamedProblem, grid, logs, numbers, random
from adjoint.stiff_problems import STIFF


class Pelts(NamedTuple):
    """Thousands of pelts a year, as traded by the Hudson Bay Company."""

    year: list[int]
    hare: list[float]
    lynx: list[float]


def pelts() -> Pelts:
    with (files("adjoint") / "data" / "pelts.csv").open() as file:
        rows = list(csv.DictReader(file))
    return Pelts([int(r["year"]) for r in rows], [float(r["hare"]) for r in rows], [float(r["lynx"]) for r in rows])


def _lotka_volterra(size: int) -> Case:
    """Of populations as logarithms, fitted to the pelts: the loss is the mean squared residual of the logarithms.

    hare' = alpha hare - beta hare lynx,    lynx' = delta hare lynx - gamma lynx

    With a size of more than one, so many populations start within 10 % of each other, and only 1920 is looked at.
    """
    data = pelts()
    observed = torch.tensor([data.hare, data.lynx], dtype=torch.float64).T.log()
    y0, t = observed[0], grid(20.0, 21)
    if size > 1:
        y0, t = y0[:, None] + 0.1 * random(2, size, seed=0), t[[0, -1]]
        observed = observed[[0, -1], :, None]

    def f(t: Tensor, y: Tensor, *logs: Tensor) -> Tensor:
        alpha, beta, gamma, delta = torch.stack(logs).exp().unbind()
        hare, lynx = y.exp().unbind()
        return torch.stack((alpha - beta * lynx, delta * hare - gamma))

    def loss(ys: Tensor) -> Tensor:
        return (ys[1:] - observed[1:].to(ys)).square().mean() if size > 1 else (ys - observed.to(ys)).square().mean()

    return Case(f, y0, t, logs(alpha=0.5, beta=0.05, gamma=0.5, delta=0.05), loss)


def _gene_ring(size: int) -> Case:
    """Messengers m that turn over fast, and proteins p: each gene is repressed by the protein before it in a ring.

    m_i' = turnover (strength / (1 + p_{i-1}^2) - m_i),    p_i' = decay (m_i - p_i)

    Forwards, m forgets its past within 1 / turnover. Backwards every error of m grows as exp(turnover t).
    """
    messengers = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    proteins = torch.linspace(1.5, 0.2, size, dtype=torch.float64)

    def f(t: Tensor, y: Tensor, *logs: Tensor) -> Tensor:
        turnover, strength, decay = torch.stack(logs).exp().unbind()
        m, p = y.chunk(2)
        return torch.cat((turnover * (strength / (1 + p.roll(1).square()) - m), decay * (m - p)))

    def loss(ys: Tensor) -> Tensor:
        return ys[-1, size:].square().mean()

    rates = logs(turnover=20.0, strength=4.0, decay=1.0)
    return Case(f, torch.cat((messengers, proteins)), grid(2.0, 2), rates, loss)


def _lorenz(_: int) -> Case:
    def f(t: Tensor, y: Tensor, sigma: Tensor, rho: Tensor, beta: Tensor) -> Tensor:
        x, y_, z = y.unbind()
        return torch.stack((sigma * (y_ - x), x * (rho - z) - y_, x * y_ - beta * z))

    y0 = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
    return Case(f, y0, grid(3.0, 31), numbers(sigma=10.0, rho=28.0, beta=8 / 3), lambda ys: ys[:, 2].mean())


def _van_der_pol(_: int) -> Case:
    def f(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        x, v = y.unbind()
        return torch.stack((v, mu * (1 - x * x) * v - x))

    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    return Case(f, y0, grid(10.0, 41), numbers(mu=3.0), lambda ys: ys[:, 0].square().mean())


def _pendulum(_: int) -> Case:
    def f(t: Tensor, y: Tensor, gravity: Tensor, length: Tensor, damping: Tensor) -> Tensor:
        angle, speed = y.unbind()
        return torch.stack((speed, -gravity / length * angle.sin() - damping * speed))

    y0 = torch.tensor([2.5, 0.0], dtype=torch.float64)
    parameters = numbers(gravity=9.81, length=1.0, damping=0.1)
    return Case(f, y0, grid(10.0, 51), parameters, lambda ys: (ys[:, 0] - 1).square().mean())


def _neural_ode(size: int) -> Case:
    """A batch of 64 points carried by a network of one hidden layer, from where they are to where they should be."""

    def f(t: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.addmm(b2, torch.tanh(torch.addmm(b1, y, w1)), w2)

    hidden = 4 * size
    parameters = {
        "w1": random(size, hidden, seed=0) / math.sqrt(size),
        "b1": torch.zeros(hidden, dtype=torch.float64),
        "w2": random(hidden, size, seed=1) / math.sqrt(hidden),
        "b2": torch.zeros(size, dtype=torch.float64),
    }
    goal = random(64, size, seed=3)
    return Case(
        f, random(64, size, seed=2), grid(1.0, 2), parameters, lambda ys: (ys[-1] - goal.to(ys)).square().mean()
    )


def _gray_scott(size: int) -> Case:
    """u' = Du lap(u) - u v^2 + feed (1 - u), v' = Dv lap(v) + u v^2 - (feed + kill) v on a torus of unit cells."""

    def laplacian(u: Tensor) -> Tensor:
        return u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, 1) - 4 * u

    def f(t: Tensor, y: Tensor, du: Tensor, dv: Tensor, feed: Tensor, kill: Tensor) -> Tensor:
        u, v = y.unbind()
        reaction = u * v * v
        return torch.stack(
            (du * laplacian(u) - reaction + feed * (1 - u), dv * laplacian(v) + reaction - (feed + kill) * v)
        )

    y0 = torch.zeros(2, size, size, dtype=torch.float64)
    y0[0] = 1
    middle = slice(3 * size // 8, 5 * size // 8 + 1)
    y0[:, middle, middle] = torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None]
    y0 += 0.01 * random(2, size, size, seed=0)
    parameters = numbers(du=0.16, dv=0.08, feed=0.035, kill=0.06)
    return Case(f, y0, grid(40.0, 2), parameters, lambda ys: ys[-1, 1].square().mean())


def _pleiades(_: int) -> Case:
    """Seven bodies in a plane, of masses 1 to 7, that pass close by each other; the state is (positions, velocities).

    Source: Hairer, Norsett & Wanner (1993), Solving ODEs I, section II.10, equations (10.3) and (10.4).
    """

    def moved(t: Tensor, speeds: Tensor, masses: Tensor) -> Tensor:
        return speeds

    def pulled(t: Tensor, places: Tensor, masses: Tensor) -> Tensor:
        between = places[:, :, None] - places[:, None, :]
        cubes = (between.square().sum(0) + torch.eye(7, dtype=places.dtype, device=places.device)) ** 1.5
        return -(masses * between / cubes).sum(-1)

    def f(t: Tensor, y: Tensor, masses: Tensor) -> Tensor:
        places, speeds = y
        return torch.stack((speeds, pulled(t, places, masses)))

    places = [[3.0, 3, -1, -3, 2, -2, 2], [3.0, -3, 2, 0, 0, -4, 4]]
    speeds = [[0.0, 0, 0, 0, 0, 1.75, -1.5], [0.0, 0, 0, -1.25, 1, 0, 0]]
    masses = torch.arange(1.0, 8.0, dtype=torch.float64)
    y0 = torch.tensor([places, speeds], dtype=torch.float64)
    return Case(f, y0, grid(3.0, 4), {"masses": masses}, lambda ys: ys[-1, 0].square().mean(), pair=(moved, pulled))


def _cnot(pieces: int) -> Case:
    """Two coupled spins under four controls that are constant in pieces: 1 - fidelity with a CNOT gate.

    i U' = (Z1 Z2 + u_1 X1 + u_2 Y1 + u_3 X2 + u_4 Y2) U; the state holds the real and the imaginary part of U.
    Source: Khaneja et al. (2005), J. Magn. Reson. 172, 296-305 (GRAPE).
    """
    end = 2.2
    one, x = torch.eye(2, dtype=torch.complex128), torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
    y = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
    z = torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128)
    terms = [torch.kron(z, z), torch.kron(x, one), torch.kron(y, one), torch.kron(one, x), torch.kron(one, y)]
    parts = torch.stack([torch.stack((h.real, h.imag)) for h in terms])

    def f(t: Tensor, u: Tensor, pulse: Tensor) -> Tensor:
        piece = (t.detach() / end * pieces).floor().clamp(0, pieces - 1).long()
        known = parts.to(u)
        real, imaginary = known[0] + (pulse[piece][:, None, None, None] * known[1:]).sum(0)
        return torch.stack((imaginary @ u[0] + real @ u[1], imaginary @ u[1] - real @ u[0]))

    def loss(us: Tensor) -> Tensor:
        last = us[-1][:, [0, 1, 3, 2]].diagonal(dim1=-2, dim2=-1).sum(-1)
        return 1 - last.square().sum() / 16

    y0 = torch.stack((torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)))
    return Case(f, y0, grid(end, pieces + 1), {"pulse": 0.5 * random(pieces, 4, seed=1)}, loss)


PROBLEMS: dict[str, NamedProblem] = {
    problem.name: problem
    for problem in (
        NamedProblem(
            "lotka_volterra",
            "hares and lynxes, fitted to the pelts of 1900-1920",
            _lotka_volterra,
            size=1,
            size_is="populations",
            method="rk4",
            dt=0.2,
        ),
        NamedProblem(
            "gene_ring",
            "a ring of genes with fast messengers: dissipative, so nothing can be solved backwards",
            _gene_ring,
            size=3,
            size_is="genes",
            least=2,
            dissipative=True,
        ),
        NamedProblem("lorenz", "three variables, chaotic", _lorenz),
        NamedProblem("van_der_pol", "an oscillator with a strongly attracting cycle", _van_der_pol),
        NamedProblem("pleiades", "seven bodies that pass close by each other", _pleiades),
        NamedProblem(
            "cnot",
            "two spins turned by a pulse in pieces: how far from a CNOT gate",
            _cnot,
            size=12,
            size_is="pieces of the pulse",
            method="rk4",
            dt=0.02,
        ),
        NamedProblem("pendulum", "a damped pendulum", _pendulum),
        NamedProblem("neural_ode", "a small network that moves 64 points", _neural_ode, size=8, size_is="dimensions"),
        NamedProblem(
            "gray_scott",
            "reaction and diffusion of two species on a grid",
            _gray_scott,
            size=256,
            size_is="cells along each side",
            least=3,
            method="rk4",
            dt=1.0,
        ),
        *STIFF,
    )
}


def problem_named(name: str) -> NamedProblem:
    """The problem of this name; ValueError with the nearest name."""
    if name not in PROBLEMS:
        near = get_close_matches(name, PROBLEMS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"problem {name!r} is unknown; {hint}known are {', '.join(PROBLEMS)}")
    return PROBLEMS[name]


@dataclass(frozen=True)
class Known:
    """What a problem's last state, loss and gradient are, by two computations that share no code."""

    state: Tensor
    """At the last time; shaped like y0."""
    loss: float
    gradient: dict[str, Tensor]
    """Of the loss, by input."""
    agreement: tuple[float, float]
    """How far both are apart, relative: states by number, gradients by norm, scaled by the inputs."""


def reference_of(name: str, size: int | None = None) -> Known | None:
    """The stored values of this problem, made by ``python -m benchmarks.references``; None if there are none."""
    problem = problem_named(name)
    text = (files("adjoint") / "data" / "references.json").read_text()
    found = json.loads(text)["problems"].get(f"{name}:{size or problem.size}" if problem.size else name)
    if found is None:
        return None
    gradient = {key: torch.tensor(value, dtype=torch.float64) for key, value in found["gradient"].items()}
    state = torch.tensor(found["state"], dtype=torch.float64)
    return Known(state, found["loss"], gradient, (found["agreement"]["state"], found["agreement"]["gradient"]))
