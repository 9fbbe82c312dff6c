"""Random right-hand sides over random states, held in random places: the laws hold for all of them.

The law: the gradient is torch's, with the same bits whatever is kept, or the program is refused; and a program that does
nothing unlawful is never refused. ``--programs 2000`` tries more of them; ``--hypothesis-show-statistics`` says what
became of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from adjoint_cases import ROUNDING, assert_close, assert_same_bits, loss_of, numbers
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from programs import Program, programs
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint import METHODS, MULTISTEP, Device, Files, Host, scan
from revolve import Multistage, Periodic

PROGRAMS = int(os.environ.get("PROGRAMS", "100"))
some, many = (
    settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for number in ((PROGRAMS + 3) // 4, PROGRAMS)
)

FREE = {"write": 0.0, "read": 0.0}
MEMORY: tuple[dict[str, Any], ...] = (
    {"slots": 1},
    {"slots": 2},
    {"slots": 4},
    {"budget": "1 MB"},
    {},
    {"tiers": [Device(slots=1), Host(slots=1, **FREE), Files(slots=2, **FREE)]},
    {"schedule": Periodic()},
    {"schedule": Multistage(memory=1, disk=2), "tiers": [Device(slots=1), Files(slots=2, **FREE)]},
    {"slots": 2, "check": True},
)
EVERY = sorted([*METHODS, *MULTISTEP])
two_memories = st.lists(st.sampled_from(MEMORY), min_size=2, max_size=2, unique_by=str)

Found = tuple[list[Tensor], list[Tensor | None]]
"""Values and derivatives."""


def steps(method: str) -> dict[str, Any]:
    if method in METHODS and METHODS[method].adaptive:
        return {"method": method, "rtol": 1e-2, "atol": 1e-2}
    return {"method": method, "dt": 0.15}


def first(program: Program, **how: Any) -> Found:
    """None throughout where nothing depends on what is wanted."""
    case = program.make()
    ys = pytree.tree_leaves(case.solve(**how).ys)
    if not any(x.requires_grad for x in ys):
        return ys, [None] * len(case.wanted)
    return ys, list(torch.autograd.grad(loss_of(ys), case.wanted, allow_unused=True))


def second(program: Program, **how: Any) -> Found:
    """The derivative of the gradient along fixed directions."""
    case = program.make()
    ys = pytree.tree_leaves(case.solve(**how).ys)
    nothing: Found = ys, [None] * len(case.wanted)
    if not any(x.requires_grad for x in ys):
        return nothing
    gradients = torch.autograd.grad(loss_of(ys), case.wanted, create_graph=True, allow_unused=True)
    directions = [numbers(*x.shape, seed=40 + i, dtype=x.dtype) for i, x in enumerate(case.wanted)]
    pairs = [(g, v) for g, v in zip(gradients, directions, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return nothing
    roots, weights = zip(*pairs, strict=True)
    return ys, list(torch.autograd.grad(roots, case.wanted, weights, allow_unused=True))


def by_transform(program: Program, **how: Any) -> Found:
    """The gradient by torch.func.grad."""
    tensors = program.tensors()
    places = tuple(i for i, moving in enumerate(program.moving) if moving)

    def loss(*moving: Tensor) -> Tensor:
        given = list(tensors)
        for i, x in zip(places, moving, strict=True):
            given[i] = x
        return loss_of(program.case(given).solve(**how).ys)

    with torch.no_grad():
        ys = pytree.tree_leaves(program.case(tensors).solve(**how).ys)
    return ys, list(torch.func.grad(loss, argnums=tuple(range(len(places))))(*[tensors[i] for i in places]))


def by_tangents(program: Program, **how: Any) -> Found:
    kept = {name: value for name, value in how.items() if name in ("method", "dt", "rtol", "atol")}
    return first(program, gradient="tangent", **kept)


def assert_agree(found: Sequence[Any], expected: Sequence[Any], program: Program) -> None:
    """Relative to the largest of all: a sum of cancelling terms may leave less of another."""
    scale = max((float(x.detach().abs().max()) for x in expected if x is not None), default=0.0)
    coarse = torch.finfo(torch.float32 if program.coarse else torch.float64).eps
    for a, b in zip(found, expected, strict=True):
        a_, b_ = (x.detach() if x is not None else torch.zeros(()) for x in (a, b))
        assert float((a_ - b_).abs().max()) <= ROUNDING * coarse * scale


@many
@given(programs(wild=False), st.sampled_from(EVERY), two_memories)
def test_every_random_program_has_one_gradient(program: Program, method: str, memories: list[dict[str, Any]]) -> None:
    how = steps(method)
    assume(any(program.moving))
    expected_values, expected = first(program, gradient="backprop", **how)
    assume(any(x.requires_grad for x in expected_values))
    values, gradients = first(program, slots="all", **how)
    assert_agree(values, expected_values, program)
    assert_agree(gradients, expected, program)
    for memory in memories:
        others, found = first(program, **memory, **how)
        assert_same_bits(others, values)
        assert_same_bits(found, gradients)


@some
@given(
    programs(wild=False),
    st.sampled_from(EVERY),
    st.sampled_from(MEMORY),
    st.sampled_from([second, by_transform, by_tangents]),
)
def test_every_random_program_has_its_other_derivatives(
    program: Program, method: str, memory: dict[str, Any], derivative: Callable[..., Found]
) -> None:
    how = steps(method)
    assume(any(program.moving))
    expected_values, expected = (second if derivative is second else first)(program, gradient="backprop", **how)
    values, found = derivative(program, **memory, **how)
    assert_agree(values, expected_values, program)
    assert_agree(found, expected, program)


@some
@given(
    programs(wild=True),
    st.sampled_from(EVERY),
    st.sampled_from(MEMORY),
    st.sampled_from([first, second, by_transform, by_tangents]),
)
def test_a_wild_program_is_right_or_refused(
    program: Program, method: str, memory: dict[str, Any], derivative: Callable[..., Found]
) -> None:
    how = steps(method)
    assume(any(program.moving))
    try:
        expected_values, expected = (second if derivative is second else first)(program, gradient="backprop", **how)
    except RuntimeError:  # torch's own graph has been used before
        return event("torch refuses it")
    try:
        values, found = derivative(program, **memory, **how)
    except RuntimeError as error:
        if program.lawful:
            raise
        return event(f"refused: {type(error).__name__}")
    event("right")
    assert_agree(values, expected_values, program)
    assert_agree(found, expected, program)


@some
@given(programs(wild=False), st.integers(1, 6), two_memories)
def test_every_random_recurrence_has_one_gradient(
    program: Program, length: int, memories: list[dict[str, Any]]
) -> None:
    """The same expressions as the step of a scan, with a series of times as its inputs."""
    assume(any(program.moving))

    def run(**how: Any) -> Found:
        case = program.make()
        series = torch.linspace(0, 1, length, dtype=torch.float64).requires_grad_()

        def step(carry: Any, t: Tensor) -> tuple[Any, Any]:
            new = pytree.tree_map(lambda x: x / (1 + x.abs() ** 2), case.f(t, carry))
            return new, {"sum": sum(x.abs().sum().double() for x in pytree.tree_leaves(new)), "old": carry}

        results = pytree.tree_leaves(scan(step, case.y0, series, **how))
        total = sum(((x.abs() ** 2).sum().double() for x in results), start=torch.zeros((), dtype=torch.float64))
        wanted = [*(x for x in case.wanted if x is not case.t), series]
        if not total.requires_grad:
            return results, [None] * len(wanted)
        return results, list(torch.autograd.grad(total, wanted, allow_unused=True))

    expected_values, expected = run(gradient="backprop")
    values, gradients = run(slots="all")
    assert_close(values, expected_values)
    assert_agree(gradients, expected, program)
    for memory in memories:
        others, found = run(**memory)
        assert_same_bits(others, values)
        assert_same_bits(found, gradients)
