"""One explicit Runge-Kutta step being computed: its stages, its error, its values in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, add

from adjoint.autograd import Step
from adjoint.tensors import State

Scalar = float | Tensor


class Terms:
    """A sum w_i k_i, taken as w_m (k_m + sum (w_i / w_m) k_i) with the largest weight w_m: one operation a term."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.first = max(range(len(weights)), key=lambda i: abs(weights[i]))
        self.scale = weights[self.first]
        self.rest = tuple((i, w / self.scale) for i, w in enumerate(weights) if w != 0 and i != self.first)

    def of(self, slopes: Sequence[State], leaf: int) -> Tensor:
        """The sum without the factor ``scale``."""
        total = slopes[self.first][leaf]
        for i, ratio in self.rest:
            total = add(total, slopes[i][leaf], alpha=ratio)
        return total


def plain(state: State) -> State:
    """The state as f is to see it: where nothing is recorded, off torch's graph."""
    if torch.is_grad_enabled():
        return state
    return tuple([x.detach() if x.requires_grad else x for x in state])


def versioned(x: Tensor) -> bool:
    """Whether torch counts how often x is written to."""
    return not (torch.is_inference_mode_enabled() or x.is_inference())


def run_single(
    program: Any, function: Any, y: Tensor, h: float, times: Sequence[Tensor], slopes: list[Tensor]
) -> Tensor:
    """The new state where a state is one tensor, written out: a small step takes a fifth less time.

    ``slopes``: those that are known; the others that the new state needs are added.
    """
    f, args = function
    shape, dtype, at, known = y.shape, y.dtype, y, len(slopes)
    for i, terms in enumerate(program.rows[known : program.tableau.weighted], known):
        if terms is not None:
            total = slopes[terms.first]
            for j, ratio in terms.rest:
                total = add(total, slopes[j], alpha=ratio)
            at = add(y, total, alpha=h * terms.scale)
        version = at._version
        value = f(times[i], at, *args)
        if isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype and at._version == version:
            slopes.append(value)
        else:
            slopes += program.checked(value, (at,), [version])
    program.evaluations += len(slopes) - known
    terms = program.weights
    total = slopes[terms.first]
    for j, ratio in terms.rest:
        total = add(total, slopes[j], alpha=ratio)
    return add(y, total, alpha=h * terms.scale)


class Stages:
    """Step k from ``start`` to ``stop``; without ``outputs`` it looks at the asked times no more.

    ``program`` is the ExplicitProgram that makes it.
    """

    __slots__ = (
        "fractions",
        "function",
        "h",
        "inner",
        "inside",
        "k",
        "leaf",
        "new",
        "program",
        "recording",
        "slopes",
        "start",
        "state",
        "stop",
        "times",
        "wanted",
    )

    def __init__(
        self,
        program: Any,
        function: Any,
        state: State,
        k: int,
        start: float,
        stop: float,
        recording: bool,
        outputs: bool,
    ) -> None:
        self.program, self.function, self.state, self.k, self.recording = program, function, state, k, recording
        self.start, self.stop, self.wanted = start, stop, outputs
        self.inside = program.asked.inside(start, stop) if outputs and program.view is None else range(0)
        self.inner = program.interpolated(self.inside)
        self.leaf: Tensor | None = None
        self.new: State
        self.h: Scalar = stop - start
        self.fractions: list[Scalar] = [(program.asked.t[j] - start) / (stop - start) for j in self.inner]
        self.slopes: list[State] = []
        numbers = None if program.moving is None else program.moving(self)
        if program.inputs or numbers is not None:
            self._differentiable_times(numbers)
        else:
            self.times = program.stage_times(k, start, stop)

    def _differentiable_times(self, given: Tensor | None) -> None:
        """Times as tensors: those given (start, stop, the asked ones inside), or made here."""
        program = self.program
        asked = [program.asked.t[j] for j in self.inner]
        if given is not None:
            numbers = given
        elif program.graph_times is not None:
            ends = program.graph_times.ends(self.k, self.start, self.stop)
            numbers = torch.cat((ends, program.t[self.inner.start : self.inner.stop].to(ends)))
        else:
            numbers = torch.tensor([self.start, self.stop, *asked], dtype=program.wide, device=program.device)
            numbers.requires_grad_(self.recording)
        self.leaf = numbers
        start, stop, *asked_times = numbers.unbind()
        self.h = h = stop - start
        self.fractions = [(t - start) / h for t in asked_times]
        exact = [stop if c == 1 else start if c == 0 else start + c * h for c in program.tableau.c]
        times = tuple(t.to(program.dtype) for t in exact)
        self.times = program.at_jumps(times, self.start, self.stop) if program.edges else times

    def run(self, first: State | None = None) -> None:
        """The stages that the new state needs, and the new state."""
        program = self.program
        if first is None and not self.recording:
            first = program.reuse(self.k, self.state)
        if first is not None:
            self.slopes.append(first)
        if program.structure.single and isinstance(self.h, float) and versioned(self.state[0]):
            slopes = [x for (x,) in self.slopes]
            self.new = (run_single(program, self.function, self.state[0], self.h, self.times, slopes),)
            self.slopes = [(x,) for x in slopes]
            return
        for i in range(len(self.slopes), program.tableau.weighted):
            self._stage(i)
        self.new = self._moved(program.weights)

    def error(self) -> State:
        """The embedded error estimate h sum_i e_i k_i."""
        program = self.program
        self._complete(program.tableau.stages)
        terms = program.errors
        assert terms is not None
        scale = (self.stop - self.start) * terms.scale
        return tuple([terms.of(self.slopes, leaf) * scale for leaf in range(len(self.state))])

    def finish(self) -> Step:
        """The step as its caller sees it."""
        program = self.program
        outputs: tuple[tuple[int, State], ...] = ()
        if self.inside:
            if self.inner:
                outputs = tuple(zip(self.inner, self.interpolate(), strict=True))
            if len(self.inside) > len(self.inner):
                outputs = (*outputs, (self.inside[-1], self.new))
        if program.view is not None and self.wanted:
            outputs = program.view.look(self)
        if len(self.slopes) == program.tableau.stages and not self.recording:
            smooth = not program.jumps_at(self.stop)
            if smooth and program.tableau.first_same_as_last:
                program.remember(self.k + 1, self.new, self.slopes[-1])
        own = self.leaf is not None and self.recording and program.graph_times is None and program.moving is None
        return Step(self.carried(), outputs, (self.leaf,) if own and self.leaf is not None else ())

    def carried(self) -> State:
        """The state of the chain after this step."""
        return self.new

    def _stage(self, i: int) -> None:
        self.slopes.append(self.program.slope(self.function, self.times[i], self.point(i)))

    def point(self, i: int) -> State:
        """Where stage i evaluates f."""
        terms = self.program.rows[i]
        return self.state if terms is None else self._moved(terms)

    def _complete(self, stages: int) -> None:
        """Stages beyond those that the new state needs; the last one is f there, if the method is so made."""
        tableau = self.program.tableau
        for i in range(len(self.slopes), stages):
            if tableau.first_same_as_last and i == tableau.stages - 1:
                self.slopes.append(self.program.slope(self.function, self.times[i], plain(self.new)))
            else:
                self.slopes.append(self.program.slope(self.function, self.times[i], plain(self.point(i))))

    def _complete_dense(self) -> None:
        tableau = self.program.tableau
        if self.recording:
            del self.slopes[tableau.weighted :]  # an error estimate may have made them without a graph
        self._complete(tableau.interpolated)

    def polynomial(self) -> State:
        """For each leaf the coefficients of 1, theta, theta^2, .. of the interpolant over this step, stacked."""
        self._complete_dense()
        dense, columns = self.program.tableau.dense[: self.program.tableau.interpolated], [self.state]
        zeros = tuple(torch.zeros_like(x) for x in self.state)
        for weights in zip(*dense, strict=True):
            columns.append(self._increment(Terms(weights)) if any(weights) else zeros)
        return tuple([torch.stack(column) for column in zip(*columns, strict=True)])

    def _increment(self, terms: Terms) -> State:
        """h sum_i w_i k_i."""
        h = self.h * terms.scale
        return tuple([(terms.of(self.slopes, leaf) * h).to(y.dtype) for leaf, y in enumerate(self.state)])

    def interpolate(self) -> list[State]:
        """y + h sum_i b_i(theta) k_i at every asked time inside the step."""
        self._complete_dense()
        return [self._at(theta) for theta in self.fractions]

    def _at(self, theta: Scalar) -> State:
        """y + h theta sum_i (b_i(theta) / theta) k_i."""
        dense = self.program.tableau.dense
        assert dense is not None
        weights: list[Scalar] = []
        for row in dense[: self.program.tableau.interpolated]:
            weight: Scalar = 0.0
            for coefficient in reversed(row):
                weight = (weight + coefficient) * theta
            weights.append(weight)
        if not isinstance(theta, Tensor):
            return self._moved(Terms([float(w) for w in weights]))
        used = [(i, w * self.h) for i, w in enumerate(weights) if isinstance(w, Tensor)]
        slopes, state = self.slopes, enumerate(self.state)
        return tuple([y + sum(w.to(y.real.dtype) * slopes[i][leaf] for i, w in used) for leaf, y in state])

    def _moved(self, terms: Terms) -> State:
        """y + h sum_i w_i k_i."""
        h, state, slopes = self.h, self.state, self.slopes
        if isinstance(h, Tensor):
            h = h * terms.scale
            return tuple([y + h.to(y.real.dtype) * terms.of(slopes, leaf) for leaf, y in enumerate(state)])
        h *= terms.scale
        if len(state) == 1:
            return (add(state[0], terms.of(slopes, 0), alpha=h),)
        return tuple([add(y, terms.of(slopes, leaf), alpha=h) for leaf, y in enumerate(state)])
