"""The stepper that autograd transposes.

A door (solve, scan) brings a Program: its step as a pure function of tensors. Everything else is here: aliases of
what the step captures, outputs emitted once, cotangents taken in, sums of parameter gradients, and the checks without
which a gradient could be silently wrong.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils.weak import WeakIdKeyDictionary

from adjoint.captured import Captured
from adjoint.draws import Drawing, refuse_draws
from adjoint.kept import heard, refuse_used_again
from adjoint.layout import apart, linked, settled
from adjoint.marks import Marks
from adjoint.tensors import State, differentiable
from adjoint.touched import Touched, leaves_behind, refuse, refuse_kept

Cotangent = list[Tensor | None]
Index = int | tuple[Tensor, ...]
"""Where in the outputs: one place, or several (what may stand in the brackets of a tensor)."""


class Step(NamedTuple):
    """What one step gives."""

    state: State
    outputs: tuple[tuple[Index, State], ...] = ()
    """(index, leaves): values that the caller sees at this index."""
    inputs: tuple[Tensor, ...] = ()
    """Leaves made for this step alone, whose cotangents go to ``Program.receive``."""


class Program(Protocol):
    """The steps of one door."""

    label: str
    evaluations: int
    """Calls of the caller's function so far."""
    initial: int | None
    """The index at which x_0 itself is an output, if it is one."""
    series: State
    """Tensors without grad of which each step is handed a part."""

    @property
    def outputs(self) -> int:
        """How many output indices there are, by now."""
        ...

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The caller's tensors (times, inputs of a recurrence) of which each step uses a part."""
        ...

    @property
    def rejected(self) -> int:
        """Steps tried and not accepted."""
        ...

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        """Step k. ``function`` is the caller's, rebound; with ``recording`` its graph is kept.

        Without ``outputs`` nobody will look at them: a step that is run again may leave them out.
        """
        ...

    @property
    def done(self) -> bool:
        """Whether the end has been reached; asked only when the number of steps is unknown."""
        ...

    def begin(self, function: Any, state: State) -> None:
        """Look at the caller's function once, with the caller's first state, before any step is taken."""
        ...

    def sample(self) -> Program:
        """A program whose step 0 is like this one's, and known: to try things out on."""
        ...

    def on_graph(self) -> Program:
        """The same steps with ``inputs`` themselves in place of per-step leaves, for torch's own graph."""
        ...

    def begin_reverse(self) -> None: ...

    def receive(self, k: int, cotangents: Sequence[Tensor | None]) -> None: ...

    def input_cotangents(self) -> Sequence[Tensor | None]: ...

    def begin_tangents(self, directions: Sequence[Tensor | None]) -> None:
        """Directions in ``inputs``, several along a leading dimension of each."""
        ...

    def tangents(self, k: int, leaves: int) -> Sequence[Tensor | None]:
        """The directions in the leaves (so many) that step k makes of ``inputs``."""
        ...


class Outputs:
    """Values at the caller's indices, one buffer per leaf, allocated when the first value arrives."""

    def __init__(self, count: int, label: str) -> None:
        self.count, self.label = count, label
        self.buffers: list[Tensor] = []

    def put(self, index: Index, leaves: State) -> None:
        if not self.buffers:
            self.buffers = [x.new_empty((self.count, *x.shape), requires_grad=False) for x in leaves]
        elif not isinstance(index, tuple) and index >= self.count:  # outputs at every step, and nobody knows how many
            self.count *= 2
            self.buffers = [torch.cat((x, torch.empty_like(x))) for x in self.buffers]
        for buffer, x in zip(self.buffers, leaves, strict=True):
            if isinstance(index, tuple):
                buffer[index] = x.detach()
                continue
            if buffer.shape[1:] != x.shape or buffer.dtype != x.dtype:
                raise ValueError(
                    f"{self.label}: output {index} has shape {tuple(x.shape)} and {x.dtype}, "
                    f"earlier ones {tuple(buffer.shape[1:])} and {buffer.dtype}"
                )
            buffer[index].copy_(x.detach())

    def finished(self, count: int) -> list[Tensor]:
        """The values at the first ``count`` indices, handed over."""
        values, self.buffers = [x if len(x) == count else x[:count].clone() for x in self.buffers], []
        return values


BLOCK = 32
"""So many steps at most are recorded as one graph, and transposed by one call of torch's engine."""


class Recorded(NamedTuple):
    """Steps in a row on one graph, cut before the first.

    Between two steps stands a node that hands on the sum of all that reaches it, and torch's engine takes nodes in the
    reverse order of their making: a block adds in the same order, to the same bits, as its steps one by one.
    """

    leaves: State
    steps: list[Step]
    fresh: bool
    """Whether these steps were never run plainly, so that nothing is known yet about what they use."""


class TooManyTapes(Exception):
    """Recording reached its limit. ``states``: x_0 up to this one, which no tape holds."""

    def __init__(self, states: list[State]) -> None:
        super().__init__()
        self.states = states


class AutogradStepper:
    """A ``revolve.Stepper`` over states of torch tensors; each recorded step is one graph, and one sum a step."""

    def __init__(self, program: Program, captured: Captured) -> None:
        self.program, self.captured = program, captured
        self.outputs = Outputs(program.outputs, program.label)
        self.marks = Marks(program.label)
        self.frontier = 0
        """Steps below it have been run: their outputs are not written again, their captures are known."""
        self.plain_runs = self.recorded_runs = 0
        self.linearisations = 0
        """Calls of the caller's function for the transposes alone, beside those of the runs."""
        self.most_tapes: int | None = None
        """So many steps may be recorded while the end is not known."""
        self.begun: list[State] = []
        """Where these steps began; their tapes hold the same memory."""
        self.tick: Callable[[int], None] | None = None
        self.block = BLOCK
        self.reversing: Callable[[int, State, Cotangent, Cotangent], None] | None = None
        """Called before each transpose, in blocks of one step."""
        self.listening = True
        """Whether recorded steps are listened to at all; the probe watches them by other means."""
        self.all_heard = False
        """Whether every recorded step is listened to."""
        self.tracking = torch.is_grad_enabled()
        """Whether anybody will want a gradient; if not, nothing is checked."""
        self.cotangents: Cotangent = []
        self.sums: Cotangent = []
        self.reversed = 0
        """Steps from here on have been reversed."""
        self.arrivals: dict[int, Tensor] = {}
        self.cuts = WeakIdKeyDictionary()
        """The leaves at which recorded graphs begin, as long as somebody holds them."""

    def start(self, state: State) -> None:
        if self.program.initial is not None:
            self.outputs.put(self.program.initial, state)

    def last(self, step: int) -> bool:
        return self.program.done

    def advance(self, state: State, start: int, stop: int) -> State:
        if not self.captured.alike and self.tracking:
            return self._advance_with_grad(state, start, stop)
        entry = state
        with torch.set_grad_enabled(self.tracking):
            for k in range(start, stop):
                first = k >= self.frontier
                step = self.program.step(self.captured.plain, k, state, False, first)
                if first:
                    if self.tracking and any(x.requires_grad for x in _results(step)):
                        self._name_the_missing(k, state)
                    self._first_time(k, step)
                state = settled(step.state)
                if first and self.tracking:
                    self.marks.note(k + 1, state)
                    if step.outputs:
                        self.marks.note_shown(k + 1, _shown(step))
        self.plain_runs += stop - start
        return apart(state, entry)

    def _advance_with_grad(self, state: State, start: int, stop: int) -> State:
        """Plain runs with the very operations of recorded ones; each graph is dropped at once."""
        limit, self.most_tapes = self.most_tapes, None
        for k in range(start, stop):
            state, _ = self.record(state, k, k + 1)
        self.most_tapes = limit
        self.recorded_runs -= stop - start
        self.plain_runs += stop - start
        return state

    def record(self, state: State, start: int, stop: int) -> tuple[State, list[Recorded]]:
        entry = state
        tape: list[Recorded] = []
        leaves: State | None = None
        with torch.enable_grad():
            for k in range(start, stop):
                if self.most_tapes is not None:
                    self.begun.append(state)
                    if k >= self.most_tapes:
                        raise TooManyTapes(self.begun)
                first = k >= self.frontier
                if leaves is None or len(tape[-1].steps) == self.block or tape[-1].fresh != first:
                    leaves = tuple(x.detach().requires_grad_() if differentiable(x) else x for x in state)
                    tape.append(Recorded(leaves, [], first))
                    if first:
                        self.cuts.update((x, True) for x in leaves if x.requires_grad)
                step = self.recorded_step(k, leaves)
                if first:
                    self._first_time(k, step)
                tape[-1].steps.append(step)
                state = settled(step.state)
                (self.marks.note if first else self.marks.compare)(k + 1, state)
                if step.outputs:
                    (self.marks.note_shown if first else self.marks.compare_shown)(k + 1, _shown(step))
                leaves = linked(step.state) if k + 1 < stop else None
        self.recorded_runs += stop - start
        return apart(state, entry), tape

    def recorded_step(self, k: int, leaves: State) -> Step:
        """One recorded run. After plain runs some are listened to, and all if tensors were put where f looks.

        A plain run keeps no graph, so that what it leaves for a later call has no gradient any more.
        """
        if self.captured.suspected:
            with Drawing() as drawing:
                step = self._recorded_step(k, leaves)
            if drawing.drew:
                refuse_draws(self.program.label)
            return step
        return self._recorded_step(k, leaves)

    def _recorded_step(self, k: int, leaves: State) -> Step:
        sampled = self.plain_runs and self.tracking and (heard(k) or k + 1 >= self.frontier)
        if not self.listening or not (sampled or self.arrivals or self.all_heard):
            return _outputs_apart(self.program.step(self.captured.recorded, k, leaves, True))
        listener = self.captured.listener(*self.program.series)
        return _outputs_apart(
            listener.run(lambda function: self.program.step(function, k, leaves, True), f"in step {k}")
        )

    def reverse(self, tape: list[Recorded], cotangent: Cotangent) -> Cotangent:
        while tape:
            block = tape.pop()
            try:
                with _uncollected() if block.fresh else nullcontext():
                    cotangent = self._transpose(block, cotangent)
                    del block
            except RuntimeError as error:
                refuse_used_again(error, self.program.label, self.reversed)
                raise
        return cotangent

    def begin_reverse(self, cotangents: Cotangent) -> None:
        """Take the cotangents of the outputs, and forget the sums of an earlier reverse sweep."""
        self.arrivals = self.captured.arrivals()
        self.cotangents = cotangents
        self.sums = [None] * len(self.captured.leaves)
        self.reversed = self.frontier
        self.program.begin_reverse()

    def _transpose(self, block: Recorded, cotangent: Cotangent) -> Cotangent:
        """One vector-Jacobian product; the running sums are seeded, so that each use adds to them in turn."""
        leaves, steps, fresh = block
        self.reversed -= len(steps)
        if fresh and self.tracking:
            self.check_leaves(block, self.reversed)
        if self.reversing is not None:
            self.reversing(self.reversed, steps[-1].state, cotangent, self.sums)
        roots: list[Tensor] = []
        seeds: list[Tensor] = []
        parameters = self.captured.leaves
        for leaf, total in zip(parameters, self.sums, strict=True):
            if total is not None:
                roots.append(leaf)
                seeds.append(total)
        sums = len(roots)
        for x, seed in zip(reversed(steps[-1].state), reversed(cotangent), strict=True):  # as the nodes between steps
            if seed is not None and x.requires_grad:
                roots.append(x)
                seeds.append(seed)
        inputs: list[Tensor] = []
        for step in reversed(steps):
            inputs += step.inputs
            for index, values in step.outputs:
                for x, all_seeds in zip(values, self.cotangents, strict=True):
                    if all_seeds is not None and x.requires_grad:
                        roots.append(x)
                        seeds.append(all_seeds[index])
        if len(roots) == sums:
            return [None] * len(leaves)
        own = [x for x in leaves if x.requires_grad]
        gradients = iter(_pulled_back(roots, (*own, *inputs, *parameters), seeds))
        result = [next(gradients) if x.requires_grad else None for x in leaves]
        for k, step in zip(count(self.reversed + len(steps) - 1, -1), reversed(steps), strict=False):
            if step.inputs:
                self.program.receive(k, list(islice(gradients, len(step.inputs))))
        self.sums = list(gradients)
        return result

    def _first_time(self, k: int, step: Step) -> None:
        """Emit the outputs of a step that runs for the first time."""
        for index, values in step.outputs:
            self.outputs.put(index, values)
        self.frontier = k + 1
        if self.tick is not None:
            self.tick(k + 1)

    def check_leaves(self, block: Recorded, start: int) -> None:
        """Follow the graph of steps that were never run plainly to its leaves, to make sure that nothing was missed."""
        leaves, steps, _ = block
        known = {id(x) for x in (*leaves, *self.captured.leaves, *(x for step in steps for x in step.inputs))}
        found = leaves_behind([x for step in steps for x in _results(step)])
        unknown = [x for key, x in found.items() if key not in known]
        for x in unknown:
            if x in self.cuts:  # the state of an earlier step
                refuse_kept(x, self.program.label)
        if unknown:
            states = [leaves, *(step.state for step in steps)]
            for k, state in enumerate(states[:-1], start):
                with torch.no_grad():
                    self._name_the_missing(k, tuple(x.detach().contiguous() for x in state))

    def _name_the_missing(self, k: int, state: State) -> None:
        """Something unknown requires grad: run the step again and watch. Leaves that the step makes itself are fine."""
        with torch.enable_grad(), Touched([*state, *self.captured.without, *self.captured.constants]) as touched:
            step = self.program.step(self.captured.plain, k, state, False)
        missing = [x for x in leaves_behind(_results(step)).values() if x not in touched.inside]
        if missing:
            refuse(missing, self.program.label)


def _pulled_back(roots: list[Tensor], inputs: State, seeds: list[Tensor]) -> Sequence[Tensor | None]:
    """One vector-Jacobian product: what torch.autograd.grad comes to once it has looked at its arguments.

    That look takes as long as two operations of torch. A mode for torch functions is to see the call itself.
    """
    if torch._C._len_torch_function_stack():
        return torch.autograd.grad(roots, inputs, seeds, allow_unused=True)
    return _engine_run_backward(tuple(roots), tuple(seeds), False, False, inputs, True, accumulate_grad=False)


def _shown(step: Step) -> list[Tensor]:
    return [x for _, values in step.outputs for x in values]


def _results(step: Step) -> list[Tensor]:
    return [*step.state, *_shown(step)]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: following a graph makes an object a node, which all go with the graph; they would set
    off one collection after the other, and some of those look at everything that torch ever imported."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _outputs_apart(step: Step) -> Step:
    """Outputs that are the new state itself, or leaves, get a node of their own: their cotangents are added in turn."""
    if not step.outputs:
        return step
    own = {id(x) for x in step.state if x.requires_grad}
    outputs = tuple(
        (i, tuple([x.view_as(x) if x.requires_grad and (x.is_leaf or id(x) in own) else x for x in xs]))
        for i, xs in step.outputs
    )
    return step._replace(outputs=outputs)
