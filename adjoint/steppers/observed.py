"""What the caller sees of a solve, in place of its states: g(t, y) at the asked times, or after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adjoint.autograd import Step
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tensors import State, Structure, differentiable, refuse_writing, versions_of

PLACES = ("times", "steps")


class Observed:
    """The steps of another program, whose outputs are g(t, y). ``function`` is a triple (f, args, g).

    The states at the asked times are seen and let go, so that a loss on a few receivers holds no fields. g is a part
    of the step: it is transposed with it, and its gradient reaches all that it holds.
    """

    initial = None

    def __init__(self, program: ExplicitProgram, at_steps: bool, shape: list[Structure]) -> None:
        self.program, self.at_steps = program, at_steps
        self._shape = shape
        """The structure of what g returns, once it has been called."""

    def __getattr__(self, name: str) -> Any:
        if name == "program":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.program, name)

    @property
    def outputs(self) -> int:
        """Seen after every step of an adaptive solve, they grow with it."""
        return self.program.timeline.steps + 1 if self.at_steps else self.program.outputs

    def begin(self, function: Any, state: State) -> None:
        self.program.begin(function[:2], state)

    def sample(self) -> Observed:
        return Observed(self.program.sample(), self.at_steps, self._shape)

    def on_graph(self) -> Observed:
        return Observed(self.program.on_graph(), self.at_steps, self._shape)

    def step(self, function: Any, k: int, state: State, recording: bool, outputs: bool = True) -> Step:
        f, args, g = function
        step: Step = self.program.step((f, args), k, state, recording, outputs)
        if not outputs:
            return step
        times = _Times(self.program, k, step)
        seen = [(0, self._see(g, times.first, state))] if k == 0 else []
        if self.at_steps:
            seen.append((k + 1, self._see(g, times.last, step.state)))
        else:
            later = [(j, values) for j, values in step.outputs if isinstance(j, int) and j > 0]
            seen += [(j, self._see(g, times.asked(j), values)) for j, values in later]
        return step._replace(outputs=tuple(seen))

    def _see(self, g: Callable[[Tensor, Any], Any], t: Tensor, state: State) -> State:
        own = state[: self.program.structure.spec.num_leaves]
        versions = versions_of(own)
        structure, leaves = Structure.of(g(t, self.program.structure.unflatten(own)), "the value of observe")
        if versions_of(own) != versions:
            refuse_writing("observe changed its state")
        if not self._shape:
            self._shape.append(structure)
        if structure.spec != self._shape[0].spec:
            raise TypeError(
                f"observe returned the structure {structure.spec} and {self._shape[0].spec} before; return the same always"
            )
        for x in leaves:
            if not differentiable(x):
                raise TypeError(f"observe returned {x.dtype}; return real or complex tensors, such as value.double()")
        return leaves


class _Times:
    """The times of one step, as functions of the caller's ``t`` where that requires grad."""

    def __init__(self, program: ExplicitProgram, k: int, step: Step) -> None:
        self._program, self._ends = program, program.timeline.ends(k)
        self._k, self._numbers = k, step.inputs[0] if step.inputs else None

    @property
    def first(self) -> Tensor:
        return self._end(0)

    @property
    def last(self) -> Tensor:
        return self._end(1)

    def asked(self, j: int) -> Tensor:
        program = self._program
        inner = program.interpolated(program.asked.inside(*self._ends))
        if j not in inner:
            return self.last
        if program.graph_times is not None:
            return program.t[j].to(program.device)
        if self._numbers is not None:
            return self._numbers[2 + j - inner.start].to(program.dtype)
        return program.time(program.asked.t[j])

    def _end(self, which: int) -> Tensor:
        program = self._program
        if program.graph_times is not None:
            return program.graph_times[self._k + which].to(program.dtype)
        if self._numbers is not None:
            return self._numbers[which].to(program.dtype)
        return program.time(self._ends[which])
