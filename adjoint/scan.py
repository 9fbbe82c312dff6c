"""``scan``: a recurrence over a sequence, differentiable in the memory of a few states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.gradients import gradient_named, is_backprop
from adjoint.problem import Gradient, Problem, check_memory
from adjoint.progress import Progress, progress_ticker
from adjoint.tensors import State, Structure, added, check_dense, refuse_writing, versions_of
from adjoint.tiers import Kind
from adjoint.transforms import leaves_of_tree, through_transforms, tree_of_leaves
from revolve import Journal, Schedule


class ScanProgram:
    """The steps carry, output = step(carry, x[k], *args) of a recurrence."""

    label = "step"
    initial: int | None = None
    rejected = 0

    def __init__(self, carry: Structure, inputs: Structure, series: State, length: int) -> None:
        self._carry, self._inputs = carry, inputs
        self.outputs = length
        self.evaluations = 0
        self._output: list[Structure] = []  # found by the first step, and shared with copies of the program
        self._series = series
        self.series = tuple(x.detach() for x in series)
        self._wanted = [i for i, x in enumerate(series) if x.requires_grad]
        self.inputs = tuple(series[i] for i in self._wanted)
        self._slices: list[tuple[Tensor, ...]] | None = None
        self._cotangents: list[Tensor] = []

    @property
    def done(self) -> bool:
        return True

    def begin(self, function: Any, state: State) -> None:
        """Nothing has to be known."""

    def sample(self) -> ScanProgram:
        return copy.copy(self)

    def on_graph(self) -> ScanProgram:
        """Slices by one unbind: x[k] in a loop would write a full-size gradient every step."""
        other = copy.copy(self)
        other._slices = [x.unbind(0) for x in self._series]
        return other

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        f, args = function
        self.evaluations += 1
        leaves: tuple[Tensor, ...] = ()
        if self._slices is not None:
            x = [slices[k] for slices in self._slices]
        else:
            x = [series[k] for series in self.series]
            if recording:
                leaves = tuple(x[i].requires_grad_() for i in self._wanted)
        versions = versions_of((*state, *x))
        result = f(self._carry.unflatten(state), self._inputs.unflatten(x), *args)
        if versions_of((*state, *x)) != versions:
            refuse_writing("step changed its carry or its input")
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"step returned {type(result).__name__}; it must return a pair (carry, output)")
        carry = self._carry.flatten(result[0], "the carry that step returned")
        for new, old in zip(carry, state, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"step {k} returned a carry of shape {tuple(new.shape)} and {new.dtype}, "
                    f"the first one has {tuple(old.shape)} and {old.dtype}"
                )
        return Step(carry, self._outputs(k, result[1]), leaves)

    def _outputs(self, k: int, output: Any) -> tuple[tuple[int, State], ...]:
        if (output is None) != (self._output == []) and k > 0:
            raise TypeError(f"step {k} returned {'no' if output is None else 'an'} output; every step must, or none")
        if output is None:
            return ()
        if not self._output:
            self._output.append(Structure.of(output, "the output of step")[0])
        return ((k, self._output[0].flatten(output, "the output of step")),)

    def unflatten(self, outputs: State) -> Any:
        """The tree of outputs; None if steps return none."""
        return self._output[0].unflatten(outputs) if self._output else None

    def begin_reverse(self) -> None:
        self._cotangents = [torch.zeros_like(x) for x in self.inputs]

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(cotangents):
            if g is not None:
                self._cotangents[i] = added(self._cotangents[i], k, g[None])

    def input_cotangents(self) -> Sequence[Tensor | None]:
        cotangents, self._cotangents = self._cotangents, []
        return cotangents

    def identity(self) -> Any:
        """What decides the steps, beside the function and the first carry."""
        return "scan", self.outputs, self.series

    def snapshot(self) -> Any:
        """What has been added up so far."""
        return self._cotangents

    def restore(self, snapshot: Any) -> None:
        self._cotangents = snapshot

    def begin_tangents(self, directions: Sequence[Tensor | None]) -> None:
        self._directions = directions

    def tangents(self, k: int, leaves: int) -> Sequence[Tensor | None]:
        return [None if v is None else v[:, k] for v in self._directions]


@through_transforms(leaves_of_tree, tree_of_leaves, lambda arguments: is_backprop(arguments["gradient"]))
def scan(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    *,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    tiers: Sequence[Kind] | None = None,
    schedule: Schedule | None = None,
    journal: str | Path | Journal | None = None,
    gradient: str | Gradient = "discrete",
    progress: bool | Progress = False,
    check: bool = False,
) -> tuple[Any, Any]:
    """Run ``carry, output = step(carry, x, *args)`` over the leading dimension of ``inputs``.

    Returns the last carry and the outputs, stacked along a new leading dimension (None if step returns None for them).
    Gradients reach the first carry, the inputs, ``args`` and every tensor that ``step`` holds, with at most ``slots``
    carries kept (or what fits ``budget`` or ``tiers``, as in :func:`adjoint.solve`); the gradient does not depend on which.

    Args:
        carry: a tree of tensors whose structure, shapes and dtypes step preserves.
        inputs: a tree of tensors, each of shape (steps, ...).
        check: compute every step twice and compare bits, as in :func:`adjoint.solve`.
    """
    structure, state = Structure.of(carry, "carry")
    input_structure, series = Structure.of(inputs, "inputs")
    check_dense(state, "carry")
    check_dense(series, "inputs")
    length = _length(series)
    if not isinstance(args, tuple):
        raise TypeError(f"args={args!r} must be a tuple; for a single argument write args=(x,)")
    check_memory(slots, budget, tiers, schedule)
    memory: dict[str, Any] = {
        "slots": slots,
        "budget": budget,
        "tiers": tiers,
        "schedule": schedule,
        "journal": journal,
        "check": check,
    }
    program = ScanProgram(structure, input_structure, series, length)
    with progress_ticker(progress, length) as tick:
        problem = Problem(program, (step, args), state, length, **memory, wants_final=True, tick=tick)
        outcome = gradient_named(gradient)(problem)
    assert outcome.final is not None
    return structure.unflatten(outcome.final), program.unflatten(tuple(outcome.outputs))


def _length(series: State) -> int:
    for x in series:
        if x.ndim == 0:
            raise ValueError("inputs holds a 0-dim tensor; each needs a leading dimension of steps")
    lengths = {len(x) for x in series}
    if len(lengths) > 1:
        raise ValueError(f"inputs have the lengths {sorted(lengths)}; every leaf needs the same number of steps")
    (length,) = lengths
    if length == 0:
        raise ValueError("inputs have length 0; give at least one step")
    return length
