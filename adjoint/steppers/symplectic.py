"""Steps that are made of parts, each of which is solved by itself: symplectic methods, and splitting.

    q' = dq(t, p),  p' = dp(t, q):     drift  q += a_i h dq,    kick  p += b_i h dp,    in turn
    y' = A(y) + B(y):                  y = exp(a_i h A) y,      y = exp(b_i h B) y,     in turn

A method is a series of moves. Each part has its own clock: a drift sees the time that the kicks have reached and a kick that
of the drifts, a flow starts from its own. So equations that depend on time keep the order of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adjoint.steppers.control import Control
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.stages import Stages
from adjoint.tableaus import METHODS
from adjoint.tensors import State, Structure, refuse_writing, versions_of


@dataclass(frozen=True)
class Flows:
    """Both parts of an equation, each by its exact solution: ``first(t, h, y, *args)`` is y after a time h from t.

    h may be negative. For a splitting method in place of f: ``solve(Flows(linear, nonlinear), y0, t, method="strang")``.
    """

    first: Callable[..., Any]
    second: Callable[..., Any]

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r} of Flows must be a function of (t, h, y, *args)")


@dataclass(frozen=True)
class Splitting:
    """A method made of moves: (part, share of the step) in turn, part 0 (drift, first flow) or 1 (kick, second flow)."""

    name: str
    order: int
    moves: tuple[tuple[int, float], ...]
    source: str
    adaptive = False

    def __post_init__(self) -> None:
        for part in (0, 1):
            total = sum(share for own, share in self.moves if own == part)
            assert abs(total - 1) < 1e-14, f"{self.name}: the moves of part {part} do not make a step"

    @property
    def symmetric(self) -> bool:
        """Whether the step back is the step with -h."""
        return self.moves == self.moves[::-1]

    @cached_property
    def clocks(self) -> tuple[tuple[float, float], ...]:
        """Of each move, what its own part and the other have done of the step when it starts."""
        done, found = [0.0, 0.0], []
        for part, share in self.moves:
            found.append((done[part], done[1 - part]))
            done[part] += share
            done[part] = round(done[part]) if abs(done[part] - round(done[part])) < 1e-14 else done[part]
        return tuple(found)


def _symmetric(*shares: float) -> tuple[tuple[int, float], ...]:
    """Kick, drift, kick, .. with these shares and the same backwards."""
    return tuple(((i + 1) % 2, share) for i, share in enumerate((*shares, *shares[-2::-1])))


_CUBE = 2 ** (1 / 3)
_OUTER, _INNER = 1 / (2 - _CUBE), -_CUBE / (2 - _CUBE)

SPLITTINGS: dict[str, Splitting] = {
    method.name: method
    for method in (
        Splitting(
            "semi_implicit_euler",
            1,
            ((1, 1.0), (0, 1.0)),
            "de Vogelaere (1956); Hairer, Lubich & Wanner (2006), Geometric Numerical Integration, VI, theorem 3.3",
        ),
        Splitting(
            "leapfrog",
            2,
            _symmetric(0.5, 1.0),
            "Stoermer (1907), Verlet (1967), kick first; Hairer, Lubich & Wanner (2003), Acta Numerica 12, (1.5)",
        ),
        Splitting(
            "strang",
            2,
            ((0, 0.5), (1, 1.0), (0, 0.5)),
            "Strang (1968), SIAM J. Numer. Anal. 5(3), 506-517; of q and p: Stoermer-Verlet, drift first",
        ),
        Splitting(
            "yoshida4",
            4,
            _symmetric(_OUTER / 2, _OUTER, (_OUTER + _INNER) / 2, _INNER),
            "Yoshida (1990), Physics Letters A 150(5-7), 262-268, equation (2.11)",
        ),
    )
}
"""By name."""


def parts_of(method: Splitting, f: Any, y0: Any) -> tuple[Callable[..., Any], Callable[..., Any], bool]:
    """Both parts of f, and whether they are flows; raises if f or y0 is no such pair."""
    if isinstance(f, Flows):
        return f.first, f.second, True
    if not (isinstance(f, (tuple, list)) and len(f) == 2 and all(map(callable, f))):
        raise TypeError(
            f"f={f!r}: method={method.name!r} solves in two parts; give f=(dq, dp) with dq(t, p), dp(t, q) and y0=(q, p), "
            f"or f=Flows(first, second)"
        )
    if not (isinstance(y0, (tuple, list)) and len(y0) == 2):
        raise TypeError(f"y0 is a {type(y0).__name__}; with f=(dq, dp) it is a pair (q, p)")
    return f[0], f[1], False


class SplittingProgram(ExplicitProgram):
    """The steps of a splitting method. ``function`` is ((first, second, whether they are flows), args)."""

    def __init__(self, method: Splitting, t: Tensor, structure: Structure, like: State, control: Control) -> None:
        super().__init__(METHODS["euler"], t, structure, like, control)
        self.method = method
        children = structure.spec.children()
        self.halves = [child.num_leaves for child in children] if len(children) == 2 else []
        self.trees = [Structure(child, child.is_leaf()) for child in children] if self.halves else []

    def stages(self, *how: Any) -> SplitStages:
        return SplitStages(self, *how)

    def slope(self, function: Any, t: Tensor, state: State) -> State:
        """dy/dt, of a pair of slopes; flows have none."""
        (dq, dp, flows), args = function
        if flows:
            raise ValueError("f=Flows(..) gives solutions, and no slopes, which this asks for; give f=(dq, dp)")
        return (*self.half(dq, 0, t, state, args), *self.half(dp, 1, t, state, args))

    def half(self, field: Callable[..., Any], part: int, t: Tensor, state: State, args: Any) -> State:
        """The slope of one part, which depends on the other."""
        size = self.halves[0]
        own, other = (state[:size], state[size:]) if part == 0 else (state[size:], state[:size])
        self.evaluations += 1
        versions, name = versions_of(other), f"the value of f[{part}]"
        leaves = self.trees[part].flatten(field(t, self.trees[1 - part].unflatten(other), *args), name)
        self._check(name, leaves, own, other, versions)
        return leaves

    def flow(self, flow: Callable[..., Any], part: int, t: Tensor, h: Tensor, state: State, args: Any) -> State:
        """The state after one part alone has gone on for h."""
        self.evaluations += 1
        versions, name = versions_of(state), "the value of " + ("Flows.first", "Flows.second")[part]
        leaves = self.structure.flatten(flow(t, h, self.structure.unflatten(state), *args), name)
        self._check(name, leaves, state, state, versions)
        return leaves

    def _check(self, name: str, leaves: State, like: State, given: State, versions: list[int]) -> None:
        if versions_of(given) != versions:
            refuse_writing(f"{name.removeprefix('the value of ')} changed its state")
        for x, y in zip(leaves, like, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)} and {x.dtype}; it must be {tuple(y.shape)} and {y.dtype}, as y0 is"
                )

    def undo(self, function: Any, k: int, state: State) -> State:
        """The state before step k, from that behind it: every move taken back, to rounding."""
        stages = self.stages(function, state, k, *self.timeline.ends(k), False, False)
        return stages.back()


class SplitStages(Stages):
    """One step of a splitting method being computed."""

    program: SplittingProgram

    def run(self, first: State | None = None) -> None:
        program, state = self.program, self.state
        (*_, flows), _ = self.function
        moves = list(zip(program.method.moves, program.method.clocks, strict=True))
        if first is None and not self.recording:
            first = program.reuse(self.k, state)
        slope: State | None = None
        for i, ((part, share), clocks) in enumerate(moves):
            known = first if i == 0 else None
            state, slope = self._moved_part(state, part, share, clocks, known)
        self.new = state
        smooth = not program.jumps_at(self.stop) and not flows
        if smooth and not self.recording and moves[-1][0][0] == moves[0][0][0] and slope is not None:
            program.remember(self.k + 1, self.new, slope)

    def back(self) -> State:
        """The state from which this step leads to ``state``."""
        state = self.state
        for (part, share), (own, other) in reversed(
            list(zip(self.program.method.moves, self.program.method.clocks, strict=True))
        ):
            state, _ = self._moved_part(state, part, -share, (own + share, other), None)
        return state

    def _moved_part(
        self, state: State, part: int, share: float, clocks: tuple[float, float], known: State | None
    ) -> tuple[State, State | None]:
        """The state after one move, and the slope that it used."""
        program = self.program
        (*parts, flows), args = self.function
        own, other = clocks
        h = self.h * share
        if flows:
            length = h if isinstance(h, Tensor) else program.time(h)
            return program.flow(parts[part], part, self._clock(own), length.to(program.dtype), state, args), None
        slope = program.half(parts[part], part, self._clock(other), state, args) if known is None else known
        size = program.halves[0]
        begin = 0 if part == 0 else size
        moved = [_added(state[begin + i], x, h) for i, x in enumerate(slope)]
        return (*state[:begin], *moved, *state[begin + len(moved) :]), slope

    def _clock(self, share: float) -> Tensor:
        """The time when so much of the step is done, a hair inside where f jumps at an end."""
        program = self.program
        if self.leaf is not None:
            start, stop = self.leaf[0], self.leaf[1]
            t = (stop if share == 1 else start if share == 0 else start + share * self.h).to(program.dtype)
        else:
            t = program.time(self.stop if share == 1 else self.start + share * (self.stop - self.start))
        ends = {0: (self.start, self.stop), 1: (self.stop, self.start)}
        if share in ends and program.edges and program.jumps_at(ends[int(share)][0]):
            with torch.no_grad():
                hair = torch.nextafter(t, t.new_tensor(ends[int(share)][1])) - t
            t = t + hair
        return t

    def polynomial(self) -> State:
        """The cubic through both ends and their slopes."""
        program = self.program
        (*_, flows), _ = self.function
        if flows:
            raise ValueError("f=Flows(..) knows no slopes to interpolate with; give the times in t")
        ends = [program.slope(self.function, self._clock(c), x) for c, x in ((0, self.state), (1, self.new))]
        columns = []
        for y, z, a, b in zip(self.state, self.new, *ends, strict=True):
            h = self.h.to(y.real.dtype) if isinstance(self.h, Tensor) else self.h
            a, b, d = h * a, h * b, z - y
            columns.append(torch.stack((y, a, 3 * d - 2 * a - b, a + b - 2 * d)))
        return tuple(columns)


def _added(x: Tensor, slope: Tensor, h: float | Tensor) -> Tensor:
    return torch.add(x, slope, alpha=h) if isinstance(h, float) else x + h.to(x.real.dtype) * slope


def split_function(method: Any, f: Any, y0: Any) -> Any:
    """f itself, or its parts if the method takes a step in parts."""
    return parts_of(method, f, y0) if isinstance(method, Splitting) else f
