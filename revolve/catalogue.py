"""Every schedule by the name that the command line and the tests know it by."""

from __future__ import annotations

from revolve.actions import Schedule
from revolve.chains import Differing
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.hierarchy import HRevolve
from revolve.mixed import Mixed, Stages
from revolve.multistage import Multistage
from revolve.online import Online
from revolve.schedules import Binomial, Periodic, StoreAll, StoreNothing
from revolve.segments import Segments
from revolve.selected import Bisection, Selected

SCHEDULES: dict[str, type[Schedule]] = {
    "all": StoreAll,
    "nothing": StoreNothing,
    "periodic": Periodic,
    "binomial": Binomial,
    "online": Online,
    "bisection": Bisection,
    "selected": Selected,
    "segments": Segments,
    "multistage": Multistage,
    "hrevolve": HRevolve,
    "disk": DiskRevolve,
    "periodic-disk": PeriodicDisk,
    "mixed": Mixed,
    "stages": Stages,
    "differing": Differing,
}
