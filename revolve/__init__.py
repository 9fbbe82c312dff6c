"""What to keep and what to redo: schedules that reverse a chain of steps in bounded memory."""

from revolve.actions import (
    GIVEN,
    Action,
    Advance,
    Drop,
    Load,
    Record,
    Report,
    Reverse,
    Save,
    Saved,
    Schedule,
    TierReport,
    both_sweeps,
    decode,
    encode,
    left_behind,
)
from revolve.binomial import (
    beta,
    extra_steps,
    fewest_slots,
    fewest_writes,
    longest_chain,
    optimal_splits,
    repetitions,
)
from revolve.budget import BudgetError, Plan, Prices, format_bytes, parse_bytes, sweep, uniform_sweep
from revolve.catalogue import SCHEDULES
from revolve.chains import Differing
from revolve.codecs import Cast
from revolve.disk import DiskRevolve, PeriodicDisk
from revolve.files import StoreError
from revolve.graph_plans import plan_graph
from revolve.graphs import Network, Node, Way
from revolve.hierarchy import HRevolve, Tier
from revolve.journal import Journal
from revolve.measured import calibrate
from revolve.mixed import Mixed, Stages
from revolve.multistage import Multistage
from revolve.online import Online
from revolve.planner import OpenPlan, Storage, plan
from revolve.referee import VerificationError, verify
from revolve.run import Run, Stepper
from revolve.schedules import Binomial, Periodic, StoreAll, StoreNothing
from revolve.segments import Segments
from revolve.selected import Bisection, Selected
from revolve.sizes import Parts
from revolve.stores import CheckpointStore, Disk, Memory
from revolve.tiles import Grid, Patch, Tile
from revolve.weigh import weigh
from revolve.written import Written

__all__ = [
    "GIVEN",
    "SCHEDULES",
    "Action",
    "Advance",
    "Binomial",
    "Bisection",
    "BudgetError",
    "Cast",
    "CheckpointStore",
    "Differing",
    "Disk",
    "DiskRevolve",
    "Drop",
    "Grid",
    "HRevolve",
    "Journal",
    "Load",
    "Memory",
    "Mixed",
    "Multistage",
    "Network",
    "Node",
    "Online",
    "OpenPlan",
    "Parts",
    "Patch",
    "Periodic",
    "PeriodicDisk",
    "Plan",
    "Prices",
    "Record",
    "Report",
    "Reverse",
    "Run",
    "Save",
    "Saved",
    "Schedule",
    "Segments",
    "Selected",
    "Stages",
    "Stepper",
    "Storage",
    "StoreAll",
    "StoreError",
    "StoreNothing",
    "Tier",
    "TierReport",
    "Tile",
    "VerificationError",
    "Way",
    "Written",
    "beta",
    "both_sweeps",
    "calibrate",
    "decode",
    "encode",
    "extra_steps",
    "fewest_slots",
    "fewest_writes",
    "format_bytes",
    "left_behind",
    "longest_chain",
    "optimal_splits",
    "parse_bytes",
    "plan",
    "plan_graph",
    "repetitions",
    "sweep",
    "uniform_sweep",
    "verify",
    "weigh",
]
