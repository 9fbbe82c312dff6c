"""The asked times of many members side by side, and fixed steps between them.

Lock-step k takes member b from ``times(k)[b]`` to ``times(k + 1)[b]``; the two are equal for a member that waits: its
step was rejected, or it has arrived, or it failed. Everything is a tensor over members on the state's device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adjoint.tensors import scattered
from adjoint.timeline import MOST_STEPS

ROWS = 128
"""Times of fixed steps are made for this many steps at once."""

Pairs = tuple[Tensor, Tensor]
"""Asked times and members, by index."""


@dataclass(frozen=True)
class MemberTimes:
    """The asked times of each member, shape (members, times). A row may end in NaN: that member has fewer times."""

    t: Tensor
    shared: bool
    """Whether all rows are the same."""

    @cached_property
    def count(self) -> Tensor:
        return (~self.t.isnan()).sum(1)

    @cached_property
    def start(self) -> Tensor:
        return self.t[:, 0].contiguous()

    @cached_property
    def stop(self) -> Tensor:
        return self.t.gather(1, self.count[:, None] - 1)[:, 0]

    @cached_property
    def sign(self) -> Tensor:
        """1 forwards in time, -1 backwards."""
        return torch.where(self.stop >= self.start, 1.0, -1.0).to(self.t)

    @cached_property
    def forwards(self) -> bool:
        """Whether every member runs forwards in time."""
        return bool((self.sign > 0).all())

    @cached_property
    def keys(self) -> Tensor:
        """The times as they come: ascending in each row, infinite where there are none."""
        return (self.sign[:, None] * self.t).nan_to_num(nan=torch.inf).contiguous()

    @cached_property
    def before_last(self) -> Tensor:
        """``keys`` without the last time of each member."""
        return self.keys.scatter(1, self.count[:, None] - 1, torch.inf)

    @cached_property
    def last(self) -> int | Pairs:
        """The last time of each member, by index; of those that have more than the first."""
        least, most = (int(x) for x in self.count.aminmax())
        if least == most:
            return most - 1
        member = (self.count > 1).nonzero()[:, 0]
        return self.count[member] - 1, member

    @property
    def members(self) -> int:
        return len(self.t)

    def passed(self, time: Tensor) -> Tensor:
        """How many asked times each member has at or before its time here, the last one not counted."""
        key = time if self.forwards else self.sign * time
        return torch.searchsorted(self.before_last, key[:, None].contiguous(), right=True)[:, 0]


class FixedLockstep:
    """Each member's intervals in equal steps no longer than ``dt``: t_i + (t_{i+1} - t_i) j / m, as one by one.

    ``dt``: (members, 1), or None for one step an interval. ``jumps``: (members, any); they stay where they are.
    """

    landing = True
    done = True

    def __init__(self, asked: MemberTimes, dt: Tensor | None, jumps: Tensor | None) -> None:
        self.asked = asked
        rows = slice(0, 1) if asked.shared and (dt is None or len(dt) == 1) and _one_row(jumps) else slice(None)
        t, stop, sign = asked.t[rows], asked.stop[rows, None], asked.sign[rows, None]
        points = torch.cat((torch.where(t.isnan(), stop, t), stop), 1)
        if jumps is not None:
            jumps = jumps[rows].expand(len(points), -1)
            inside = (sign * jumps > sign * points[:, :1]) & (sign * jumps < sign * stop)
            known = (jumps[:, :, None] == t[:, None, :]).any(2)
            points = torch.cat((points, torch.where(inside & ~known, jumps, stop)), 1)
        order = torch.argsort(sign * points, dim=1, stable=True)
        self._points = points.gather(1, order)
        self._column = torch.where(order < asked.count[rows, None], order, -1)
        """Which asked time a point is, -1 for jumps. Of equal points the asked time comes first."""
        spans = self._points.diff(dim=1).abs()
        ratio = torch.ones_like(spans) if dt is None else spans / (dt if len(dt) == 1 else dt[rows])
        if float(ratio.sum(1).max()) > MOST_STEPS:
            raise ValueError(f"dt makes {float(ratio.sum(1).max()):.3g} steps; give a larger dt")
        self._place(torch.where(spans > 0, (ratio * (1 - 1e-12)).ceil().clamp(min=1), 0).long())

    def _place(self, counts: Tensor) -> None:
        """So many steps in each interval."""
        self._counts, self._ends = counts, counts.cumsum(1)
        self._fewest, self.steps = (int(x) for x in self._ends[:, -1].aminmax())
        self._first, self._table = -1, [self.asked.start]
        self._landings()

    def moved_along(self, noted: FixedLockstep) -> FixedLockstep:
        """This timeline with as many steps in each interval as another."""
        self._place(noted._counts)
        return self

    def times(self, k: int) -> Tensor:
        """Where the members are before lock-step k."""
        block = k // ROWS * ROWS
        if block != self._first:
            steps = torch.arange(block, min(block + ROWS, self.steps + 1), device=self._points.device)
            table = self._times(steps.expand(len(self._points), -1)).T.contiguous()
            self._first, self._table = block, list(table.expand(-1, self.asked.members).unbind())
        return self._table[k - block]

    def own_times(self, steps: Tensor) -> Tensor:
        """Where each member is after so many steps of its own."""
        if len(self._points) == 1:
            return self._times(steps[None])[0]
        return self._times(steps[:, None])[:, 0]

    def _times(self, steps: Tensor) -> Tensor:
        """By row of points, after each of so many steps."""
        interval, fraction = self._where(steps)
        start = self._points.gather(1, interval)
        table = start + (self._points.gather(1, interval + 1) - start) * fraction
        return torch.where(steps >= self._ends[:, -1:], self._points[:, -1:], table)

    @property
    def counts(self) -> Tensor:
        """How many steps each row takes."""
        return self._ends[:, -1]

    def _where(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """In which interval each step begins, and how far in, as a part of it."""
        last = self._ends.shape[1] - 1
        interval = torch.searchsorted(self._ends, steps.contiguous(), right=True).clamp(max=last)
        count = self._counts.gather(1, interval)
        before = steps - (self._ends.gather(1, interval) - count)
        return interval, (before.to(self._points) / count.clamp(min=1)).clamp(max=1)

    def ends(self, k: int) -> tuple[Tensor, Tensor]:
        return self.times(k), self.times(k + 1)

    def everyone(self, k: int) -> bool:
        """Whether every member moves in step k."""
        return k < self._fewest

    def anyone(self, k: int) -> bool:
        return True

    def moving(self, k: int, t: Tensor) -> Tensor:
        """``times(k)`` as a differentiable function of the asked times (members, times)."""
        ends, fraction = self._between(k)
        start, stop = (torch.where(at >= 0, t.gather(1, at.clamp(min=0)), value)[:, 0] for at, value in ends)
        return start + (stop - start) * fraction

    def pull(self, k: int, cotangent: Tensor, total: Tensor) -> Tensor:
        """``total`` and the cotangent of the asked times from that of ``times(k)``: the transpose of ``moving``."""
        ends, fraction = self._between(k)
        for (at, _), part in zip(ends, (1 - fraction, fraction), strict=True):
            total = scattered(total, at.clamp(min=0), torch.where(at >= 0, (cotangent * part)[:, None], 0))
        return total

    def _between(self, k: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Between which points step k begins, each as (asked time or -1, value), and how far in."""
        interval, fraction = self._where(torch.full((len(self._points), 1), k, device=self._points.device))
        arrived = k >= self._ends[:, -1:]
        last = self.asked.count[: len(self._points), None] - 1
        ends = []
        for i in (interval, interval + 1):
            at = torch.where(arrived, last, self._column.gather(1, i))
            ends.append((at.expand(self.asked.members, -1), self._points.gather(1, i).expand(self.asked.members, -1)))
        return ends, fraction[:, 0]

    def _landings(self) -> None:
        """Which asked times but the last each step ends on, ordered by steps."""
        column = self._column[:, 1:]
        last = self.asked.count[: len(column), None] - 1
        row, i = ((self._counts > 0) & (column >= 0) & (column < last)).nonzero(as_tuple=True)
        step, at = self._ends[row, i] - 1, column[row, i]
        order = torch.argsort(step, stable=True)
        self._landed = (at[order], row[order])
        bounds = torch.searchsorted(step[order].contiguous(), torch.arange(self.steps + 1, device=step.device))
        self._bounds: list[int] = bounds.tolist()
        self._every: list[int] = at[order].tolist() if len(self._points) == 1 else []

    def passing(self, k: int) -> None:
        """No asked times lie inside a step."""

    def landing_on(self, k: int) -> int | Pairs | None:
        """The asked times (but the last) on which step k ends: one for all members, or pairs."""
        low, high = self._bounds[k], self._bounds[k + 1]
        if low == high:
            return None
        if self._every:
            return self._every[low]
        at, member = self._landed
        return at[low:high], member[low:high]


def _one_row(jumps: Tensor | None) -> bool:
    return jumps is None or len(jumps) == 1


@dataclass(frozen=True)
class KnownLockstep:
    """A single step of everybody, on trial."""

    start: Tensor
    stop: Tensor
    landing = False
    done = True
    steps = 1

    def ends(self, k: int) -> tuple[Tensor, Tensor]:
        return self.start, self.stop

    def everyone(self, k: int) -> bool:
        return True

    def anyone(self, k: int) -> bool:
        return True

    def passing(self, k: int) -> None:
        pass

    def landing_on(self, k: int) -> None:
        pass

    def times(self, k: int) -> Tensor:
        return self.stop if k else self.start

    def moving(self, k: int, t: Tensor) -> Tensor:
        return self.times(k)

    def pull(self, k: int, cotangent: Tensor, total: Tensor) -> Tensor:
        return total
