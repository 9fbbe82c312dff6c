"""A schedule laid out in time: when each range runs, and how long each kept state and each tape lives.

One run of a step, and one transpose of a step, take one unit of time, and moving states takes none, unless prices say
otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from revolve.actions import ADVANCE, DROP, RECORD, REVERSE, SAVE, Schedule, both_sweeps
from revolve.budget import Prices


class Move(NamedTuple):
    """The steps start .. stop-1, run, recorded or reversed from one time to another."""

    verb: int
    start: int
    stop: int
    begin: float
    end: float


class Wait(NamedTuple):
    """A state on its way into a tier or out of it, from one time to another."""

    verb: int
    step: int
    tier: int
    begin: float
    end: float


class Life(NamedTuple):
    """A state from its save to its drop, in a numbered slot of its tier."""

    step: int
    tier: int
    slot: int
    begin: float
    end: float


class Tape(NamedTuple):
    """What one recorded step left, until it is reversed."""

    step: int
    begin: float
    end: float


@dataclass(frozen=True)
class Trace:
    steps: int
    moves: tuple[Move, ...]
    lives: tuple[Life, ...]
    tapes: tuple[Tape, ...]
    waits: tuple[Wait, ...] = ()

    @property
    def time(self) -> float:
        return self.moves[-1].end if self.moves else 0

    @property
    def slots(self) -> dict[int, int]:
        """The slots that each tier needs."""
        needed: defaultdict[int, int] = defaultdict(int)
        for life in self.lives:
            needed[life.tier] = max(needed[life.tier], life.slot + 1)
        return dict(sorted(needed.items()))


def trace(schedule: Schedule, steps: int, prices: Prices | None = None) -> Trace:
    """Both sweeps of a schedule, laid out in time. A state takes the lowest slot that is free."""
    moves: list[Move] = []
    waits: list[Wait] = []
    lives: list[Life] = []
    tapes: list[Tape] = []
    held: dict[tuple[int, int], tuple[int, float]] = {}
    recorded: dict[int, float] = {}
    now: float = 0
    for verb, a, b in both_sweeps(schedule, steps):
        lasts = _duration(verb, b, prices)
        if verb in (ADVANCE, RECORD, REVERSE):
            end = now + (b - a) * lasts
            moves.append(Move(verb, a, b, now, end))
            if verb == RECORD:
                recorded |= {step: now + (step - a) * lasts for step in range(a, b)}
            elif verb == REVERSE:
                tapes += (Tape(step, recorded.pop(step), now + (b - step) * lasts) for step in reversed(range(a, b)))
            now = end
        elif lasts:
            waits.append(Wait(verb, a, b, now, now + lasts))
            now += lasts
        if verb == SAVE:
            taken = {slot for (_, tier), (slot, _) in held.items() if tier == b}
            held[a, b] = next(slot for slot in range(len(taken) + 1) if slot not in taken), now - lasts
        elif verb == DROP:
            slot, begin = held.pop((a, b))
            lives.append(Life(a, b, slot, begin, now))
    return Trace(steps, tuple(moves), tuple(sorted(lives)), tuple(tapes), tuple(waits))


def _duration(verb: int, tier: int, prices: Prices | None) -> float:
    """Of one step, or of one state on its way."""
    if prices is None:
        return int(verb in (ADVANCE, RECORD, REVERSE))
    if verb == ADVANCE:
        return prices.step
    if verb == RECORD:
        return prices.step if prices.record is None else prices.record
    if verb == REVERSE:
        return prices.reverse or prices.step
    return dict(enumerate(prices.write if verb == SAVE else prices.read)).get(tier, 0.0) if verb != DROP else 0.0


def letters(trace: Trace) -> str:
    """The trace as text: steps across, time downward; ``>`` a plain run, ``o`` a record, ``<`` a reverse, ``|`` a slot.

    A step that is recorded and reversed at once is one line, ``x``.
    """
    pitch = 2 if trace.steps <= 60 else 1
    width = trace.steps * pitch
    margin = len(str(trace.time))
    lines = [f"{'time':>{margin}}  {_ruler(trace.steps, pitch)}"]
    skip = False
    for move, following in zip(trace.moves, (*trace.moves[1:], None), strict=True):
        if skip:
            skip = False
            continue
        symbol = {ADVANCE: ">", RECORD: "o", REVERSE: "<"}[move.verb]
        if following is not None and following[:3] == (REVERSE, move.start, move.stop) and move.stop == move.start + 1:
            symbol, skip = "x", True
        row = [" "] * width
        held = [life for life in trace.lives if life.begin <= move.begin < life.end]
        for life in held:
            row[life.step * pitch] = "|"
        for step in range(move.start, move.stop):
            row[step * pitch + pitch - 1] = symbol
        lines.append(f"{move.begin:>{max(margin, 4)}}  {''.join(row).rstrip()}")
    return "\n".join(lines)


def _ruler(steps: int, pitch: int) -> str:
    """Every tenth (or fifth) step's number above its column."""
    row = [" "] * (steps * pitch + 8)
    for step in range(0, steps, 10 if pitch == 1 else 5):
        for offset, digit in enumerate(str(step)):
            row[step * pitch + offset] = digit
    return "".join(row).rstrip()
