"""Solves that another process can continue: torch's tensors as trees for a :class:`revolve.Journal`, and what a run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from adjoint.autograd import AutogradStepper
from adjoint.probe import Nowhere, Unmarked
from adjoint.tensors import State
from revolve import Journal
from revolve.trees import digest


def to_tree(value: Any) -> Any:
    """Tensors in tuples, lists and dicts as trees of arrays and numbers."""
    if isinstance(value, Tensor):
        x = value.detach().resolve_conj().resolve_neg().contiguous().cpu()
        data = x.reshape(-1).view(torch.uint8).numpy()
        return {
            "tensor": data,
            "kind": str(x.dtype).removeprefix("torch."),
            "shape": tuple(x.shape),
            "on": str(value.device),
        }
    if isinstance(value, (tuple, list)):
        return type(value)(to_tree(x) for x in value) if type(value) in (tuple, list) else tuple(map(to_tree, value))
    if isinstance(value, dict):
        return {key: to_tree(x) for key, x in value.items()}
    return value


def from_tree(tree: Any) -> Any:
    """Back again, each tensor on the device that it was on."""
    if isinstance(tree, dict) and "tensor" in tree:
        kind = getattr(torch, tree["kind"])
        return torch.from_numpy(tree["tensor"]).view(kind).reshape(tree["shape"]).to(tree["on"], copy=True)
    if isinstance(tree, (tuple, list)):
        return type(tree)(from_tree(x) for x in tree)
    if isinstance(tree, dict):
        return {key: from_tree(x) for key, x in tree.items()}
    return tree


def opened(journal: str | Path | Journal | None) -> Journal | None:
    """The journal in this folder, or the one given."""
    return journal if journal is None or isinstance(journal, Journal) else Journal(journal)


class Progress(Protocol):
    """What a program adds to :class:`adjoint.autograd.Program` so that its run can be continued."""

    def identity(self) -> Any:
        """All that decides its steps, beside the function and the first state, as a tree of numbers and tensors."""
        ...

    def snapshot(self) -> Any:
        """All that it has found or added up so far, in either sweep."""
        ...

    def restore(self, snapshot: Any) -> None: ...


class Continuable:
    """A stepper whose progress can be kept: what it has put together goes into a tree, and comes back from one."""

    def __init__(self, stepper: AutogradStepper) -> None:
        self._stepper = stepper
        self._program = cast(Progress, stepper.program)
        self.advance, self.record, self.reverse, self.last = (
            stepper.advance,
            stepper.record,
            stepper.reverse,
            stepper.last,
        )

    def snapshot(self) -> Any:
        stepper = self._stepper
        return {
            "steps": stepper.frontier,
            "outputs": stepper.outputs.buffers,
            "notes": stepper.marks.notes,
            "asked": digest(to_tree(stepper.cotangents)),
            "sums": stepper.sums,
            "reversed": stepper.reversed,
            "program": self._program.snapshot(),
        }

    def restore(self, snapshot: Any) -> None:
        stepper = self._stepper
        if snapshot["asked"] != digest(to_tree(stepper.cotangents)):
            raise ValueError(
                "the reverse sweep to be continued began with other cotangents of the outputs: the loss is another one; "
                "to begin it anew delete the file 'reverse' in the folder of the journal"
            )
        stepper.frontier, stepper.reversed = snapshot["steps"], snapshot["reversed"]
        stepper.outputs.buffers, stepper.sums = snapshot["outputs"], snapshot["sums"]
        stepper.marks.notes = snapshot["notes"]
        self._program.restore(snapshot["program"])


def describe(journal: Journal, stepper: AutogradStepper, state: State) -> None:
    """Say which run this is: the steps, every tensor that they use, and the numbers of the first one.

    Raises TypeError for a program that cannot be continued.
    """
    program, captured = stepper.program, stepper.captured
    for name in ("identity", "snapshot", "restore"):
        if name not in vars(type(program)):  # inherited, it would miss what a subclass has found
            kind = getattr(program, "wish", type(program).__name__)
            raise TypeError(f"{kind} takes steps that cannot be continued by another process yet; leave journal= out")
    identity = cast(Progress, program).identity()
    held = [(name, digest(to_tree(x))) for name, x in zip(captured.names, captured.tensors, strict=True)]
    constants = [digest(to_tree(x)) for x in captured.constants]
    trial = AutogradStepper(program.sample(), captured)
    trial.outputs, trial.marks = Nowhere(program.outputs, program.label), Unmarked(program.label)
    first = digest(to_tree(trial.advance(state, 0, 1)))
    journal.details = {"program": identity, "held": held, "constants": constants, "first step": first}
    journal.convert(to_tree, from_tree)
