"""diffrax: Kvaerno5 with the PI control that its pages recommend for stiff problems, and its discrete adjoint, compiled; a
batch by vmap."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stiff.problems import Array, Stiff, reactions

jax.config.update("jax_enable_x64", True)


def right(problem: Stiff, y: Any, p: Any) -> Any:
    """f; 25 reactions as arrays, since their compilation takes minutes one by one."""
    if problem.name != "pollution":
        return jnp.stack(problem.f(y, p))
    partners, made = reactions()
    return (p * jnp.prod(jnp.append(y, 1.0)[partners], 1)) @ made


def kvaerno5(problem: Stiff, members: int) -> Any:
    how = problem.tolerances
    term = diffrax.ODETerm(lambda t, y, p: right(problem, y, p))

    def loss(y0: Any, p: Any) -> tuple[Any, Any]:
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Kvaerno5(),
            0.0,
            problem.end,
            None,
            y0,
            args=p,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(rtol=how["rtol"], atol=how["atol"], pcoeff=0.3, icoeff=0.4),
            adjoint=diffrax.RecursiveCheckpointAdjoint(),
            max_steps=8192,
            throw=False,
        )
        seen = solution.ys[0][problem.seen]
        return jnp.log(seen) if problem.logarithm else seen, solution.result == diffrax.RESULTS.successful

    inputs = tuple(map(jnp.asarray, problem.inputs(members)))
    program = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1), has_aux=True))).lower(*inputs).compile()

    def run() -> tuple[Array, Array]:
        (of_y0, of_p), done = jax.block_until_ready(program(*inputs))
        if not bool(done.all()):
            raise RuntimeError("the steps do not suffice")
        return np.asarray(of_y0), np.asarray(of_p)

    return run
