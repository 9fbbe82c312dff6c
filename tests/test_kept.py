"""What a function keeps late in time, where nothing can follow it, is refused; what is no such thing is left alone."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from adjoint_cases import Case, assert_close, assert_same_bits, gradients, leaf, loss_of, numbers, steps_of
from torch import Tensor

from adjoint import METHODS, UntrackedTensorError, scan, solve
from adjoint.kept import heard

CPU = torch.device("cpu")
TIMES = (0.0, 0.4, 1.0)
LATE = 0.5
Made = tuple[Callable[..., Any], list[Tensor]]
Keep = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def theta(seed: int = 1) -> Tensor:
    return leaf(3, seed=seed, on=CPU)


KEEPERS: dict[str, Callable[[], Keep]] = {}


def keeper(make: Callable[[], Keep]) -> Callable[[], Keep]:
    KEEPERS[make.__name__] = make
    return make


@keeper
def in_a_context_variable() -> Keep:
    variable: ContextVar[Tensor | None] = ContextVar("kept", default=None)

    def keep(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def get() -> Tensor:
            found = variable.get()
            if found is None:
                found = make()
                variable.set(found)
            return found

        return get

    return keep


class Key:
    """To keep something under."""


@keeper
def in_a_weak_dictionary() -> Keep:
    key, kept = Key(), weakref.WeakKeyDictionary[Key, Tensor]()

    def keep(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def get() -> Tensor:
            if key not in kept:
                kept[key] = make()
            return kept[key]

        return get

    return keep


@keeper
def in_an_attribute_of_a_tensor() -> Keep:
    carrier = numbers(3)

    def keep(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def get() -> Tensor:
            if not hasattr(carrier, "kept"):
                carrier.kept = make()  # type: ignore[attr-defined]
            return carrier.kept  # type: ignore[attr-defined, no-any-return]

        return get

    return keep


@keeper
def in_a_cache() -> Keep:
    return functools.cache


@keeper
def in_a_class() -> Keep:
    class Kept:
        value: Tensor | None = None

    def keep(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def get() -> Tensor:
            Kept.value = make() if Kept.value is None else Kept.value
            return Kept.value

        return get

    return keep


@keeper
def in_a_generator() -> Keep:
    def keep(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def endless() -> Any:
            made = make()
            while True:
                yield made

        return functools.partial(next, endless())

    return keep


WHAT: dict[str, Callable[[Tensor], Tensor]] = {
    "a function of p": torch.sin,
    "p itself": lambda p: p,
    "a multiple": lambda p: 2 * p,
    "a view": lambda p: p.view(3),
}


def case(keep: Keep, what: Callable[[Tensor], Tensor], from_when: float = LATE) -> Case:
    p, q = theta(), theta(5)
    get = keep(lambda: what(p))
    return Case(lambda t, y: get() * y if t > from_when else q * y, numbers(3, seed=2), TIMES, [p, q])


def refused_or_right(make: Callable[[], Case], **how: Any) -> bool:
    """Whether it was refused; if not, the gradient must be torch's."""
    expected = gradients(make(), **{**how, "slots": None, "gradient": "backprop"})
    try:
        assert_close(gradients(make(), **how), expected)
    except UntrackedTensorError as error:
        return "gradient would be lost" in str(error)
    return False


FORMS = [*((name, "a function of p") for name in KEEPERS), *(("in_a_cache", what) for what in WHAT)]


@pytest.mark.parametrize("slots", [1, 2, "all", None])
@pytest.mark.parametrize("method", ["rk4", "tsit5"])
@pytest.mark.parametrize(("name", "what"), FORMS)
def test_what_is_kept_late_is_refused_or_right(name: str, what: str, method: str, slots: int | str | None) -> None:
    refused = refused_or_right(lambda: case(KEEPERS[name](), WHAT[what]), slots=slots, **steps_of(method))
    assert refused or slots in ("all", None)


@pytest.mark.parametrize("from_when", [-1.0, LATE])
@pytest.mark.parametrize("name", KEEPERS)
def test_the_continuous_gradient_refuses_it_too(name: str, from_when: float) -> None:
    made = case(KEEPERS[name](), torch.sin, from_when)
    with pytest.raises(UntrackedTensorError, match="gradient would be lost"):
        gradients(made, method="rk4", dt=0.1, gradient="backsolve")


@pytest.mark.parametrize("name", KEEPERS)
def test_a_scan_refuses_it_too(name: str) -> None:
    p = theta()
    get = KEEPERS[name]()(lambda: torch.sin(p))
    with pytest.raises(UntrackedTensorError, match="gradient would be lost"):
        last, _ = scan(
            lambda c, x: (get() * c if x > LATE else p * c, None), numbers(3), torch.linspace(0, 1, 9), slots=2
        )
        last.sum().backward()


@pytest.mark.parametrize("slots", [1, "all"])
@pytest.mark.parametrize("method", ["rk4", "tsit5"])
@pytest.mark.parametrize("name", KEEPERS)
def test_what_is_kept_of_the_time_is_refused_or_right(name: str, method: str, slots: int | str) -> None:
    """f gets the time without its graph: what is made of it in one call is constant in the next."""

    def make() -> Case:
        p, t = theta(), torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
        clock = ContextVar[Tensor]("clock")
        get = KEEPERS[name]()(lambda: torch.cos(1 + clock.get()))

        def f(now: Tensor, y: Tensor) -> Tensor:
            clock.set(now)
            return p * get() * y

        return Case(f, numbers(3, seed=2), t, [p, t])

    refused_or_right(make, slots=slots, **steps_of(method))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_it(method: str) -> None:
    assert refused_or_right(lambda: case(in_a_context_variable(), torch.sin), slots=2, **steps_of(method))


def test_a_refusal_names_the_step_the_tensor_and_the_ways_out() -> None:
    with pytest.raises(
        UntrackedTensorError, match=r"f uses in step 9 .*\(3,\), torch.float64, 'kept' of .* anew .*args="
    ):
        gradients(case(in_an_attribute_of_a_tensor(), torch.sin), method="rk4", dt=0.1, slots=2)
    with pytest.raises(UntrackedTensorError, match=r"f keeps a tensor .* in step \d+ .*args="):
        gradients(case(in_an_attribute_of_a_tensor(), torch.sin), method="rk4", dt=0.01, slots="all")


class Constants:
    early = numbers(3, seed=7)
    which = torch.tensor([2, 0, 1])


def late_in_every_call_anew() -> Made:
    """Arrays become tensors outside of what can be listened to, but other ones in each call."""
    p, table = theta(), np.arange(3.0)
    return lambda t, y: p * y * (torch.from_numpy(np.sin(table)) if t > LATE else 1.0), [p]


def late_and_held_where_it_can_be_found() -> Made:
    p, held = theta(), {"late": [numbers(3, seed=3)]}
    return lambda t, y: p * y * (held["late"][0] if t > LATE else 1.0), [p]


def used_at_first_and_late() -> Made:
    p = theta()
    return lambda t, y: p * y * Constants.early if t <= LATE else p * y - Constants.early, [p]


def late_and_without_derivative() -> Made:
    p = theta()
    return lambda t, y: p * (y[Constants.which] if t > LATE else y), [p]


def late_in_a_solve() -> Made:
    p = theta()
    return lambda t, y: solve(lambda s, z: p * z, y, (0.0, 0.1), method="rk4").ys[-1] if t > LATE else -y, [p]


@pytest.mark.parametrize(
    "make",
    [
        late_in_every_call_anew,
        late_and_held_where_it_can_be_found,
        used_at_first_and_late,
        late_and_without_derivative,
        late_in_a_solve,
    ],
)
@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_what_is_not_kept_is_left_alone(make: Callable[[], Made], method: str) -> None:
    def case_of() -> Case:
        f, wanted = make()
        return Case(f, numbers(3, seed=2), TIMES, wanted)

    how = steps_of(method)
    first = gradients(case_of(), slots="all", **how)
    assert_close(first, gradients(case_of(), gradient="backprop", **how))
    assert_same_bits(gradients(case_of(), slots=1, **how), first)


def test_few_calls_are_listened_to() -> None:
    numbers_heard = [k for k in range(100) if heard(k)]
    assert numbers_heard == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]
    assert loss_of(theta()).requires_grad


@pytest.mark.parametrize("slots", ["all", 3])
def test_a_graph_kept_from_the_step_before_is_refused(slots: int | str) -> None:
    """Sums save no tensors, so that torch has nothing to complain of; nothing here is ever run plainly."""
    p = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    kept: ContextVar[Tensor] = ContextVar("kept")

    def f(t: Tensor, y: Tensor) -> Tensor:
        if t < 0.5:
            return p + y
        before = kept.get(None)
        kept.set(y)
        return p + y if before is None else p + before

    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="from one call|did not use at first|computed again"):
        solve(f, y0, [0.0, 1.0], method="euler", dt=0.01, slots=slots).ys.sum().backward()
