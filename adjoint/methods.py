"""Every method by name, of every family, and the program that takes its steps."""

from __future__ import annotations

from torch import Tensor

from adjoint.bdf import DifferentiationFormulas
from adjoint.implicit_method import Implicit
from adjoint.implicit_tableaus import IMPLICIT
from adjoint.rosenbrock_tableaus import ROSENBROCK, RosenbrockTableau
from adjoint.steppers.adams import MULTISTEP, Adams, AdamsProgram
from adjoint.steppers.bdf import BdfProgram
from adjoint.steppers.control import Control
from adjoint.steppers.explicit import ExplicitProgram, with_timeline
from adjoint.steppers.implicit import ImplicitProgram
from adjoint.steppers.rosenbrock import RosenbrockProgram
from adjoint.steppers.symplectic import SPLITTINGS, Splitting, SplittingProgram
from adjoint.tableaus import METHODS, Tableau
from adjoint.tensors import State, Structure

Method = Tableau | Adams | Splitting | Implicit
NAMED: dict[str, Method] = {
    **METHODS,
    **MULTISTEP,
    **SPLITTINGS,
    **{name: Implicit(name) for name in (*IMPLICIT, *ROSENBROCK)},
}


def program_of(method: Method, t: Tensor, structure: Structure, state: State, control: Control) -> ExplicitProgram:
    """The steps of one solve of dy/dt = f(t, y) over the asked times ``t``."""
    return with_timeline(untimed_program_of(method, t, structure, state, control))


def untimed_program_of(
    method: Method, t: Tensor, structure: Structure, state: State, control: Control
) -> ExplicitProgram:
    """The same without the times of its steps."""
    if isinstance(method, Adams):
        return AdamsProgram(method, t, structure, state, control)
    if isinstance(method, Splitting):
        return SplittingProgram(method, t, structure, state, control)
    if isinstance(method, Implicit):
        if isinstance(method.tableau, DifferentiationFormulas):
            return BdfProgram(method, t, structure, state, control)
        steps = RosenbrockProgram if isinstance(method.tableau, RosenbrockTableau) else ImplicitProgram
        return steps(method, t, structure, state, control)
    return ExplicitProgram(method, t, structure, state, control)
