"""Step-size control of many members side by side.

Everything is a tensor over members on the state's device; the host is told a few counts, once for every step tried.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adjoint.adaptive_timeline import Controller
from adjoint.member_times import MemberTimes, Pairs
from adjoint.tensors import scattered

FINE, MAX_STEPS, UNDERFLOW, NONFINITE = range(4)
TOGETHER = 64
"""Times of so many steps are looked at together."""

STATUS = ("success", "max_steps", "underflow", "nonfinite")


class Judged(NamedTuple):
    """What one attempt came to: a mask over members, and counts on the host."""

    accepts: Tensor
    accepted: int
    tried: int
    landed: int
    """How many landed on a jump, or arrived."""


class Fact(NamedTuple):
    """Of one step, on the host."""

    moving: int
    """How many members do not wait."""
    inside: int
    """How many asked times are passed, last ones not counted."""


class AdaptiveLockstep:
    """Times found on the way, each member's by its own errors; what has been accepted never changes again.

    The control is that of ``AdaptiveTimeline`` on tensors, with logarithms of squared errors in place of powers.
    """

    landing = False

    def __init__(
        self, asked: MemberTimes, order: int, max_steps: int, controller: Controller, jumps: Tensor | None
    ) -> None:
        self.asked, self.max_steps, self.controller = asked, max_steps, controller
        self._times = [asked.start]
        self._facts: list[Fact | None] = []
        self._span = (asked.stop - asked.start).abs()
        self._running = self._span > 0
        self.running = int(self._running.sum())
        """How many members are still on their way."""
        self.status = torch.zeros_like(asked.count)
        """FINE, or why a member cannot go on."""
        self.failed: list[int] = []
        """Members that were found unable to go on since the last attempt."""
        self._attempts = torch.zeros_like(asked.count)
        self._tries = 0
        now = asked.passed(asked.start)
        self._passed = (-1, now, now)
        """A step, and how many asked times had been passed before it and after it."""
        self._passed_by_all = int(now.sum())
        self._set_control(order)
        self._stops = None
        self._limit = asked.stop
        if jumps is not None:
            sign = asked.sign[:, None]
            key, start, stop = sign * jumps, sign * asked.start[:, None], sign * asked.stop[:, None]
            stops = torch.where((key > start) & (key < stop), key, stop)
            self._stops = torch.cat((stops, stop), 1).sort(1).values
            self._aim()

    def _set_control(self, order: int) -> None:
        """The logarithm of a factor is a sum over squared errors' logarithms: of this error and of the last two."""
        c, like = self.controller, self._span
        self._powers = tuple(-x / (2 * order) for x in (c.proportional + c.integral + c.derivative, 1.0))
        self._earlier = ((c.proportional + 2 * c.derivative) / (2 * order), -c.derivative / (2 * order))
        self._safety = torch.full_like(like, math.log(c.safety))
        self._carry = self._safety
        """What the last two accepted errors add to the logarithm of the next factor."""
        self._previous = self._safety
        """What the last one will add once there is another."""
        self._largest, self._one = torch.full_like(like, c.largest), torch.ones_like(like)
        self._most: Tensor | None = None
        """The largest factors allowed, if some members were just rejected: theirs is 1."""
        self._floor = torch.full_like(like, c.min_step)
        ends = torch.maximum(self.asked.start.abs(), self.asked.stop.abs())
        self._cautious = float(self._least(ends).max())
        """A longer step is never too short."""

    @property
    def steps(self) -> int:
        return len(self._times) - 1

    @property
    def done(self) -> bool:
        return self.running == 0

    @property
    def accepted(self) -> Tensor:
        """Steps that each member took."""
        total = torch.zeros_like(self._attempts)
        for k in range(0, self.steps, TOGETHER):
            times = torch.stack(self._times[k : k + TOGETHER + 1])
            total += (times[1:] != times[:-1]).sum(0)
        return total

    @property
    def rejected(self) -> Tensor:
        """Steps that each member tried in vain."""
        return self._attempts - self.accepted

    def times(self, k: int) -> Tensor:
        return self._times[k]

    def ends(self, k: int) -> tuple[Tensor, Tensor]:
        return self._times[k], self._times[k + 1]

    def everyone(self, k: int) -> bool:
        """Whether every member moves in step k."""
        return self._fact(k).moving == self.asked.members

    def anyone(self, k: int) -> bool:
        return self._fact(k).moving > 0

    def moving(self, k: int, t: Tensor) -> Tensor:
        """``times(k)`` as a differentiable function of the asked times: both ends move, what lies between stays."""
        time, asked = self._times[k], self.asked
        stop = t.gather(1, asked.count[:, None] - 1)[:, 0]
        return torch.where(time == asked.start, t[:, 0], torch.where(time == asked.stop, stop, time))

    def pull(self, k: int, cotangent: Tensor, total: Tensor) -> Tensor:
        """``total`` and the cotangent of the asked times from that of ``times(k)``: the transpose of ``moving``."""
        time, asked = self._times[k], self.asked
        at_start, at_stop = time == asked.start, time == asked.stop
        column = torch.where(at_start, 0, asked.count - 1)[:, None]
        return scattered(total, column, torch.where(at_start | at_stop, cotangent, 0)[:, None])

    def passing(self, k: int) -> Pairs | None:
        """The asked times (but the last) that members pass in step k, as pairs (asked time, member)."""
        inside = self._fact(k).inside
        if not inside:
            return None
        if self._passed[0] == k:
            _, first, then = self._passed
        else:
            first, then = (self.asked.passed(x) for x in self.ends(k))
        count = then - first
        member = torch.repeat_interleave(count, output_size=inside)
        offset = first - (count.cumsum(0) - count)
        return torch.arange(inside, device=member.device) + offset[member], member

    def landing_on(self, k: int) -> None:
        """No step ends on an asked time for its sake, but the last one."""

    @property
    def most_inside(self) -> int:
        """The most pairs of an asked time and a member that one step passes, of those that are known."""
        return max((fact.inside for fact in self._facts if fact is not None), default=0)

    @property
    def all_inside(self) -> int:
        """The same of all steps together."""
        return sum(fact.inside for fact in self._facts if fact is not None)

    def _fact(self, k: int) -> Fact:
        fact = self._facts[k]
        if fact is None:
            start, stop = self.ends(k)
            inside = (self.asked.passed(stop) - self.asked.passed(start)).sum()
            fact = self._facts[k] = Fact(*torch.stack(((start != stop).sum(), inside)).tolist())
        return fact

    def moved_along(self, noted: AdaptiveLockstep) -> AdaptiveLockstep:
        """This timeline with the accepted times of another in between, finished."""
        ends = zip((noted.asked.start, noted.asked.stop), (self.asked.start, self.asked.stop), strict=True)
        (old_start, start), (old_stop, stop) = ends
        self._times = [torch.where(x == old_start, start, torch.where(x == old_stop, stop, x)) for x in noted._times]
        self._facts = [None] * self.steps
        self.status, self.running, self._running = noted.status, 0, torch.zeros_like(self._running)
        return self

    def begin(self, first: Tensor) -> None:
        """The lengths of the first steps to try, positive."""
        self._length = torch.minimum(first, self._span).clamp(max=self.controller.max_step)
        self._check(self._times[-1])

    def fail(self, who: Tensor, why: int) -> None:
        """These members go no further."""
        who = who & self._running
        self.failed += who.nonzero()[:, 0].tolist()
        self.status = torch.where(who, why, self.status)
        self._attempts = torch.where(who, self._tries, self._attempts)
        self._running = self._running & ~who
        self.running = int(self._running.sum())

    def propose(self) -> tuple[Tensor, Tensor]:
        """The step to try next; the last one is clipped to the end (or stretched to it, by a hundredth)."""
        t, asked = self._times[-1], self.asked
        remaining = self._limit - t
        moved = t + self._length if asked.forwards else t + asked.sign * self._length
        reach, most = 1.01 * self._length, self.controller.max_step
        if most < math.inf:
            reach = torch.minimum(reach, self._length.clamp(min=most * (1 + 1e-9)))
        self._lands = (remaining if asked.forwards else remaining.abs()) <= reach
        stop = torch.where(self._lands, self._limit, moved)
        return t, stop if self.running == asked.members else torch.where(self._running, stop, t)

    def judge(self, stop: Tensor, h: Tensor, squared: Tensor) -> Judged:
        """Which members accept their step to ``stop``, of length ``h`` and with this squared error ratio.

        Sets the length of everybody's next step.
        """
        t, asked, tried, jumps = self._times[-1], self.asked, self.running, self._stops is not None
        self.failed = []
        self._tries += 1
        accepts = squared <= 1 if tried == asked.members else (squared <= 1) & self._running
        self._set_length(accepts, h if asked.forwards else h.abs(), squared)
        now = torch.where(accepts, stop, t)
        running = self._running & (now != asked.stop)
        close = running & (self._length < self._cautious)
        masks = (accepts, running, close, accepts & self._lands) if jumps else (accepts, running, close)
        counts = torch.stack(masks).sum(1)
        if asked.t.shape[1] > 2:
            passed = asked.passed(now)
            counts = torch.cat((counts, passed.sum()[None]))
            self._passed = (self.steps, self._passed[2], passed)
        accepted, still, too_close, *more = counts.tolist()
        landed = more.pop(0) if jumps else tried - still
        inside = more[0] - self._passed_by_all if more else 0
        self._passed_by_all += inside
        self._most = None if accepted == tried else torch.where(accepts, self._largest, self._one)
        if still < tried:
            self._attempts = torch.where(self._running & ~running, self._tries, self._attempts)
        self._running, self.running = running, still
        if too_close or self.steps + 1 >= self.max_steps:
            self._check(now)
        if accepted or not self.running:
            self._times.append(now)
            self._facts.append(Fact(accepted, inside))
            if jumps:
                self._aim()
        return Judged(accepts, accepted, tried, landed)

    def _set_length(self, accepts: Tensor, tried: Tensor, squared: Tensor) -> None:
        control = self.controller
        size = squared.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_(min=1e-20).log_()
        bold = torch.add(self._carry, size, alpha=self._powers[0])
        timid = torch.add(self._safety, size, alpha=self._powers[1])
        factor = torch.where(accepts, bold, timid).exp_().clamp_(control.smallest, control.largest)
        length = tried * (factor if self._most is None else torch.minimum(factor, self._most))
        if self._stops is not None:  # the step was cut short for the stop's sake alone
            length = torch.where(accepts & self._lands, torch.maximum(length, self._length), length)
        self._length = length.clamp(max=control.max_step) if control.max_step < math.inf else length
        size = size.clamp_(min=2 * math.log(1e-4))
        now, later = self._earlier
        self._carry = torch.where(accepts, torch.add(self._previous, size, alpha=now), self._carry)
        if later:
            self._previous = torch.where(accepts, torch.add(self._safety, size, alpha=later), self._previous)

    def _aim(self) -> None:
        """The next time at which each member must end a step."""
        assert self._stops is not None
        key = self.asked.sign * self._times[-1]
        at = torch.searchsorted(self._stops, key[:, None], right=True).clamp(max=self._stops.shape[1] - 1)
        self._limit = self.asked.sign * self._stops.gather(1, at)[:, 0]

    def _least(self, t: Tensor) -> Tensor:
        """The shortest step that may be taken from a time: 16 units in its last place, or ``min_step``."""
        size = torch.maximum(t.abs(), self._span * 1e-12)
        return torch.maximum(16 * (torch.nextafter(size, torch.full_like(size, torch.inf)) - size), self._floor)

    def _check(self, now: Tensor) -> None:
        """Find members that can go no further."""
        if self.steps + 1 >= self.max_steps:
            self.fail(self.accepted + (now != self._times[-1]) >= self.max_steps, MAX_STEPS)
        self.fail(self._length < self._least(now), UNDERFLOW)
