"""Steps that are found within a budget: tapes while they fit, then states in their place."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from adjoint_cases import ADAPTIVE, assert_same_bits, leaf, loss_of, numbers
from torch import Tensor

from adjoint import Solution, odeint_dense, solve
from adjoint.memories import Memories
from revolve import Drop, Online, Save

CPU = torch.device("cpu")


class World:
    def __init__(self) -> None:
        self.weights, self.y0 = leaf(16, 16, seed=1, on=CPU, scale=0.3), leaf(40, 16, seed=2, on=CPU)
        self.t = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64, requires_grad=True)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weights) * torch.cos(5 * t)

    def solved(self, **how: Any) -> Solution:
        return solve(self.f, self.y0, self.t, **how)

    def gradients(self, tree: Any) -> list[Tensor]:
        return list(torch.autograd.grad(loss_of(tree), (self.weights, self.y0, self.t)))


@pytest.mark.parametrize("observe", [None, lambda t, y: y.sum(1) * t])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_beyond_the_tapes_that_fit_states_are_placed_in_the_same_sweep(method: str, observe: Any) -> None:
    world = World()
    how: dict[str, Any] = {"method": method, "rtol": 1e-3, "atol": 1e-4, "observe": observe, "dt": 0.02}
    everything = world.solved(slots="all", **how)
    steps, plan = everything.stats.steps, everything.plan
    assert plan is not None and steps > 4
    tree = everything.ys if observe is None else everything.observed
    expected = world.gradients(tree)
    for tapes in (1, 2, steps // 2, steps - 1):
        budget = plan.working_bytes + tapes * plan.tape_bytes + plan.state_bytes
        solution = world.solved(budget=budget, **how)
        found, stats = solution.plan, solution.stats
        assert found is not None and isinstance(found.schedule, Online) and found.bytes <= budget
        assert_same_bits([solution.ys], [everything.ys])
        assert_same_bits(world.gradients(solution.ys if observe is None else solution.observed), expected)
        recorded = (budget - plan.working_bytes) // plan.tape_bytes
        assert stats.recorded_runs == recorded + steps
        assert stats.plain_runs == found.report.plain_runs + 1 - recorded
        assert stats.tier_bytes[0] <= found.slots * plan.state_bytes


@pytest.mark.parametrize("slots", [2, 3])
def test_more_steps_may_be_recorded_than_there_are_slots_to_go_on_with(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    how: dict[str, Any] = {"method": "tsit5", "rtol": 1e-6, "atol": 1e-7}
    everything = world.solved(slots="all", **how)
    expected = world.gradients(everything.ys)
    plan = everything.plan
    assert plan is not None and everything.stats.steps > 10
    monkeypatch.setattr(Memories, "online_within", lambda self, steps: Online(slots))
    solution = world.solved(budget=plan.working_bytes + 8 * plan.tape_bytes, **how)
    assert_same_bits([solution.ys], [everything.ys])
    assert_same_bits(world.gradients(solution.ys), expected)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_a_sweep_that_goes_on_holds_what_one_from_the_start_holds(slots: int) -> None:
    def held(actions: Any, until: int) -> list[set[int]]:
        states, seen = set[int](), []
        for action in islice(actions, 200):
            match action:
                case Save(step):
                    states.add(step)
                case Drop(step):
                    states.remove(step)
                case _ if action.stop > until:
                    seen.append(set(states))
        return seen

    for start in range(1, 40):
        from_there, whole = held(Online(slots).going_on(start), start), held(Online(slots).forward(None), start)
        count = min(len(from_there), len(whole))
        assert count > 20 and from_there[:count] == whole[:count]


@pytest.mark.parametrize(
    "how", [{"slots": 3}, {"slots": "all"}, {}, {"budget": "40 kB"}, {"budget": "1 MB"}, {"gradient": "backprop"}]
)
def test_what_a_failed_solve_was_at_last_is_its_last_state(how: dict[str, Any]) -> None:
    rate = torch.ones((), dtype=torch.float64, requires_grad=True)
    one = 1 + numbers(5).abs()
    solution = solve(lambda t, y: rate * y**2, one, (0.0, 0.1, 3.0), throw=False, observe=lambda t, y: 2 * y, **how)
    assert solution.status == "underflow"
    assert torch.equal(solution.ys[0], solution.last_y) and solution.last_y.max() > 1e6
    (gradient,) = torch.autograd.grad(solution.observed[1].sum(), rate)
    torch.testing.assert_close(gradient, (2 * 0.1 * one**2 / (1 - 0.1 * one) ** 2).sum(), rtol=1e-4, atol=0)


def test_a_dense_solution_within_a_budget() -> None:
    world = World()
    kept, few = (
        odeint_dense(world.f, world.y0, world.t[0], world.t[-1], rtol=1e-4, **how)
        for how in ({"slots": "all"}, {"budget": "3 MB"})
    )
    assert_same_bits(world.gradients(few(torch.tensor([0.5, 1.1]))), world.gradients(kept(torch.tensor([0.5, 1.1]))))
