"""Step 0, run plainly, recorded and reversed on trial: what it weighs, and whether it can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.autograd import AutogradStepper, Index, Outputs
from adjoint.captured import Captured
from adjoint.draws import unchanging
from adjoint.kept import times_noted
from adjoint.marks import Marks
from adjoint.memory import SHARE, Meter, free_bytes
from adjoint.problem import Problem
from adjoint.tensors import State, bytes_of, differentiable
from adjoint.touched import Touched, refuse_kept
from revolve import Plan, parse_bytes, plan

NODE_BYTES = 850
"""What a node of torch's graph weighs beside the tensors that it saves: measured, roughly."""


@dataclass(frozen=True)
class Weights:
    """Bytes of one gradient, by what they grow with."""

    state: int
    tape: int
    working: int
    each: int = 0
    """Kept of each step, whatever the plan."""

    def plan(self, steps: int, slots: int | str | None, budget: int | str | None, device: torch.device) -> Plan:
        """The plan that the caller asked for, or the cheapest that fits a share of the free memory."""
        if slots is None and budget is None:
            budget = free_bytes(device) // SHARE
        return plan(
            steps=steps,
            slots=slots,
            budget=budget,
            state_bytes=self.state,
            tape_bytes=self.tape,
            working_bytes=self.working + self.each * steps,
            given=True,
        )

    def of_pairs(self) -> Weights:
        """The same for pairs of a state and a direction: a transpose is differentiated while its own graph is held."""
        return Weights(2 * self.state, self.tape + self.state, 2 * self.working + 3 * self.tape)

    def check(self, budget: int | str | None, device: torch.device) -> None:
        """Raise at once if the budget cannot hold even one state and one tape."""
        if budget is not None:
            self.plan(2, None, budget, device)

    def most_tapes(self, budget: int | str | None, device: torch.device) -> int:
        """How many steps may be recorded before the number of steps is known."""
        limit = free_bytes(device) // SHARE if budget is None else parse_bytes(budget)
        return max(0, (limit - self.working) // max(self.tape + self.each, 1))


class Nowhere(Outputs):
    """Outputs that are only weighed."""

    bytes = puts = 0

    def put(self, index: Index, leaves: State) -> None:
        self.bytes += bytes_of(leaves)
        self.puts += 1


class Unmarked(Marks):
    """Nothing is compared: by the probe, which does that itself, and where states come back with fewer digits."""

    def note(self, step: int, state: State) -> None:
        pass

    def note_shown(self, step: int, values: Sequence[Tensor]) -> None:
        pass


PASSING = ("aten.detach", "aten.clone", "aten.alias", "aten.view.default")
"""Operations that a recorded step and a plain one need in different numbers, and that change no number."""


def probe(problem: Problem, captured: Captured, state: State) -> Weights:
    """Try step 0 and weigh it.

    Raises if it writes to its state, draws random numbers, keeps tensors between calls, uses what was not found, or
    gives other numbers when it is run again.
    """
    program = problem.program
    stepper: AutogradStepper
    with unchanging(state, captured, lambda: stepper.advance(state, 0, 1)), torch.enable_grad():
        begun = _begin(problem)
        stepper = AutogradStepper(program.sample(), captured)
        outputs = stepper.outputs = Nowhere(program.outputs, program.label)
        stepper.marks, stepper.listening = Unmarked(program.label), False
        aliases = tuple(x.detach() for x in state)
        with (
            Meter() as meter,
            Touched([*aliases, *captured.without, *program.series]) as touched,
            _noting_times(problem, captured, touched),
        ):
            first = stepper.advance(aliases, 0, 1)
        captured.check_unwritten()
        for x in touched.outside.values():
            captured.watch(f"a tensor that {captured.label} uses", x)
    plain_peak, plain_operations = meter.peak, _numbers_of(meter.operations)
    with Meter() as meter, torch.enable_grad():
        with Touched(program.series) as again:
            second, tape = stepper.record(state, 0, 1)
        _refuse_kept((begun, touched), again, captured)
        operations = _numbers_of(meter.operations)
        del again  # it holds tensors that a step does not
        nodes = _count_nodes(tape[0].steps[0].state)
        held = meter.live
        stepper.begin_reverse([None] * max((len(values) for _, values in tape[0].steps[0].outputs), default=0))
        stepper.reversed = 1
        stepper.sums = [torch.zeros_like(x) for x in captured.leaves]
        seeds: list[Tensor | None] = [torch.ones_like(x) if differentiable(x) else None for x in state]
        meter.restart()
        stepper.reverse(tape, seeds)
        reverse_peak = meter.peak - held
    _compare(first, second, captured)
    if operations != plain_operations:  # maybe the first call of all did more than others
        with Meter() as meter, torch.enable_grad():
            with Touched([*captured.without, *program.series]) as again:
                third = stepper.advance(state, 0, 1)
            _refuse_kept((begun, touched), again, captured)
        _compare(first, third, captured)
        plain_peak, plain_operations = meter.peak, _numbers_of(meter.operations)
    captured.alike = plain_operations == operations
    tape_bytes = held + NODE_BYTES * nodes
    each = outputs.bytes / outputs.puts if outputs.puts else bytes_of(state)
    all_outputs = int(each * program.outputs)
    working = max(reverse_peak, plain_peak - tape_bytes) + bytes_of(state) + 2 * all_outputs + bytes_of(program.inputs)
    return Weights(bytes_of(state), tape_bytes, working, getattr(program, "step_bytes", 0))


def _begin(problem: Problem) -> Touched:
    """Begin the program; what f may keep then that is made of times has no way back to them."""
    with Touched(()) as touched:
        moving = problem.program.inputs and not problem.program.series
        function = times_noted(problem.function, touched) if moving else problem.function
        problem.program.begin(function, problem.state)
    return touched


@contextmanager
def _noting_times(problem: Problem, captured: Captured, touched: Touched) -> Iterator[None]:
    """The same for a plain step."""
    plain = captured.plain
    if problem.program.inputs and not problem.program.series:
        captured.plain = times_noted(plain, touched)
    try:
        yield
    finally:
        captured.plain = plain


def _refuse_kept(before: Sequence[Touched], again: Touched, captured: Captured) -> None:
    """A tensor made in one call and used in the next has lost its way back to what it was made from."""
    for x in again.outside.values():
        if any(x in first.derived for first in before):
            refuse_kept(x, captured.label)
        captured.vetted.append(x)


def _numbers_of(operations: list[str]) -> list[str]:
    return [name for name in operations if not name.startswith(PASSING)]


def _compare(first: State, second: State, captured: Captured) -> None:
    """The same step gives the same numbers, up to what nondeterministic kernels do to the last digits."""
    for x, y in zip(first, second, strict=True):
        if x.is_meta or torch.equal(x, y):
            continue
        digits = torch.finfo(x.dtype).eps ** 0.5 if differentiable(x) else 0.0
        scale = torch.nan_to_num(x.abs()).max() if digits else 0.0
        if not torch.allclose(x, y, rtol=0.0, atol=float(digits * scale), equal_nan=True):
            raise RuntimeError(
                f"{captured.label} gives other values when it is called again with the same arguments; "
                f"recomputed steps would differ. It must depend on nothing but its arguments and tensors that stay"
            )


def _count_nodes(results: State) -> int:
    seen = {x.grad_fn for x in results if x.grad_fn is not None}
    stack = list(seen)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return len(seen)
