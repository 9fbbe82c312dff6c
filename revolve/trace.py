"""A schedule laid out in time: when each range runs, and how long each kept state and each tape lives.

One run of a step, and one transpose of a step, take one unit of time; moving states takes none.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from revolve.actions import ADVANCE, DROP, RECORD, REVERSE, SAVE, Schedule, both_sweeps


class Move(NamedTuple):
    """The steps start .. stop-1, run, recorded or reversed from one time to another."""

    verb: int
    start: int
    stop: int
    begin: int
    end: int


class Life(NamedTuple):
    """A state from its save to its drop, in a numbered slot of its tier."""

    step: int
    tier: int
    slot: int
    begin: int
    end: int


class Tape(NamedTuple):
    """What one recorded step left, until it is reversed."""

    step: int
    begin: int
    end: int


@dataclass(frozen=True)
class Trace:
    steps: int
    moves: tuple[Move, ...]
    lives: tuple[Life, ...]
    tapes: tuple[Tape, ...]

    @property
    def time(self) -> int:
        return self.moves[-1].end if self.moves else 0

    @property
    def slots(self) -> dict[int, int]:
        """The slots that each tier needs."""
        needed: defaultdict[int, int] = defaultdict(int)
        for life in self.lives:
            needed[life.tier] = max(needed[life.tier], life.slot + 1)
        return dict(sorted(needed.items()))


def trace(schedule: Schedule, steps: int) -> Trace:
    """Both sweeps of a schedule, laid out in time. A state takes the lowest slot that is free."""
    moves: list[Move] = []
    lives: list[Life] = []
    tapes: list[Tape] = []
    held: dict[tuple[int, int], tuple[int, int]] = {}
    recorded: dict[int, int] = {}
    now = 0
    for verb, a, b in both_sweeps(schedule, steps):
        if verb in (ADVANCE, RECORD, REVERSE):
            moves.append(Move(verb, a, b, now, now + b - a))
            if verb == RECORD:
                recorded |= {step: now + step - a for step in range(a, b)}
            elif verb == REVERSE:
                tapes += (Tape(step, recorded.pop(step), now + b - step) for step in reversed(range(a, b)))
            now += b - a
        elif verb == SAVE:
            taken = {slot for (_, tier), (slot, _) in held.items() if tier == b}
            held[a, b] = next(slot for slot in range(len(taken) + 1) if slot not in taken), now
        elif verb == DROP:
            slot, begin = held.pop((a, b))
            lives.append(Life(a, b, slot, begin, now))
    return Trace(steps, tuple(moves), tuple(sorted(lives)), tuple(tapes))


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
