"""The times of the steps: fixed by the caller, or found by step-size control and frozen once accepted."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

STRIDE = 128
"""So many steps are laid out at once where the end is not known."""

MOST_STEPS = 10**8
"""Fixed steps are laid out before the solve, at some 60 bytes each."""


class SolveError(RuntimeError):
    """A solve that could not be finished; ``status`` says why, and the numbers say where.

    ``y`` is the last good state, a tree like y0 without gradient, at time ``t`` before step ``step``; None if unknown.
    """

    def __init__(self, status: str, message: str, *, t: float, step: int, state: tuple[Tensor, ...] = ()) -> None:
        super().__init__(message)
        self.status, self.t, self.step = status, t, step
        self.state = state
        """The leaves of the last good state."""
        self.y: Any = None


class Timeline(Protocol):
    """Step k runs from time k to time k+1. Times are Python floats: double precision, whatever the state's."""

    landing: bool
    """Whether steps end on every asked time; if not, values in between are interpolated."""

    @property
    def steps(self) -> int:
        """Steps accepted so far."""
        ...

    @property
    def done(self) -> bool: ...

    def ends(self, step: int) -> tuple[float, float]: ...

    def knots(self, t: Tensor) -> Tensor:
        """The steps' times as a differentiable function of the asked times, shape (steps + 1,)."""
        ...


class FixedTimeline:
    """Each interval of ``t`` in equal steps no longer than ``dt`` (one step if None): t_i + (t_{i+1} - t_i) j / m.

    Jumps are ends of intervals too, and stay where they are when ``t`` moves.
    """

    landing = True

    def __init__(self, t: list[float], dt: float | None, jumps: tuple[float, ...] = ()) -> None:
        low, high = min(t[0], t[-1]), max(t[0], t[-1])
        self._jumps = [x for x in sorted(set(jumps) - set(t)) if low < x < high]
        points = np.array([*t, *self._jumps], dtype=np.float64)
        self._order = np.argsort(points if t[-1] >= t[0] else -points, kind="stable")
        self._points = points[self._order]
        spans = np.diff(self._points)
        ratio = np.ones_like(spans) if dt is None else np.abs(spans) / dt
        if ratio.sum() > MOST_STEPS:
            raise ValueError(f"dt={dt} makes {ratio.sum():.3g} steps, whose times fill the memory; give a larger dt")
        self._place(np.maximum(1, np.ceil(ratio * (1 - 1e-12))).astype(np.int64))

    def _place(self, counts: np.ndarray) -> None:
        """So many steps in each interval."""
        points, ends, self._counts = self._points, np.cumsum(counts), counts
        self._interval = np.repeat(np.arange(len(counts)), counts)
        self._fraction = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)) / counts[self._interval]
        times = points[self._interval] + np.diff(points)[self._interval] * self._fraction
        self.times = np.append(times, points[-1])
        """Where the steps start, and where the last one stops."""
        self._times: list[float] = self.times.tolist()

    def moved_along(self, noted: FixedTimeline) -> FixedTimeline:
        """This timeline with as many steps in each interval as another."""
        self._place(noted._counts)
        return self

    @property
    def steps(self) -> int:
        return len(self._times) - 1

    done = True

    def ends(self, step: int) -> tuple[float, float]:
        return self._times[step], self._times[step + 1]

    def knots(self, t: Tensor) -> Tensor:
        jumps = torch.tensor(self._jumps, dtype=t.dtype, device=t.device)
        points = torch.cat((t, jumps))[torch.as_tensor(self._order, device=t.device)]
        interval = torch.as_tensor(self._interval, device=t.device)
        fraction = torch.as_tensor(self._fraction, device=t.device, dtype=t.dtype)
        return torch.cat((points[interval] + (points[interval + 1] - points[interval]) * fraction, points[-1:]))


class GridTimeline:
    """Steps between the times of a grid that starts and stops where the asked times do.

    It moves with its start, or as ``construct`` says, which makes the grid from the asked times.
    """

    landing = False
    done = True

    def __init__(self, grid: tuple[float, ...], construct: Callable[[Tensor], Tensor] | None = None) -> None:
        self._times, self._construct = list(grid), construct

    @property
    def steps(self) -> int:
        return len(self._times) - 1

    def ends(self, step: int) -> tuple[float, float]:
        return self._times[step], self._times[step + 1]

    def knots(self, t: Tensor) -> Tensor:
        if self._construct is not None:
            return torch.cat((t[:1], self._construct(t)[1:-1].to(t), t[-1:]))
        offsets = torch.tensor([x - self._times[0] for x in self._times[1:-1]], dtype=t.dtype, device=t.device)
        return torch.cat((t[:1], t[0] + offsets, t[-1:]))


class StridingTimeline:
    """Equal steps from a start to an end that is not known; they move with the start."""

    landing = False
    done = False

    def __init__(self, start: float, length: float, most: int) -> None:
        self._start, self.length, self._most = start, length, most
        self._times = [start]
        self.extend()

    @property
    def steps(self) -> int:
        """Steps laid out so far."""
        return len(self._times) - 1

    def extend(self) -> None:
        count = self.steps
        if count >= self._most:
            raise SolveError(
                "max_steps",
                f"no event in {count} steps of {abs(self.length):g}, up to t={self._times[-1]:.6g}; give longer steps, or "
                f"start nearer to the event",
                t=self._times[-1],
                step=count,
            )
        further = min(count + STRIDE, self._most)
        self._times += [self._start + self.length * k for k in range(count + 1, further + 1)]

    def ends(self, step: int) -> tuple[float, float]:
        return self._times[step], self._times[step + 1]

    def knots(self, t: Tensor) -> Tensor:
        return t[0] + self.length * torch.arange(len(self._times), dtype=t.dtype, device=t.device)


@dataclass(frozen=True)
class Controller:
    """From error ratios (1 is the tolerance) to the length of the next step.

        h_new = h min(largest, max(smallest, safety e_n^(-(p+i+d)/q) e_{n-1}^((p+2d)/q) e_{n-2}^(-d/q)))

    q is the order of the error estimate. Source: Soederlind (2003), ACM TOMS 29(1), 1-26; the constants of PI are those
    of DOPRI5 (Hairer, Norsett & Wanner, Solving ODEs II, section IV.2: alpha = 0.17, beta = 0.04 at q = 5).
    """

    proportional: float = 0.2
    integral: float = 0.65
    derivative: float = 0.0
    safety: float = 0.9
    smallest: float = 0.2
    largest: float = 10.0
    min_step: float = 0.0
    """A step that would have to be shorter ends the solve."""
    max_step: float = math.inf
    force_min: bool = False
    """Accept steps of ``min_step`` whatever their error, instead of ending the solve."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest < 1 <= self.largest:
            raise ValueError(
                f"smallest={self.smallest}, largest={self.largest}: give factors with 0 < smallest < 1 <= largest"
            )
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety={self.safety} must be above 0 and at most 1, such as 0.9")
        if not 0 <= self.min_step <= self.max_step:
            raise ValueError(f"min_step={self.min_step}, max_step={self.max_step}: give 0 <= min_step <= max_step")

    def factor(self, error: float, previous: tuple[float, float], order: int) -> float:
        """By what to multiply the step, after this error ratio and the last two that were accepted."""
        p, i, d = self.proportional, self.integral, self.derivative
        terms = zip((error, *previous), (-(p + i + d), p + 2 * d, -d), strict=True)
        wanted = self.safety * math.prod(max(e, 1e-10) ** (power / order) for e, power in terms)
        return min(self.largest, max(self.smallest, wanted))

    def shrink(self, error: float, order: int) -> float:
        """By what to multiply a step that was rejected: the error of this step alone decides."""
        if not math.isfinite(error):
            return self.smallest
        return max(self.smallest, self.safety * error ** (-1 / order))


CONTROLLERS: dict[str, Controller] = {
    "I": Controller(proportional=0.0, integral=1.0),
    "PI": Controller(),
    "PID": Controller(proportional=-2 / 9, integral=2 / 9, derivative=1 / 18),
}
"""By name; PID is the filter H312 of Soederlind (2003), for smooth step sequences."""


class CutTimeline:
    """Steps to planned stops, one after the other; each starts where the last one ended, or where it was cut."""

    def __init__(self, start: float, stops: list[float], landing: bool, frozen: bool = False) -> None:
        self.landing = landing
        self._starts, self._stops = [start], stops
        self._frozen = frozen
        """Whether the stops are those of an earlier solve, that over the rest of a cut step among them."""

    @property
    def steps(self) -> int:
        return len(self._stops)

    done = False

    def ends(self, step: int) -> tuple[float, float]:
        start = self._starts[step] if step < len(self._starts) else self._stops[step - 1]
        return start, self._stops[step]

    def take(self, step: int, cut: float | None) -> None:
        """This step has been taken, and cut at a time inside of it if that is given."""
        stop = self._stops[step]
        self._starts.append(stop if cut is None else cut)
        if cut is not None and cut != stop and not self._frozen:
            self._stops.insert(step + 1, stop)

    def knots(self, t: Tensor) -> Tensor:
        raise NotImplementedError("the times of cut steps are carried by the state")


@dataclass
class AdaptiveTimeline:
    """Times found on the way from ``start`` to ``stop``; what has been accepted never changes again."""

    start: float
    stop: float
    order: int
    """Order q of the local error estimate."""
    max_steps: int
    controller: Controller = field(default_factory=Controller)
    jumps: tuple[float, ...] = ()
    """Times at which f is not smooth: steps end there, and the stages at both sides see their own limit."""
    dtype: torch.dtype = torch.float64
    """Accepted times are rounded to it."""
    rejected: int = 0
    landing = False
    _FOUND: ClassVar[tuple[str, ...]] = ("rejected", "_length", "_previous", "_just_rejected")

    def __post_init__(self) -> None:
        self._times = [self.start]
        self._uncut: dict[int, float] = {}
        self._length = min(abs(self.stop - self.start), self.controller.max_step)
        self._previous = (1.0, 1.0)
        self._just_rejected = False
        self._sign = sign = 1.0 if self.stop >= self.start else -1.0
        inside = (t for t in self.jumps if sign * self.start < sign * t < sign * self.stop)
        self._stops = [*sorted(set(inside), key=lambda t: sign * t), self.stop]

    @property
    def steps(self) -> int:
        return len(self._times) - 1

    def begin(self, first: float) -> None:
        """The length of the first step to try, positive; a guess, so that one too short for t to resolve is lengthened."""
        self._length = max(self._limited(first), self._least(self._times[-1]))

    @property
    def done(self) -> bool:
        return self._times[-1] == self.stop

    def ends(self, step: int) -> tuple[float, float]:
        return self._times[step], self._uncut.get(step, self._times[step + 1])

    def cut(self, t: float) -> None:
        """The last step happened as it is; the next one starts at t, inside of it."""
        self._uncut[self.steps - 1], self._times[-1] = self._times[-1], t

    @property
    def trial(self) -> tuple[float, float]:
        """A step from here of the length to be tried, wherever it ends."""
        return self._times[-1], self._times[-1] + self._sign * self._length

    def propose(self) -> tuple[float, float]:
        """The step to try next, the last one clipped to the end (or stretched to it, by a hundredth)."""
        t = self._times[-1]
        if self.steps >= self.max_steps:
            raise SolveError(
                "max_steps",
                f"max_steps={self.max_steps} taken and {self._progress(t)} "
                f"(step size {self._length:.3g}); allow more steps, loosen rtol/atol, or the problem is stiff",
                t=t,
                step=self.steps,
            )
        least = self._least(t)
        if self._length < least:
            raise SolveError(
                "underflow",
                f"the step size fell to {self._length:.3g} at t={t:.6g}, step {self.steps}: below {least:.3g}, "
                f"{'which is min_step' if least == self.controller.min_step else 'what t can resolve'}; "
                f"the solution may blow up there, or rtol/atol are too tight for the precision",
                t=t,
                step=self.steps,
            )
        stop = next(x for x in self._stops if self._sign * x > self._sign * t)
        ahead = self._rounded(t + self._sign * self._length)
        reach = min(1.01 * self._length, max(self._length, self.controller.max_step * (1 + 1e-9)))
        if abs(stop - t) <= reach or self._sign * ahead >= self._sign * stop:
            return t, stop
        return t, ahead

    def _progress(self, t: float) -> str:
        return f"no event met by t={t:.6g}" if math.isinf(self.stop) else f"t={t:.6g} of {self.stop:.6g} reached"

    def _least(self, t: float) -> float:
        """A step must not be shorter, from here."""
        extent = abs(self.stop - self.start)
        scale = max(abs(t), extent * 1e-12 if math.isfinite(extent) else 0.0)
        resolved = 16 * math.ulp(scale) if self.dtype is torch.float64 else 4 * torch.finfo(self.dtype).eps * scale
        return max(self.controller.min_step, resolved)

    def _rounded(self, t: float) -> float:
        return t if self.dtype is torch.float64 else torch.tensor(t, dtype=self.dtype).item()

    def _limited(self, length: float) -> float:
        control = self.controller
        return min(max(length, control.min_step) if control.force_min else length, control.max_step)

    def judge(self, t_new: float, error: float) -> bool:
        """Whether a step to t_new with this error ratio is accepted; sets the length of the next one to try."""
        tried = abs(t_new - self._times[-1])
        least = self.controller.force_min and tried <= self.controller.min_step * (1 + 1e-9)
        if error <= 1 or (least and math.isfinite(error)):
            factor = self.controller.factor(error, self._previous, self.order)
            length = tried * (min(1.0, factor) if self._just_rejected else factor)
            if t_new in self._stops:  # the step was cut short for the stop's sake alone
                length = max(length, self._length)
            self._length = self._limited(length)
            self._previous = (max(error, 1e-4), self._previous[0])
            self._just_rejected = False
            self._times.append(t_new)
            return True
        length = tried * self.controller.shrink(error, self.order)
        self._length = length if least else self._limited(length)
        self._just_rejected = True
        self.rejected += 1
        return False

    def snapshot(self) -> dict[str, Any]:
        """The accepted times, and what the length of the next step depends on."""
        return {name: getattr(self, name) for name in self._FOUND} | {"_times": np.array(self._times)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        for name in self._FOUND:
            setattr(self, name, snapshot[name])
        self._times = snapshot["_times"].tolist()

    def moved_along(self, noted: AdaptiveTimeline) -> AdaptiveTimeline:
        """This timeline with the accepted times of another in between, and its end if that reached it."""
        self._times = [self.start, *noted._times[1:]]
        if noted.done:
            self._times[-1] = self.stop
        return self

    def knots(self, t: Tensor) -> Tensor:
        """Accepted times in between are constants; only both ends (if the last was reached) move with the caller's."""
        constant = torch.tensor(self._times[1:], dtype=t.dtype, device=t.device)
        return torch.cat((t[:1], constant[:-1], t[-1:])) if self.done else torch.cat((t[:1], constant))


class GraphTimes:
    """The times of the steps as functions of the caller's, for torch's own graph; also of steps that are being found."""

    def __init__(self, timeline: Timeline, t: Tensor) -> None:
        self._timeline, self._t = timeline, t
        known = not isinstance(timeline, AdaptiveTimeline | StridingTimeline)
        self._knots = timeline.knots(t) if known else None

    def ends(self, step: int, start: float, stop: float) -> Tensor:
        """Where a step starts and stops, shape (2,); its numbers are given."""
        if self._knots is not None:
            return self._knots[step : step + 2]
        return torch.stack((self._moving(step, start), self._moving(step + 1, stop)))

    def __getitem__(self, knot: int) -> Tensor:
        if self._knots is not None:
            return self._knots[knot]
        return self._moving(knot, self._timeline.ends(max(knot - 1, 0))[knot > 0])

    def _moving(self, knot: int, time: float) -> Tensor:
        t, timeline = self._t, self._timeline
        if isinstance(timeline, StridingTimeline):
            return t[0] + timeline.length * knot
        assert isinstance(timeline, AdaptiveTimeline)
        return t[0] if knot == 0 else t[-1] if time == timeline.stop else t.new_tensor(time)


class Movable(Protocol):
    def moved_along(self, noted: Any) -> Any:
        """This timeline with the steps of another of its kind."""
        ...


Steps = TypeVar("Steps", bound=Movable)


class Replay:
    """What a sequence of solves found (the times of their steps), noted once and then used again in the same order."""

    def __init__(self) -> None:
        self._timelines: list[Movable] = []
        self._next: int | None = None

    def rewind(self) -> None:
        """From here on, solves take the steps that were noted."""
        self._next = 0

    def again(self, found: Steps) -> Steps:
        """What a solve is to use in place of what it made."""
        if self._next is None:
            self._timelines.append(found)
            return found
        if self._next == len(self._timelines):
            raise RuntimeError(f"only {len(self._timelines)} solves were noted; a replay must make as many")
        noted = self._timelines[self._next]
        if type(noted) is not type(found):
            raise RuntimeError("a replay must make the solves that were noted: fixed steps here, controlled ones there")
        self._next += 1
        moved: Steps = found.moved_along(noted)
        return moved


_REPLAY: ContextVar[Replay | None] = ContextVar("replay", default=None)


@contextmanager
def frozen_steps() -> Iterator[Replay]:
    """Inside, the steps of solves are noted; after ``rewind()`` they are taken again, whatever the errors and ``dt``.

    Finite differences need this: the gradient is that of the steps that were taken, not of how they were chosen.
    """
    token = _REPLAY.set(Replay())
    try:
        replay = _REPLAY.get()
        assert replay is not None
        yield replay
    finally:
        _REPLAY.reset(token)


def replaying() -> bool:
    """Whether steps are being noted, or taken again."""
    return _REPLAY.get() is not None


def replayed(found: Steps) -> Steps:
    """What was found itself, or what was noted while steps are frozen."""
    replay = _REPLAY.get()
    return found if replay is None else replay.again(found)


class Asked:
    """The times at which the caller wants the solution, and which of them a step covers."""

    def __init__(self, t: list[float]) -> None:
        self.t = t
        self._sign = 1.0 if t[-1] >= t[0] else -1.0
        self._ordered = [self._sign * x for x in t]

    def inside(self, start: float, stop: float) -> range:
        """Indices j with t_j in (start, stop]."""
        low = bisect_right(self._ordered, self._sign * start)
        return range(low, bisect_right(self._ordered, self._sign * stop, lo=low))
