"""Implicit Runge-Kutta steps.

    M k_i = f(t + c_i h, y + h sum_j a_ij k_j),    y_new = y + h sum_i b_i k_i

Stages are found by Newton's method with the Jacobian at the start of the step: a step is a function of the state before
it alone, so that computed again it has the same bits. The transpose is that of the equations, exact wherever the
iteration ended (:mod:`adjoint.steppers.roots`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint.autograd import Step
from adjoint.implicit_tableaus import IMPLICIT, ImplicitTableau
from adjoint.linear import Dense, Factored, LinearAlgebra
from adjoint.memory import aside
from adjoint.names import named
from adjoint.rosenbrock_tableaus import ROSENBROCK, RosenbrockTableau
from adjoint.steppers.explicit import Control, ExplicitProgram
from adjoint.steppers.roots import Equation, Evaluated, Newton, NewtonFailed
from adjoint.steppers.stages import Stages, Terms
from adjoint.steppers.vectors import Vectors
from adjoint.tensors import State, Structure
from adjoint.timeline import AdaptiveTimeline, SolveError

HALVED = 0.5
"""By what a step is multiplied whose stages are not found."""


@dataclass(frozen=True, eq=False)
class Implicit:
    """An implicit method, and how its equations are solved.

    solve(f, y0, t, method=Implicit("radau5", mass=mass, linear=Dense()))
    """

    method: str | ImplicitTableau | RosenbrockTableau = "kvaerno5"
    """One of ``IMPLICIT`` or ``ROSENBROCK``, or a table of your own."""
    linear: LinearAlgebra = field(default_factory=Dense)
    newton: Newton = field(default_factory=Newton)
    mass: Tensor | None = None
    """M in M dy/dt = f(t, y), (n, n), constant; singular for differential-algebraic equations of index 1."""
    split: bool = False
    """Whether f is a pair (explicit, implicit) of which the method takes the first part explicitly."""

    implicit = True

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            named("method", self.method, {**IMPLICIT, **ROSENBROCK})
        if self.mass is not None:
            self._check_mass(self.mass)
        if self.split and self.mass is not None:
            raise ValueError("mass goes with one f, not with a pair (explicit, implicit); give the sum of both")
        if self.split and self.tableau.explicit is None:
            raise ValueError(
                f"method={self.name!r} has no explicit part for a pair (explicit, implicit); give the sum of both as one "
                f"function, or take 'kencarp3', 'kencarp4' or 'kencarp5'"
            )

    def _check_mass(self, mass: Tensor) -> None:
        if mass.ndim != 2 or mass.shape[0] != mass.shape[1]:
            raise ValueError(
                f"mass has shape {tuple(mass.shape)}; give a square matrix with a row for each number of y"
            )
        if mass.requires_grad:
            raise ValueError("mass requires grad, and no gradient reaches it; give mass.detach()")
        if self.tableau.starts_explicitly and bool(torch.linalg.matrix_rank(mass) < len(mass)):
            raise ValueError(
                f"mass is singular, and method={self.name!r} begins with an explicit stage, which has no solution then; "
                f"take 'radau5', 'rodas4', 'sdirk2' or 'backward_euler'"
            )

    @property
    def tableau(self) -> ImplicitTableau | RosenbrockTableau:
        if isinstance(self.method, str):
            return IMPLICIT[self.method] if self.method in IMPLICIT else ROSENBROCK[self.method]
        return self.method

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        return self.tableau.adaptive


class Split:
    """f = (explicit, implicit) as one function: their sum, or the part that is asked for by a last argument."""

    def __init__(self, explicit: Callable[..., Any], implicit: Callable[..., Any]) -> None:
        self.parts = (explicit, implicit)

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        if args and isinstance(args[-1], Part):
            return self.parts[args[-1].index](t, y, *args[:-1])
        first, second = (part(t, y, *args) for part in self.parts)
        return pytree.tree_map(torch.add, first, second)


@dataclass(frozen=True)
class Part:
    """Which part of a :class:`Split` is meant."""

    index: int


EXPLICITLY, IMPLICITLY = Part(0), Part(1)


def divided(f: Any, method: Any, with_cost: bool) -> tuple[Any, Any]:
    """A pair (explicit, implicit) as one function, and the method told so; a running cost takes all implicitly."""
    if not isinstance(f, tuple):
        return f, method
    if len(f) != 2 or not all(map(callable, f)):
        raise TypeError(f"f={f!r} must be a function, or a pair of functions (explicit, implicit)")
    if not isinstance(method, Implicit):
        raise ValueError(
            f"f is a pair (explicit, implicit), and method={method.name!r} has one part only; take 'kencarp4', say"
        )
    return Split(*f), method if with_cost else replace(method, split=True)


class ImplicitProgram(ExplicitProgram):
    """The steps of an implicit method. A state may have the last slope behind it, which is the first of the next step."""

    def __init__(self, how: Implicit, t: Tensor, structure: Structure, like: State, control: Control) -> None:
        super().__init__(how.tableau, t, structure, like, control)  # type: ignore[arg-type]
        self.how = self.method = how
        self.vectors = Vectors(like, how.linear.members)
        if how.mass is not None and len(how.mass) != self.vectors.size:
            raise ValueError(f"mass has {len(how.mass)} rows, and y0 {self.vectors.size} numbers; give as many")
        rows = how.tableau.a
        lower = rows if how.tableau.coupled else [row[:i] for i, row in enumerate(rows)]
        self.rows = [Terms(row) if any(row) else None for row in lower]
        explicit = [row[:i] for i, row in enumerate(how.tableau.explicit or ())] if how.split else []
        self.explicit_rows = [Terms(row) if any(row) else None for row in explicit]
        if how.linear.members and control.tolerance.norm is None:
            self.control = _of_members(control)
        self.jacobians = self.factorisations = 0
        self.on_trial = False
        self.carries = how.tableau.carries and not how.split
        """Whether the state has the last slope; that of a pair's implicit part is not taken at the new state."""
        if self.carries:
            self.initial = None  # the first step shows it: the chain's state has more leaves

    def first(self, state: State) -> State:
        if not self.carries:
            return state
        zeros = (torch.zeros_like(x, memory_format=torch.contiguous_format).detach() for x in state)
        return (*state, *zeros)

    def sample(self) -> ImplicitProgram:
        other = super().sample()
        assert isinstance(other, ImplicitProgram)
        other.on_trial = True
        return other

    def begin(self, function: Any, state: State) -> None:
        super().begin(function, state[: self.leaves])

    def unstarted(self, state: State) -> list[Tensor]:
        """The outputs if not even one step could be taken."""
        if self.view is not None:
            return []
        rest = self.outputs - 1
        return [torch.cat((x[None], x.detach().new_full((rest, *x.shape), torch.nan))) for x in state[: self.leaves]]

    def stages(self, *how: Any) -> ImplicitStages:
        return ImplicitStages(self, *how)

    def identity(self) -> Any:
        how = self.how
        return repr((how.tableau, how.newton, how.linear, how.split)), how.mass, super().identity()

    def part(self, function: Any, part: Part, t: Tensor, state: State) -> State:
        """One part of f; all of it, if it has no parts."""
        if not self.how.split:
            return self.slope(function, t, state)
        f, args = function
        return self.slope((f, (*args, part)), t, state)

    def _explore(self, function: Any, k: int, state: State, recording: bool) -> Step:
        timeline, tolerance, y = self.timeline, self.control.tolerance, state[: self.leaves]
        assert isinstance(timeline, AdaptiveTimeline)
        jacobian: Any = None
        worst = ""
        while True:
            try:
                start, stop = timeline.propose()
            except SolveError as end:
                raise self._diagnosed(end, function, y, (), worst or self._fastest(function, end.t, y)) from None
            self._announce("step", start, state, stop - start)
            stages = self.stages(function, state, k, start, stop, recording, True)
            stages.jacobian = jacobian
            try:
                stages.run()
            except NewtonFailed:
                ratio = (self.control.controller.safety / HALVED) ** timeline.order
                worst = (
                    "; Newton's method does not converge, which f with jumps or a kink may cause, or no number in it"
                )
            else:
                with torch.no_grad():
                    error = stages.error()
                    ratio = tolerance.ratio(error, y, stages.new)
                    if not ratio <= 1:
                        worst = f"; the largest error is in {tolerance.worst(error, y, stages.new)}"
            jacobian = stages.jacobian
            accepted = timeline.judge(stop, ratio)
            self._announce("accept" if accepted else "reject", start, state, stop - start)
            if accepted:
                self._announced = k + 1
                if self.watch is not None:
                    self.watch(stages)
                return stages.finish()

    def _fastest(self, function: Any, t: float, y: State) -> str:
        with torch.no_grad():
            return f"; f is largest in {self.control.tolerance.worst(self.slope(function, self.time(t), y), y, y)}"

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        try:
            return super().step(function, k, state, recording, outputs)
        except NewtonFailed:
            start, stop = self.timeline.ends(k)
            raise SolveError(
                "newton",
                f"Newton's method does not find the stages of step {k}, from t={start:.6g} to {stop:.6g}; give shorter "
                f"steps by dt=, or take a method that controls them, such as 'kvaerno5'",
                t=start,
                step=k,
                state=tuple(x.detach() for x in state),
            ) from None


def _of_members(control: Control) -> Control:
    """The error of the member with the largest one decides."""

    def largest(leaves: State) -> float:
        squares = torch.cat([x.abs().double().square().flatten(1) for x in leaves], -1)
        return float(squares.mean(-1).max().sqrt())

    return replace(control, tolerance=replace(control.tolerance, norm=largest))


def _shifted(base: Tensor, row: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """base + sum_j w_j x_j"""
    for j, w in enumerate(row):
        base = base + w.to(base.dtype) * x[j] if isinstance(w, Tensor) else torch.add(base, x[j], alpha=w)
    return base


def _moved(state: State, h: float | Tensor, slope: State) -> State:
    """y + h k"""
    if isinstance(h, Tensor):
        return tuple([y + h.to(y.real.dtype) * k for y, k in zip(state, slope, strict=True)])
    return tuple([torch.add(y, k, alpha=h) for y, k in zip(state, slope, strict=True)])


class ImplicitStages(Stages):
    """One step of an implicit method being computed."""

    program: ImplicitProgram

    def __init__(self, program: ImplicitProgram, function: Any, state: State, *how: Any) -> None:
        super().__init__(program, function, state[: program.leaves], *how)
        self.carry = state[program.leaves :]
        self.jacobian: Any = None
        """At the start of the step; kept while shorter ones are tried."""
        self._factors: dict[Any, Factored] = {}
        self._measured: tuple[Tensor, float, float] | None = None
        self._eta = 1.0
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
                point = self._known(i)
                shift = self.program.how.tableau.a[i][i] * self.h
                if tableau.a[i][i]:
                    point = _moved(point, shift, own)
                self.explicit.append(program.part(self.function, EXPLICITLY, self.times[i], point))
                own = tuple([x + z for x, z in zip(own, self.explicit[-1], strict=True)])
            self.slopes.append(own)
        self.new = self._moved(program.weights)
        if self.suspect is not None:
            self.new = tuple(y + 0 * self.suspect.sum().to(y.dtype) for y in self.new)

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
            slope = slope @ mass.T.to(slope) if self._carried() else slope
        solver = self._factored(((h * tableau.filtered,),))
        return program.vectors.unpack(solver.solve((h * (tableau.filtered * slope + total))[None])[0])

    def carried(self) -> State:
        if not self.program.carries:
            return self.new
        return (*self.new, *self.slopes[-1])

    def finish(self) -> Step:
        step = super().finish()
        if self.k == 0 and self.wanted and self.program.view is None and self.program.initial is None:
            return step._replace(outputs=((0, self.state), *step.outputs))
        return step

    def _carried(self) -> bool:
        restarts = self.program.restarts
        return self.k > 0 and not self.program.jumps_at(self.start) and not (restarts is not None and restarts(self.k))

    def _first_slope(self) -> State:
        """f at the start of the step, as the step before found it."""
        return self.carry if self._carried() else self._at_start()

    def _at_start(self) -> State:
        """f there itself; with a regular mass matrix, the slope."""
        program, mass = self.program, self.program.how.mass
        t = self.times[0] if program.how.tableau.starts_explicitly else self._start_time()
        slope = program.part(self.function, IMPLICITLY, t, self.state)
        if mass is None or not program.how.tableau.starts_explicitly:
            return slope
        flat = program.vectors.pack(slope)
        return program.vectors.unpack(torch.linalg.solve(mass.to(flat), flat[..., None])[..., 0])

    def _start_time(self) -> Tensor:
        t: Tensor = self.program.time(self.start) if self.leaf is None else self.leaf[0].to(self.program.dtype)
        if self.program.jumps_at(self.start):
            with torch.no_grad():
                hair = torch.nextafter(t, t.new_tensor(self.stop)) - t
            t = t + hair
        return t

    def _known(self, i: int) -> State:
        """y and what earlier stages add to it, where stage i evaluates f."""
        program = self.program
        if not program.how.split:
            return super().point(i)
        point = self.state
        for terms, slopes in ((program.rows[i], self.implicit), (program.explicit_rows[i], self.explicit)):
            if terms is not None:
                total = tuple(terms.of(slopes, leaf) for leaf in range(len(point)))
                point = _moved(point, self.h * terms.scale, total)
        return point

    def point(self, i: int) -> State:
        return self._known(i)

    def _solved(self, which: range) -> list[State]:
        """The slopes of these stages, which are one system."""
        program, tableau = self.program, self.program.how.tableau
        vectors, members = program.vectors, len(which)
        coefficients = [[tableau.a[i][j] for j in which] for i in which]
        base = vectors.pack(self.state if tableau.coupled else self._known(which[0]))
        known, function, times = base.detach(), self.function, [self.times[i] for i in which]
        still = [t.detach() for t in times]
        h, mass = self.stop - self.start, program.how.mass
        weights = tuple(tuple(h * a for a in row) for row in coefficients)

        def slope(t: Tensor, y: Tensor) -> Tensor:
            return vectors.pack(program.part(function, IMPLICITLY, t, vectors.unpack(y)))

        def residual(x: Tensor) -> Tensor:
            found = torch.stack([slope(t, _shifted(known, row, x)) for t, row in zip(still, weights, strict=True)])
            if found.requires_grad:  # a plain run that uses what is not known: whoever called must see it
                self.suspect, found = found, found.detach()
            return found - (x if mass is None else x @ mass.T.to(x))

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recording):
            x = self._found(residual, weights, self._guess(members), known, still)
        if self.recording:

            def evaluate(x: Tensor, own: Sequence[Tensor]) -> Evaluated:
                start, *moving = own
                times = moving[:-1] or still
                step: float | Tensor = moving[-1] if moving else h
                with torch.enable_grad(), aside():
                    points = [_shifted(start, [step * a for a in row], x) for row in coefficients]
                    points = [y if y.requires_grad else y.requires_grad_() for y in points]
                    parts = [slope(t, y) for t, y in zip(times, points, strict=True)]
                    return Evaluated(torch.stack(parts), parts, points)

            own = (base, *times, self.h) if isinstance(self.h, Tensor) else (base,)
            x = Equation(evaluate, own, program.how.linear, weights, program.how.mass).root(x)
        return [vectors.unpack(row) for row in x.unbind(0)]

    def _guess(self, count: int) -> Tensor:
        vectors = self.program.vectors
        last = (self.implicit or self.slopes)[-1:] or ([self.slope] if self.slope and self._carried() else [])
        flat = vectors.pack(tuple(x.detach() for x in last[0])) if last else vectors.zeros()
        return flat.expand(count, *flat.shape)

    def _found(
        self,
        residual: Callable[[Tensor], Tensor],
        weights: tuple[tuple[float, ...], ...],
        guess: Tensor,
        known: Tensor,
        times: Sequence[Tensor],
    ) -> Tensor:
        program, newton = self.program, self.program.how.newton
        reach = max(sum(map(abs, row)) for row in weights)
        allowed, goal, floor = self._measures()

        latest = guess

        def seen(x: Tensor) -> Tensor:
            nonlocal latest
            latest = x
            return residual(x)

        def size(change: Tensor) -> float:
            vectors = program.vectors
            if program.how.adaptive:
                return vectors.size_of(change * reach, allowed)
            moved = reach * torch.maximum(latest.abs(), change.abs()).amax(
                0
            )  # of a state of zeros this alone is rounded
            return vectors.size_of(change * reach, 1 / (1 / allowed + vectors.rounding_of(moved)))

        try:
            x, self._eta = newton.find(
                seen, guess, lambda x: self._factored(weights), size, self._eta, goal=goal, floor=floor
            )
        except NewtonFailed as failed:
            if program.on_trial:
                return torch.nan_to_num(failed.last)
            if program.how.adaptive and self.k == program.timeline.steps:
                raise  # a shorter step is tried

            def anew(x: Tensor) -> Factored:
                jacobians = [self._jacobian(t, _shifted(known, w, x)) for t, w in zip(times, weights, strict=True)]
                program.factorisations += 1
                return program.how.linear.factored(jacobians, weights, program.how.mass)

            more = Newton(newton.kappa, 5 * newton.most)
            x, _ = more.find(seen, guess, anew, size, 1.0, refresh=True, goal=goal, floor=floor)
        return x

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

    def _factored(self, weights: tuple[tuple[float, ...], ...]) -> Factored:
        """Of M - w J with J at the start of the step."""
        program = self.program
        if weights not in self._factors:
            if self.jacobian is None:
                flat = program.vectors.pack(tuple(x.detach() for x in self.state))
                self.jacobian = self._jacobian(self.times[0].detach(), flat)
            program.factorisations += 1
            self._factors[weights] = program.how.linear.factored([self.jacobian], weights, program.how.mass)
        return self._factors[weights]

    def _jacobian(self, t: Tensor, y: Tensor) -> Any:
        program = self.program
        program.jacobians += 1
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            value = program.vectors.pack(program.part(self.function, IMPLICITLY, t, program.vectors.unpack(at)))
        return program.how.linear.jacobian(value, at)
