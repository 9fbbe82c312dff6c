"""The reverse sweep of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adjoint.autograd import Cotangent
from adjoint.join import Sweep
from adjoint.steppers.lockstep import LockstepProgram
from adjoint.tangents import Directions, Second
from adjoint.tensors import State


@dataclass
class MemberSweep:
    """The reverse sweep of a batch, in which a member's NaN reaches no tensor that others share.

    Tapes of the first sweep hold steps that some members rejected. Their cotangents are zero, but zero times infinity
    is not: then the sweep is made again, from tapes in which f sees such members at a safe place. If a member has none,
    it may be for a NaN among its own constants: then recorded steps find another member's numbers there.
    """

    sweep: Sweep
    program: LockstepProgram
    lent: bool = False

    def check(self) -> None:
        self.sweep.check()

    def reverse(self, of_outputs: Cotangent, of_state: Cotangent) -> Cotangent:
        program = self.program
        self._look_for_places()
        found = self.sweep.reverse(of_outputs, of_state)
        if program.doubtful and not _all_finite(found):
            program.doubtful = False
            found = self.sweep.reverse(of_outputs, of_state)
        return self._unpoisoned(found)

    def tangents(self, directions: Directions) -> tuple[list[Tensor], State]:
        self._look_for_places()
        return self.sweep.tangents(directions)

    def second(self, of_outputs: Cotangent, of_state: Cotangent, directions: Directions) -> Second:
        self._look_for_places()
        second = self.sweep.second(of_outputs, of_state, directions)
        self._unpoisoned(second.inputs)
        return second

    def _unpoisoned(self, found: Cotangent) -> Cotangent:
        if self.program.poisoned and not all(map(self._kept_in, found)):
            raise RuntimeError(self.program.poison())
        return found

    def _look_for_places(self) -> None:
        """Where f may be called for members that wait. If one has none, numbers are lent to it, and tapes made anew."""
        program, captured, run = self.program, self.sweep.stepper.captured, self.sweep.run
        with self.sweep.ambient.entered():
            program.safe_places(captured.recorded)
            if program.poisoned and not self.lent:
                self.lent = True
                captured.lend(program.members, program.donor)
                program.forget_places()
                program.safe_places(captured.recorded)
                assert run.steps is not None
                run.adopt(program.chain_start, run.steps)

    def _kept_in(self, x: Tensor | None) -> bool:
        """Whether what is not finite is in rows of the members that nothing could be done about."""
        if x is None:
            return True
        bad = ~torch.isfinite(x)
        for dim in (i for i in range(x.ndim) if x.shape[i] == self.program.members):
            bad = bad.index_fill(dim, torch.tensor(self.program.poisoned, device=x.device), False)
        return not bool(bad.any())


def _all_finite(found: Cotangent) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in found if x is not None)
