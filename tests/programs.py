"""Random right-hand sides of every kind that a user may write, lawful or not.

A program is a plain description; from it the same problem can be made again and again. Its parameters lie in closures,
modules, containers or objects; its expressions branch on time and state, detach, write into tensors of their own, call
other transforms and solves. Wild ones also keep tensors from one call for the next, and read tensors that cannot be
followed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from adjoint_cases import Case, numbers
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from adjoint import solve

SIZE = 3
DTYPES = (torch.float64, torch.float64, torch.float32, torch.complex128)

Expression = tuple[Any, ...]
Unary = Callable[[Tensor], Tensor]


def in_place(x: Tensor) -> Tensor:
    own = x * 0.5
    own.add_(0.1).mul_(x)
    own[0] = own[1] * 0.5
    own[1:] -= x[:2] * 0.25
    return own


def filled(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for i in range(SIZE):
        out[i] = x[SIZE - 1 - i]
    return out


def partly_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        factor = torch.cos(x.abs())
    return factor * x


def under_checkpoint(x: Tensor) -> Tensor:
    return checkpoint(lambda z: torch.sin(z) * 0.5, x, use_reentrant=False)  # type: ignore[no-any-return]


def under_vmap(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda a: a * torch.cos(a.abs()))(x)


def gradient_of_an_energy(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x if x.requires_grad else x.detach().requires_grad_()
        energy = torch.log1p((z.abs() ** 2).sum())
        (slope,) = torch.autograd.grad(energy, z, create_graph=True)
    return slope


def inner_solve(x: Tensor) -> Tensor:
    return solve(lambda s, z: -z * x.abs(), x, (0.0, 0.2), method="euler", slots=1).ys[-1]  # type: ignore[no-any-return]


class Twice(torch.autograd.Function):
    """A custom function with a custom backward that can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x) * 0.5

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.cos(x).conj() * 0.5


UNARY: dict[str, Unary] = {
    "sin": torch.sin,
    "tanh": lambda x: torch.tanh(x.real).to(x.dtype) if x.is_complex() else torch.tanh(x),
    "square": lambda x: x * x / (1 + x.abs() ** 2),
    "flip": lambda x: x.flip(0),
    "mean": lambda x: x.mean().expand(SIZE),
    "stack": lambda x: torch.stack([x[i] for i in (2, 0, 1)]),
    "cumsum": lambda x: torch.cumsum(x, 0) / SIZE,
    "detach": lambda x: x.detach(),
    "diagonal": lambda x: torch.outer(x, x).diagonal() / (1 + x.abs() ** 2),
    "relu": lambda x: x if x.is_complex() else torch.relu(x),
    "clamp": lambda x: x if x.is_complex() else torch.clamp(x, -0.5, 0.5),
    "where": lambda x: torch.where(x.abs() > 0.3, x, 0.1 * x),
    "sort": lambda x: x if x.is_complex() else x.sort().values,
    "in place": in_place,
    "filled": filled,
    "no grad": partly_without_grad,
    "checkpoint": under_checkpoint,
    "vmap": under_vmap,
    "energy": lambda x: x if x.is_complex() else gradient_of_an_energy(x),
    "solve": inner_solve,
    "custom": lambda x: x if x.is_complex() else Twice.apply(x),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (1 + y.abs()),
    "cat": lambda x, y: torch.cat((x[:1], y[1:])),
    "matmul": lambda x, y: (torch.outer(x, y) @ y) / (1 + y.abs() ** 2),
    "added in place": lambda x, y: (x * 1).add_(y),
}


class Key:
    """To keep something under."""


def keepers() -> dict[str, Callable[[Callable[[], Tensor]], Tensor]]:
    """Memories: each gives what it was given first."""
    kept: dict[str, Tensor] = {}
    variable: ContextVar[Tensor | None] = ContextVar("kept", default=None)
    weak, key, carrier = weakref.WeakKeyDictionary[Key, Tensor](), Key(), torch.zeros(1)

    class Class:
        value: Tensor | None = None

    def in_a_dict(make: Callable[[], Tensor]) -> Tensor:
        if "kept" not in kept:
            kept["kept"] = make()
        return kept["kept"]

    def in_a_variable(make: Callable[[], Tensor]) -> Tensor:
        found = variable.get()
        if found is None:
            variable.set(found := make())
        return found

    def in_a_weak_dict(make: Callable[[], Tensor]) -> Tensor:
        if key not in weak:
            weak[key] = make()
        return weak[key]

    def in_a_tensor(make: Callable[[], Tensor]) -> Tensor:
        if not hasattr(carrier, "kept"):
            carrier.kept = make()  # type: ignore[attr-defined]
        return carrier.kept  # type: ignore[attr-defined, no-any-return]

    def in_a_class(make: Callable[[], Tensor]) -> Tensor:
        Class.value = make() if Class.value is None else Class.value
        return Class.value

    return {
        "dict": in_a_dict,
        "variable": in_a_variable,
        "weak dict": in_a_weak_dict,
        "tensor": in_a_tensor,
        "class": in_a_class,
    }


@dataclass
class Holder:
    held: Any

    def parameter(self, index: int) -> Tensor:
        return self.held[index]  # type: ignore[no-any-return]


KEEPERS = tuple(keepers())


def hide(tensors: list[Tensor], place: str) -> Callable[[int], Tensor]:
    """Tensors where a function can follow them."""
    if place == "object":
        return Holder(tuple(tensors)).parameter
    if place == "partial":
        return functools.partial(lambda held, index: held[index], tensors)
    if place == "dict":
        held = {"a": [{i: p} for i, p in enumerate(tensors)]}
        return lambda index: held["a"][index][index]
    if place == "module":
        module = nn.Module()
        for i, p in enumerate(tensors):
            if isinstance(p, nn.Parameter):
                module.register_parameter(f"p{i}", p)
            else:
                module.register_buffer(f"p{i}", p)
        return lambda index: getattr(module, f"p{index}")  # type: ignore[no-any-return]
    if place == "default":
        return lambda index, held=tensors: held[index]  # type: ignore[misc]
    return lambda index: tensors[index]


PLACES = ("closure", "object", "partial", "dict", "module", "default")


@dataclass
class Surroundings:
    """What an expression may see in one call of f."""

    t: Tensor
    state: list[Tensor]
    parameter: Callable[[int], Tensor]
    buffer: Callable[[int], Tensor]
    hidden: Any
    keepers: dict[int, dict[str, Any]]
    like: Tensor

    def of_type(self, x: Tensor) -> Tensor:
        if x.is_complex() and not self.like.is_complex():
            x = x.real
        return x.to(self.like.dtype)


def value(expression: Expression, here: Surroundings) -> Tensor:
    """A vector, bounded by about one, of the dtype of ``here.like``."""
    kind, *rest = expression
    match kind:
        case "state":
            found = here.state[rest[0]]
        case "parameter":
            found = here.parameter(rest[0])
        case "buffer":
            found = here.buffer(rest[0])
        case "time":
            found = torch.cos(here.t).expand(SIZE)
        case "number":
            found = torch.full_like(here.like, rest[0])
        case "hidden":
            found = here.hidden[rest[0]].p
        case "kept":
            name, keeper, content = rest
            found = here.keepers[name][keeper](lambda: value(content, here))
        case "late":
            found = value(rest[1], here) if here.t > rest[0] else value(rest[2], here)
        case "window":
            found = value(rest[2], here) if rest[0] < here.t < rest[1] else value(rest[3], here)
        case "positive":
            found = value(rest[1] if here.state[rest[0]].real.sum() > 0 else rest[2], here)
        case "unary":
            found = UNARY[rest[0]](value(rest[1], here))
        case _:
            found = BINARY[rest[0]](value(rest[1], here), value(rest[2], here))
    return here.of_type(found)


def kinds(expression: Expression) -> set[str]:
    """Everything that happens in an expression."""
    found = {str(expression[0])} | {str(x) for x in expression[1:2] if expression[0] in ("unary", "binary")}
    for part in expression[1:]:
        if isinstance(part, tuple):
            found |= kinds(part)
    return found


def expressions(state: int, parameters: int, buffers: int, wild: bool) -> st.SearchStrategy[Expression]:
    ends: list[st.SearchStrategy[Expression]] = [
        st.tuples(st.just("state"), st.integers(0, state - 1)),
        st.tuples(st.just("parameter"), st.integers(0, parameters - 1)),
        st.tuples(st.just("parameter"), st.integers(0, parameters - 1)),
        st.tuples(st.just("buffer"), st.integers(0, buffers - 1)),
        st.just(("time",)),
        st.tuples(st.just("number"), st.floats(-1, 1, allow_nan=False)),
    ]
    if wild:
        ends.append(st.tuples(st.just("hidden"), st.integers(0, parameters - 1)))
    moments = st.floats(-1.2, 2.2)

    def grown(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        ways = [
            st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), inner),
            st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), inner, inner),
            st.tuples(st.just("late"), moments, inner, inner),
            st.builds(lambda a, b, x, y: ("window", a, a + b, x, y), moments, st.floats(0.05, 0.6), inner, inner),
            st.tuples(st.just("positive"), st.integers(0, state - 1), inner, inner),
        ]
        if wild:
            ways.append(st.tuples(st.just("kept"), st.integers(0, 2), st.sampled_from(KEEPERS), inner))
        return st.one_of(*ways)

    return st.recursive(st.one_of(*ends), grown, max_leaves=6)


@dataclass
class Program:
    """A right-hand side, where it starts, and when it is asked for."""

    dtypes: list[torch.dtype]
    shape_of_tree: str
    slopes: list[Expression]
    parameters: list[tuple[torch.dtype, bool, str]]
    """dtype, whether it requires grad, and what it is: a leaf, a module's parameter, or made from a leaf."""
    place: str
    starts: list[bool]
    times: list[float]
    moving_times: bool
    coarse_times: bool
    place_of_buffers: str

    @property
    def happens(self) -> set[str]:
        return set().union(*(kinds(e) for e in self.slopes))

    @property
    def lawful(self) -> bool:
        return not self.happens & {"hidden", "kept"}

    @property
    def coarse(self) -> bool:
        """Whether anything is in single precision."""
        return self.coarse_times or torch.float32 in {*self.dtypes, *(dtype for dtype, _, _ in self.parameters)}

    def tensors(self) -> list[Tensor]:
        """Fresh values: parameters, then leaves of the first state, then the times."""
        found = [0.5 * numbers(SIZE, seed=i, dtype=dtype) for i, (dtype, _, _) in enumerate(self.parameters)]
        found += [0.5 * numbers(SIZE, seed=10 + i, dtype=dtype) for i, dtype in enumerate(self.dtypes)]
        return [*found, torch.tensor(self.times, dtype=torch.float32 if self.coarse_times else torch.float64)]

    @property
    def moving(self) -> list[bool]:
        return [*(grad for _, grad, _ in self.parameters), *self.starts, self.moving_times]

    def make(self) -> Case:
        tensors = self.tensors()
        for i, (x, moving) in enumerate(zip(tensors, self.moving, strict=True)):
            if i < len(self.parameters) and self.parameters[i][2] == "module":
                tensors[i] = nn.Parameter(x, requires_grad=moving)
            else:
                x.requires_grad_(moving)
        return self.case(tensors)

    def case(self, tensors: list[Tensor]) -> Case:
        """The problem over these tensors."""
        count = len(self.parameters)
        held = [
            torch.sin(x) if kind == "made" else x for x, (_, _, kind) in zip(tensors, self.parameters, strict=False)
        ]
        *leaves, t = tensors[count:]
        find = hide(held, self.place)
        constants = [0.5 * numbers(SIZE, seed=20), torch.tensor([2, 0, 1])]
        buffer = hide(constants, self.place_of_buffers)
        hidden = [SimpleNamespace(p=x) for x in held]
        tree = self.tree(leaves)
        structure = pytree.tree_structure(tree)
        memories = {i: keepers() for i in range(3)}

        def f(t: Tensor, y: Any) -> Any:
            state = pytree.tree_leaves(y)
            slopes = [
                value(e, Surroundings(t, state, find, buffer, hidden, memories, x))
                for e, x in zip(self.slopes, state, strict=True)
            ]
            return pytree.tree_unflatten(slopes, structure)

        wanted = [x for x, moving in zip(tensors, self.moving, strict=True) if moving]
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
def programs(draw: st.DrawFn, wild: bool) -> Program:
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    kind = st.sampled_from(("leaf", "module", "made"))
    parameters = draw(st.lists(st.tuples(st.sampled_from(DTYPES), st.booleans(), kind), min_size=1, max_size=3))
    start, sign = draw(st.floats(-1, 1)), draw(st.sampled_from((1, -1)))
    times = [start]
    for length in draw(st.lists(st.floats(0.05, 0.4), min_size=1, max_size=4)):
        times.append(times[-1] + sign * length)
    return Program(
        dtypes=dtypes,
        shape_of_tree=draw(st.sampled_from(("single", "tuple", "dict", "nested"))),
        slopes=[draw(expressions(len(dtypes), len(parameters), 2, wild)) for _ in dtypes],
        parameters=parameters,
        place=draw(st.sampled_from(PLACES)),
        starts=[draw(st.booleans()) for _ in dtypes],
        times=times,
        moving_times=draw(st.booleans()),
        coarse_times=draw(st.integers(0, 4)) == 0,
        place_of_buffers=draw(st.sampled_from(PLACES)),
    )
