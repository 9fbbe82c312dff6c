"""Stiff problems of the literature, each with its parameters as inputs and its source.

Values at the end and gradients, computed in two independent ways, are in ``data/references.json``
(``python -m benchmarks.references`` makes it; :func:`adjoint.problems.reference_of` reads it). Chemistry, oscillators and
nerve take batches as well: y of shape (members, n), with parameters of shape (members,), rates of (members, 25).
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from adjoint.cases import Case, NamedProblem, grid, numbers
from adjoint.sparse import Sparse

D = torch.float64


def _robertson_rates(y: Tensor, rates: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    slow, fast, back = rates
    a, b, c = y.unbind(-1)
    return slow * a, fast * b**2, back * b * c


ROBERTSON = {"slow": 0.04, "fast": 3e7, "back": 1e4}
DECADES = torch.tensor([0.0, *(0.4 * 10.0**k for k in range(7))], dtype=D)
"""From 0.4 to 400,000: six decades."""


def _robertson(_: int) -> Case:
    """Three species that react at rates nine decades apart, for six decades of time.

    A -> B at 0.04 A,    2 B -> B + C at 3e7 B^2,    B + C -> A + C at 1e4 B C

    Source: Robertson (1966), in Walsh (ed.), Numerical Analysis, an Introduction, 178-182; Hairer & Wanner (1996),
    Solving ODEs II, section IV.1, equation (1.4).
    """

    def f(t: Tensor, y: Tensor, *rates: Tensor) -> Tensor:
        slow, fast, back = _robertson_rates(y, rates)
        return torch.stack((back - slow, slow - back - fast, fast), -1)

    return Case(f, torch.tensor([1.0, 0.0, 0.0], dtype=D), DECADES, numbers(**ROBERTSON), lambda ys: ys[-1, 0])


def _robertson_dae(_: int) -> Case:
    """The same with the conservation of mass, A + B + C = 1, in place of the third equation: an index of 1."""

    def f(t: Tensor, y: Tensor, *rates: Tensor) -> Tensor:
        slow, fast, back = _robertson_rates(y, rates)
        return torch.stack((back - slow, slow - back - fast, y.sum(-1) - 1), -1)

    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=D))
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)
    return Case(f, y0, DECADES, numbers(**ROBERTSON), lambda ys: ys[-1, 0], mass)


def _hires(_: int) -> Case:
    """How light makes plants grow by high irradiance: eight species of phytochrome.

    Source: Schaefer (1975), J. Math. Biology 2, 41-56; Hairer & Wanner (1996), section IV.10; rates by name as in
    Mazzia & Magherini (2008), Test set for IVP solvers, problem HIRES.
    """

    def f(t: Tensor, y: Tensor, *rates: Tensor) -> Tensor:
        k1, k2, k3, k4, k5, k6, plus, minus, star, oks = rates
        a, b, c, d, e, g, h, i = y.unbind(-1)
        binding = plus * g * i
        leaving = (k2 + minus + star) * h
        return torch.stack(
            (
                k2 * b + k6 * c + oks - k1 * a,
                k1 * a - (k2 + k3) * b,
                k2 * d + k5 * e - (k6 + k1) * c,
                k3 * b + k1 * c - (k4 + k2) * d,
                k2 * (g + h) - (k1 + k5) * e,
                k4 * d + k1 * e + minus * h - k2 * g - binding,
                binding - leaving,
                leaving - binding,
            ),
            -1,
        )

    rates = {"k1": 1.71, "k2": 0.43, "k3": 8.32, "k4": 0.69, "k5": 0.035, "k6": 8.32}
    y0 = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.0057], dtype=D)
    known = numbers(**rates, plus=280.0, minus=0.69, star=0.69, oks=0.0007)
    return Case(f, y0, grid(321.8122, 2), known, lambda ys: ys[-1, 5])


POLLUTION_RATES = """0.35 26.6 1.23e4 8.6e-4 8.2e-4 1.5e4 1.3e-4 2.4e4 1.65e4 9e3 0.022 1.2e4 1.88 1.63e4 4.8e6 3.5e-4
0.0175 1e8 4.44e11 1.24e3 2.1 5.78 0.0474 1.78e3 3.12"""
POLLUTION_FROM = "1 2,4 5,2 7 7 7,6 9 9,6 11,2 11,1 13 10,2 14 1,6 3 4 4 16 16 17,6 19 19 1,4 19,1 20"
POLLUTION_TO = "2,3 1 1,6 5,5,8 8 5,8 5,8,10 11 1,10,12 13 1,11 1,14 5,7 15 4 16 3 6,6 3 5,18 2 1,3 19 20 1,19"
"""Species of each reaction, before and after; 5,5 is two of it."""
POLLUTION_FIRST = {2: 0.2, 4: 0.04, 7: 0.1, 8: 0.3, 9: 0.01, 17: 0.007}
POLLUTION_SPECIES = """NO2 NO O O3 HO2 OH HCHO CO ALD MEO2 C2O3 CO2 PAN CH3O HNO3 O1D SO2 SO4 NO3 N2O5""".split()
OZONE = 3
"""Its place in the state of "pollution"."""


def pollution_reactions() -> list[tuple[list[int], list[int]]]:
    """The places of the species that each of 25 reactions uses and makes."""

    def places(words: str) -> list[list[int]]:
        return [[int(x) - 1 for x in word.split(",")] for word in words.split()]

    return list(zip(places(POLLUTION_FROM), places(POLLUTION_TO), strict=True))


def _pollution(_: int) -> Case:
    """The chemistry of a Dutch air pollution model: 20 species, 25 reactions, rates from 8e-4 to 4e11 a minute.

    Reaction i runs at the speed k_i [first] [second]. The loss is the logarithm of the ozone after an hour.

    Source: Verwer (1994), SIAM J. Sci. Comput. 15, 1243-1250, tables 1 and 2.
    """
    made = torch.zeros(25, 20, dtype=D)
    for i, (used, products) in enumerate(pollution_reactions()):
        for j in used:
            made[i, j] -= 1
        for j in products:
            made[i, j] += 1
    first, second = torch.tensor([(*used, 20)[:2] for used, _ in pollution_reactions()]).T  # the last index: none

    def f(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        with_one = torch.cat((y, torch.ones_like(y[..., :1])), -1)
        return (rates * with_one[..., first] * with_one[..., second]) @ made.to(y)

    y0 = torch.zeros(20, dtype=D)
    for species, amount in POLLUTION_FIRST.items():
        y0[species - 1] = amount
    rates = torch.tensor([float(x) for x in POLLUTION_RATES.split()], dtype=D)
    return Case(f, y0, grid(60.0, 2), {"rates": rates}, lambda ys: ys[-1, OZONE].log())


def _oregonator(_: int) -> Case:
    """The Belousov-Zhabotinsky reaction, which swings from colour to colour: three species over more than a period.

    Source: Field & Noyes (1974), J. Chem. Phys. 60, 1877-1884; Hairer & Wanner (1996), section IV.10, equation (10.15).
    """

    def f(t: Tensor, y: Tensor, s: Tensor, q: Tensor, w: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack((s * (b + a * (1 - q * a - b)), (c - (1 + a) * b) / s, w * (a - c)), -1)

    known = numbers(s=77.27, q=8.375e-6, w=0.161)
    return Case(f, torch.tensor([1.0, 2.0, 3.0], dtype=D), grid(360.0, 2), known, lambda ys: ys[-1].log().mean())


def _relaxation(size: int) -> Case:
    """Van der Pol's oscillator with a damping of mu, in units of time of mu: slow arcs, and jumps between them.

    x' = v,    v' = mu^2 ((1 - x^2) v - x),    mu up to a million

    Source: van der Pol (1926), Phil. Mag. 2, 978-992; Hairer & Wanner (1996), section IV.10, equation (10.16).
    """

    def f(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack((v, mu * mu * ((1 - x * x) * v - x)), -1)

    y0 = torch.tensor([2.0, 0.0], dtype=D)
    return Case(f, y0, grid(2.0, 2), numbers(mu=float(size)), lambda ys: ys[-1, 0])


def _brusselator(cells: int) -> Case:
    """Reaction and diffusion on a line; the state has u and v of each cell side by side.

    u' = a + u^2 v - (b + 1) u + d u_xx,    v' = b u - u^2 v + d v_xx,    u = 1 and v = 3 at both ends

    From 100 numbers on the linear systems are sparse. Source: Hairer & Wanner (1996), section IV.10, equation (10.14).
    """

    def f(t: Tensor, y: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        u, v = y.reshape(cells, 2).unbind(1)
        spread = d * (cells + 1) ** 2
        left_right_u = torch.nn.functional.pad(u, (1, 1), value=1.0)
        left_right_v = torch.nn.functional.pad(v, (1, 1), value=3.0)
        made = u * u * v
        du = a + made - (b + 1) * u + spread * (left_right_u[2:] - 2 * u + left_right_u[:-2])
        dv = b * u - made + spread * (left_right_v[2:] - 2 * v + left_right_v[:-2])
        return torch.stack((du, dv), 1).reshape(-1)

    x = torch.arange(1, cells + 1, dtype=D) / (cells + 1)
    y0 = torch.stack((1 + torch.sin(2 * math.pi * x), torch.full_like(x, 3.0)), 1).reshape(-1)
    linear = Sparse(brusselator_pattern(cells)) if cells >= 50 else None
    return Case(f, y0, grid(10.0, 2), numbers(a=1.0, b=3.0, d=0.02), lambda ys: ys[-1, ::2].mean(), linear=linear)


def brusselator_pattern(cells: int) -> scipy.sparse.spmatrix:
    """Where its Jacobian may differ from zero: each number with those of its cell and its own kind beside it."""
    neighbours = scipy.sparse.diags([np.ones(2 * cells)] * 3, [-2, 0, 2], shape=(2 * cells, 2 * cells))
    return neighbours + scipy.sparse.kron(scipy.sparse.identity(cells), np.ones((2, 2)))


def _over_itself(x: Tensor) -> Tensor:
    """x / (1 - exp(-x)), smooth at 0."""
    near = x.abs() < 1e-4
    safe = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, 1 + x / 2 + x * x / 12, safe / -torch.expm1(-safe))


def _hodgkin_huxley(_: int) -> Case:
    """A nerve that fires: its voltage in mV, and the gates m, h and n of its channels, for 20 ms under a steady current.

    C v' = I - g_Na m^3 h (v - E_Na) - g_K n^4 (v - E_K) - g_leak (v - E_leak),    gate' = a(v) (1 - gate) - b(v) gate

    Source: Hodgkin & Huxley (1952), J. Physiol. 117, 500-544, equations (12) to (26), with rest at -65 mV.
    """

    def f(t: Tensor, y: Tensor, *known: Tensor) -> Tensor:
        current, capacity, g_na, g_k, g_leak, e_na, e_k, e_leak = known
        v, m, h, n = y.unbind(-1)
        through = g_na * m**3 * h * (v - e_na) + g_k * n**4 * (v - e_k) + g_leak * (v - e_leak)
        opening = (_over_itself((v + 40) / 10), 0.07 * torch.exp(-(v + 65) / 20), 0.1 * _over_itself((v + 55) / 10))
        closing = (4 * torch.exp(-(v + 65) / 18), torch.sigmoid((v + 35) / 10), 0.125 * torch.exp(-(v + 65) / 80))
        gates = (a * (1 - x) - b * x for a, b, x in zip(opening, closing, (m, h, n), strict=True))
        return torch.stack(((current - through) / capacity, *gates), -1)

    known = numbers(current=10.0, capacity=1.0, g_na=120.0, g_k=36.0, g_leak=0.3, e_na=50.0, e_k=-77.0, e_leak=-54.4)
    y0 = torch.tensor([-65.0, 0.05, 0.6, 0.32], dtype=D)
    return Case(f, y0, grid(20.0, 2), known, lambda ys: ys[-1, 0])


_stiff = partial(NamedProblem, method="kvaerno5", stiff=True)
STIFF: tuple[NamedProblem, ...] = (
    _stiff("robertson", "three species, rates nine decades apart, six decades of time", _robertson, small=1e-6),
    _stiff(
        "robertson_dae",
        "the same, with the conservation of mass as an algebraic equation",
        _robertson_dae,
        method="radau5",
        small=1e-6,
    ),
    _stiff("hires", "eight species of phytochrome under high irradiance", _hires, small=1e-4),
    _stiff("pollution", "air over a city: 20 species, 25 reactions; the ozone of an hour", _pollution, small=1e-6),
    _stiff("oregonator", "the reaction that swings from colour to colour", _oregonator, small=1e-3),
    _stiff(
        "relaxation",
        "van der Pol's oscillator, damped so much that it rests and jumps",
        _relaxation,
        size=1000,
        size_is="mu",
        small=1.0,
    ),
    _stiff(
        "brusselator",
        "reaction and diffusion of two species on a line",
        _brusselator,
        size=20,
        size_is="cells",
        small=1.0,
    ),
    NamedProblem("hodgkin_huxley", "the spikes of a nerve under a steady current", _hodgkin_huxley),
)
