"""Explicit Runge-Kutta steps.

    k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),    y_new = y + h sum_i b_i k_i

The transpose of a step is that of its torch graph (one vector-Jacobian product of the whole step), which is exactly
the discrete adjoint of Sandu (2006), Springer LNCS 3994, section 2.1, for the state, the parameters and the times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline, GraphTimes
from adjoint.autograd import Step
from adjoint.frozen import replayed
from adjoint.memory import aside
from adjoint.steppers.control import Control
from adjoint.steppers.stages import Stages, Terms, run_single, versioned
from adjoint.tableaus import Tableau
from adjoint.tangents import Batch, pushed
from adjoint.tensors import State, Structure, added, bytes_of, refuse_writing, versions_of
from adjoint.timeline import Asked, CutTimeline, FixedTimeline, GridTimeline, SolveError, StridingTimeline

ROWS = 128
"""Stage times are made for this many steps at once, .."""
TABLES = 4
""".. and kept of the last so many times as many."""


class View(Protocol):
    """What is shown of a solve in place of values at asked times: polynomials of steps, by index."""

    def count(self, steps: int) -> int:
        """How many, once so many steps have been taken."""
        ...

    @property
    def done(self) -> bool:
        """Whether the solve may end."""
        ...

    def look(self, stages: Stages) -> tuple[tuple[int, State], ...]:
        """What to show of a step that has been taken."""
        ...

    def afresh(self) -> View:
        """One like this for a step on trial."""
        ...


class ExplicitProgram:
    """The steps of an explicit Runge-Kutta solve. ``function`` is a pair (f, args).

    Times are differentiable when the caller's ``t`` requires grad: then h and the stage times are tensors, made from
    one small leaf per step. Otherwise h is a Python float.
    """

    label = "f"
    initial: int | None = 0
    series: State = ()
    watch: Callable[[Stages], None] | None = None
    """Is shown the stages of every step."""
    moving: Callable[[Stages], Tensor | None] | None = None
    """Gives the times of a step (start, stop, the asked ones inside) on the graph, if they depend on anything there."""
    restarts: Callable[[int], bool] | None = None
    """Whether the state was changed where step k begins, so that nothing of earlier steps goes on."""

    def __init__(
        self,
        tableau: Tableau,
        t: Tensor,
        structure: Structure,
        like: State,
        control: Control,
    ) -> None:
        self.tableau, self.structure, self.control = tableau, structure, control
        self.leaves, self._bytes = len(like), bytes_of(like)
        self.view: View | None = None
        self.method: Any = tableau
        self.asked = Asked([float(x) for x in t.tolist()])
        self.timeline: FixedTimeline | GridTimeline | StridingTimeline | AdaptiveTimeline | CutTimeline
        self.inputs: tuple[Tensor, ...] = (t,) if t.requires_grad else ()
        self.evaluations = 0
        self.graph_times: GraphTimes | None = None
        """For backpropagation through torch's own graph: the steps' times as a function of the caller's."""
        self.t, self.dtype = t, control.time_dtype or t.dtype
        self.device = like[0].device
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.rows = [Terms(row) if any(row) else None for row in tableau.a]
        self.weights = Terms(tableau.b)
        self.errors = None if tableau.error is None else Terms(tableau.error)
        self._announced = 0
        self._tables: dict[int, tuple[Tensor, ...]] = {}
        """Stage times one after another, by the first of ``ROWS`` steps."""
        self._known_slope: tuple[int, State, State] | None = None
        self._lean = structure.single and type(self).stages is ExplicitProgram.stages
        """Whether a step of which nobody sees anything but its end needs no :class:`Stages`."""

    def begin(self, function: Any, state: State) -> None:
        """Choose the first step of an adaptive solve, unless that is known."""
        if isinstance(self.timeline, AdaptiveTimeline) and not self.timeline.done:
            span = self.asked.t[-1] - self.asked.t[0]
            first = self.control.dt
            if first is None:
                first = _first_step(self, function, tuple(x.contiguous() for x in state), self.asked.t[0], span)
            self.timeline.begin(min(first, abs(span)))

    def begin_compiled(self) -> None:
        """The same where a compiled program will choose the first step, by two slopes of its own."""
        if isinstance(self.timeline, AdaptiveTimeline) and not self.timeline.done:
            span = abs(self.asked.t[-1] - self.asked.t[0])
            if self.control.dt is None:
                self.evaluations += 2
            else:
                self.timeline.begin(min(self.control.dt, span))

    def seen_by(self, view: View) -> ExplicitProgram:
        """This program, showing polynomials of steps in place of values at the asked times."""
        self.view, self.initial = view, None
        return self

    def first(self, state: State) -> State:
        """The first state of the chain, from that of the equation."""
        return state

    def settled(self, function: Any, t: Tensor, state: State, what: str) -> State:
        """The state from which to go on at t; another one where it has algebraic equations to fulfil."""
        return state

    def stages(self, *how: Any) -> Stages:
        """One step to be computed: (function, state, k, start, stop, recording, outputs)."""
        return Stages(self, *how)

    def sample(self) -> ExplicitProgram:
        """A program of one step like the first one of this, to try things out on."""
        other = copy.copy(self)
        if self.timeline.steps:
            start, stop = self.timeline.ends(0)
        else:
            assert isinstance(self.timeline, AdaptiveTimeline)
            start, stop = self.timeline.propose()
        other.timeline = FixedTimeline([start, stop], None)
        other.control, other._tables = replace(self.control, callbacks={}, twins={}), {}
        other.watch = other.restarts = None
        if self.view is not None:
            other.view = self.view.afresh()
        return other

    def on_graph(self) -> ExplicitProgram:
        """The same steps as functions of the caller's own times, for torch's graph to follow."""
        other = copy.copy(self)
        if self.inputs:
            other.graph_times = GraphTimes(self.timeline, self.t.to(device=self.device, dtype=self.wide))
        return other

    @property
    def outputs(self) -> int:
        return len(self.asked.t) if self.view is None else self.view.count(self.timeline.steps)

    @property
    def step_bytes(self) -> int:
        """What every step adds to a view that grows with them, and to its cotangents."""
        if self.view is None or self.timeline.done or self.view.count(2) == self.view.count(1):
            return 0
        degree = max(map(len, self.tableau.dense or ((),)))
        return 2 * (degree + 1) * self._bytes

    @property
    def done(self) -> bool:
        return self.timeline.done or (self.view is not None and self.view.done)

    @property
    def rejected(self) -> int:
        return self.timeline.rejected if isinstance(self.timeline, AdaptiveTimeline) else 0

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        if k == self.timeline.steps:
            if not isinstance(self.timeline, StridingTimeline):
                return self._explore(function, k, state, recording)
            try:
                self.timeline.extend()
            except SolveError as end:
                end.state = tuple(x.detach() for x in state)
                raise
        start, stop = self.timeline.ends(k)
        if self.control.callbacks and k == self._announced:
            self._announced = k + 1
            self._announce("step", start, state, stop - start)
        shows = outputs and (self.view is not None or self.asked.inside(start, stop))
        if self._lean and not (shows or self.inputs or self.watch or self.moving) and versioned(state[0]):
            known = None if recording else self.reuse(k, state)
            times, slopes = self.stage_times(k, start, stop), [] if known is None else [known[0]]
            return Step((run_single(self, function, state[0], stop - start, times, slopes),))
        stages = self.stages(function, state, k, start, stop, recording, outputs)
        stages.run()
        if self.watch is not None:
            self.watch(stages)
        return stages.finish()

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
                raise self._diagnosed(end, function, state, slope, worst) from None
            self._announce("step", start, state, stop - start)
            stages = self.stages(function, state, k, start, stop, recording, True)
            stages.run(first)
            with torch.no_grad() if recording else nullcontext():
                error = stages.error()
            with torch.no_grad():
                ratio = tolerance.ratio(error, state, stages.new)
            accepted = timeline.judge(stop, ratio)
            self._announce("accept" if accepted else "reject", start, state, stop - start)
            if accepted:
                self._announced = k + 1
                if self.watch is not None:
                    self.watch(stages)
                return stages.finish()
            with torch.no_grad():
                worst = f"; the largest error is in {tolerance.worst(error, state, stages.new)}"
                worst += "" if math.isfinite(ratio) else ", where it is no number: f is not finite a little further on"
            slope = stages.slopes[0]
            first = None if stages.leaf is not None else slope

    def _diagnosed(self, end: SolveError, function: Any, state: State, slope: State, worst: str) -> SolveError:
        """The same failure, with the state, the component with the largest error, and whether f is to blame."""
        timeline, tolerance = self.timeline, self.control.tolerance
        assert isinstance(timeline, AdaptiveTimeline)
        good = tuple(x.detach() for x in state)
        with torch.no_grad():
            if not worst:
                slope = self.slope(function, self.time(end.t), state)
                worst = f"; f is largest in {tolerance.worst(slope, state, state)}"
                if end.status == "max_steps" and _finite(slope):
                    trial = self.stages(function, good, timeline.steps, *timeline.trial, False, False)
                    trial.run()
                    worst = f"; the largest error is in {tolerance.worst(trial.error(), good, trial.new)}"
        if not _finite(slope):
            message = (
                f"f is not finite at t={end.t:.6g}, step {end.step}, where y is{worst}; f may divide by zero, or take a "
                f"root or a logarithm, outside of where that is defined: keep y inside, or name the time in jumps="
            )
            return SolveError("nonfinite", message, t=end.t, step=end.step, state=good)
        return SolveError(end.status, str(end) + worst, t=end.t, step=end.step, state=good)

    def _announce(self, what: str, start: float, state: State, h: float) -> None:
        if what in self.control.callbacks:
            y = self.structure.unflatten(tuple(x.detach() for x in state[: self.leaves]))
            self.control.callbacks[what](self.time(start), y, self.time(abs(h)))

    def reversing(
        self, k: int, state: State, cotangent: Sequence[Tensor | None], sums: Sequence[Tensor | None]
    ) -> None:
        """Show the reverse sweep, before the transpose of step k, to the caller's callbacks."""
        tree, twins = self.structure.unflatten, self.control.twins
        y = [x.detach() for x in state[: self.leaves]]
        of_y = [torch.zeros_like(x) if g is None else g for x, g in zip(y, cotangent, strict=False)]
        start, stop = self.timeline.ends(k)
        t, length = self.time(stop), self.time(abs(stop - start))
        for what in ("step", "accept"):
            if what in twins:
                twins[what](t, (torch.zeros_like(t), tree(y), tree(of_y), *sums), length)

    def slope(self, function: Any, t: Tensor, state: State) -> State:
        """f(t, y) as leaves."""
        f, args = function
        self.evaluations += 1
        versions = versions_of(state)
        return self.checked(f(t, self.structure.unflatten(state), *args), state, versions)

    def checked(self, value: Any, state: State, versions: list[int]) -> State:
        """The value of f as leaves, if they have the state's shapes and dtypes and the state is as it was."""
        leaves = self.structure.flatten(value, "the value of f")
        if versions_of(state) != versions:
            refuse_writing("f changed its state")
        for x, y in zip(leaves, state):  # noqa: B905 (the structure has as many leaves)
            if x.shape != y.shape or x.dtype != y.dtype:
                raise ValueError(
                    f"f returned shape {tuple(x.shape)} and {x.dtype} for a state of shape {tuple(y.shape)} "
                    f"and {y.dtype}; it must return dy/dt, shaped and typed like y"
                )
        return leaves

    def stage_times(self, k: int, start: float, stop: float) -> tuple[Tensor, ...]:
        """t + c_i h for every stage, as tensors of the dtype of ``t`` on the state's device."""
        if k < self.timeline.steps:
            stages = len(self.tableau.c)
            table, place = self._tables.get(k - k % ROWS, ()), k % ROWS * stages
            if place >= len(table):
                table = self._add_table(k - k % ROWS)
            first = table[place]  # all of a table count their writings together
            if not first.is_inference() and first._version:
                refuse_writing("f changed its time")
            return table[place : place + stages]
        return self._make_table([(start, stop)])[0].unbind()

    def _add_table(self, first: int) -> tuple[Tensor, ...]:
        ends = [self.timeline.ends(j) for j in range(first, min(first + ROWS, self.timeline.steps))]
        self._tables.pop(first, None)
        if len(self._tables) == TABLES:
            del self._tables[next(iter(self._tables))]
        with aside():
            self._tables[first] = table = self._make_table(ends).flatten().clone().unbind()
        return table

    def forget_times(self) -> None:
        """Steps that have been laid out start elsewhere now."""
        self._tables.clear()

    def begin_anew(self) -> None:
        """No step has been taken yet."""
        self._announced, self._known_slope, self._tables = 0, None, {}

    def time(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=self.dtype, device=self.device)

    def _make_table(self, ends: list[tuple[float, float]]) -> Tensor:
        rows = [[b if c == 1 else a + c * (b - a) for c in self.tableau.c] for a, b in ends]
        table = torch.tensor(rows, dtype=torch.float64).to(self.dtype)
        for row, (a, b) in enumerate(ends if self.edges else ()):
            table[row] = torch.stack(self.at_jumps(table[row].unbind(), a, b))
        return table.to(self.device)

    def at_jumps(self, times: Sequence[Tensor], start: float, stop: float) -> tuple[Tensor, ...]:
        """The stage times of a step, a hair inside where it starts or stops at a jump: f is to see its own side."""
        moved = list(times)
        for end, other, c in ((start, stop, 0), (stop, start, 1)):
            for i in (i for i, x in enumerate(self.tableau.c) if x == c and self.jumps_at(end)):
                with torch.no_grad():
                    hair = torch.nextafter(moved[i], moved[i].new_tensor(other)) - moved[i]
                moved[i] = moved[i] + hair
        return tuple(moved)

    @property
    def edges(self) -> bool:
        """Whether f jumps anywhere."""
        return self.control.perturb or bool(self.control.jumps)

    def jumps_at(self, t: float) -> bool:
        return self.control.perturb or t in self.control.jumps

    def reuse(self, k: int, state: State) -> State | None:
        """The first slope of this step, if it was the last of the step before (first same as last)."""
        known, self._known_slope = self._known_slope, None
        if known is None or known[0] != k:
            return None
        same = known[1] is state or all(x is y for x, y in zip(known[1], state, strict=True))
        return known[2] if same else None

    def remember(self, k: int, state: State, slope: State) -> None:
        self._known_slope = (k, state, slope)

    def begin_reverse(self) -> None:
        self._known_slope = None
        if self.inputs:
            self._of_ends = torch.zeros(self.timeline.steps + 1, dtype=self.wide, device=self.device)
            self._of_asked = torch.zeros(len(self.asked.t), dtype=self.wide, device=self.device)

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None:
        (times,) = cotangents
        if times is not None:
            inner = self.interpolated(self.asked.inside(*self.timeline.ends(k)))
            self._of_ends = added(self._of_ends, k, times[:2])
            if inner:
                self._of_asked = added(self._of_asked, inner.start, times[2:])

    def take_ends(self, cotangents: Tensor) -> None:
        """The cotangents of the ends of all steps, where they were added up elsewhere: shape (steps + 1,)."""
        self._of_ends = cotangents.to(self._of_ends)

    def input_cotangents(self) -> Sequence[Tensor | None]:
        if not self.inputs:
            return ()
        with torch.enable_grad():
            t = self.t.detach().to(self._of_ends).requires_grad_()
            (asked,) = torch.autograd.grad(self.timeline.knots(t), t, self._of_ends)
        return ((asked + self._of_asked).to(self.t),)

    def identity(self) -> Any:
        """What decides the steps, beside f and y0."""
        control, norm = self.control, self.control.tolerance.norm
        tolerances = control.tolerance.rtol, control.tolerance.atol, getattr(norm, "__qualname__", None)
        how = control.dt, control.max_steps, control.controller, control.jumps, control.stops, control.grid
        said = repr((self.tableau, *how, control.perturb, control.time_dtype, control.rounding))
        ends = np.array([self.timeline.ends(k)[1] for k in range(self.timeline.steps)])
        return said, tolerances, self.t.detach(), ends

    def snapshot(self) -> Any:
        """What has been found and added up so far."""
        found = self.timeline.snapshot() if isinstance(self.timeline, AdaptiveTimeline) else None
        return found, getattr(self, "_of_ends", None), getattr(self, "_of_asked", None)

    def restore(self, snapshot: Any) -> None:
        found, self._of_ends, self._of_asked = snapshot
        if isinstance(self.timeline, AdaptiveTimeline):
            self.timeline.restore(found)
        self._announced, self._known_slope, self._tables = self.timeline.steps, None, {}

    def begin_tangents(self, directions: Sequence[Tensor | None]) -> None:
        self._along: tuple[Tensor, Tensor] | None = None
        for rows in directions:
            if rows is not None:
                t, rows = self.t.detach().to(self.device, self.wide), rows.to(self.device, self.wide)
                with torch.enable_grad():
                    knots = self.timeline.knots(t.requires_grad_())
                self._along = pushed([knots], [t], [rows], Batch(len(rows), self.label))[0], rows

    def tangents(self, k: int, leaves: int) -> Sequence[Tensor | None]:
        if not leaves or self._along is None:
            return (None,) * leaves
        inner = self.interpolated(self.asked.inside(*self.timeline.ends(k)))
        ends, asked = self._along
        return (torch.cat((ends[:, k : k + 2], asked[:, inner.start : inner.stop]), 1),)

    def interpolated(self, inside: range) -> range:
        """Of the asked times inside a step, those whose values are interpolated."""
        if self.timeline.landing:
            return range(0)
        return inside[:-1] if inside and inside[-1] == len(self.asked.t) - 1 else inside


def _finite(state: State) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in state)


Timed = TypeVar("Timed", bound=ExplicitProgram)


def with_timeline(program: Timed) -> Timed:
    """The program with the times of its steps, as far as they are known."""
    tableau, control, asked = program.tableau, program.control, program.asked.t
    if control.grid is not None:
        program.timeline = GridTimeline(control.grid, control.construct)
    elif not tableau.adaptive and math.isinf(asked[-1]):
        assert control.dt is not None
        program.timeline = StridingTimeline(asked[0], math.copysign(control.dt, asked[-1]), control.max_steps)
    elif not tableau.adaptive:
        program.timeline = replayed(FixedTimeline(asked, control.dt, control.jumps))
    else:
        order, stops = tableau.error_order + 1, (*control.jumps, *control.stops)
        most, controller, dtype = control.max_steps, control.controller, control.rounding
        program.timeline = replayed(AdaptiveTimeline(asked[0], asked[-1], order, most, controller, stops, dtype))
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
