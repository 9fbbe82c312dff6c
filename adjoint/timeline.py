"""The times of the steps: fixed by the caller, or found by step-size control and frozen once accepted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Protocol

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
