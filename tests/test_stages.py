"""Stages as tapes: the same gradient bit by bit, f evaluated as planned, linearisations counted apart."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint.steppers.stages import Stages as Computed
from revolve import Binomial, Mixed, Record, Reverse, Schedule, Stages, StoreAll, both_sweeps

DOUBLE = torch.float64
METHODS = {"midpoint": 2, "heun3": 3, "rk4": 4, "bosh3": 3, "dopri5": 6}
WITH_END = {"bosh3": 4, "dopri5": 7}
"""Methods whose last stage is the end of the step."""

CASES = [(name, Stages(slots, stages)) for name, stages in METHODS.items() for slots in (3, 9, 25)]
CASES += [(name, Stages(slots, stages, True)) for name, stages in WITH_END.items() for slots in (9, 25)]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Weights, first state, asked times."""
    weights = torch.linspace(-1, 1, 9, dtype=DOUBLE).reshape(3, 3).requires_grad_()
    y0 = torch.tensor([1.0, -0.5, 0.25], dtype=DOUBLE, requires_grad=True)
    return weights, y0, torch.tensor([0.0, 0.31, 1.0], dtype=DOUBLE, requires_grad=True)


def solved(
    method: str | adjoint.Tableau, schedule: Schedule, **options: Any
) -> tuple[adjoint.Solution, tuple[Tensor, ...]]:
    """A solve and its gradient with respect to all that it depends on."""
    weights, y0, t = tensors()
    lengths: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if method in ("bosh3", "dopri5") else {"dt": 0.05}
    lengths |= options
    solution = adjoint.solve(
        lambda t, y: torch.tanh(y @ weights) - 0.2 * t * y, y0, t, method=method, schedule=schedule, **lengths
    )
    return solution, torch.autograd.grad(solution.ys.square().sum(), (weights, y0, t))


def kept_tapes(schedule: Schedule, steps: int) -> int:
    """Recorded steps that are not transposed at once."""
    actions = list(both_sweeps(schedule, steps))
    last = Record(steps - 1, steps)
    return sum(
        isinstance(action, Record) and action != last and following != Reverse(action.start, action.stop)
        for action, following in pairwise(actions)
    )


@pytest.mark.parametrize(("method", "schedule"), CASES, ids=str)
def test_the_gradient_is_that_of_any_other_schedule(method: str, schedule: Stages) -> None:
    _, wanted = solved(method, StoreAll())
    _, found = solved(method, schedule)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("method", "schedule"), [(m, s) for m, s in CASES if m not in WITH_END], ids=str)
def test_f_is_evaluated_as_planned_and_linearised_once_for_each_kept_tape(method: str, schedule: Stages) -> None:
    solution, _ = solved(method, schedule)
    stats, plan = solution.stats, solution.plan
    assert plan is not None
    assert (stats.plain_runs, stats.recorded_runs) == (plan.report.plain_runs, stats.steps)
    assert stats.evaluations == schedule.stages * plan.report.runs
    assert stats.linearisations == schedule.stages * kept_tapes(schedule, stats.steps)
    assert solved(method, Binomial(3))[0].stats.linearisations == 0


@pytest.mark.parametrize("slots", [9, 25])
def test_no_kept_tape_holds_on_to_a_graph(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Of the values of f that have a graph, those of two steps are alive at most: the latest, and one on its way."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    run = Computed.run

    def watched(self: Computed, first: Any = None) -> None:
        run(self, first)
        if self.recording:
            alive[:] = [*(held for held in alive if held() is not None), weakref.ref(self.slopes[0][0])]
            counts.append(len(alive))

    monkeypatch.setattr(Computed, "run", watched)
    solved("rk4", Stages(slots, 4))
    assert max(counts) <= 2
    counts.clear()
    solved("rk4", Mixed(slots, 1, 4))
    assert max(counts) > 2


def test_plain_runs_with_the_operations_of_recorded_ones_find_an_unknown_end() -> None:
    """Torch takes other kernels without grad for this f, so that plain runs record too."""
    weights, y0, _ = tensors()

    def gradient(schedule: Schedule) -> Tensor:
        solution = adjoint.solve(
            lambda t, y: -weights[0, 0] * y * y.detach(), y0, [0.0, 1.0], method="dopri5", rtol=1e-4, schedule=schedule
        )
        return torch.autograd.grad(solution.ys[-1].sum(), weights)[0]

    assert torch.equal(gradient(Stages(9, 6)), gradient(StoreAll()))


def test_a_second_reverse_sweep_and_a_journal_find_the_same(tmp_path: Any) -> None:
    weights, y0, _ = tensors()

    def gradient(**options: Any) -> list[Tensor]:
        solution = adjoint.solve(lambda t, y: torch.tanh(y @ weights), y0, [0.0, 1.0], method="rk4", dt=0.05, **options)
        loss = solution.ys[-1].sum()
        return [torch.autograd.grad(loss, weights, retain_graph=True)[0] for _ in range(2)]

    wanted = gradient(slots="all")[0]
    assert all(torch.equal(found, wanted) for found in gradient(schedule=Stages(13, 4)))
    solution = adjoint.solve(
        lambda t, y: torch.tanh(y @ weights),
        y0,
        [0.0, 1.0],
        method="rk4",
        dt=0.05,
        schedule=Stages(13, 4),
        journal=tmp_path,
    )
    assert torch.equal(torch.autograd.grad(solution.ys[-1].sum(), weights)[0], wanted)


def test_a_function_with_other_values_when_it_is_linearised_is_refused() -> None:
    weights, y0, _ = tensors()
    factor = torch.ones((), dtype=DOUBLE)

    solution = adjoint.solve(
        lambda t, y: factor * torch.tanh(y @ weights), y0, [0.0, 1.0], method="rk4", dt=0.01, schedule=Stages(400, 4)
    )
    factor.data.mul_(2.0)  # unseen by version counters
    with pytest.raises(RuntimeError, match="f gave other values when step 98 was linearised"):
        solution.ys[-1].sum().backward()


@pytest.mark.parametrize(
    ("method", "schedule", "sentence"),
    [
        ("rk4", Stages(6, 2), "a step of rk4 has 4 such stages; give stages=4"),
        ("dopri5", Stages(9, 6, True), "a step of dopri5 has 7 such stages; give stages=7"),
        ("explicit_adams", Stages(9, 4), "only explicit Runge-Kutta steps have stages to keep; take Mixed or Binomial"),
    ],
)
def test_stages_that_the_method_has_not_are_refused(method: str, schedule: Stages, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        solved(method, schedule)


def test_a_method_whose_last_stage_is_not_the_end_is_refused() -> None:
    euler = adjoint.Tableau("own_euler", 1, (0.0,), ((),), (1.0,), "Euler")
    with pytest.raises(
        ValueError, match="the last stage of own_euler is not the end of the step; leave last_is_solution"
    ):
        solved(euler, Stages(20, 1, True))
    assert all(map(torch.equal, solved(euler, Stages(5, 1))[1], solved(euler, StoreAll())[1]))


def test_further_tiers_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps states and tapes in the first tier alone; leave the others out"):
        solved("rk4", Stages(9, 4), tiers=[adjoint.Device(), adjoint.Host()])


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_tapes_that_hold_the_end_of_their_step_are_left_from_again(method: str) -> None:
    schedule = Mixed(6, 1, 2, holds_end=True)
    solution, found = solved(method, schedule)
    _, wanted = solved(method, StoreAll())
    assert all(map(torch.equal, found, wanted))
    assert solution.stats.tier_bytes.get(1, 0) == 0
