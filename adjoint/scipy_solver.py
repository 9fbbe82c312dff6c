"""scipy's solvers as a method of the ``odeint`` family, with the continuous adjoint along their dense output.

    dlam/dt = -f_y(t, u(t))^T lam,    mu = integral of f_p(t, u(t))^T lam dt

u is scipy's own interpolant of the forward solve, and the solver of the backward one is scipy's too. How scipy chooses its
steps cannot be followed, so there is no discrete adjoint of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.integrate
import torch
from torch import Tensor

from adjoint.autograd import AutogradStepper, Cotangent
from adjoint.captured import Captured
from adjoint.continuous import Right, carried_out
from adjoint.names import named
from adjoint.problem import Outcome, Problem
from adjoint.steppers.control import Control, Tolerance
from adjoint.steppers.explicit import ExplicitProgram, with_timeline
from adjoint.tableaus import METHODS
from adjoint.tensors import State, Structure
from adjoint.timeline import SolveError
from adjoint.touched import leaves_behind, refuse

Array = np.ndarray[Any, np.dtype[np.float64]]
SOLVERS: dict[str, Any] = {
    name: getattr(scipy.integrate, name) for name in ("LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF")
}
IMPLICIT = ("LSODA", "Radau", "BDF")
NODES = 4
"""Of Gauss-Legendre quadrature for mu, in each step of the forward or the backward solve."""


@dataclass(frozen=True)
class Scipy:
    """What ``scipy.integrate.solve_ivp`` is to do."""

    solver: str | type = "LSODA"
    min_step: float = 0.0
    max_step: float = float("inf")

    name = "scipy_solver"
    adaptive = True
    implicit = False

    def __post_init__(self) -> None:
        if isinstance(self.solver, str):
            named("solver", self.solver, SOLVERS)
        elif not (isinstance(self.solver, type) and issubclass(self.solver, scipy.integrate.OdeSolver)):
            raise TypeError(
                f"solver={self.solver!r} is no solver of scipy; give one of {', '.join(SOLVERS)}, or an OdeSolver"
            )
        if self.min_step and "min_step" not in inspect.signature(self._kind).parameters:
            raise ValueError(f"min_step={self.min_step}: solver={self.solver!r} has no least step; 'LSODA' has")

    @property
    def _kind(self) -> Any:
        return SOLVERS[self.solver] if isinstance(self.solver, str) else self.solver

    def solved(
        self, f: Callable[[float, Array], Array], jac: Any, t: list[float], y0: Array, rtol: Any, atol: Any, **more: Any
    ) -> Any:
        """Of solve_ivp; raises SolveError if it gives up. ``t``: from, to, and what lies between."""
        options: dict[str, Any] = {"max_step": self.max_step, **more}
        if self.min_step:
            options["min_step"] = self.min_step
        if self.solver in IMPLICIT:
            options["jac"] = jac
        if np.ndim(rtol) and np.ptp(rtol) == 0:
            rtol = float(rtol[0])
        found = scipy.integrate.solve_ivp(f, (t[0], t[-1]), y0, method=self.solver, rtol=rtol, atol=atol, **options)
        if found.status < 0:
            last = float(found.t[-1]) if len(found.t) else t[0]
            raise SolveError(
                "scipy",
                f"scipy's {self.solver} ended at t={last:.6g} of {t[-1]:.6g}: {found.message}",
                t=last,
                step=len(found.t),
            )
        return found


class Flat:
    """A state as one vector of real numbers, and back."""

    def __init__(self, like: State) -> None:
        self._like = like
        self.size = sum(x.numel() * (2 if x.is_complex() else 1) for x in like)

    def out(self, leaves: State) -> Array:
        real = [torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach() for x in leaves]
        return np.concatenate([x.cpu().double().numpy().reshape(-1) for x in real])

    def back(self, vector: Array) -> State:
        flat, found, begin = torch.from_numpy(np.array(vector, dtype=np.float64)), [], 0
        for like in self._like:
            count = like.numel() * (2 if like.is_complex() else 1)
            part, begin = flat[begin : begin + count], begin + count
            x = torch.view_as_complex(part.reshape(-1, 2)) if like.is_complex() else part
            found.append(x.reshape(like.shape).to(like))
        return tuple(found)

    def spread(self, tolerances: Any) -> Any:
        """One number, or one for each number of the state."""
        given = tolerances if isinstance(tolerances, tuple) else (tolerances,) * len(self._like)
        if not any(isinstance(x, Tensor) for x in given) and len(set(given)) == 1:
            return float(given[0])
        each = (
            torch.as_tensor(x, dtype=torch.float64).expand(like.shape)
            for x, like in zip(given, self._like, strict=True)
        )
        return self.out(
            tuple(torch.complex(x, x) if y.is_complex() else x for x, y in zip(each, self._like, strict=True))
        )


@dataclass(frozen=True)
class ByScipy:
    """The solve and its gradient. ``rtol`` and ``atol``: of the backward solve; None: those of the forward one."""

    forward: Scipy
    backward: Scipy
    rtol: Any = None
    atol: Any = None

    def __call__(self, problem: Problem) -> Outcome:
        dense: list[Any] = []

        def run(stepper: AutogradStepper, state: State, differentiable: bool) -> tuple[State, SolveError | None]:
            return self._forwards(stepper, state, dense if differentiable else None)

        return carried_out(problem, "scipy_solver", None, run, partial(_Backwards, self, dense))

    def _forwards(
        self, stepper: AutogradStepper, state: State, dense: list[Any] | None
    ) -> tuple[State, SolveError | None]:
        program, captured = stepper.program, stepper.captured
        assert isinstance(program, ExplicitProgram)
        flat, tolerance, t = Flat(state), program.control.tolerance, program.asked.t

        def slope(time: float, y: Array) -> Array:
            with torch.set_grad_enabled(stepper.tracking):
                found = program.slope(captured.plain, program.time(time), flat.back(y))
            if any(x.requires_grad for x in found):
                refuse(list(leaves_behind(list(found)).values()), program.label)
            return flat.out(found)

        def jacobian(time: float, y: Array) -> Array:
            return _jacobian(Right(program, captured), program.time(time), flat, y)

        stepper.start(state)
        try:
            found = self.forward.solved(
                slope,
                jacobian,
                t,
                flat.out(state),
                flat.spread(tolerance.rtol),
                flat.spread(tolerance.atol),
                t_eval=np.array(t),
                dense_output=dense is not None,
            )
        except SolveError as error:
            return state, error
        for j, y in enumerate(found.y.T):
            stepper.outputs.put(j, flat.back(y) if j else state)
        stepper.frontier = int(found.nfev)
        if dense is not None:
            dense.append(found.sol)
        return flat.back(found.y[:, -1]), None


@dataclass
class _Backwards:
    """The backward solve of one gradient."""

    how: ByScipy
    dense: list[Any]
    """scipy's interpolant of the forward solve."""
    program: ExplicitProgram
    captured: Captured
    outputs: State
    right: Right = field(init=False)

    def __post_init__(self) -> None:
        self.right = Right(self.program, self.captured)
        self.flat = Flat(tuple(x[0] for x in self.outputs))

    def check(self) -> None:
        self.captured.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> list[Tensor | None]:
        """Cotangents of (y0, t if it is differentiated, the captured tensors)."""
        asked, right = self.program.asked.t, self.right
        lam: State = tuple(torch.zeros_like(x[0]) for x in self.outputs)
        mu: State = tuple(torch.zeros_like(x) for x in self.captured.leaves)
        of_times = torch.zeros(len(asked), dtype=torch.float64)
        for j in range(len(asked) - 1, 0, -1):
            state, jump = right.jump(self.outputs, of_outputs, j)
            of_times[j] = right.along(asked[j], state, jump)
            lam = tuple(x + g for x, g in zip(lam, jump, strict=True))
            lam, mu = self._between(asked[j], asked[j - 1], lam, mu)
        return right.cotangents(self.outputs, of_outputs, lam, mu, of_times)

    def _between(self, start: float, stop: float, lam: State, mu: State) -> tuple[State, State]:
        """lam and mu from one asked time back to the one before."""
        flat, program, tolerance = self.flat, self.program, self.program.control.tolerance
        if not any(bool(x.any()) for x in lam):
            return lam, mu
        rtol, atol = (
            flat.spread(forward if own is None else own)
            for own, forward in ((self.how.rtol, tolerance.rtol), (self.how.atol, tolerance.atol))
        )

        def slope(t: float, x: Array) -> Array:
            found, _ = self.right.products(program.time(t), self._at(t), flat.back(x), True, False)
            return -flat.out(found)

        def jacobian(t: float, x: Array) -> Array:
            return -_jacobian(self.right, program.time(t), flat, self.dense[0](t)).T

        found = self.how.backward.solved(slope, jacobian, [start, stop], flat.out(lam), rtol, atol, dense_output=True)
        if mu:
            mu = self._integral(found, start, stop, mu)
        return flat.back(found.y[:, -1]), mu

    def _integral(self, backward: Any, start: float, stop: float, mu: State) -> State:
        """mu, and what it grows by from ``start`` back to ``stop``."""
        low, high = min(start, stop), max(start, stop)
        knots = np.unique([low, high, *backward.t, *(x for x in self.dense[0].ts if low < x < high)])
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        sign = 1.0 if start > stop else -1.0
        for a, b in pairwise(knots):
            for node, weight in zip(nodes, weights, strict=True):
                t = (a + b + (b - a) * node) / 2
                lam = self.flat.back(backward.sol(t))
                _, found = self.right.products(self.program.time(t), self._at(t), lam, False, True)
                mu = tuple(m + sign * weight * (b - a) / 2 * x for m, x in zip(mu, found, strict=True))
        return mu

    def _at(self, t: float) -> State:
        return self.flat.back(self.dense[0](t))


def _jacobian(right: Right, t: Tensor, flat: Flat, y: Array) -> Array:
    """(n, n), a product with each unit vector."""
    state, rows = flat.back(y), []
    for unit in np.eye(flat.size):
        found, _ = right.products(t, state, flat.back(unit), True, False)
        rows.append(flat.out(found))
    return np.array(rows)


def program_by_scipy(t: Tensor, structure: Structure, state: State, tolerance: Tolerance, dtype: torch.dtype) -> Any:
    """What calls f, and takes a step on trial to find the tensors that it holds."""
    control = Control(replace(tolerance, norm=None), time_dtype=dtype)
    return with_timeline(ExplicitProgram(METHODS["bosh3"], t, structure, state, control))
