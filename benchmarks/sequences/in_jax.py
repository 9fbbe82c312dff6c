"""jax: a compiled scan, as it is and with nested rematerialisation; and equinox's checkpointed scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox.internal
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sequences.problem import STATES, numbers, segment

jax.config.update("jax_enable_x64", True)


def row(h: Any, u: Any, p: Any) -> tuple[Any, Any]:
    w, c, v, r = p
    gate = jax.nn.sigmoid(u * w + c)
    h = gate * h + (1 - gate) * v * u
    return h, h @ r


def compiled(length: int, outputs: Callable[[Any, Any], Any]) -> Callable[[], Sequence[np.ndarray]]:
    u, *p = (jnp.asarray(x) for x in numbers(length))
    gradient = jax.jit(jax.grad(lambda u, p: 0.5 * jnp.sum(outputs(u, p) ** 2), argnums=(0, 1)))
    program = gradient.lower(u, p).compile()

    def run() -> Sequence[np.ndarray]:
        of_u, of_p = jax.block_until_ready(program(u, p))
        return [np.asarray(x) for x in (of_u, *of_p)]

    return run


def scan(length: int) -> Any:
    return compiled(length, lambda u, p: jax.lax.scan(lambda h, x: row(h, x, p), jnp.zeros(STATES), u)[1])


def remat(length: int) -> Any:
    """Segments near the square root of the length are run again, and in each of them every row."""
    size = segment(length)

    def outputs(u: Any, p: Any) -> Any:
        @jax.checkpoint
        def part(h: Any, us: Any) -> tuple[Any, Any]:
            return jax.lax.scan(jax.checkpoint(lambda h, x: row(h, x, p)), h, us)

        return jax.lax.scan(part, jnp.zeros(STATES), u.reshape(-1, size))[1].ravel()

    return compiled(length, outputs)


def checkpointed(length: int) -> Any:
    """equinox: the on-line binomial schedule, in as many slots as it chooses."""

    def outputs(u: Any, p: Any) -> Any:
        return equinox.internal.scan(lambda h, x: row(h, x, p), jnp.zeros(STATES), u, kind="checkpointed")[1]

    return compiled(length, outputs)
