"""Exact discrete adjoint gradients of time-stepping programs on torch tensors, within a memory budget."""

from adjoint import check, state_space
from adjoint.adaptive_timeline import CONTROLLERS, Controller
from adjoint.chain import chain, checkpoint, checkpoint_sequential, graph
from adjoint.checked import ReproducibilityError
from adjoint.checkpointed import Checkpointed, checkpointed
from adjoint.estimate import Estimate, estimate
from adjoint.events import At, Event, Occurrences
from adjoint.frozen import frozen_steps
from adjoint.gradients import GRADIENTS, Backprop, Backsolve, Discrete, Tangent
from adjoint.implicit_method import BDF, Implicit
from adjoint.implicit_tableau import ImplicitTableau, theta_method
from adjoint.implicit_tableaus import IMPLICIT
from adjoint.interpolate import DenseSolution
from adjoint.interpolating import Gauss, Interpolating, Quadrature
from adjoint.linear import Dense
from adjoint.linear_scan import linear_scan
from adjoint.members import MemberStats
from adjoint.newton import Objective, gauss_newton, hvp
from adjoint.odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from adjoint.problem import Stats
from adjoint.reversible import Reversible
from adjoint.rosenbrock_tableaus import ROSENBROCK, RosenbrockTableau
from adjoint.scan import scan
from adjoint.selective import Selective
from adjoint.signals import Signal
from adjoint.solve import Solution, solve
from adjoint.sparse import Krylov, Sparse
from adjoint.steady import SteadyState, steady_state
from adjoint.steppers.adams import MULTISTEP, Adams
from adjoint.steppers.newton import Newton
from adjoint.steppers.symplectic import SPLITTINGS, Flows, Splitting
from adjoint.stepping import TakenStep, steps
from adjoint.tableaus import METHODS, Tableau
from adjoint.tiers import Device, Files, Host
from adjoint.timeline import SolveError
from adjoint.touched import UntrackedTensorError

__all__ = [
    "BDF",
    "CONTROLLERS",
    "GRADIENTS",
    "IMPLICIT",
    "METHODS",
    "MULTISTEP",
    "ROSENBROCK",
    "SPLITTINGS",
    "Adams",
    "At",
    "Backprop",
    "Backsolve",
    "Checkpointed",
    "Controller",
    "Dense",
    "DenseSolution",
    "Device",
    "Discrete",
    "Estimate",
    "Event",
    "Files",
    "Flows",
    "Gauss",
    "Host",
    "Implicit",
    "ImplicitTableau",
    "Interpolating",
    "Krylov",
    "MemberStats",
    "Newton",
    "Objective",
    "Occurrences",
    "Quadrature",
    "ReproducibilityError",
    "Reversible",
    "RosenbrockTableau",
    "Selective",
    "Signal",
    "Solution",
    "SolveError",
    "Sparse",
    "Splitting",
    "Stats",
    "SteadyState",
    "Tableau",
    "TakenStep",
    "Tangent",
    "UntrackedTensorError",
    "chain",
    "check",
    "checkpoint",
    "checkpoint_sequential",
    "checkpointed",
    "estimate",
    "frozen_steps",
    "gauss_newton",
    "graph",
    "hvp",
    "linear_scan",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "scan",
    "solve",
    "state_space",
    "steady_state",
    "steps",
    "theta_method",
]
