"""A solve with events: checked, carried out, and what happened put in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.bdf import DifferentiationFormulas
from adjoint.events import At, Event, Occurrences
from adjoint.frozen import replayed
from adjoint.methods import Method, untimed_program_of
from adjoint.problem import Gradient, Outcome, Problem
from adjoint.steppers.adams import Adams
from adjoint.steppers.bdf import refuse_moving
from adjoint.steppers.control import Control
from adjoint.steppers.eventful import EventfulProgram, Log
from adjoint.steppers.symplectic import Splitting
from adjoint.tensors import State, Structure
from adjoint.timeline import CutTimeline, FixedTimeline
from adjoint.transforms import mapped

Events = Sequence[Event | At]


def check_events(events: Any, method: Any, t: Tensor, refused: dict[str, bool]) -> tuple[Event | At, ...]:
    """The events as a tuple; raises for what a solve with events cannot do. ``refused``: what else is asked for."""
    if isinstance(events, (Event, At)) or not isinstance(events, Sequence):
        raise TypeError(f"events={events!r} must be a series of Event and At; for a single one write events=[..]")
    for i, event in enumerate(events):
        if not isinstance(event, (Event, At)):
            raise TypeError(f"events[{i}]={event!r} is neither an Event nor an At; write Event(function, ..)")
    for name, asked in refused.items():
        if asked:
            out = "solve the members one after the other" if name == "batched=True" else "leave one of them out"
            raise ValueError(f"events= and {name} cannot be had together yet; {out}")
    if mapped():
        raise NotImplementedError("members of a vmap have events at different times; solve them one after the other")
    for kind, why in (
        (Splitting, "has no interpolant on which events are found"),
        (Adams, "leans on slopes of earlier steps, which do not hold behind an event"),
    ):
        if isinstance(method, kind):
            raise ValueError(f"method={method.name!r} {why}; give 'rk4', 'tsit5' or 'radau5'")
    if isinstance(getattr(method, "tableau", None), DifferentiationFormulas) and torch.is_grad_enabled():
        _check_restarts(events, t)
    if len(t) < 2:
        raise ValueError("events happen between two times, and t has one; give the time to which to solve")
    _check_known(events, t)
    return tuple(events)


def _check_restarts(events: Events, t: Tensor) -> None:
    """Raise ValueError if BDF would begin again at a time that moves."""
    if t.requires_grad:
        refuse_moving("t requires grad")
    for i, event in enumerate(events):
        if isinstance(event, Event) and event.acts and event.terminal not in (True, 1):
            refuse_moving(f"events[{i}] happens where the solution says")
        if isinstance(event, At) and isinstance(event.times, Tensor) and event.times.requires_grad:
            refuse_moving(f"events[{i}].times requires grad")


def _check_known(events: Events, t: Tensor) -> None:
    """Known times must not be where their derivative has two sides, nor two at once if one of them moves."""
    first: dict[float, int] = {}
    for i, event in enumerate(events):
        if not isinstance(event, At) or not isinstance(event.times, Tensor):
            continue
        for j, time in enumerate(event.times.tolist()):
            moves = event.times.requires_grad
            if moves and time in (t[0].item(), t[-1].item()):
                raise ValueError(
                    f"events[{i}].times[{j}]={time:g} is an end of t and requires grad, and has no derivative there; give "
                    f"it in an At of its own that does not, or a longer t"
                )
            other = first.setdefault(time, i)
            both = events[other]
            if other != i and (
                moves or (isinstance(both, At) and isinstance(both.times, Tensor) and both.times.requires_grad)
            ):
                raise ValueError(
                    f"events[{other}] and events[{i}] both have the time {time:g}, and one of them requires grad: which "
                    f"comes first has no derivative. Give one At that does what both do"
                )


def of_states_alone(events: Events) -> tuple[Event | At, ...]:
    """The same events for a state that has the integral of a running cost beside it."""
    found: list[Event | At] = []
    for event in events:
        reset = None if event.reset is None else _beside(event.reset)
        if isinstance(event, At):
            found.append(At(event.times, reset))
        else:
            first = _of_first(event.function)
            found.append(Event(first, reset, event.terminal, event.direction, event.samples))
    return tuple(found)


def _of_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_pair(t: Tensor, pair: Any, *args: Any) -> Tensor:
        return function(t, pair[0], *args)

    return of_pair


def _beside(reset: Callable[..., Any]) -> Callable[..., Any]:
    def of_pair(t: Tensor, pair: Any, *args: Any) -> Any:
        return reset(t, pair[0], *args), pair[1]

    return of_pair


def program_with_events(
    method: Method, t: Tensor, structure: Structure, start: State, control: Control, events: Events
) -> EventfulProgram:
    """The steps of a solve with events; while steps are frozen, those of the solve that was noted.

    Known times are ends of steps at which f may jump.
    """
    log = replayed(Log())
    times = [x for e in events if isinstance(e, At) and isinstance(e.times, Tensor) for x in e.times.tolist()]
    control = replace(control, jumps=(*control.jumps, *times))
    inner = untimed_program_of(method, t.detach(), structure, start, control)
    program = EventfulProgram(inner, events, t, log)
    asked, tableau = inner.asked.t, inner.tableau
    if log.frozen is not None:
        stops = [_stop(note.stop, note.pin, events, asked) for note in log.frozen]
        inner.timeline = CutTimeline(asked[0], stops, not tableau.adaptive, frozen=True)
    elif tableau.adaptive:
        order, ends = tableau.error_order + 1, (*control.jumps, *control.stops)
        most, controller, dtype = control.max_steps, control.controller, control.rounding
        inner.timeline = AdaptiveTimeline(asked[0], asked[-1], order, most, controller, ends, dtype)
    else:
        grid = FixedTimeline(asked, control.dt, control.jumps)
        inner.timeline = CutTimeline(asked[0], [grid.ends(k)[1] for k in range(grid.steps)], True)
    return program


def _stop(noted: float, pin: tuple[int, int] | None, events: Events, asked: list[float]) -> float:
    """Where a frozen step ends now."""
    if pin is None:
        return noted
    event = None if pin[0] < 0 else events[pin[0]]
    if event is None:
        return asked[pin[1]]
    assert isinstance(event, At) and isinstance(event.times, Tensor)
    return float(event.times[pin[1]])


def carried_out(
    program: EventfulProgram,
    function: tuple[Callable[..., Any], tuple[Any, ...]],
    t: Tensor,
    state: State,
    how: Gradient,
    memory: dict[str, Any],
    tick: Any,
) -> Outcome:
    """The outcome of the chain; its outputs are the leaves of y and a time."""
    held = tuple(
        (None, event.reset, event.times) if isinstance(event, At) else (event.function, event.reset, None)
        for event in program.events
    )
    return how(Problem(program, (*function, None, (t, held)), program.first(state, t[0]), None, **memory, tick=tick))


def put_in_order(
    program: EventfulProgram, outcome: Outcome, t: Tensor, structure: Structure
) -> tuple[Tensor, Any, tuple[Occurrences, ...], str]:
    """The times that were reached, the states there, what happened, and how the solve ended."""
    *leaves, at = outcome.outputs
    asked, sign = program.asked.t, (1.0 if program.asked.t[-1] >= program.asked.t[0] else -1.0)
    count = sum(sign * x <= sign * program.reached for x in asked) if program.finished_early else len(asked)
    rows: list[list[int]] = [[] for _ in program.events]
    row = len(asked)
    happened = [i for i, _ in program.known_at(asked[0])] if program.taken else []
    for note in program.log.notes:
        happened += [*(x.event for x in note.found), *(i for i, _ in note.known)]
    for i in happened:
        rows[i].append(row)
        row += 2
    events = tuple(_occurrences(places, leaves, at, t, structure) for places in rows)
    ys = [x[:count] for x in leaves]
    failure = outcome.failure
    if failure is not None:
        beyond = [j for j, x in enumerate(asked) if sign * x > sign * failure.t]
        with torch.no_grad():
            for x in ys:
                x[beyond] = math.nan
        size = structure.spec.num_leaves
        failure.y = structure.unflatten([x.clone() for x in failure.state[:size]]) if failure.state else None
    ending = failure.status if failure is not None else "event" if program.finished_early else "success"
    return t[:count], structure.unflatten(ys), events, ending


def _occurrences(rows: list[int], leaves: Sequence[Tensor], at: Tensor, t: Tensor, structure: Structure) -> Occurrences:
    index = torch.tensor(rows, dtype=torch.int64, device=at.device)
    before, after = ([x[index + shift] for x in leaves] for shift in (0, 1))
    return Occurrences(at[index].to(t), structure.unflatten(before), structure.unflatten(after))
