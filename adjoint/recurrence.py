"""One step of a scan as a pure function: a row of the inputs, or a chunk of rows, and what a row may be left out of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.tensors import State, Structure, added, refuse_writing, versions_of


@dataclass(frozen=True)
class Layout:
    """How a sequence is cut into steps of the schedule."""

    length: int
    chunk: int | None = None
    """So many rows make one step of the schedule; None: one, handed on without the dimension of time."""
    parallel: bool = False
    """Whether the caller's function takes a chunk at once."""
    batch_first: bool = False
    """Whether the caller's chunks are (batch, time, ...)."""
    window: int | None = None
    """The carry is cut from its past before every row that is a multiple of this."""
    mask: Tensor | None = None
    """(time, batch): the rows that there are."""
    generators: tuple[torch.Generator, ...] = ()
    """Whose states are a part of the carry."""

    @property
    def steps(self) -> int:
        return -(-self.length // (self.chunk or 1))

    def rows(self, step: int) -> range:
        size = self.chunk or 1
        return range(step * size, min((step + 1) * size, self.length))


class ScanProgram:
    """The steps carry, output = step(carry, x[k], *args) of a recurrence, one by one or in chunks."""

    label = "step"
    initial: int | None = None
    rejected = 0

    def __init__(self, carry: Structure, inputs: Structure, first: State, series: State, layout: Layout) -> None:
        self._carry, self._inputs, self._layout = carry, inputs, layout
        self.outputs = layout.steps
        self.evaluations = 0
        self._output: list[Structure] = []  # found by the first step, and shared with copies of the program
        self._series = series
        self.series = tuple(x.detach() for x in series)
        self._fill: State = ()
        self._rest: State = ()
        if layout.mask is not None:
            members = _stand_ins(layout.mask)
            self._fill = tuple(_first_there(x, layout.mask, members) for x in self.series)
            self._rest = tuple(c.detach()[members] for c in first)
        self._wanted = [i for i, x in enumerate(series) if x.requires_grad]
        self.inputs = tuple(series[i] for i in self._wanted)
        self._slices: list[Sequence[Tensor]] | None = None
        self._cotangents: list[Tensor] = []

    @property
    def done(self) -> bool:
        return True

    def begin(self, function: Any, state: State) -> None:
        """Nothing has to be known."""

    def sample(self) -> ScanProgram:
        return copy.copy(self)

    def on_graph(self) -> ScanProgram:
        """Slices by one call: x[k] in a loop would write a full-size gradient every step."""
        other, chunk = copy.copy(self), self._layout.chunk
        other._slices = [x.unbind(0) if chunk is None else x.split(chunk) for x in self._series]
        return other

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        layout = self._layout
        leaves: State = ()
        if self._slices is not None:
            x = tuple(slices[k] for slices in self._slices)
        else:
            rows = layout.rows(k)
            x = tuple(s[k] if layout.chunk is None else s[rows.start : rows.stop] for s in self.series)
            if recording:
                leaves = tuple(x[i].requires_grad_() for i in self._wanted)
        own = len(state) - len(layout.generators)
        with Drawing(layout.generators, state[own:]) as drawing:
            run = self._row if layout.chunk is None else self._whole if layout.parallel else self._rows
            carry, found = run(function, k, state[:own], x)
        return Step((*carry, *drawing.left), () if found is None else ((k, found),), leaves)

    def _row(self, function: Any, k: int, carry: State, x: State) -> tuple[State, State | None]:
        """Row k."""
        layout = self._layout
        if layout.window is not None and k and k % layout.window == 0:
            carry = tuple(c.detach() for c in carry)
        if layout.mask is None:
            return self._called(function, k, carry, x)
        there = layout.mask[k]
        tried = _chosen(there, carry, self._rest)
        new, output = self._called(function, k, tried, _chosen(there, x, self._fill))
        nothing = [torch.zeros_like(y) for y in output or ()]
        return _chosen(there, new, carry), None if output is None else _chosen(there, output, nothing)

    def _rows(self, function: Any, step: int, carry: State, x: State) -> tuple[State, State | None]:
        """The rows of a chunk, one by one."""
        outputs = []
        for k, row in zip(self._layout.rows(step), zip(*(s.unbind(0) for s in x), strict=True), strict=True):
            carry, output = self._row(function, k, carry, row)
            outputs.append(output)
        if outputs[0] is None:
            return carry, None
        return carry, self._filled(tuple(torch.stack(column) for column in zip(*outputs, strict=True)))

    def _whole(self, function: Any, step: int, carry: State, x: State) -> tuple[State, State | None]:
        """A chunk at once."""
        layout, rows = self._layout, self._layout.rows(step)
        if layout.window is not None and rows.start and rows.start % layout.window == 0:
            carry = tuple(c.detach() for c in carry)
        if layout.batch_first:
            x = tuple(s.transpose(0, 1) for s in x)
        carry, output = self._called(function, rows.start, carry, x)
        if output is None:
            return carry, None
        for y in output:
            if y.ndim <= layout.batch_first or y.shape[int(layout.batch_first)] != len(rows):
                raise ValueError(
                    f"step {step} was handed {len(rows)} rows and returned an output of shape {tuple(y.shape)}; with "
                    f"parallel=True it returns as many, {'(batch, rows, ...)' if layout.batch_first else '(rows, ...)'}"
                )
        return carry, self._filled(tuple(y.transpose(0, 1) if layout.batch_first else y for y in output))

    def _filled(self, outputs: State) -> State:
        """Outputs of the last chunk, with rows of zeros up to the length of the others."""
        missing = (self._layout.chunk or 1) - len(outputs[0])
        return tuple(torch.cat((y, y.new_zeros((missing, *y.shape[1:])))) for y in outputs) if missing else outputs

    def _called(self, function: Any, k: int, state: State, x: Sequence[Tensor]) -> tuple[State, State | None]:
        """The caller's function, and a look at what it returned."""
        f, args = function
        self.evaluations += 1
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
        return carry, self._looked_at(k, result[1])

    def _looked_at(self, k: int, output: Any) -> State | None:
        if (output is None) != (self._output == []) and k > 0:
            raise TypeError(f"step {k} returned {'no' if output is None else 'an'} output; every step must, or none")
        if output is None:
            return None
        if not self._output:
            self._output.append(Structure.of(output, "the output of step")[0])
        return self._output[0].flatten(output, "the output of step")

    def unflatten(self, outputs: State) -> Any:
        """The tree of outputs, time and batch as the caller has them; None if steps return none."""
        if not self._output:
            return None
        layout = self._layout
        if layout.chunk is not None:
            outputs = tuple(y.flatten(0, 1) for y in outputs)
            if layout.length % layout.chunk:
                outputs = tuple(y[: layout.length] for y in outputs)
        return self._output[0].unflatten([y.transpose(0, 1) for y in outputs] if layout.batch_first else outputs)

    def begin_reverse(self) -> None:
        self._cotangents = [torch.zeros_like(x) for x in self.inputs]

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None:
        single = self._layout.chunk is None
        for i, g in enumerate(cotangents):
            if g is not None:
                start = self._layout.rows(k).start
                self._cotangents[i] = added(self._cotangents[i], start, g[None] if single else g)

    def input_cotangents(self) -> Sequence[Tensor | None]:
        cotangents, self._cotangents = self._cotangents, []
        return cotangents

    def identity(self) -> Any:
        """What decides the steps, beside the function and the first carry."""
        layout = self._layout
        cut = layout.length, layout.chunk, layout.parallel, layout.window
        return "scan", cut, self.series, layout.mask

    def snapshot(self) -> Any:
        """What has been added up so far."""
        return self._cotangents

    def restore(self, snapshot: Any) -> None:
        self._cotangents = snapshot

    def begin_tangents(self, directions: Sequence[Tensor | None]) -> None:
        self._directions = directions

    def tangents(self, k: int, leaves: int) -> Sequence[Tensor | None]:
        rows = self._layout.rows(k)
        where: Any = k if self._layout.chunk is None else slice(rows.start, rows.stop)
        return [None if v is None else v[:, where] for v in self._directions]


class Drawing:
    """Puts generators into the states of the carry, and takes out what is ``left`` of them; the ambient ones stay."""

    def __init__(self, generators: Sequence[torch.Generator], states: State) -> None:
        self._generators, self._states = generators, states
        self._ambient: list[Tensor] = []
        self.left: State = ()

    def __enter__(self) -> Drawing:
        if self._generators:
            self._ambient = [g.get_state() for g in self._generators]
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)
        return self

    def __exit__(self, *_: object) -> None:
        self.left = tuple(g.get_state() for g in self._generators)
        for generator, state in zip(self._generators, self._ambient, strict=True):
            generator.set_state(state)


def _chosen(there: Tensor, these: Sequence[Tensor], those: Sequence[Tensor]) -> State:
    """Of each member of a batch the first if it is there, else the second."""
    pairs = zip(these, those, strict=True)
    return tuple(torch.where(there.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs)


def _stand_ins(mask: Tensor) -> Tensor:
    """Of each member whose first row, and the carry before it, are tried where it has none: a pair that really occurs.
    Its own, or those of one who has any: a step need not be finite at what fills a gap, at zero, or past the end."""
    own, has = torch.arange(mask.shape[1], device=mask.device), mask.any(0)
    return torch.where(has, own, has.to(torch.uint8).argmax()) if len(own) else own


def _first_there(x: Tensor, mask: Tensor, members: Tensor) -> Tensor:
    """The first input of each of these members; zero if nobody has one."""
    first = (mask.cumsum(0) == 0).sum(0).clamp(max=len(x) - 1)
    found = x[first[members], members]
    return _chosen(mask.any(0)[members], (found,), (torch.zeros_like(found),))[0]
