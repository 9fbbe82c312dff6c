"""Random right-hand sides over random states, held in random places: the laws hold for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from adjoint_cases import ROUNDING, Case, assert_close, assert_same_bits, gradients, numbers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adjoint import METHODS, Device, Files, Host, scan

PROGRAMS = int(os.environ.get("PROGRAMS", "100"))
few, many = (
    settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for number in ((PROGRAMS + 2) // 3, PROGRAMS)
)

DTYPES = (torch.float64, torch.float32, torch.complex128)
SIZE = 3

UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin,
    torch.tanh,
    lambda x: x * x / (1 + x.abs() ** 2),
    lambda x: x.flip(0),
    lambda x: x.mean().expand(SIZE),
    lambda x: torch.stack([x[i] for i in (2, 0, 1)]),
    lambda x: torch.cumsum(x, 0) / SIZE,
    lambda x: x.detach(),
    lambda x: torch.outer(x, x).diagonal() / (1 + x.abs() ** 2),
    lambda x: x if x.is_complex() else torch.relu(x),
    lambda x: x if x.is_complex() else torch.clamp(x, -0.5, 0.5),
    lambda x: torch.where(x.abs() > 0.3, x, 0.1 * x),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.sub,
    torch.mul,
    lambda x, y: x / (1 + y.abs()),
    lambda x, y: torch.cat((x[:1], y[1:])),
    lambda x, y: (torch.outer(x, y) @ y) / (1 + y.abs() ** 2),
)

Expression = tuple[Any, ...]


def expressions(leaves: int, parameters: int) -> st.SearchStrategy[Expression]:
    """Trees over the leaves of the state, the parameters, the time and numbers."""
    ends = st.one_of(
        st.tuples(st.just("leaf"), st.integers(0, leaves - 1)),
        st.tuples(st.just("parameter"), st.integers(0, parameters - 1)),
        st.tuples(st.just("late"), st.integers(0, parameters - 1)),
        st.just(("time",)),
        st.tuples(st.just("number"), st.floats(-1, 1, allow_nan=False)),
    )
    return st.recursive(
        ends,
        lambda inner: st.one_of(
            st.tuples(st.just("unary"), st.integers(0, len(UNARY) - 1), inner),
            st.tuples(st.just("binary"), st.integers(0, len(BINARY) - 1), inner, inner),
        ),
        max_leaves=5,
    )


def value(
    expression: Expression, t: Tensor, leaves: list[Tensor], parameters: Callable[[int], Tensor], like: Tensor
) -> Tensor:
    """The value of an expression as a vector, bounded by about one, of the dtype of ``like``."""
    kind, *rest = expression
    again = partial(value, t=t, leaves=leaves, parameters=parameters, like=like)
    match kind:
        case "leaf":
            found = leaves[rest[0]]
        case "parameter":
            found = parameters(rest[0])
        case "late":
            found = parameters(rest[0]) if t > 0.4 else torch.full_like(like, 0.2)
        case "time":
            found = torch.cos(t).expand(SIZE)
        case "number":
            found = torch.full_like(like, rest[0])
        case "unary":
            return UNARY[rest[0]](again(rest[1]))
        case _:
            return BINARY[rest[0]](again(rest[1]), again(rest[2]))
    if found.is_complex() and not like.is_complex():
        found = found.real
    return found.to(like.dtype)


@dataclass
class Holder:
    held: Any

    def parameter(self, index: int) -> Tensor:
        return self.held[index]  # type: ignore[no-any-return]


def hide(parameters: list[Tensor], place: str) -> Callable[[int], Tensor]:
    """The parameters, where a function can follow them."""
    if place == "object":
        return Holder(tuple(parameters)).parameter
    if place == "partial":
        return partial(lambda held, index: held[index], parameters)
    if place == "dict":
        held = {"a": [{i: p} for i, p in enumerate(parameters)]}
        return lambda index: held["a"][index][index]
    if place == "module":
        module = nn.ParameterList([p for p in parameters if isinstance(p, nn.Parameter)])
        rest = {i: p for i, p in enumerate(parameters) if not isinstance(p, nn.Parameter)}
        places = [i for i, p in enumerate(parameters) if isinstance(p, nn.Parameter)]
        return lambda index: rest[index] if index in rest else module[places.index(index)]
    if place == "default":
        return lambda index, held=parameters: held[index]  # type: ignore[misc]
    return lambda index: parameters[index]


PLACES = ("closure", "object", "partial", "dict", "module", "default")


@dataclass
class Program:
    """A plain description: from it the same problem can be made again and again."""

    dtypes: list[torch.dtype]
    shape_of_tree: str
    slopes: list[Expression]
    parameters: list[tuple[torch.dtype, bool, str]]
    """dtype, whether it requires grad, and what it is: a leaf, a module's parameter, or made from a leaf."""
    place: str
    starts: list[bool]
    times: list[float]
    moving_times: bool

    def make(self) -> Case:
        wanted: list[Tensor] = []
        held: list[Tensor] = []
        for i, (dtype, grad, kind) in enumerate(self.parameters):
            p = 0.5 * numbers(SIZE, seed=i, dtype=dtype)
            if kind == "module":
                p = nn.Parameter(p, requires_grad=grad)
            else:
                p.requires_grad_(grad)
            held.append(torch.tanh(p) if kind == "made" else p)
            wanted += [p] * grad
        leaves = [0.5 * numbers(SIZE, seed=10 + i, dtype=dtype) for i, dtype in enumerate(self.dtypes)]
        for x, grad in zip(leaves, self.starts, strict=True):
            x.requires_grad_(grad)
            wanted += [x] * grad
        t = torch.tensor(self.times, dtype=torch.float64, requires_grad=self.moving_times)
        wanted += [t] * self.moving_times
        tree, find = self.tree(leaves), hide(held, self.place)
        structure = pytree.tree_structure(tree)

        def f(t: Tensor, y: Any) -> Any:
            found = pytree.tree_leaves(y)
            slopes = [value(e, t, found, find, x) for e, x in zip(self.slopes, found, strict=True)]
            return pytree.tree_unflatten(slopes, structure)

        return Case(f, tree, t, wanted)

    def tree(self, leaves: list[Tensor]) -> Any:
        match self.shape_of_tree:
            case "single" if len(leaves) == 1:
                return leaves[0]
            case "dict":
                return {chr(97 + i): x for i, x in enumerate(leaves)}
            case "nested":
                return [{"x": leaves[0]}, tuple(leaves[1:])]
            case _:
                return tuple(leaves)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    parameters = draw(
        st.lists(
            st.tuples(st.sampled_from(DTYPES), st.booleans(), st.sampled_from(("leaf", "module", "made"))),
            min_size=1,
            max_size=3,
        )
    )
    start = draw(st.floats(-1, 1))
    lengths = draw(st.lists(st.floats(0.05, 0.4), min_size=1, max_size=4))
    sign = draw(st.sampled_from((1, -1)))
    times = [start]
    for length in lengths:
        times.append(times[-1] + sign * length)
    return Program(
        dtypes=dtypes,
        shape_of_tree=draw(st.sampled_from(("single", "tuple", "dict", "nested"))),
        slopes=[draw(expressions(len(dtypes), len(parameters))) for _ in dtypes],
        parameters=parameters,
        place=draw(st.sampled_from(PLACES)),
        starts=[draw(st.booleans()) for _ in dtypes],
        times=times,
        moving_times=draw(st.booleans()),
    )


def steps(method: str) -> dict[str, Any]:
    if METHODS[method].adaptive:
        return {"method": method, "rtol": 1e-2, "atol": 1e-2}
    return {"method": method, "dt": 0.15}


@many
@given(programs(), st.sampled_from(sorted(METHODS)), st.data())
def test_every_random_program_has_one_gradient(program: Program, method: str, data: st.DataObject) -> None:
    how = steps(method)
    assume(program.make().wanted)
    expected_values, expected = both(program.make(), gradient="backprop", **how)
    assume(any(x.requires_grad for x in pytree.tree_leaves(expected_values)))
    values, first = both(program.make(), slots="all", **how)
    assert_close(values, expected_values)
    assert_close_to_the_largest(first, expected, program)
    for memory in data.draw(st.lists(st.sampled_from(MEMORY), min_size=2, max_size=2, unique_by=str)):
        others, found = both(program.make(), **memory, **how)
        assert_same_bits(others, values)
        assert_same_bits(found, first)


FREE = {"write": 0.0, "read": 0.0}
MEMORY: tuple[dict[str, Any], ...] = (
    {"slots": 1},
    {"slots": 2},
    {"slots": 4},
    {"budget": "1 MB"},
    {},
    {"tiers": [Device(slots=1), Host(slots=1, **FREE), Files(slots=2, **FREE)]},
)


def both(case: Case, **how: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Values and gradients; None throughout where nothing depends on what is wanted."""
    ys = case.solve(**how).ys
    if not any(x.requires_grad for x in pytree.tree_leaves(ys)):
        return pytree.tree_leaves(ys), [None] * len(case.wanted)
    return pytree.tree_leaves(ys), gradients(case, **how)


def assert_close_to_the_largest(found: list[Tensor | None], expected: list[Tensor | None], program: Program) -> None:
    """Relative to the largest gradient of all: a sum of cancelling terms may leave less of another."""
    scale = max((float(x.abs().max()) for x in expected if x is not None), default=0.0)
    dtypes = {*program.dtypes, *(dtype for dtype, _, _ in program.parameters)}
    coarse = torch.finfo(torch.float32 if torch.float32 in dtypes else torch.float64).eps
    for a, b in zip(found, expected, strict=True):
        a_, b_ = (x if x is not None else torch.zeros(()) for x in (a, b))
        assert float((a_ - b_).abs().max()) <= ROUNDING * coarse * scale


@few
@given(programs(), st.integers(1, 6), st.data())
def test_every_random_recurrence_has_one_gradient(program: Program, length: int, data: st.DataObject) -> None:
    """The same expressions as the step of a scan, with a series of times as its inputs."""
    assume(program.make().wanted)

    def run(**how: Any) -> tuple[list[Tensor], list[Tensor | None]]:
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
    values, first = run(slots="all")
    assert_close(values, expected_values)
    assert_close_to_the_largest(first, expected, program)
    for memory in data.draw(st.lists(st.sampled_from(MEMORY), min_size=2, max_size=2, unique_by=str)):
        others, found = run(**memory)
        assert_same_bits(others, values)
        assert_same_bits(found, first)
