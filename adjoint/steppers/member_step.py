"""One explicit Runge-Kutta step of many members, each with its own time and step size.

k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j),    y_new = y + h sum_i b_i k_i,    t, h: one for each member
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adjoint.autograd import Step
from adjoint.member_times import Pairs
from adjoint.steppers.stages import Terms, plain
from adjoint.tableaus import Tableau
from adjoint.tensors import State

SMALL = 64
"""Numbers of members with up to so many entries are spread over them once a step: torch broadcasts these slowly."""

Slope = Callable[[Tensor, State], State]


def spread(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each member, in a form that goes with a leaf."""
    if like.ndim == 1:
        return numbers
    numbers = numbers.reshape(-1, *[1] * (like.ndim - 1))
    return numbers.expand_as(like).contiguous() if like[0].numel() <= SMALL else numbers


def finite(state: State) -> Tensor:
    """Which members have nothing but finite numbers."""
    result: Tensor | None = None
    for x in state:
        mask = torch.isfinite(x.detach())
        mask = mask.flatten(1).all(1) if x.ndim > 1 else mask
        result = mask if result is None else result & mask
    assert result is not None
    return result


class Numbers:
    """One number for each member, spread over leaves of a state: made once for each."""

    __slots__ = ("_spread", "numbers")

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self._spread: dict[int, Tensor] = {}

    def over(self, i: int, leaf: Tensor) -> Tensor:
        """As it goes with leaf i."""
        known = self._spread.get(i)
        if known is None:
            numbers = self.numbers
            if numbers.dtype != torch.bool:
                numbers = numbers.to(leaf.dtype.to_real())
            known = self._spread[i] = spread(numbers, leaf)
        return known

    def choose(self, there: State, elsewhere: State) -> State:
        """Of a mask: one state where it holds, another one elsewhere."""
        pairs = enumerate(zip(there, elsewhere, strict=True))
        return tuple([torch.where(self.over(i, x), x, y) for i, (x, y) in pairs])


class Coefficients:
    """A tableau, ready to be used on a device."""

    def __init__(self, tableau: Tableau, like: Tensor) -> None:
        self.tableau = tableau
        self.rows = [Terms(row) if any(row) else None for row in tableau.a]
        self.weights = Terms(tableau.b)
        self.error = Terms(tableau.error) if tableau.error is not None else None
        self.c = like.new_tensor(tableau.c)[:, None]
        dense = tableau.dense[: tableau.interpolated] if tableau.dense is not None else ()
        self.used = [i for i, row in enumerate(dense) if any(row)]
        """Stages that the interpolant needs."""
        self.dense = like.new_tensor([dense[i] for i in self.used])[:, :, None].unbind(1) if dense else ()


class MemberStep:
    """One step being computed: from ``start`` to ``stop``, equal for members that wait.

    ``moves`` is a mask over members that do not wait; None if nobody does.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        slope: Slope,
        state: State,
        start: Tensor,
        stop: Tensor,
        time_type: torch.dtype,
        jumps: Tensor | None = None,
    ) -> None:
        self.coefficients, self.slope, self.state = coefficients, slope, state
        self.start, self.stop, self._time_type, self._jumps = start, stop, time_type, jumps
        self.moves: Tensor | None = None
        self.leaves: tuple[Tensor, ...] = ()
        self._base, self._base_state = start, state
        self.slopes: list[State] = []

    def make_leaves(self) -> None:
        """From here on this step is a function of its times."""
        self.leaves = (self.start.clone().requires_grad_(), self.stop.clone().requires_grad_())
        self.start, self.stop = self.leaves
        self._base = self.start

    def stand_in(self, moves: Tensor, times: Tensor, states: State) -> None:
        """Show f these times and states in place of those of members that wait; they take a step of no length."""
        self.moves = moves
        self._base = torch.where(moves, self.start, times)
        self._base_state = Numbers(moves).choose(self.state, states)

    def _set_times(self) -> None:
        """The length of the step, and when f is called for each stage."""
        c, base, moves, end = self.coefficients.tableau.c, self._base, self.moves, self.stop
        if self.leaves and moves is None:  # a node of its own, as for members that wait: one order of adding up
            base = base.view_as(base)
        self.h = end - self.start
        if moves is not None:
            self.h, end = torch.where(moves, self.h, 0), torch.where(moves, end, base)
        elif self.leaves:
            end = end.view_as(end)
        self._lengths = Numbers(self.h)
        between = (base + self.coefficients.c * self.h).unbind()
        times = [end if x == 1 else base if x == 0 else t for x, t in zip(c, between, strict=True)]
        if self._time_type != base.dtype:
            times = [t.to(self._time_type) for t in times]
        self.times = times if self._jumps is None else self._beside_jumps(times)

    def _beside_jumps(self, times: list[Tensor]) -> list[Tensor]:
        """A hair inside where a step starts or stops at a jump: f is to see its own side."""
        assert self._jumps is not None
        start, stop = self.start.detach(), self.stop.detach()
        for end, other, at in ((start, stop, 0), (stop, start, 1)):
            jumps = (self._jumps == end[:, None]).any(1) & (start != stop)
            for i in (i for i, x in enumerate(self.coefficients.tableau.c) if x == at):
                known = times[i].detach()
                hair = torch.where(jumps, torch.nextafter(known, other.to(known)) - known, 0)
                times[i] = times[i] + hair
        return times

    def run(self, first: State | None = None) -> None:
        """The stages that the new state needs, and the new state (of members that wait, a place of no meaning)."""
        self._set_times()
        self.slopes = [] if first is None else [first]
        for i in range(len(self.slopes), self.coefficients.tableau.weighted):
            self.slopes.append(self._stage(i))
        self.new = self._moved(self.coefficients.weights)

    def error(self) -> tuple[State, float]:
        """The embedded error estimate h sum_i e_i k_i, but for a factor."""
        self._complete(self.coefficients.tableau.stages)
        terms = self.coefficients.error
        assert terms is not None
        h, state = self._lengths, enumerate(self.state)
        return tuple([terms.of(self.slopes, i) * h.over(i, x) for i, x in state]), terms.scale

    def finish(self, moves: Numbers | None, inside: Pairs | None, asked: Tensor) -> Step:
        """The step as its caller sees it: whoever does not move stays. ``asked``: times by member."""
        state = self.new if moves is None else moves.choose(self.new, self.state)
        outputs = () if inside is None else ((inside, self._interpolate(inside, asked)),)
        return Step(state, outputs, self.leaves)

    def _stage(self, i: int) -> State:
        return self.slope(self.times[i], self._point(i))

    def _point(self, i: int) -> State:
        row = self.coefficients.rows[i]
        return self._base_state if row is None else self._moved(row)

    def _complete(self, stages: int) -> None:
        """Stages beyond those that the new state needs; the last one is f there, if the method is so made."""
        tableau = self.coefficients.tableau
        for i in range(len(self.slopes), stages):
            same = tableau.first_same_as_last and i == tableau.stages - 1
            there = self.new if same else self._point(i)
            self.slopes.append(self.slope(self.times[i], plain(there)))

    def _interpolate(self, inside: Pairs, asked: Tensor) -> State:
        """y + h sum_i b_i(theta) k_i at every pair of an asked time and a member."""
        tableau, (at, member) = self.coefficients.tableau, inside
        if any(x.requires_grad for x in self.new):
            del self.slopes[tableau.weighted :]  # an error estimate may have made them without a graph
        self._complete(tableau.interpolated)
        times = asked[member, at]
        if self.leaves:
            times = times.requires_grad_()
            self.leaves = (*self.leaves, times)
        h = self.h[member]
        theta = (times - self.start[member]) / h
        weights = self.coefficients.dense[-1] * theta
        for coefficient in reversed(self.coefficients.dense[:-1]):
            weights = (weights + coefficient) * theta
        weights = weights * h
        values = []
        for leaf, y in enumerate(self.state):
            stacked = torch.stack([self.slopes[i][leaf] for i in self.coefficients.used])
            # quicker, but where it is transposed it adds up in an order of the device's own
            slopes = stacked[:, member] if stacked.requires_grad else stacked.index_select(1, member)
            spread_out = spread(weights.to(y.real.dtype).flatten(), slopes.flatten(0, 1)).view(
                *weights.shape, *slopes.shape[2:]
            )
            values.append(self._base_state[leaf][member] + (spread_out * slopes).sum(0))
        return tuple(values)

    def _moved(self, terms: Terms) -> State:
        """y + h sum_i w_i k_i."""
        slopes, lengths = self.slopes, self._lengths
        moved = []
        for i, y in enumerate(self._base_state):
            total, h = terms.of(slopes, i), lengths.over(i, y)
            if y.is_complex():
                moved.append(y + (h * terms.scale) * total)
            else:
                moved.append(torch.addcmul(y, h, total, value=terms.scale))
        return tuple(moved)
