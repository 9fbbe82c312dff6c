"""Explicit Runge-Kutta steps.

    k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),    y_new = y + h sum_i b_i k_i

The transpose of a step is that of its torch graph (one vector-Jacobian product of the whole step), which is exactly
the discrete adjoint of Sandu (2006), Springer LNCS 3994, section 2.1, for the state, the parameters and the times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.tableaus import Tableau
from adjoint.tensors import State, Structure, added, refuse_writing, versions_of
from adjoint.timeline import AdaptiveTimeline, Asked, Controller, FixedTimeline, GridTimeline, SolveError, replayed

Scalar = float | Tensor
ROWS = 128
"""Stage times are made for this many steps at once."""


@dataclass(frozen=True)
class Tolerance:
    """The error of a step is measured by err / (atol + rtol max(|y|, |y_new|)), as a root mean square."""

    rtol: float | Tensor | tuple[float | Tensor, ...]
    atol: float | Tensor | tuple[float | Tensor, ...]
    """A number, a tensor that fits the state, or one of these for every leaf."""
    norm: Callable[[State], Any] | None = None
    """In place of the root mean square: a function of the scaled error's leaves."""

    def ratio(self, error: State, before: State, after: State) -> float:
        """1 is just acceptable; not finite if the error is not."""
        if self.norm is not None:
            return float(self.norm(tuple(self._scaled(error, before, after))))
        total: float | Tensor = 0.0
        count = 0
        for scaled in self._scaled(error, before, after):
            total = total + torch.sum(scaled * scaled).double()
            count += scaled.numel()
        return float((total / max(count, 1)) ** 0.5)

    def worst(self, error: State, before: State, after: State) -> str:
        """Where the error is largest, in words."""
        scaled = list(self._scaled(error, before, after))
        values = [torch.nan_to_num(x, nan=torch.inf).flatten() for x in scaled]
        leaf = max(range(len(values)), key=lambda i: float(values[i].max()) if values[i].numel() else 0.0)
        flat = int(values[leaf].argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), scaled[leaf].shape))
        return f"component {index}" + (f" of leaf {leaf}" if len(values) > 1 else "")

    def _scaled(self, error: State, before: State, after: State) -> Sequence[Tensor]:
        return [
            e.abs() / (_of_leaf(self.atol, i) + _of_leaf(self.rtol, i) * torch.maximum(x.abs(), y.abs()))
            for i, (e, x, y) in enumerate(zip(error, before, after, strict=True))
        ]


def _of_leaf(tolerance: float | Tensor | tuple[float | Tensor, ...], leaf: int) -> float | Tensor:
    return tolerance[leaf] if isinstance(tolerance, tuple) else tolerance


@dataclass(frozen=True)
class Control:
    """How long the steps are: ``dt`` is the longest fixed step, or the first of an adaptive solve."""

    tolerance: Tolerance
    dt: float | None = None
    max_steps: int = 100_000
    controller: Controller = field(default_factory=Controller)
    jumps: tuple[float, ...] = ()
    grid: tuple[float, ...] | None = None
    """Fixed steps between these times, whatever times are asked for; values in between are interpolated."""
    callbacks: Mapping[str, Callable[[Tensor, Any, float], None]] = field(default_factory=dict)
    """"step", "accept", "reject": called with (t, y, h) once for each step when it is first tried."""


class ExplicitProgram:
    """The steps of an explicit Runge-Kutta solve. ``function`` is a pair (f, args).

    Times are differentiable when the caller's ``t`` requires grad: then h and the stage times are tensors, made from
    one small leaf per step. Otherwise h is a Python float.
    """

    label = "f"
    initial: int | None = 0
    series: State = ()

    def __init__(
        self,
        tableau: Tableau,
        t: Tensor,
        structure: Structure,
        like: State,
        control: Control,
    ) -> None:
        self.tableau, self.structure, self.control = tableau, structure, control
        self.asked = Asked([float(x) for x in t.tolist()])
        self.outputs = len(self.asked.t)
        self.timeline: FixedTimeline | GridTimeline | AdaptiveTimeline
        self.inputs: tuple[Tensor, ...] = (t,) if t.requires_grad else ()
        self.evaluations = 0
        self.graph_times: Tensor | None = None
        """For backpropagation through torch's own graph: the steps' times as a function of the caller's."""
        self._t, self._dtype = t, t.dtype
        self._device = like[0].device
        self._wide = torch.float32 if self._device.type == "mps" else torch.float64
        self._rows = [[(j, a) for j, a in enumerate(row) if a != 0] for row in tableau.a]
        self._weights = [(j, b) for j, b in enumerate(tableau.b) if b != 0]
        self._announced = 0
        self._first_row = -1
        self._table: list[tuple[Tensor, ...]] = []
        self._known_slope: tuple[int, State, State] | None = None

    def begin(self, function: Any, state: State) -> None:
        """Choose the first step of an adaptive solve, unless that is known."""
        if isinstance(self.timeline, AdaptiveTimeline) and not self.timeline.done:
            span = self.asked.t[-1] - self.asked.t[0]
            first = self.control.dt
            if first is None:
                first = _first_step(self, function, tuple(x.contiguous() for x in state), self.asked.t[0], span)
            self.timeline.begin(min(first, abs(span)))

    def sample(self) -> ExplicitProgram:
        """A program of one step like the first one of this, to try things out on."""
        other = copy.copy(self)
        if self.timeline.steps:
            start, stop = self.timeline.ends(0)
        else:
            assert isinstance(self.timeline, AdaptiveTimeline)
            start, stop = self.timeline.propose()
        other.timeline = FixedTimeline([start, stop], None)
        other.control = replace(self.control, callbacks={})
        return other

    def on_graph(self) -> ExplicitProgram:
        """The same steps as functions of the caller's own times, for torch's graph to follow."""
        other = copy.copy(self)
        if self.inputs:
            other.graph_times = self.timeline.knots(self._t.to(device=self._device, dtype=self._wide))
        return other

    @property
    def done(self) -> bool:
        return self.timeline.done

    @property
    def rejected(self) -> int:
        return self.timeline.rejected if isinstance(self.timeline, AdaptiveTimeline) else 0

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        if k == self.timeline.steps:
            return self._explore(function, k, state, recording)
        start, stop = self.timeline.ends(k)
        if self.control.callbacks and k == self._announced:
            self._announced = k + 1
            self._announce("step", start, state, stop - start)
        attempt = _Attempt(self, function, state, k, start, stop, recording, outputs)
        attempt.run()
        return attempt.finish()

    def _explore(self, function: Any, k: int, state: State, recording: bool) -> Step:
        """Try steps from the last accepted time until one is accurate enough."""
        timeline, tolerance = self.timeline, self.control.tolerance
        assert isinstance(timeline, AdaptiveTimeline)
        first: State | None = None
        slope: State = ()
        worst = ""
        while True:
            try:
                start, stop = timeline.propose()
            except SolveError as end:
                if end.status == "underflow" and not worst:
                    with torch.no_grad():
                        slope = self.slope(function, self.time(end.t), state)
                        worst = f"; f is largest in {tolerance.worst(slope, state, state)}"
                if not all(bool(torch.isfinite(x).all()) for x in slope):
                    message = f"f is not finite at t={end.t:.6g}, step {end.step}, where y is{worst}"
                    raise SolveError("nonfinite", message, t=end.t, step=end.step) from None
                raise SolveError(end.status, str(end) + worst, t=end.t, step=end.step) from None
            self._announce("step", start, state, stop - start)
            attempt = _Attempt(self, function, state, k, start, stop, recording, True)
            attempt.run(first)
            with torch.no_grad() if recording else nullcontext():
                error = attempt.error()
            with torch.no_grad():
                ratio = tolerance.ratio(error, state, attempt.new)
            accepted = timeline.judge(stop, ratio)
            self._announce("accept" if accepted else "reject", start, state, stop - start)
            if accepted:
                self._announced = k + 1
                return attempt.finish()
            with torch.no_grad():
                worst = f"; the largest error is in {tolerance.worst(error, state, attempt.new)}"
            slope = attempt.slopes[0]
            first = None if attempt.leaf is not None else slope

    def _announce(self, what: str, start: float, state: State, h: float) -> None:
        if what in self.control.callbacks:
            y = self.structure.unflatten(tuple(x.detach() for x in state))
            self.control.callbacks[what](self.time(start), y, h)

    def slope(self, function: Any, t: Tensor, state: State) -> State:
        """f(t, y) as leaves, of the state's shapes and dtypes."""
        f, args = function
        self.evaluations += 1
        versions = versions_of(state)
        value = self.structure.flatten(f(t, self.structure.unflatten(state), *args), "the value of f")
        if versions_of(state) != versions:
            refuse_writing("f changed its state")
        for x, y in zip(value, state):  # noqa: B905 (the structure has as many leaves)
            if x.shape != y.shape or x.dtype != y.dtype:
                raise ValueError(
                    f"f returned shape {tuple(x.shape)} and {x.dtype} for a state of shape {tuple(y.shape)} "
                    f"and {y.dtype}; it must return dy/dt, shaped and typed like y"
                )
        return value

    def stage_times(self, k: int, start: float, stop: float) -> tuple[Tensor, ...]:
        """t + c_i h for every stage, as tensors of the dtype of ``t`` on the state's device."""
        if k < self.timeline.steps:
            first = k // ROWS * ROWS
            if first != self._first_row or k - first >= len(self._table):
                ends = [self.timeline.ends(j) for j in range(first, min(first + ROWS, self.timeline.steps))]
                self._first_row, self._table = first, [row.unbind() for row in self._make_table(ends).unbind()]
            return self._table[k - first]
        return self._make_table([(start, stop)])[0].unbind()

    def time(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=self._dtype, device=self._device)

    def _make_table(self, ends: list[tuple[float, float]]) -> Tensor:
        start, stop = torch.tensor(ends, dtype=torch.float64).unbind(1)
        columns = [stop if c == 1 else start + c * (stop - start) for c in self.tableau.c]
        table = torch.stack(columns, 1).to(self._dtype)
        for row, (a, b) in enumerate(ends if self.control.jumps else ()):
            table[row] = torch.stack(self.at_jumps(table[row].unbind(), a, b))
        return table.to(self._device)

    def at_jumps(self, times: Sequence[Tensor], start: float, stop: float) -> tuple[Tensor, ...]:
        """The stage times of a step, a hair inside where it starts or stops at a jump: f is to see its own side."""
        jumps, moved = self.control.jumps, list(times)
        for end, other, c in ((start, stop, 0), (stop, start, 1)):
            for i in (i for i, x in enumerate(self.tableau.c) if x == c and end in jumps):
                with torch.no_grad():
                    hair = torch.nextafter(moved[i], moved[i].new_tensor(other)) - moved[i]
                moved[i] = moved[i] + hair
        return tuple(moved)

    def reuse(self, k: int, state: State) -> State | None:
        """The first slope of this step, if it was the last of the step before (first same as last)."""
        known, self._known_slope = self._known_slope, None
        return known[2] if known is not None and known[0] == k and known[1] is state else None

    def remember(self, k: int, state: State, slope: State) -> None:
        self._known_slope = (k, state, slope)

    def begin_reverse(self) -> None:
        self._known_slope = None
        if self.inputs:
            self._of_ends = torch.zeros(self.timeline.steps + 1, dtype=self._wide, device=self._device)
            self._of_asked = torch.zeros(self.outputs, dtype=self._wide, device=self._device)

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None:
        (times,) = cotangents
        if times is not None:
            inner = self.interpolated(self.asked.inside(*self.timeline.ends(k)))
            self._of_ends = added(self._of_ends, k, times[:2])
            if inner:
                self._of_asked = added(self._of_asked, inner.start, times[2:])

    def input_cotangents(self) -> Sequence[Tensor | None]:
        if not self.inputs:
            return ()
        with torch.enable_grad():
            t = self._t.detach().to(self._of_ends).requires_grad_()
            (asked,) = torch.autograd.grad(self.timeline.knots(t), t, self._of_ends)
        return ((asked + self._of_asked).to(self._dtype).to(self._t.device),)

    def interpolated(self, inside: range) -> range:
        """Of the asked times inside a step, those whose values are interpolated."""
        if self.timeline.landing:
            return range(0)
        return inside[:-1] if inside and inside[-1] == self.outputs - 1 else inside


class _Attempt:
    """One step being computed; without ``outputs`` it looks at the asked times no more."""

    def __init__(
        self,
        program: ExplicitProgram,
        function: Any,
        state: State,
        k: int,
        start: float,
        stop: float,
        recording: bool,
        outputs: bool,
    ) -> None:
        self.program, self.function, self.state, self.k, self.recording = program, function, state, k, recording
        self.start, self.stop = start, stop
        self.inside = program.asked.inside(start, stop) if outputs else range(0)
        self.inner = program.interpolated(self.inside)
        self.leaf: Tensor | None = None
        self.h: Scalar = stop - start
        self.fractions: list[Scalar] = [(program.asked.t[j] - start) / (stop - start) for j in self.inner]
        if program.inputs:
            self._differentiable_times()
        else:
            self.times = program.stage_times(k, start, stop)

    def _differentiable_times(self) -> None:
        program = self.program
        asked = [program.asked.t[j] for j in self.inner]
        numbers = torch.tensor([self.start, self.stop, *asked], dtype=program._wide, device=program._device)
        if program.graph_times is not None:
            ends = program.graph_times[self.k : self.k + 2]
            numbers = torch.cat((ends, program._t[self.inner.start : self.inner.stop].to(ends)))
        elif self.recording:
            numbers.requires_grad_()
        self.leaf = numbers
        start, stop, *asked_times = numbers.unbind()
        self.h = h = stop - start
        self.fractions = [(t - start) / h for t in asked_times]
        exact = [stop if c == 1 else start if c == 0 else start + c * h for c in program.tableau.c]
        times = tuple(t.to(program._dtype) for t in exact)
        self.times = program.at_jumps(times, self.start, self.stop) if program.control.jumps else times

    def run(self, first: State | None = None) -> None:
        """The stages that the new state needs, and the new state."""
        program = self.program
        if first is None and not self.recording:
            first = program.reuse(self.k, self.state)
        self.slopes: list[State] = [] if first is None else [first]
        for i in range(len(self.slopes), program.tableau.weighted):
            self.slopes.append(self._stage(i))
        self.new = self._moved(program._weights)

    def error(self) -> State:
        """The embedded error estimate h sum_i e_i k_i."""
        tableau = self.program.tableau
        self._complete(tableau.stages)
        assert tableau.error is not None
        terms = [(i, e) for i, e in enumerate(tableau.error) if e != 0]
        h = float(self.stop - self.start)
        return tuple(h * x for x in self._sum(terms))

    def finish(self) -> Step:
        """The step as its caller sees it."""
        program = self.program
        outputs: tuple[tuple[int, State], ...] = ()
        if self.inner:
            outputs = tuple(zip(self.inner, self._interpolate(), strict=True))
        if len(self.inside) > len(self.inner):
            outputs = (*outputs, (self.inside[-1], self.new))
        if len(self.slopes) == program.tableau.stages and not self.recording:
            smooth = self.stop not in program.control.jumps
            if smooth and program.tableau.first_same_as_last:
                program.remember(self.k + 1, self.new, self.slopes[-1])
        leaf = (self.leaf,) if self.leaf is not None and self.recording and program.graph_times is None else ()
        return Step(self.new, outputs, leaf)

    def _stage(self, i: int) -> State:
        program = self.program
        row = program._rows[i]
        return program.slope(self.function, self.times[i], self._moved(row) if row else self.state)

    def _complete(self, stages: int) -> None:
        """Stages beyond those that the new state needs; the last one is f there, if the method is so made."""
        tableau = self.program.tableau
        for i in range(len(self.slopes), stages):
            same = tableau.first_same_as_last and i == tableau.stages - 1
            self.slopes.append(self.program.slope(self.function, self.times[i], self.new) if same else self._stage(i))

    def _interpolate(self) -> list[State]:
        """y + h sum_i b_i(theta) k_i at every asked time inside the step."""
        tableau = self.program.tableau
        assert tableau.dense is not None
        if self.recording:
            del self.slopes[tableau.weighted :]  # an error estimate may have made them without a graph
        self._complete(tableau.interpolated)
        values = []
        for theta in self.fractions:
            terms: list[tuple[int, Scalar]] = []
            for i, row in enumerate(tableau.dense[: tableau.interpolated]):
                weight: Scalar = 0.0
                for coefficient in reversed(row):
                    weight = (weight + coefficient) * theta
                terms.append((i, weight))
            values.append(self._moved([x for x in terms if not (isinstance(x[1], float) and x[1] == 0)]))
        return values

    def _moved(self, terms: Sequence[tuple[int, Scalar]]) -> State:
        """y + h sum_i w_i k_i."""
        h, state = self.h, self.state
        if isinstance(h, Tensor):
            return tuple([y + h * x for y, x in zip(state, self._sum(terms), strict=True)])
        if len(terms) == 1 and isinstance(terms[0][1], float):
            i, weight = terms[0]
            h, increments = h * float(weight), self.slopes[i]
        else:
            increments = self._sum(terms)
        if len(state) == 1:
            return (torch.add(state[0], increments[0], alpha=h),)
        return tuple([torch.add(y, x, alpha=h) for y, x in zip(state, increments, strict=True)])

    def _sum(self, terms: Sequence[tuple[int, Scalar]]) -> State:
        return tuple([self._leaf_sum(leaf, terms) for leaf in range(len(self.state))])

    def _leaf_sum(self, leaf: int, terms: Sequence[tuple[int, Scalar]]) -> Tensor:
        slopes = self.slopes
        i, weight = terms[0]
        total = slopes[i][leaf] * weight
        for i, weight in terms[1:]:
            if isinstance(weight, float):
                total = torch.add(total, slopes[i][leaf], alpha=weight)
            else:
                total = total + slopes[i][leaf] * weight
        return total


def explicit_program(
    tableau: Tableau, t: Tensor, structure: Structure, state: State, control: Control
) -> ExplicitProgram:
    """The steps of one solve of dy/dt = f(t, y) over the asked times ``t``, from fixed or controlled steps."""
    program = ExplicitProgram(tableau, t, structure, state, control)
    asked = program.asked.t
    if control.grid is not None:
        program.timeline = GridTimeline(control.grid)
    elif not tableau.adaptive:
        program.timeline = replayed(FixedTimeline(asked, control.dt, control.jumps))
    else:
        order = tableau.error_order + 1
        program.timeline = replayed(
            AdaptiveTimeline(asked[0], asked[-1], order, control.max_steps, control.controller, control.jumps)
        )
    return program


def _first_step(program: ExplicitProgram, function: Any, state: State, start: float, span: float) -> float:
    """The length of a first step to try: Hairer, Norsett & Wanner I, section II.4.

    It calls the caller's own function as the caller would: a tensor that is kept from these calls has its whole graph.
    """
    tolerance, length = program.control.tolerance, abs(span)
    slope = program.slope(function, program.time(start), state)
    slope, known = (tuple(x.detach() for x in leaves) for leaves in (slope, state))
    zero = tuple(torch.zeros_like(x) for x in known)
    size, speed = tolerance.ratio(known, known, zero), tolerance.ratio(slope, known, zero)
    guess = min(1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed, length)
    shift = guess if span > 0 else -guess
    moved = tuple(torch.add(y, x, alpha=shift) for y, x in zip(state, slope, strict=True))
    bent = program.slope(function, program.time(start + shift), moved)
    change = tuple(x.detach() - y for x, y in zip(bent, slope, strict=True))
    most = max(speed, tolerance.ratio(change, known, zero) / guess)
    wanted = max(1e-6, guess * 1e-3) if most <= 1e-15 else (0.01 / most) ** (1 / (program.tableau.error_order + 1))
    chosen = min(100 * guess, wanted, length)
    return chosen if chosen > 0 else min(1e-6, length)
