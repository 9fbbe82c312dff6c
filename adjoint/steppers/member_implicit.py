"""Implicit Runge-Kutta steps of many members at once, each with its own times, iteration, Jacobian and fate.

    M k_i = f(t + c_i h, y + h sum_j a_ij k_j),    y_new = y + h sum_i b_i k_i,    t, h: one for each member

Each member does what it would do alone (:mod:`adjoint.steppers.implicit_stages`): its iteration ends when its own stages
are found, and it keeps its own Jacobian. Members that wait have the identity as their matrix, and f sees them where it
is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.implicit_method import Implicit
from adjoint.linear import Dense, DenseFactors, Factored, Weights, factors_of
from adjoint.lockstep_timeline import AdaptiveLockstep
from adjoint.member_times import Pairs
from adjoint.memory import aside
from adjoint.steppers.consistent import Algebraic
from adjoint.steppers.implicit import HALVED
from adjoint.steppers.jacobians import BITS, Work
from adjoint.steppers.lockstep import LockstepProgram
from adjoint.steppers.member_newton import find_members
from adjoint.steppers.member_step import MemberStep, Numbers
from adjoint.steppers.newton import Newton
from adjoint.steppers.roots import Equation, Evaluated
from adjoint.steppers.stages import Terms
from adjoint.steppers.vectors import Vectors
from adjoint.tensors import State

EACH = Dense(members=True)


@dataclass(frozen=True, eq=False)
class Moving:
    """The systems of members; of those that wait, the identity."""

    moves: Tensor

    members = reusable = True
    drift = 0.0

    def jacobian(self, value: Tensor, at: Tensor) -> Tensor:
        return EACH.jacobian(value, at)

    def factored(self, jacobians: Sequence[Tensor], weights: Weights, mass: Tensor | None) -> DenseFactors:
        matrix = EACH.matrix(jacobians, weights, mass)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return factors_of(torch.where(self.moves[:, None, None], matrix, eye), len(weights))


class ImplicitLockstep(LockstepProgram):
    """The steps of a batch. Behind the leaves of y a state has the last slope, and where the Jacobian was made, and when."""

    iterates = True

    def __init__(self, how: Implicit, *rest: Any) -> None:
        super().__init__(how.tableau, *rest)
        self.how, self.work = how, Work()
        self.vectors = Vectors(self.first, True)
        if how.mass is not None and len(how.mass) != self.vectors.size:
            raise ValueError(
                f"mass has {len(how.mass)} rows, and each member {self.vectors.size} numbers; give as many"
            )
        rows = how.tableau.a
        lower = rows if how.tableau.coupled else [row[:i] for i, row in enumerate(rows)]
        self.rows = [Terms(row) if any(row) else None for row in lower]
        self.carries = how.tableau.carries
        self.keeps = self.iterates and how.newton.reuse > 0 and self.first[0].real.dtype in BITS
        if self.carries or self.keeps:
            self.initial = None  # the first step shows it: the chain's state has more leaves
        self.lost = torch.zeros_like(self.asked.count, dtype=torch.bool)
        """Members whose fixed steps have no stages that can be found."""
        self._made: tuple[State, Tensor] | None = None
        """The Jacobians of a kept place, each member's."""
        self._here: tuple[State, Any] | None = None
        """What was made of f at a state from which steps are tried."""

    @property
    def chain_start(self) -> State:
        zeros = tuple(torch.zeros_like(x) for x in self.first) if self.carries else ()
        if not self.keeps:
            return (*self.first, *zeros)
        flat = self.vectors.zeros()
        never = torch.full_like(self.asked.start, torch.nan).view(torch.int64)
        return (*self.first, *zeros, torch.zeros_like(flat).view(BITS[flat.dtype]), never)

    def begin(self, function: Any, state: State) -> None:
        self._check_consistent(function)
        super().begin(function, state)

    def _check_consistent(self, function: Any) -> None:
        """Raise ValueError for members that begin farther from a consistent state than their tolerances allow."""
        spaces = self.how.null_spaces
        if spaces is None:
            return
        vectors, t = self.vectors, self.time(self.asked.start)
        y = vectors.pack(self.first)

        def f(y: Tensor) -> Tensor:
            found: Tensor = vectors.pack(self.slope(function, t, vectors.unpack(y)))
            return found

        equations = Algebraic(spaces, f, y, "y0", float(t[0]))
        if equations.fulfilled():
            return
        sizes = (equations.correction().abs() * vectors.pack(self.tolerance.allowed(self.first))).amax(-1)
        if not bool((sizes <= 1).all()):
            b = int(sizes.nan_to_num(nan=torch.inf).argmax())
            raise ValueError(
                f"y0 of member {b} does not fulfil the algebraic equations of mass: it is {float(sizes[b]):.3g} times as far "
                f"from a consistent state as rtol and atol allow; give a consistent one"
            )

    def unstarted(self, state: State) -> list[Tensor]:
        """The outputs if not even one step could be taken."""
        rest = self.outputs - 1
        return [torch.cat((x[None], x.detach().new_full((rest, *x.shape), torch.nan))) for x in state[: self.leaves]]

    def sample(self) -> LockstepProgram:
        other = super().sample()
        assert isinstance(other, ImplicitLockstep)
        other.work, other._made, other._here = Work(), None, None
        return other

    def attempt(self, function: Any, k: int, state: State, start: Tensor, stop: Tensor, recording: bool) -> MemberStep:
        return ImplicitMemberStep(self, function, k, state, start, stop, recording)

    def penalised(self, attempt: MemberStep, squared: Tensor) -> Tensor:
        """A step whose stages are not found is halved."""
        assert isinstance(attempt, ImplicitMemberStep)
        timeline = self.timeline
        if attempt.lost is None or not isinstance(timeline, AdaptiveLockstep):
            return squared
        order = self.tableau.error_order + 1
        return torch.where(attempt.lost, (timeline.controller.safety / HALVED) ** (2 * order), squared)

    def _has_died(self, k: int, attempt: MemberStep, moves: Tensor | None) -> bool:
        assert isinstance(attempt, ImplicitMemberStep)
        if attempt.lost is not None:
            self.lost = self.lost | (attempt.lost if moves is None else attempt.lost & moves)
        return super()._has_died(k, attempt, moves)

    def status(self) -> list[str]:
        return ["newton" if x else word for word, x in zip(super().status(), self.lost.tolist(), strict=True)]

    def remember(self, kept: State, made: Tensor | None, before: Tensor | None, moves: Tensor | None) -> None:
        """The Jacobians of the places that a state tells of: those of the step, and of who does not move the earlier."""
        if made is not None and moves is not None:
            made = None if before is None else torch.where(moves[:, None, None], made, before)
        self._made = None if made is None else (kept, made)

    def remembered(self, kept: State) -> Tensor | None:
        """The Jacobians of these places, if they are known."""
        if self._made is None or not all(x is y or torch.equal(x, y) for x, y in zip(self._made[0], kept, strict=True)):
            return None
        return self._made[1]

    def jacobian(self, function: Any, t: Tensor, y: Tensor) -> Tensor:
        """df/dy of packed states, (members, n, n)."""
        self.work.jacobians += 1
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            value = self.vectors.pack(self.slope(function, t, self.vectors.unpack(at)))
        return EACH.jacobian(value, at)


class ImplicitMemberStep(MemberStep):
    """One step being computed."""

    def __init__(
        self, program: Any, function: Any, k: int, state: State, start: Tensor, stop: Tensor, recording: bool
    ) -> None:
        y, more = state[: program.leaves], state[program.leaves :]
        slope = partial(program.slope, function)
        super().__init__(program._coefficients, slope, y, start, stop, program._t.dtype, program.jumps)
        self.program, self.function, self.k, self.recording = program, function, k, recording
        self.whole = state
        self.carry, self.kept = (more[: program.leaves], more[program.leaves :]) if program.carries else ((), more)
        self.lost: Tensor | None = None
        """Whose stages were not found."""
        self.suspect: Tensor | None = None
        self._exploring = k == program.timeline.steps

    def run(self, first: State | None = None) -> None:
        self._set_times()
        program, tableau = self.program, self.program.how.tableau
        self._prepare()
        self.first = self._first_slope() if program.carries else ()
        self.slopes = self._solved(range(tableau.stages)) if tableau.coupled else []
        for i in range(0 if tableau.coupled else tableau.stages):
            if i == 0 and tableau.starts_explicitly:
                self.slopes.append(self.first if program.carries else self._at_start())
            else:
                self.slopes += self._solved(range(i, i + 1))
        self._end()

    def _prepare(self) -> None:
        """Who moves, who goes on from the step before, and by which Jacobians."""
        program, start = self.program, self.start.detach()
        self.on = (start != self.stop.detach()) if self.moves is None else self.moves
        self.length = self.h.detach().to(program.vectors.zeros().dtype)
        self.begins = self._start_time()
        jumps = None if self._jumps is None else (self._jumps == start[:, None]).any(1)
        self._fresh = start == program.asked.start if jumps is None else (start == program.asked.start) | jumps
        self.linear = Moving(self.on)
        self._usable = self._stale = torch.zeros_like(self.on)
        if self.kept:
            self._usable = ~self.kept[1].view(program.asked.start.dtype).isnan()
            self._stale = self._usable & ~self._fresh & self.on
        self._matrix: Tensor | None = None
        self._known: Tensor | None = None
        self._factors: dict[Any, Factored] = {}
        self._measured: tuple[Tensor, float, Tensor | float] | None = None
        self._eta, self._theta = torch.ones_like(self.length), torch.zeros_like(self.length)

    def _end(self) -> None:
        """The new state. It shows what a plain run used without knowing it, and whose fixed step cannot be taken."""
        program = self.program
        self.new = self._moved(program._coefficients.weights)
        if self.suspect is not None:
            self.new = tuple(y + torch.nan_to_num(0 * self.suspect).sum().to(y.dtype) for y in self.new)
        if self.lost is not None and program.timeline.landing and not program.trial:
            self.new = Numbers(~self.lost).choose(self.new, tuple(torch.full_like(y, torch.nan) for y in self.new))

    def error(self) -> tuple[State, float]:
        program, tableau = self.program, self.program.how.tableau
        if not tableau.filtered:
            return super().error()
        vectors, mass, terms = program.vectors, program.how.mass, self.coefficients.error
        assert terms is not None
        total = vectors.pack(tuple(terms.of(self.slopes, i) * terms.scale for i in range(len(self.state))))
        slope = vectors.pack(self.first)
        if mass is not None:  # where a step begins anew this is f, and M k elsewhere
            total = total @ mass.T.to(total)
            slope = torch.where(self._fresh[:, None], slope, slope @ mass.T.to(slope))
        solver = self._factored(((tableau.filtered,),))
        right = self.length[:, None] * (tableau.filtered * slope + total)
        return vectors.unpack(solver.solve(right[None])[0]), 1.0

    def finish(self, moves: Numbers | None, inside: Pairs | None, asked: Tensor) -> Step:
        program = self.program
        slopes = self.slopes[-1] if program.carries else ()
        new = (*self.new, *slopes, *self._kept_after())
        state = new if moves is None else moves.choose(new, self.whole)
        if program.keeps and not program.trial:
            program.remember(state[-2:], self._matrix, self._known, None if moves is None else moves.numbers)
        outputs = () if inside is None else ((inside, self._interpolate(inside, asked)),)
        if self.k == 0 and program.initial is None and not program.trial:
            outputs = ((0, self.state), *outputs)
        return Step(state, outputs, self.leaves)

    def _kept_after(self) -> State:
        """Where the Jacobian was made that each member went by, and when; no time if it is not to be used again."""
        program = self.program
        if not program.keeps:
            return ()
        place, times = self.kept
        here = program.vectors.pack(tuple(x.detach() for x in self.state)).view(place.dtype)
        wide = program.asked.start.dtype
        time = torch.where(self._stale, times.view(wide), self._rest_time().to(wide))
        if not program.trial:
            time = torch.where(self._theta <= program.how.newton.reuse, time, torch.nan)
        return torch.where(self._stale[:, None], place, here), time.view(times.dtype)

    def _first_slope(self) -> State:
        """f at the start of the step, as the step before found it; for members that wait nothing."""
        goes_on, begins = self.on & ~self._fresh, self.on & self._fresh
        zeros = tuple(torch.zeros_like(x) for x in self.carry)
        known = Numbers(goes_on).choose(self.carry, zeros)
        if not bool(begins.any()):
            return known
        return Numbers(begins).choose(self._at_start(), known)

    def _at_start(self) -> State:
        """f there itself; with a regular mass matrix, the slope."""
        program, mass = self.program, self.program.how.mass
        found = self.slope(self.begins, self._base_state)
        if mass is None or not program.how.tableau.starts_explicitly:
            return found
        flat = program.vectors.pack(found)
        slope: State = program.vectors.unpack(torch.linalg.solve(mass.to(flat), flat[..., None])[..., 0])
        return slope

    def _start_time(self) -> Tensor:
        """When f is called at the start of the step: a hair inside where it starts at a jump."""
        time = self._base.to(self._time_type)
        if self._jumps is None:
            return time
        start = self.start.detach()
        jumps = (self._jumps == start[:, None]).any(1) & (start != self.stop.detach())
        known = time.detach()
        return time + torch.where(jumps, torch.nextafter(known, self.stop.detach().to(known)) - known, 0)

    def _point(self, i: int) -> State:
        terms = self.program.rows[i]
        return self._base_state if terms is None else self._moved(terms)

    def _solved(self, which: range) -> list[State]:
        """The slopes of these stages, which are one system."""
        program, tableau = self.program, self.program.how.tableau
        vectors, mass = program.vectors, program.how.mass
        coefficients = tuple(tuple(tableau.a[i][j] for j in which) for i in which)
        base = vectors.pack(self._base_state if tableau.coupled else self._point(which[0]))
        known, times = base.detach(), [self.times[i] for i in which]
        still, h = [t.detach() for t in times], self.length

        def slope(t: Tensor, y: Tensor) -> Tensor:
            found: Tensor = vectors.pack(self.slope(t, vectors.unpack(y)))
            return found

        def residual(x: Tensor) -> Tensor:
            rows = zip(still, coefficients, strict=True)
            found = torch.stack([slope(t, _shifted(known, row, h, x)) for t, row in rows])
            if found.requires_grad:  # a plain run that uses what is not known: whoever called must see it
                self.suspect, found = found, found.detach()
            return found - (x if mass is None else x @ mass.T.to(x))

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.recording):
            x = self._found(residual, coefficients, self._guess(which), known, still)
        if self.recording:

            def evaluate(x: Tensor, own: Sequence[Tensor]) -> Evaluated:
                start, *moving = own
                times, step = (moving[:-1], moving[-1].to(start)) if moving else (still, h)
                with torch.enable_grad(), aside():
                    points = [_shifted(start, row, step, x) for row in coefficients]
                    points = [y if y.requires_grad else y.requires_grad_() for y in points]
                    parts = [slope(t, y) for t, y in zip(times, points, strict=True)]
                    return Evaluated(torch.stack(parts), parts, points)

            own = (base, *times, self.h) if self.h.requires_grad else (base,)
            weights = tuple(tuple(a * h for a in row) for row in coefficients)
            x = Equation(evaluate, own, self.linear, weights, mass, work=program.work).root(x)
        return [vectors.unpack(row) for row in x.unbind(0)]

    def _guess(self, which: range) -> Tensor:
        """From the slopes of earlier stages, the polynomial through them; or the last one of the step before."""
        vectors, tableau = self.program.vectors, self.program.how.tableau
        weights = () if tableau.coupled else tableau.predictors[which[0]]
        total: Tensor = vectors.zeros()
        if weights and self.slopes:
            for n, (j, w) in enumerate(weights):
                x = vectors.pack(tuple(x.detach() for x in self.slopes[j]))
                total = torch.add(total, x, alpha=w) if n else x * w
        elif self.first:
            flat = vectors.pack(tuple(x.detach() for x in self.first))
            total = torch.where((self.on & ~self._fresh)[:, None], flat, total)
        return total.expand(len(which), *total.shape)

    def _found(
        self,
        residual: Callable[[Tensor], Tensor],
        coefficients: tuple[tuple[float, ...], ...],
        guess: Tensor,
        known: Tensor,
        times: Sequence[Tensor],
    ) -> Tensor:
        program, newton, h = self.program, self.program.how.newton, self.length
        vectors: Vectors = program.vectors
        allowed, goal, floor = self._measures()
        reach = (h.abs() * max(sum(map(abs, row)) for row in coefficients))[:, None]

        def size(change: Tensor, x: Tensor) -> Tensor:
            scale = allowed * reach
            if not program.how.adaptive:
                most = reach * torch.maximum(x.abs(), change.abs()).amax(0)  # of a state of zeros this alone is rounded
                scale = reach / (1 / allowed + vectors.rounding_of(most))
            return vectors.sizes_of(change, scale)

        how: dict[str, Any] = {"goal": goal, "floor": floor}
        wanted = self.on if self.lost is None else self.on & ~self.lost
        find = partial(find_members, newton, residual, guess, size=size)
        found = find(solver=self._factored(coefficients), eta=self._eta, wanted=wanted, **how)
        program.work.iterations += found.iterations
        x, eta, theta, failed = found.x, found.eta, torch.maximum(self._theta, found.theta), found.failed
        if bool(failed.any()):
            again = failed & self._stale
            if bool(again.any()):
                self._renew(again)
                found = find(solver=self._factored(coefficients), eta=torch.where(again, 1.0, eta), wanted=again, **how)
                program.work.iterations += found.iterations
                x = torch.where(again[:, None], found.x, x)
                eta, theta = torch.where(again, found.eta, eta), torch.where(again, found.theta, theta)
                failed = torch.where(again, found.failed, failed)
            if not (program.trial or (program.how.adaptive and self._exploring)) and bool(failed.any()):

                def anew(x: Tensor) -> Factored:
                    rows = zip(times, coefficients, strict=True)
                    made = [program.jacobian(self.function, t, _shifted(known, row, h, x)) for t, row in rows]
                    return self._of(made, coefficients)

                more, ones = Newton(newton.kappa, 5 * newton.most), torch.ones_like(eta)
                last = find_members(more, residual, guess, anew(guess), size, ones, failed, anew=anew, **how)
                x, failed = torch.where(failed[:, None], last.x, x), last.failed
            if bool(failed.any()):
                program.work.failures += 0 if program.trial else int(failed.sum())
                x = torch.where(failed[:, None], 0, x)
                self.lost = failed if self.lost is None else self.lost | failed
        self._eta, self._theta = eta, theta
        return x

    def _measures(self) -> tuple[Tensor, float, Tensor | float]:
        """How changes are scaled, below what they are small enough, and below what they may be rounding."""
        if self._measured is None:
            program, vectors = self.program, self.program.vectors
            rounding = vectors.rounding(self.state)
            if program.how.adaptive:
                allowed = vectors.pack(program.tolerance.allowed(self.state))
                floor = 4 * vectors.sizes_of(rounding[None], allowed)
                self._measured = allowed, program.how.newton.kappa, floor
            else:
                self._measured = 1 / rounding, 1.0, 1e6
        return self._measured

    def _factored(self, coefficients: tuple[tuple[float, ...], ...]) -> Factored:
        """Of M - h a J with the Jacobian that each member goes by."""
        if coefficients not in self._factors:
            if self._matrix is None:
                self._matrix = self._jacobians()
            self._factors[coefficients] = self._of([self._matrix], coefficients)
        return self._factors[coefficients]

    def _of(self, jacobians: Sequence[Tensor], coefficients: tuple[tuple[float, ...], ...]) -> Factored:
        self.program.work.factorisations += 1
        weights = tuple(tuple(a * self.length for a in row) for row in coefficients)
        return self.linear.factored(jacobians, weights, self.program.how.mass)

    def _jacobians(self) -> Tensor:
        """Those that the state tells of, and the others at the start of the step."""
        if not bool(self._stale.any()):
            return self._at_rest()
        if self._known is None:
            self._known = self._of_kept_place()
        if bool((self._stale | ~self.on).all()):
            return self._known
        return torch.where(self._stale[:, None, None], self._known, self._at_rest())

    def _renew(self, who: Tensor) -> None:
        """Take the Jacobians of these members at the start of the step."""
        self._stale = self._stale & ~who
        self._matrix, self._factors = self._jacobians(), {}

    def _of_kept_place(self) -> Tensor:
        program, (place, times) = self.program, self.kept
        known = program.remembered(self.kept)
        if known is not None:
            found: Tensor = known
            return found
        y, wide = program.vectors.pack(tuple(x.detach() for x in self.state)), program.asked.start.dtype
        there = torch.where(self._usable[:, None], place.view(y.dtype), y)
        when = torch.where(self._usable, times.view(wide), self._rest_time().to(wide))
        made: Tensor = program.jacobian(self.function, program.time(when), there)
        return made

    def _at_rest(self) -> Tensor:
        """At the start of the step, the same for all attempts."""
        program = self.program
        known = program._here
        if known is not None and known[0] is self.whole and not program.trial:
            found: Tensor = known[1]
            return found
        flat = program.vectors.pack(tuple(x.detach() for x in self.state))
        made: Tensor = program.jacobian(self.function, self._rest_time(), flat)
        program._here = (self.whole, made)
        return made

    def _rest_time(self) -> Tensor:
        """The start of the step, also of members that wait."""
        time: Tensor = self.program.time(self.start.detach())
        return time if self._jumps is None else torch.where(self.on, self.begins.detach(), time)


def _shifted(base: Tensor, row: Sequence[float], h: Tensor, x: Tensor) -> Tensor:
    """base + h sum_j a_j x_j"""
    total = x[0] * row[0]
    for a, y in zip(row[1:], x[1:], strict=True):
        total = torch.add(total, y, alpha=a)
    return torch.addcmul(base, h[:, None], total)
