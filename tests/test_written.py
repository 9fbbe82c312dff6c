"""A plan written out is that plan: from what its first sweep leaves, and from anything else at hand."""

from __future__ import annotations

import pytest

from revolve import Advance, Binomial, Record, Reverse, Saved, Written, both_sweeps, left_behind, verify
from revolve.actions import GIVEN


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_a_plan_written_out_is_the_plan_and_costs_as_much(steps: int) -> None:
    original = Binomial(min(3, max(1, steps - 1)))
    plan = Written(tuple(both_sweeps(original, steps)))
    assert list(both_sweeps(plan, steps)) == list(both_sweeps(original, steps))
    assert verify(plan, steps) == plan.price(steps) == original.price(steps)


def test_from_another_moment_it_goes_back_from_what_is_there() -> None:
    plan = Written(tuple(both_sweeps(Binomial(3), 6)))
    for states in ({(0, 0)}, {(0, GIVEN)}, {(0, 0), (4, 0)}, {(0, GIVEN), (2, 0), (3, 0)}):
        saved = Saved(frozenset(states), (), -1)
        actions = list(plan.backward(6, saved))
        assert [a for a in actions if isinstance(a, Reverse)] == [Reverse(k, k + 1) for k in reversed(range(6))]
        assert not left_behind(actions, saved).tapes


def test_what_is_no_whole_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="do not end with the reverse of step 0"):
        Written((Advance(0, 1), Record(1, 2), Reverse(1, 2)))
    plan = Written((Record(0, 2), Reverse(0, 2)))
    with pytest.raises(ValueError, match="steps=3: this plan was written for 2"):
        plan.price(3)
    with pytest.raises(ValueError, match="steps that it knows"):
        list(plan.forward(None))
