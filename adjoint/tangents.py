"""The derivative of a chain that has been run, along directions, and the derivative of its reverse sweep along one.

With steps x_{k+1} = Phi_k(x_k, p) and directions (v, w) in (x_0, p):

    v_{k+1} = A_k v_k + B_k w,                                A_k, B_k: derivatives of Phi_k in x and p
    lam_k = A_k^T lam_{k+1},   mu += B_k^T lam_{k+1}          the reverse sweep
    its derivative: that of (A_k^T lam, B_k^T lam) along (v_k, w) with lam held, and A_k^T lam', B_k^T lam'

Both go through the graph of one recorded step: J v is the derivative of J^T u in u, which is linear in it. So a step
needs no forward-mode rule, only to be differentiable twice. Source: Griewank & Walther (2008), Evaluating Derivatives,
sections 3.2 and 5.1 (second-order adjoints); the twofold transpose is folklore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adjoint.ambient import Ambient
from adjoint.autograd import AutogradStepper, Cotangent, Index, Recorded, Step
from adjoint.tensors import State, differentiable
from adjoint.tiers import Store
from revolve import Run, Schedule

Directions = Sequence[Tensor | None]
"""For each tensor a direction, or several along a new leading dimension; None is zero."""


def pushed(roots: Sequence[Tensor], points: Sequence[Tensor], directions: Directions, batch: Batch) -> list[Tensor]:
    """J v for each root: the derivatives of ``roots`` at ``points`` along directions, (directions, *root.shape)."""
    moved: list[Tensor] = [x.new_zeros((batch.size, *x.shape)) for x in roots]
    live = [i for i, x in enumerate(roots) if x.requires_grad]
    if not live:
        return moved
    seeds = [torch.zeros_like(roots[i]).requires_grad_() for i in live]
    transposed = _transposed([roots[i] for i in live], points, seeds, batch.label)
    pairs = [
        (g, v)
        for g, v in zip(transposed, directions, strict=True)
        if g is not None and g.requires_grad and v is not None
    ]
    if pairs:
        found = batch.transpose([g for g, _ in pairs], seeds, [v for _, v in pairs])
        for i, x in zip(live, found, strict=True):
            if x is not None:
                moved[i] = x
    return moved


def _transposed(roots: Sequence[Tensor], points: Sequence[Tensor], seeds: Sequence[Tensor], label: str) -> Cotangent:
    """The transpose of a step as a graph of its own, which can be differentiated again."""
    with torch.enable_grad():
        found: Cotangent = [*torch.autograd.grad(roots, points, seeds, create_graph=True, allow_unused=True)]
    _refuse_once(found, label)
    return found


def _refuse_once(transposed: Cotangent, label: str) -> None:
    """Raise if a backward in this graph is differentiable once only: torch would leave its part out without a word."""
    stack = [x.grad_fn for x in transposed if x is not None and x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                f"{label} uses an operation that is differentiable once only (a custom autograd.Function, it may be, with "
                f"once_differentiable); second derivatives and gradient='tangent' differentiate it twice"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


class Batch:
    """So many directions: transposed at once where torch can do that, and comes to the same; one by one elsewhere."""

    def __init__(self, size: int, label: str) -> None:
        self.size, self.label = size, label
        self._at_once = size > 1
        self._compared = False

    def transpose(self, roots: list[Tensor], seeds: list[Tensor], directions: list[Tensor]) -> list[Tensor | None]:
        """For linear ``roots`` of ``seeds``: the transpose of each direction, None where nothing depends on a seed."""
        if self._at_once:
            try:
                at_once = torch.autograd.grad(
                    roots, seeds, directions, retain_graph=True, is_grads_batched=True, allow_unused=True
                )
            except RuntimeError:  # a custom backward, say, that is not made for it
                self._at_once = False
            else:
                if not self._compared:
                    self._compared = True
                    self._at_once = all(map(_alike, at_once, self._in_turn(roots, seeds, directions)))
                if self._at_once:
                    return list(at_once)
        return self._in_turn(roots, seeds, directions)

    def _in_turn(self, roots: list[Tensor], seeds: list[Tensor], directions: list[Tensor]) -> list[Tensor | None]:
        rows = [
            torch.autograd.grad(roots, seeds, [v[i] for v in directions], retain_graph=True, allow_unused=True)
            for i in range(self.size)
        ]
        return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    scale = torch.nan_to_num(b.abs()).max() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=float(torch.finfo(b.dtype).eps ** 0.5 * scale), equal_nan=True)


class _Tape(NamedTuple):
    leaves: State
    tangents: State
    step: Step
    k: int


class TangentStepper:
    """A ``revolve.Stepper`` over pairs of a state and its tangents, which have a leading dimension of directions."""

    def __init__(self, stepper: AutogradStepper, state: State, of_parameters: Directions, batch: Batch) -> None:
        self.stepper, self.program, self.captured = stepper, stepper.program, stepper.captured
        self.leaves = len(state)
        self.batch = batch
        self.of_parameters = of_parameters
        self.frontier = 0
        self.outputs: list[Tensor] = []
        """Tangents of the outputs, by leaf: (directions, outputs, ...)."""
        self.cotangents: Cotangent = []
        self.sums: list[Tensor | None] = [None] * len(self.captured.leaves)
        self.second: list[Tensor | None] = [None] * len(self.captured.leaves)

    def last(self, step: int) -> bool:
        raise AssertionError("the number of steps is known")

    def advance(self, state: State, start: int, stop: int) -> State:
        for k in range(start, stop):
            state = self._record(state, k)[0]
        self.stepper.plain_runs += stop - start
        return state

    def record(self, state: State, start: int, stop: int) -> tuple[State, list[_Tape]]:
        tapes = []
        for k in range(start, stop):
            state, tape = self._record(state, k)
            tapes.append(tape)
        self.stepper.recorded_runs += stop - start
        return state, tapes

    def _record(self, state: State, k: int) -> tuple[State, _Tape]:
        program, first = self.program, k >= self.frontier
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() if differentiable(x) else x for x in state[: self.leaves])
            step = self.stepper.recorded_step(k, leaves)
        tangents = state[self.leaves :]
        ends = [
            *step.state,
            *(x for _, values in step.outputs for x in values),
        ]  # of a rerun too: the same order of sums
        own = [(x, v) for x, v in zip(leaves, tangents, strict=True) if x.requires_grad]
        points = [*(x for x, _ in own), *step.inputs, *self.captured.leaves]
        along = [*(v for _, v in own), *program.tangents(k, len(step.inputs)), *self.of_parameters]
        moved = pushed(ends, points, along, self.batch)
        if first:
            self.stepper.check_leaves(Recorded(leaves, [step], True), k)
            self._emit(step, moved[self.leaves :])
            self.frontier = k + 1
        new = tuple(x.detach().contiguous() for x in step.state)
        self.stepper.marks.compare(k + 1, new)
        pair = (*new, *(v.contiguous() for v in moved[: self.leaves]))
        return _apart(pair, state), _Tape(leaves, tangents, step, k)

    def put(self, index: Index, tangents: Sequence[Tensor]) -> None:
        if not self.outputs:
            count = self.program.outputs
            self.outputs = [v.new_zeros((self.batch.size, count, *v.shape[1:])) for v in tangents]
        for buffer, v in zip(self.outputs, tangents, strict=True):
            place: Any = (slice(None), *index) if isinstance(index, tuple) else (slice(None), index)
            buffer[place] = v

    def _emit(self, step: Step, tangents: list[Tensor]) -> None:
        given = iter(tangents)
        for index, values in step.outputs:
            self.put(index, [next(given) for _ in values])

    def reverse(self, tape: list[_Tape], cotangent: tuple[Cotangent, Cotangent]) -> tuple[Cotangent, Cotangent]:
        while tape:
            cotangent = self._transpose(tape.pop(), *cotangent)
        return cotangent

    def _transpose(self, tape: _Tape, lam: Cotangent, dot: Cotangent) -> tuple[Cotangent, Cotangent]:
        """One step of the reverse sweep, and its derivative along the (single) direction."""
        leaves, step = tape.leaves, tape.step
        roots, seeds, dots = self._ends(step, lam, dot)
        if not roots:
            return [None] * len(leaves), [None] * len(leaves)
        seeds = [x.detach().requires_grad_() for x in seeds]  # so that what is differentiable only once says so
        own = [(x, v) for x, v in zip(leaves, tape.tangents, strict=True) if x.requires_grad]
        points = [*(x for x, _ in own), *step.inputs, *self.captured.leaves]
        along = [*(v for _, v in own), *self.program.tangents(tape.k, len(step.inputs)), *self.of_parameters]
        first = _transposed(roots, points, seeds, self.program.label)
        pairs = [(g, v[0]) for g, v in zip(first, along, strict=True) if g is not None and v is not None]
        pairs += [(x, v) for x, v in zip(roots, dots, strict=True) if v is not None]
        second: Sequence[Tensor | None] = [None] * len(points)
        if pairs:
            ends, weights = zip(*pairs, strict=True)
            second = torch.autograd.grad(ends, points, weights, allow_unused=True)
        state_end, inputs_end = len(own), len(own) + len(step.inputs)
        if step.inputs:
            self.program.receive(tape.k, second[state_end:inputs_end])
        self.sums = [None if x is None else x.detach() for x in first[inputs_end:]]
        self.second = list(second[inputs_end:])
        pair = zip(first[:state_end], second[:state_end], strict=True)
        found = [next(pair) if x.requires_grad else (None, None) for x in leaves]
        return [None if x is None else x.detach() for x, _ in found], [x for _, x in found]

    def _ends(self, step: Step, lam: Cotangent, dot: Cotangent) -> tuple[list[Tensor], list[Tensor], Cotangent]:
        """Where a step's transpose begins: tensors, their cotangents, and the derivatives of these."""
        triples = list(zip(step.state, lam, dot, strict=True))
        for index, values in step.outputs:
            triples += [
                (x, None if c is None else c[index], None) for x, c in zip(values, self.cotangents, strict=True)
            ]
        ends = [(x, c, d) for x, c, d in triples if x.requires_grad and (c is not None or d is not None)]
        if ends:
            sums = zip(self.captured.leaves, self.sums, self.second, strict=True)
            ends += [(x, c, d) for x, c, d in sums if c is not None or d is not None]
        seeds = [torch.zeros_like(x) if c is None else c for x, c, _ in ends]
        return [x for x, _, _ in ends], seeds, [d for _, _, d in ends]


def _apart(new: State, old: State) -> State:
    """The new state in memory of its own, should a step hand on what it was given."""
    held = {x.untyped_storage()._cdata for x in old}
    return tuple(x.clone() if x.untyped_storage()._cdata in held else x for x in new)


class Second(NamedTuple):
    """What :meth:`Linearisation.second` finds; None where it was not wanted."""

    inputs: list[Tensor | None]
    """The derivative of the cotangents of (x_0, the program's inputs, the captured tensors)."""
    outputs: list[Tensor]
    state: State
    """The derivatives of the outputs and of the last state."""


@dataclass
class Linearisation:
    """A chain that has been run, as a linear map and its derivative; it runs again within a schedule of its own."""

    stepper: AutogradStepper
    state: State
    """x_0."""
    memories: Callable[[State], tuple[Schedule, Mapping[int, Store]]]
    """A plan, and stores, for pairs like this one of a state and its tangents."""
    ambient: Ambient

    def push(self, directions: Directions, count: int) -> tuple[list[Tensor], State]:
        """Derivatives of the outputs and the last state along directions in (x_0, the inputs, the captured tensors)."""
        stepper, start = self._begin(directions, count)
        with self.ambient.entered():
            end = stepper.advance(start, 0, self.stepper.frontier)
        return stepper.outputs, end[len(self.state) :]

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        """The derivative along one direction of the cotangents that belong to these, and of the results themselves."""
        stepper, start = self._begin([None if v is None else v[None] for v in directions], 1)
        program, steps = self.stepper.program, self.stepper.frontier
        schedule, stores = self.memories(start)
        run = Run[Any, Any, Any](schedule, stepper, stores, given=True)
        stepper.cotangents = of_outputs
        program.begin_reverse()
        none: Cotangent = [None] * len(self.state)
        with self.ambient.entered():
            end = run.forward(start, steps)
            _, dots = run.backward((of_state or none, none))
        inputs = [*dots, *program.input_cotangents(), *stepper.second]
        return Second(inputs, [x[0] for x in stepper.outputs], tuple(x[0] for x in end[len(self.state) :]))

    def _begin(self, directions: Directions, count: int) -> tuple[TangentStepper, State]:
        program, size = self.stepper.program, len(self.state)
        inputs_end = size + len(program.inputs)
        program.begin_tangents(directions[size:inputs_end])
        self.stepper.arrivals = self.stepper.captured.arrivals()
        stepper = TangentStepper(self.stepper, self.state, directions[inputs_end:], Batch(count, program.label))
        first = tuple(
            (x.new_zeros((count, *x.shape)) if v is None else v).contiguous()
            for x, v in zip(self.state, directions, strict=False)
        )
        if program.initial is not None:
            stepper.put(program.initial, first)
        return stepper, (*self.state, *first)
