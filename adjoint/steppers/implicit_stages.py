"""One step of an implicit Runge-Kutta method being computed: its stages by Newton's method, its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.implicit_method import EXPLICITLY, IMPLICITLY
from adjoint.linear import Factored
from adjoint.memory import aside
from adjoint.steppers.jacobians import Jacobian
from adjoint.steppers.newton import Newton, NewtonFailed
from adjoint.steppers.roots import Equation, Evaluated
from adjoint.steppers.stages import Stages
from adjoint.steppers.vectors import Vectors
from adjoint.tensors import State


def shifted(base: Tensor, row: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """base + sum_j w_j x_j"""
    for j, w in enumerate(row):
        base = base + w.to(base.dtype) * x[j] if isinstance(w, Tensor) else torch.add(base, x[j], alpha=w)
    return base


def moved(state: State, h: float | Tensor, slope: State) -> State:
    """y + h k"""
    if isinstance(h, Tensor):
        return tuple([y + h.to(y.real.dtype) * k for y, k in zip(state, slope, strict=True)])
    return tuple([torch.add(y, k, alpha=h) for y, k in zip(state, slope, strict=True)])


class ImplicitStages(Stages):
    """One step of an implicit method. ``program`` is the ImplicitProgram that makes it."""

    def __init__(self, program: Any, function: Any, state: State, *how: Any) -> None:
        super().__init__(program, function, state[: program.leaves], *how)
        self.carry = state[program.leaves : program.leaves * (1 + program.carries)]
        restarts = program.restarts
        self.goes_on = (
            self.k > 0 and not program.jumps_at(self.start) and not (restarts is not None and restarts(self.k))
        )
        """Whether what the step before left is of use."""
        self.jacobian = Jacobian(self, state[program.leaves * (1 + program.carries) :])
        self._measured: tuple[Tensor, float, float] | None = None
        self._eta = 1.0
        self._theta = 0.0
        self.suspect: Tensor | None = None
        self.explicit: list[State] = []
        self.implicit: list[State] = []

    def run(self, first: State | None = None) -> None:
        program, tableau = self.program, self.program.how.tableau
        self.slope = self._first_slope() if program.carries else ()
        if tableau.coupled:
            self.slopes = self._solved(range(tableau.stages))
        for i in range(0 if tableau.coupled else tableau.stages):
            if i == 0 and tableau.starts_explicitly:
                own = self.slope if program.carries else self._at_start()
            else:
                (own,) = self._solved(range(i, i + 1))
            self.implicit.append(own)
            if program.how.split:
                point = self.point(i)
                shift = tableau.a[i][i] * self.h
                if tableau.a[i][i]:
                    point = moved(point, shift, own)
                self.explicit.append(program.part(self.function, EXPLICITLY, self.times[i], point))
                own = tuple([x + z for x, z in zip(own, self.explicit[-1], strict=True)])
            self.slopes.append(own)
        self.new = self._moved(program.weights)
        self._betray()

    def _betray(self) -> None:
        """A plain run that used what is not known must show it."""
        if self.suspect is not None:
            self.new = tuple(y + torch.nan_to_num(0 * self.suspect).sum().to(y.dtype) for y in self.new)

    def error(self) -> State:
        program, tableau = self.program, self.program.how.tableau
        if not tableau.filtered:
            return super().error()
        h, mass = self.stop - self.start, program.how.mass
        assert program.errors is not None
        stages = tuple(program.errors.of(self.slopes, i) * program.errors.scale for i in range(len(self.state)))
        total, slope = program.vectors.pack(stages), program.vectors.pack(self.slope)
        if mass is not None:
            total = total @ mass.T.to(total)
            slope = slope @ mass.T.to(slope) if self.goes_on else slope
        solver = self.jacobian.factored(((tableau.filtered,),))
        return program.vectors.unpack(solver.solve((h * (tableau.filtered * slope + total))[None])[0])

    def carried(self) -> State:
        slopes = self.slopes[-1] if self.program.carries else ()
        kept = self.jacobian.kept(self._theta) if self.program.keeps else ()
        return (*self.new, *slopes, *kept)

    def finish(self) -> Step:
        step = super().finish()
        if self.k == 0 and self.wanted and self.program.view is None and self.program.initial is None:
            return step._replace(outputs=((0, self.state), *step.outputs))
        return step

    def _first_slope(self) -> State:
        """f at the start of the step, as the step before found it."""
        return self.carry if self.goes_on else self._at_start()

    def _at_start(self) -> State:
        """f there itself; with a regular mass matrix, the slope."""
        program, mass = self.program, self.program.how.mass
        t = self.times[0] if program.how.tableau.starts_explicitly else self.start_time()
        slope: State = program.part(self.function, IMPLICITLY, t, self.state)
        if mass is None or not program.how.tableau.starts_explicitly:
            return slope
        flat = program.vectors.pack(slope)
        found: State = program.vectors.unpack(torch.linalg.solve(mass.to(flat), flat[..., None])[..., 0])
        return found

    def start_time(self) -> Tensor:
        t: Tensor = self.program.time(self.start) if self.leaf is None else self.leaf[0].to(self.program.dtype)
        if self.program.jumps_at(self.start):
            with torch.no_grad():
                hair = torch.nextafter(t, t.new_tensor(self.stop)) - t
            t = t + hair
        return t

    def point(self, i: int) -> State:
        """y and what earlier stages add to it, where stage i evaluates f."""
        program = self.program
        if not program.how.split:
            return super().point(i)
        point = self.state
        for terms, slopes in ((program.rows[i], self.implicit), (program.explicit_rows[i], self.explicit)):
            if terms is not None:
                total = tuple(terms.of(slopes, leaf) for leaf in range(len(point)))
                point = moved(point, self.h * terms.scale, total)
        return point

    def _solved(self, which: range) -> list[State]:
        """The slopes of these stages, which are one system."""
        program, tableau = self.program, self.program.how.tableau
        vectors = program.vectors
        coefficients = tuple(tuple(tableau.a[i][j] for j in which) for i in which)
        base = vectors.pack(self.state if tableau.coupled else self.point(which[0]))
        known, function, times = base.detach(), self.function, [self.times[i] for i in which]
        still = [t.detach() for t in times]
        h, mass = self.stop - self.start, program.how.mass
        weights = tuple(tuple(h * a for a in row) for row in coefficients)

        def slope(t: Tensor, y: Tensor) -> Tensor:
            found: Tensor = vectors.pack(program.part(function, IMPLICITLY, t, vectors.unpack(y)))
            return found

        def residual(x: Tensor) -> Tensor:
            if len(still) == 1:
                found = slope(still[0], torch.add(known, x[0], alpha=weights[0][0]))[None]
            else:
                found = torch.stack([slope(t, shifted(known, row, x)) for t, row in zip(still, weights, strict=True)])
            if found.requires_grad:  # a plain run that uses what is not known: whoever called must see it
                self.suspect, found = found, found.detach()
            return found - (x if mass is None else x @ mass.T.to(x))

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recording):
            x = self._found(residual, coefficients, self._guess(which), known, still)
        if self.recording:

            def evaluate(x: Tensor, own: Sequence[Tensor]) -> Evaluated:
                start, *moving = own
                times = moving[:-1] or still
                step: float | Tensor = moving[-1] if moving else h
                with torch.enable_grad(), aside():
                    points = [shifted(start, [step * a for a in row], x) for row in coefficients]
                    points = [y if y.requires_grad else y.requires_grad_() for y in points]
                    parts = [slope(t, y) for t, y in zip(times, points, strict=True)]
                    return Evaluated(torch.stack(parts), parts, points)

            own = (base, *times, self.h) if isinstance(self.h, Tensor) else (base,)
            x = Equation(evaluate, own, program.how.linear, weights, program.how.mass, work=program.work).root(x)
        return [vectors.unpack(row) for row in x.unbind(0)]

    def _guess(self, which: range) -> Tensor:
        """From the slopes of earlier stages, the polynomial through them; or the last one of the step before."""
        vectors = self.program.vectors
        earlier = self.implicit or self.slopes
        weights = () if self.program.how.tableau.coupled else self.program.how.tableau.predictors[which[0]]
        if weights and earlier:
            total: Tensor | None = None
            for j, w in weights:
                x = vectors.pack(tuple(x.detach() for x in earlier[j]))
                total = x * w if total is None else torch.add(total, x, alpha=w)
            assert total is not None
            return total.expand(len(which), *total.shape)
        last = [self.slope] if self.slope and self.goes_on else []
        flat = vectors.pack(tuple(x.detach() for x in last[0])) if last else vectors.zeros()
        return flat.expand(len(which), *flat.shape)

    def _found(
        self,
        residual: Callable[[Tensor], Tensor],
        coefficients: tuple[tuple[float, ...], ...],
        guess: Tensor,
        known: Tensor,
        times: Sequence[Tensor],
    ) -> Tensor:
        program, newton = self.program, self.program.how.newton
        h = self.stop - self.start
        allowed, goal, floor = self._measures()
        reach = abs(h) * max(sum(map(abs, row)) for row in coefficients)
        scale, latest = allowed * reach, guess

        def seen(x: Tensor) -> Tensor:
            nonlocal latest
            latest = x
            return residual(x)

        def size(change: Tensor) -> float:
            vectors: Vectors = program.vectors
            if program.how.adaptive:
                return vectors.size_of(change, scale)
            most = reach * torch.maximum(latest.abs(), change.abs()).amax(
                0
            )  # of a state of zeros this alone is rounded
            return vectors.size_of(change, reach / (1 / allowed + vectors.rounding_of(most)))

        how: dict[str, Any] = {"goal": goal, "floor": floor}
        while True:
            try:
                factors, relax = self.jacobian.factored(coefficients), self.jacobian.relaxation
                found = newton.find(seen, guess, factors, size, self._eta, relax=relax, **how)
            except NewtonFailed as failed:
                if program.on_trial:
                    return torch.nan_to_num(failed.last)
                if self.jacobian.renew():
                    self._eta, self._theta = 1.0, 0.0
                    continue
                if program.how.adaptive and self.k == program.timeline.steps:
                    raise  # a shorter step is tried
                break
            self._eta, self._theta = found.eta, max(self._theta, found.theta)
            program.work.iterations += found.iterations
            return found.x
        weights = tuple(tuple(h * a for a in row) for row in coefficients)

        def anew(x: Tensor) -> Factored:
            jacobians = [
                program.jacobian(self.function, t, shifted(known, w, x)) for t, w in zip(times, weights, strict=True)
            ]
            made: Factored = program.factored(jacobians, weights)
            return made

        more = Newton(newton.kappa, 5 * newton.most)
        return more.find(seen, guess, anew(guess), size, 1.0, anew=anew, **how).x

    def _measures(self) -> tuple[Tensor, float, float]:
        """How changes are scaled, below what they are small enough, and below what they may be rounding."""
        if self._measured is None:
            program, vectors = self.program, self.program.vectors
            rounding = vectors.rounding(self.state)
            if program.how.adaptive:
                allowed = vectors.allowed(program.control.tolerance, self.state)
                self._measured = allowed, program.how.newton.kappa, 4 * vectors.size_of(rounding, allowed)
            else:
                self._measured = 1 / rounding, 1.0, 1e6
        return self._measured
