"""State-space models and cells over long sequences, (batch, length, features), within a memory budget."""

from adjoint.state_space.cells import LiquidCell, ODECell, Recurrent
from adjoint.state_space.discretise import (
    RULES,
    bilinear,
    bilinear_of_matrices,
    hippo_legs,
    hippo_normal,
    zero_order_hold,
    zero_order_hold_of_matrices,
)
from adjoint.state_space.kalman import Filtered, kalman_filter
from adjoint.state_space.linear import LRU, S4D, S5, STARTS
from adjoint.state_space.model import Model
from adjoint.state_space.selective import Selective
from adjoint.state_space.stack import Stack

__all__ = [
    "LRU",
    "RULES",
    "S4D",
    "S5",
    "STARTS",
    "Filtered",
    "LiquidCell",
    "Model",
    "ODECell",
    "Recurrent",
    "Selective",
    "Stack",
    "bilinear",
    "bilinear_of_matrices",
    "hippo_legs",
    "hippo_normal",
    "kalman_filter",
    "zero_order_hold",
    "zero_order_hold_of_matrices",
]
