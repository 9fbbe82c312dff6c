"""Behaviour at the edges: schedules that are wrong or unusual, and stores that fail."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import adjoint
from revolve import (
    Action,
    Advance,
    Binomial,
    Drop,
    HRevolve,
    Load,
    Memory,
    Periodic,
    Record,
    Reverse,
    Run,
    Save,
    Saved,
    StoreAll,
    Tier,
    verify,
)

STEPS = 12


class Squares:
    """x -> x + x^2 / 10, and its transpose."""

    def advance(self, state: np.ndarray, start: int, stop: int) -> np.ndarray:
        for _ in range(start, stop):
            state = state + state**2 / 10
        return state

    def record(self, state: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, list[np.ndarray]]:
        tape = []
        for _ in range(start, stop):
            tape.append(state)
            state = self.advance(state, 0, 1)
        return state, tape

    def reverse(self, tape: list[np.ndarray], cotangent: np.ndarray) -> np.ndarray:
        for state in reversed(tape):
            cotangent = cotangent * (1 + state / 5)
        return cotangent

    def last(self, step: int) -> bool:
        return step == STEPS - 1


X = np.array([0.1, 0.2])


def gradient(run: Run) -> np.ndarray:
    run.forward(X, STEPS)
    return run.backward(np.ones(2))


@dataclass
class Listed:
    """A schedule that cannot be hashed, with both sweeps written down."""

    first: list[Action] = field(default_factory=lambda: [Save(0), Advance(0, STEPS - 1), Record(STEPS - 1, STEPS)])
    second: list[Action] | None = None

    def forward(self, steps: int | None) -> Iterator[Action]:
        yield from self.first

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        if self.second is not None:
            yield from self.second
            return
        yield Reverse(STEPS - 1, STEPS)
        for k in reversed(range(STEPS - 1)):
            yield Load(0)
            if k:
                yield Advance(0, k)
            yield from (Record(k, k + 1), Reverse(k, k + 1))
        yield Drop(0)


def test_a_schedule_that_cannot_be_hashed_runs():
    assert verify(Listed(), STEPS).recorded_runs == STEPS
    np.testing.assert_array_equal(gradient(Run(Listed(), Squares())), gradient(Run(StoreAll(), Squares())))


WRONG = {
    "a first sweep that stops early": (Listed(first=[Save(0), Advance(0, 3)]), "ended at 3 of 12"),
    "a reverse sweep that stops early": (Listed(second=[Reverse(11, 12)]), "did not reach step 0, but 11"),
    "a reverse sweep that reverses nothing": (Listed(second=[]), "did not reach step 0, but 12"),
    "a reverse sweep that leaves out a step": (
        Listed(second=[Reverse(11, 12), Load(0), Record(0, 1), Reverse(0, 1)]),
        "when the steps from 11 on are reversed",
    ),
}


@pytest.mark.parametrize(("schedule", "message"), WRONG.values(), ids=WRONG)
def test_a_run_never_returns_the_cotangent_of(schedule, message):
    with pytest.raises(ValueError, match=message):
        gradient(Run(schedule, Squares()))


def test_a_tier_without_a_store_is_named():
    schedule = HRevolve((Tier(1), Tier(3, 1.0, 1.0)))
    with pytest.raises(ValueError, match=r"tier=1.*tiers \[0\] only"):
        gradient(Run(schedule, Squares(), {0: Memory()}))


class Unreliable(Memory):
    """A store whose load fails once."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def load(self, step: int) -> np.ndarray:
        self.after -= 1
        if self.after == 0:
            raise OSError("the disk is gone")
        return super().load(step)


@pytest.mark.parametrize("after", range(1, 8))
@pytest.mark.parametrize("schedule", [Binomial(slots=3), Periodic(every=5)], ids=str)
def test_a_reverse_sweep_can_be_repeated_after_a_store_failed_to_load(schedule, after):
    store = Unreliable(after)
    run = Run(schedule, Squares(), {0: store}, given=True)
    run.forward(X, STEPS)
    with pytest.raises(OSError, match="disk"):
        run.backward(np.ones(2))
    np.testing.assert_array_equal(run.backward(np.ones(2)), gradient(Run(StoreAll(), Squares())))
    assert len(store) == 0


T = torch.linspace(0, 1, 4)
Y = torch.tensor([1.0, 2.0])
WRONG_CALLS = {
    "f gives nothing": ({"f": lambda t, y: None}, TypeError, "the value of f holds None"),
    "f gives a number": ({"f": lambda t, y: 1.0}, TypeError, r"the value of f holds 1.0 \(float\)"),
    "dt is a tensor": ({"dt": torch.tensor(0.1)}, TypeError, r"dt=tensor\(0.1000\) \(Tensor\) must be a number"),
    "dt is text": ({"dt": "0.1"}, TypeError, "dt='0.1'"),
    "dt is far too small": ({"dt": 1e-12}, ValueError, "dt=1e-12 makes 1e\\+12 steps"),
    "rtol is a tensor": ({"rtol": torch.ones(2)}, TypeError, "rtol=tensor"),
    "method is a list": ({"method": ["rk4"]}, ValueError, r"method=\['rk4'\] is unknown"),
    "jumps is a number": ({"jumps": 0.3}, TypeError, r"jumps=0.3 must be a series .* write jumps=\(0.3,\)"),
    "a jump is not a time": ({"jumps": [float("nan")]}, ValueError, "jumps holds nan"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_solve_answers_in_a_sentence_when(wrong, error, message):
    with pytest.raises(error, match=message):
        adjoint.solve(**{"f": lambda t, y: -y, "y0": Y, "t": T, "method": "rk4"} | wrong)


@pytest.mark.parametrize("gradient", ["discrete", "backprop", "backsolve"])
def test_a_controlled_solve_warns_of_nothing(gradient):
    rate = torch.tensor(1.5, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adjoint.solve(lambda t, y: -rate * y, Y, T, gradient=gradient).ys.sum().backward()
    assert rate.grad is not None


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_a_right_hand_side_that_is_not_finite_is_named_as_that(gradient):
    rate = torch.tensor(-1.0, requires_grad=True)
    with pytest.raises(adjoint.SolveError, match="f is not finite at t=0, step 0") as failure:
        adjoint.solve(lambda t, y: y * rate.sqrt(), Y, T, gradient=gradient)
    assert failure.value.status == "nonfinite"
