"""``check=True``: every step is computed twice, and the bits of every state are compared with those of the first sweep."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from adjoint.autograd import AutogradStepper, Program, Recorded
from adjoint.captured import Captured
from adjoint.marks import Marks
from adjoint.tensors import State, differentiable


class ReproducibilityError(RuntimeError):
    """A step that gives another state when it is computed again; ``step`` says which."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Hashes(Marks):
    """A digest of every state's bits, by leaf."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.digests: dict[int, list[bytes]] = {}

    def note(self, step: int, state: State) -> None:
        self.digests[step] = [_digest(x) for x in state]

    def compare(self, step: int, state: State) -> None:
        """Raise if the state at this step has other bits than when it was noted."""
        known = self.digests.get(step)  # none, if another process was here
        for leaf, (old, x) in enumerate(zip(known or map(_digest, state), state, strict=True)):
            if old != _digest(x):
                raise _Other(step - 1, leaf)


class _Other(Exception):
    """Other bits, in this leaf of the state after this step."""

    def __init__(self, step: int, leaf: int) -> None:
        super().__init__()
        self.step, self.leaf = step, leaf


def _digest(x: Tensor) -> bytes:
    if x.is_meta:
        return b""
    data = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).cpu().view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).digest()


class CheckedStepper(AutogradStepper):
    """The same steps one by one: a first run is repeated at once, a later one compared, a recorded one listened to."""

    def __init__(self, program: Program, captured: Captured) -> None:
        super().__init__(program, captured)
        self.marks = Hashes(program.label)
        self.block, self.all_heard = 1, True

    def advance(self, state: State, start: int, stop: int) -> State:
        for k in range(start, stop):
            first, entry = k >= self.frontier, state
            state = super().advance(entry, k, k + 1)
            self._look(k, entry, state, first)
        return state

    def record(self, state: State, start: int, stop: int) -> tuple[State, list[Recorded]]:
        tape: list[Recorded] = []
        for k in range(start, stop):
            first, entry = k >= self.frontier, state
            try:
                state, blocks = super().record(entry, k, k + 1)
            except _Other as other:
                raise self._diagnosed(other, entry) from None
            tape += blocks
            self._look(k, entry, state, first)
        return state, tape

    def _look(self, k: int, entry: State, state: State, first: bool) -> None:
        try:
            if first:
                self.marks.note(k + 1, state)
                self.plain_runs -= 1
                state = super().advance(entry, k, k + 1)
            self.marks.compare(k + 1, state)
        except _Other as other:
            raise self._diagnosed(other, entry) from None

    def _diagnosed(self, other: _Other, entry: State) -> ReproducibilityError:
        """Which step it is, by how much it differs, and what may be the reason."""
        k, program = other.step, self.program
        a, b = (super(CheckedStepper, self).advance(entry, k, k + 1)[other.leaf] for _ in range(2))
        if _digest(a) != _digest(b):
            why = (
                f"Two runs in a row differ{_by(a, b)}: it draws random numbers, counts its calls, or uses kernels that are "
                f"not deterministic (torch.use_deterministic_algorithms(True) names those)"
            )
        else:
            why = (
                "Runs in a row agree, but not with the first one: something that it uses has changed in between, such as "
                "a memory of earlier calls, or a tensor that is written to where it cannot be followed"
            )
        ends = getattr(getattr(program, "timeline", None), "ends", None)
        when = ""
        if ends is not None and all(isinstance(x, float) for x in ends(k)):
            when = " from t={:.6g} to t={:.6g}".format(*ends(k))
        return ReproducibilityError(
            f"{program.label} ({_name(self.captured.original)}) is not reproducible: step {k}{when} gave other bits in leaf "
            f"{other.leaf} of the state when it was computed again. {why}",
            k,
        )


def _by(a: Tensor, b: Tensor) -> str:
    if not differentiable(a) or not a.numel():
        return ""
    gap = torch.nan_to_num((a - b).abs()).detach()
    place = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return f" by {float(gap.max()):.3g} in component {place}"


def _name(function: Any) -> str:
    """What the caller calls his function."""
    f = function[0] if isinstance(function, tuple) else function
    return str(getattr(f, "__qualname__", type(f).__qualname__))
