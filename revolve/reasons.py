"""Why a schedule: what each one promises, in a sentence."""

from __future__ import annotations

from revolve import binomial
from revolve.actions import Report, Schedule
from revolve.chains import Differing
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.hierarchy import HRevolve
from revolve.mixed import Mixed, Stages
from revolve.multistage import Multistage
from revolve.online import Online
from revolve.schedules import Binomial, Periodic, StoreAll, StoreNothing
from revolve.segments import Segments
from revolve.selected import Bisection, Selected


def promise(schedule: Schedule, report: Report) -> str:
    """What the schedule is the best at, or what it pays for being simple; empty for one that is not known here."""
    match schedule:
        case StoreAll():
            return "Every tape is kept, so nothing runs twice."
        case StoreNothing():
            return "Only x_0 is kept, and every step is run to from there."
        case Binomial():
            return "No schedule that keeps so few states runs less." if report.steps > 1 else ""
        case Online():
            reach = binomial.beta(slots=schedule.slots, repetitions=2) + 1
            if report.steps <= reach:
                return "The end is found on the way, and yet no schedule that knows it runs less in as many slots."
            return (
                f"The end is found on the way: the least there is up to {reach} steps, and near it beyond."
                + _beside(report)
            )
        case Periodic() | Selected() | Bisection():
            return _beside(report).lstrip()
        case Segments():
            return "Every step runs twice at most; the tapes of one segment are held together."
        case Multistage(promotes=True):
            return "No schedule with so few plain runs writes and reads less on disk."
        case Multistage():
            return "No schedule in as many slots runs less; the states that are used most lie in memory."
        case HRevolve() | DiskRevolve(rereads=True):
            return "No plan costs less in runs, writes and reads together."
        case DiskRevolve():
            return "No plan that reads every file once costs less in runs, writes and reads together."
        case PeriodicDisk():
            return f"A file every {_spaced(schedule.period)}, for chains that are too long for the exact optimum."
        case Mixed() | Stages():
            return "No plan that keeps states or tapes in so much memory runs less."
        case Differing(exact=True):
            return "The steps differ; no sequence of moves within the budget costs less."
        case Differing():
            return "The steps differ; this is the least cost while what is kept stays until it is needed no more."
    return ""


def _spaced(number: int) -> str:
    return "step" if number == 1 else f"{number} steps"


def _beside(report: Report) -> str:
    """The price of Binomial in as many slots."""
    slots = report.peak_slots
    if report.steps == 1 or not slots:
        return ""
    least = binomial.extra_steps(steps=report.steps, slots=slots)
    if least == report.plain_runs:
        return " Binomial runs no less in as many slots."
    return f" Binomial would make {least} plain runs in as many slots."
