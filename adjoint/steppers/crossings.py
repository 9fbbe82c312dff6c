"""Where event functions cross zero along the interpolant of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from adjoint.events import At, Event
from adjoint.interpolate import Polynomials
from adjoint.tensors import State
from adjoint.timeline import SolveError

Value = Callable[[int, Tensor, State], Tensor]
"""events[i] at a time and a state: one number."""

NOISE = 1e-10
"""An event function that has just crossed zero counts as zero if it is below this part of its size around there."""


class Found(NamedTuple):
    """An event that happened."""

    event: int
    time: float


class Crossings:
    """The signs of all event functions along a solve, and where they change."""

    def __init__(self, events: Sequence[Event | At], refuse_ties: bool = True) -> None:
        self._refuses_ties = refuse_ties
        self.events = {i: e for i, e in enumerate(events) if isinstance(e, Event)}
        self._signs: dict[int, int] = {}
        """0: not known yet; the function was zero, and the next step shows what it becomes."""
        self._sizes: dict[int, float] = {}
        """Of those that have just happened."""
        self._last: dict[int, float] = {}

    def begin(self, value: Value, t: float, y: State) -> None:
        at = torch.tensor(t, dtype=torch.float64, device=y[0].device)
        y = tuple(x.detach() for x in y)
        with torch.no_grad():
            self._signs = {i: _sign(self._checked(value, i, at, y)) for i in self.events}

    def go_on(self, value: Value, t: float, y: State, changed: bool) -> None:
        """The signs behind a step; ``changed``: the state may have jumped there."""
        at = torch.tensor(t, dtype=torch.float64, device=y[0].device)
        with torch.no_grad():
            for i in self.events if changed else ():
                number = self._checked(value, i, at, y)
                self._signs[i] = 0 if abs(number) <= NOISE * self._sizes.get(i, 0.0) else _sign(number)
        self._sizes = {}

    def look(
        self, value: Value, u: Polynomials, start: float, stop: float, new: State
    ) -> tuple[tuple[Found, ...], float | None]:
        """What happens in a step, in order, and the time of the event that cuts it, if one does."""
        u = Polynomials(u.times.detach(), [x.detach() for x in u.coefficients])
        sign = 1.0 if stop > start else -1.0
        with torch.no_grad():
            every = {i: self._of_one(i, value, u, start, stop, new) for i in self.events}
        acting = [(sign * times[0], i) for i, (times, _) in every.items() if times and self.events[i].acts]
        first, which = min(acting, default=(math.inf, -1))
        near = 16 * math.ulp(max(abs(start), abs(stop)))
        together = sorted(i for time, i in acting if time - first <= near)
        if len(together) > 1 and self._refuses_ties:
            raise ValueError(
                f"events[{together[0]}] and events[{together[1]}] happen at once, at t={sign * first:.6g}: which comes "
                f"first has no derivative. Give one event that does what both do"
            )
        found = [
            Found(i, t) for i, (times, _) in every.items() for t in times if i != which and sign * t <= first + near
        ]
        found.sort(key=lambda x: sign * x.time)
        if which < 0:
            self._signs = {i: last for i, (_, last) in every.items()}
            return tuple(found), None
        cut = sign * first
        self._check_again(which, cut, start, near)
        for i in {x.event for x in found} | {which}:
            ends = (value(i, u.times[j], u.at(u.times[j])) for j in (0, 1))
            self._sizes[i] = max(abs(x.item()) for x in ends)
        return (*found, Found(which, cut)), cut

    def again(self, found: Found, value: Value, u: Polynomials) -> Found:
        """The same event on the interpolant of a step that has moved a little: Newton's iteration from where it was."""
        u = Polynomials(u.times.detach(), [x.detach() for x in u.coefficients])
        t = torch.tensor(found.time, dtype=u.times.dtype, device=u.times.device)
        for _ in range(50):
            at = t.clone().requires_grad_()
            with torch.enable_grad():
                number = value(found.event, at, u.at(at))
                (slope,) = torch.autograd.grad(number, at)
            change = float(number.detach() / slope)
            t = t - change
            if abs(change) <= 2 * math.ulp(abs(t.item())):
                break
        return Found(found.event, t.item())

    def _of_one(
        self, i: int, value: Value, u: Polynomials, start: float, stop: float, new: State
    ) -> tuple[list[float], int]:
        """When events[i] happens in a step (only once, if it cuts the step), and its sign at the end."""
        event, sign = self.events[i], self._signs[i]

        def number(t: float) -> float:
            at = torch.tensor(t, dtype=u.times.dtype, device=u.times.device)
            return self._checked(value, i, at, u.at(at))

        left, times = start, []
        if sign == 0:
            sign, left = self._next_sign(i, value, u, number, start, stop)
        inner = [start + (stop - start) * (j + 1) / (event.samples + 1) for j in range(event.samples)]
        for right in (*inner, stop):
            if abs(right - start) <= abs(left - start):
                continue
            end = u.times.new_tensor(right)
            found = self._checked(value, i, end, new) if right == stop else number(right)
            if sign == 0:
                sign = _sign(found)
            elif _sign(found) != sign:
                if event.direction in (0, -sign):
                    times.append(_root(number, left, right, sign))
                sign = _sign(found) if found else (0 if right == stop else -sign)
                if times and event.acts:
                    break
            left = right
        return times, sign

    def _next_sign(
        self, i: int, value: Value, u: Polynomials, number: Callable[[float], float], start: float, stop: float
    ) -> tuple[int, float]:
        """The sign of a function that is zero at the start, by its derivative along the step; and where it has it."""
        at = u.times[0].clone().requires_grad_()
        with torch.enable_grad():
            found = value(i, at, u.at(at))
            slope = torch.autograd.grad(found, at, allow_unused=True)[0] if found.requires_grad else None
        sign = _sign((0.0 if slope is None else slope.item()) * (1.0 if stop > start else -1.0))
        if sign == 0:
            return 0, start
        for power in range(40, 0, -1):
            t = start + (stop - start) * 2.0**-power
            if t != start and _sign(number(t)) == sign:
                return sign, t
        return sign, start

    def _check_again(self, i: int, t: float, start: float, near: float) -> None:
        """An event that repeats without time going on would do so forever."""
        if i in self._last and abs(t - self._last[i]) <= near:
            raise SolveError(
                "events",
                f"events[{i}] happens again and again at t={t:.6g}, and time does not go on: let its reset leave the "
                f"surface on which it happens, give it a direction, or end the solve with terminal=",
                t=t,
                step=-1,
            )
        self._last[i] = t

    def _checked(self, value: Value, i: int, t: Tensor, y: State) -> float:
        found = value(i, t, y).item()
        if not math.isfinite(found):
            raise ValueError(
                f"the function of events[{i}] gave {found} at t={float(t):.6g}; it must be finite where the solution is"
            )
        return found


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _root(number: Callable[[float], float], left: float, right: float, sign: int) -> float:
    """Where a function of this sign at the left end loses it, as nearly as time can be told."""
    if number(left) * sign <= 0:  # by a rounding error
        return left
    if number(right) * sign >= 0:
        return right
    return float(brentq(number, left, right, xtol=4 * math.ulp(max(abs(left), abs(right))), rtol=8.9e-16))
