"""The native engine beside compiled peers: small systems, one trajectory and many, fixed steps and controlled ones."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import adjoint
from benchmarks.measure import Section, Times, interleaved
from benchmarks.peers.problems import Problem, lotka_volterra
from benchmarks.peers.report import versions

REPEATS = 9
TEXT = """\
One gradient of |y(T)|^2 with respect to the first state and all parameters, float64, the classic Runge-Kutta method with
fixed steps but for the last row, on one core and one thread, in one process. Milliseconds of the processor, medians of
{repeats} taken in turn; "times" is the median of the ratios of the same round, and in brackets what was aimed at. Ours is a
whole call of `solve(..., engine="native")` with its backward; "4 steps" is the same call with only four, which is what the
call costs in Python. diffrax gets as many checkpoints as ours slots, the fewest in which no step runs plainly more than
twice; jax is the faster of a scan and a scan with nested rematerialisation, without slots. Everything is compiled
before it is timed; diffrax and jax get compiled programs with nothing around them. Off by: the difference from diffrax's
gradient, relative to its norm. First: our first call, in which everything is traced and compiled. Where one trajectory
misses what was aimed at, Python does: reading the arguments, following what the function holds, planning, and torch's
graph take what "4 steps" shows, and the two compiled calls the rest."""


def lorenz96(xp: Any, y: Any, p: Any) -> Any:
    return (xp.roll(y, -1, -1) - xp.roll(y, 2, -1)) * xp.roll(y, 1, -1) - y + p[0]


def hodgkin_huxley(xp: Any, y: Any, p: Any) -> Any:
    """Membrane potential in mV and three gates; time in ms. Hodgkin & Huxley (1952), rates for a rest at -65 mV."""
    sodium, potassium, leak, current = p[0]
    v, m, h, n = xp.moveaxis(y, -1, 0)
    alpha_m = 0.1 * (v + 40) / (1 - xp.exp(-(v + 40) / 10))
    alpha_n = 0.01 * (v + 55) / (1 - xp.exp(-(v + 55) / 10))
    alpha_h, beta_h = 0.07 * xp.exp(-(v + 65) / 20), 1 / (1 + xp.exp(-(v + 35) / 10))
    beta_m, beta_n = 4 * xp.exp(-(v + 65) / 18), 0.125 * xp.exp(-(v + 65) / 80)
    flow = sodium * m * m * m * h * (v - 50) + potassium * n * n * n * n * (v + 77) + leak * (v + 54.387)
    return xp.stack(
        (
            current - flow,
            alpha_m * (1 - m) - beta_m * m,
            alpha_h * (1 - h) - beta_h * h,
            alpha_n * (1 - n) - beta_n * n,
        ),
        -1,
    )


@dataclass(frozen=True)
class Row:
    problem: Problem
    diffrax: float
    """So many times faster than it is aimed at."""
    jax: float | None
    rtol: float | None = None
    """Of controlled steps."""


def rows() -> list[Row]:
    random = np.random.default_rng(0)
    rates, conductances = (np.array([1.1, 0.4, 0.4, 0.1]),), (np.array([120.0, 36.0, 0.3, 10.0]),)
    rest, animals = np.array([-65.0, 0.05, 0.6, 0.32]), np.array([10.0, 5.0])
    waves = random.standard_normal((1000, 40))

    def many(y: np.ndarray) -> np.ndarray:
        return y * (1 + 0.1 * random.random((1000, len(y))))

    force = (np.array([8.0]),)
    prey = Problem("Lotka-Volterra", lotka_volterra, animals, rates, 1024, 2.0**-7)
    axon = Problem("Hodgkin-Huxley", hodgkin_huxley, rest, conductances, 1024, 2.0**-7)
    ring = Problem("Lorenz-96 (40)", lorenz96, waves[0], force, 1024, 2.0**-8)
    return [
        Row(prey, 100, 7),
        Row(replace(prey, name="Lotka-Volterra, 1000 at once", y0=many(animals)), 8, 3),
        Row(axon, 12, 5),
        Row(replace(axon, name="Hodgkin-Huxley, 1000 at once", y0=many(rest), steps=256), 5, 3),
        Row(ring, 15, 5),
        Row(replace(ring, name="Lorenz-96 (40), 1000 at once", y0=waves, steps=128), 10, 8),
        Row(replace(prey, name="Lotka-Volterra, dopri5"), 15, None, rtol=1e-8),
    ]


def ours(row: Row, problem: Problem | None = None) -> Callable[[], list[torch.Tensor]]:
    problem = problem or row.problem
    y0 = torch.tensor(problem.y0, requires_grad=True)
    parameters = tuple(torch.tensor(p, requires_grad=True) for p in problem.parameters)
    t = torch.tensor([0.0, problem.end], dtype=torch.float64)
    how: dict[str, Any] = {"method": "rk4", "dt": problem.h, "slots": problem.slots}
    if row.rtol is not None:
        how = {"method": "dopri5", "rtol": row.rtol, "atol": row.rtol}

    slope = problem.f

    def f(t: torch.Tensor, y: torch.Tensor, p: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return slope(torch, y, p)

    def run() -> list[torch.Tensor]:
        solution = adjoint.solve(f, y0, t, args=(parameters,), engine="native", **how)
        assert solution.engine.startswith("native"), solution.engine
        return list(torch.autograd.grad(solution.ys[-1].square().sum(), (y0, *parameters)))

    return run


def peers(row: Row) -> dict[str, Callable[[], Any]]:
    """Compiled gradients by name, of those that are installed."""
    if find_spec("jax") is None or find_spec("diffrax") is None:
        return {}
    in_jax, in_diffrax = import_module("benchmarks.peers.in_jax"), import_module("benchmarks.peers.in_diffrax")
    if row.rtol is not None:
        return {"diffrax": controlled(row)}
    return {
        "diffrax": in_diffrax.checkpointed(row.problem),
        "scan": in_jax.scan(row.problem),
        "remat": in_jax.remat(row.problem),
    }


def controlled(row: Row) -> Callable[[], Any]:
    """diffrax's Dopri5 to the same tolerances."""
    diffrax, jnp = import_module("diffrax"), import_module("jax.numpy")
    problem, compiled = row.problem, import_module("benchmarks.peers.in_jax").compiled

    def last(y0: Any, p: Any) -> Any:
        term = diffrax.ODETerm(lambda t, y, args: problem.f(jnp, y, args))
        control = diffrax.PIDController(rtol=row.rtol, atol=row.rtol)
        solution = diffrax.diffeqsolve(
            term, diffrax.Dopri5(), 0.0, problem.end, None, y0, args=p, stepsize_controller=control, max_steps=4096
        )
        return solution.ys[0]

    return compiled(problem, last)


def measured(row: Row, repeats: int = REPEATS) -> tuple[str, ...]:
    """One line of the table."""
    mine, short, others = ours(row), ours(row, row.problem.short()), peers(row)
    start = time.process_time()
    gradient = mine()
    first = time.process_time() - start
    times = interleaved([mine, short, *others.values()], repeats=repeats, device="cpu")
    places = {name: i for i, name in enumerate(others, 2)}
    scans = [places[name] for name in ("scan", "remat") if name in places]
    cells = [row.problem.name, f"{row.problem.steps}" if row.rtol is None else f"rtol {row.rtol:g}"]
    cells += [f"**{milliseconds(times.of(0))}**", milliseconds(times.of(1)) if row.rtol is None else ""]
    cells += against(times, places.get("diffrax"), row.diffrax)
    cells += against(times, min(scans, key=times.of) if scans else None, row.jax)
    reference = next(iter(others.values()), None)
    return (*cells, "" if reference is None else off_by(gradient, reference()), f"{first:.1f} s")


def against(times: Times, which: int | None, aim: float | None) -> list[str]:
    if which is None:
        return ["", "" if aim is None else f"not installed ({aim:g})"]
    found = times.ratio(which, 0)
    missed = "" if aim is None or found >= aim else ", missed"
    return [milliseconds(times.of(which)), f"{found:.1f} ({aim:g}{missed})"]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def off_by(mine: list[torch.Tensor], theirs: Any) -> str:
    pairs = [(a.numpy(), np.asarray(b)) for a, b in zip(mine, theirs, strict=True)]
    difference = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return f"{(difference / sum(float(np.square(b).sum()) for _, b in pairs)) ** 0.5:.0e}"


def run(device: str) -> Section:
    """Always on the CPU, on one core, with an empty cache of programs."""
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as empty:
        before = os.environ.get("ADJOINT_CACHE")
        os.environ["ADJOINT_CACHE"] = empty
        os.sched_setaffinity(0, {max(cores)})
        try:
            found = tuple(measured(row) for row in rows())
        finally:
            os.sched_setaffinity(0, cores)
            if before is None:
                del os.environ["ADJOINT_CACHE"]
            else:
                os.environ["ADJOINT_CACHE"] = before
    words = " ".join(TEXT.format(repeats=REPEATS).split())
    header = ("problem", "steps", "ours", "4 steps", "diffrax", "times", "jax", "times", "off by", "first")
    return Section("The native engine beside compiled peers", f"{words} {versions()}", header, found)
