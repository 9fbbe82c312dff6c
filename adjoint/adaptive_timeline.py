"""Times found on the way by step-size control."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adjoint.timeline import SolveError, StridingTimeline, Timeline


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
