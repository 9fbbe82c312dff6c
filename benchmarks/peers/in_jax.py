"""jax: a compiled scan over steps, as it is and with nested rematerialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.problems import Problem

jax.config.update("jax_enable_x64", True)

Gradient = Callable[[], Sequence[jax.Array]]


def numbers(gradient: Sequence[jax.Array]) -> list[np.ndarray]:
    return [np.asarray(g) for g in gradient]


def compiled(problem: Problem, last: Callable[[Any, Any], Any]) -> Gradient:
    """The gradient of |last(y0, parameters)|^2, compiled before it is called."""
    inputs = (jnp.asarray(problem.y0), tuple(jnp.asarray(p) for p in problem.parameters))
    gradient = jax.jit(jax.grad(lambda y0, p: jnp.sum(last(y0, p) ** 2), argnums=(0, 1)))
    program = gradient.lower(*inputs).compile()

    def run() -> Sequence[jax.Array]:
        of_y0, of_parameters = jax.block_until_ready(program(*inputs))
        return [of_y0, *of_parameters]

    return run


def refuse_control(problem: Problem) -> None:
    if problem.rtol is not None:
        raise ValueError("takes fixed steps")


def step(problem: Problem, y: Any, p: Any) -> Any:
    h = problem.h
    k1 = problem.f(jnp, y, p)
    k2 = problem.f(jnp, y + h / 2 * k1, p)
    k3 = problem.f(jnp, y + h / 2 * k2, p)
    k4 = problem.f(jnp, y + h * k3, p)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def scan(problem: Problem) -> Gradient:
    refuse_control(problem)

    def last(y0: Any, p: Any) -> Any:
        return jax.lax.scan(lambda y, _: (step(problem, y, p), None), y0, length=problem.steps)[0]

    return compiled(problem, last)


def remat(problem: Problem) -> Gradient:
    """Segments are run again, and in each of them every step."""
    refuse_control(problem)

    def last(y0: Any, p: Any) -> Any:
        @jax.checkpoint
        def one(y: Any, _: None) -> tuple[Any, None]:
            return step(problem, y, p), None

        @jax.checkpoint
        def segment(y: Any, _: None) -> tuple[Any, None]:
            return jax.lax.scan(one, y, length=problem.steps // problem.segments)[0], None

        return jax.lax.scan(segment, y0, length=problem.segments)[0]

    return compiled(problem, last)
