"""Tensors are found wherever a function may hide them, or refused by name: a silently missing gradient is the worst bug.

Every case is a function that makes a right-hand side and the tensors to differentiate with respect to. The gradient
must be that of torch's own graph, with the same bits whatever is kept; or the solve must be refused, whatever is kept.
"""

from __future__ import annotations

import functools
import random
import threading
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adjoint_cases import Case, assert_close, assert_same_bits, gradients, leaf, loss_of, numbers, steps_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adjoint import GRADIENTS, METHODS, UntrackedTensorError, scan, solve

CPU = torch.device("cpu")
TIMES = (0.0, 0.4, 1.0)
LATE = 0.5
SLOTS = (1, 3, "all", None)
Made = tuple[Callable[..., Any], list[Tensor]]

some_methods = pytest.mark.parametrize("method", ["rk4", "tsit5"])
every_method = pytest.mark.parametrize("method", METHODS)
slots_matter = pytest.mark.parametrize("slots", SLOTS)


def theta(seed: int = 1) -> Tensor:
    return leaf(3, seed=seed, on=CPU)


def case_of(make: Callable[[], Made], y0: Tensor | None = None) -> Case:
    f, wanted = make()
    return Case(f, numbers(3, seed=2) if y0 is None else y0, TIMES, wanted)


FOUND: dict[str, Callable[[], Made]] = {}
REFUSED: dict[str, Callable[[], Made]] = {}


def found(make: Callable[[], Made]) -> Callable[[], Made]:
    FOUND[make.__name__] = make
    return make


def refused(make: Callable[[], Made]) -> Callable[[], Made]:
    REFUSED[make.__name__] = make
    return make


# ---- where a tensor is found ----------------------------------------------------------------------------------------


@found
def in_a_closure() -> Made:
    p = theta()
    return lambda t, y: p * y, [p]


@found
def in_a_closure_of_a_closure() -> Made:
    p = theta()

    def outer() -> Callable[[Tensor], Tensor]:
        return lambda y: torch.sin(p) * y

    inner = outer()
    return lambda t, y: inner(y), [p]


@found
def in_a_recursive_closure() -> Made:
    p = theta()

    def power(y: Tensor, n: int) -> Tensor:
        return y if n == 0 else p * power(y, n - 1)

    return lambda t, y: power(y, 3), [p]


@found
def in_functions_that_call_each_other() -> Made:
    p, q = theta(), theta(3)

    def even(y: Tensor, n: int) -> Tensor:
        return y if n == 0 else p * odd(y, n - 1)

    def odd(y: Tensor, n: int) -> Tensor:
        return y if n == 0 else q * even(y, n - 1)

    return lambda t, y: even(y, 3), [p, q]


@found
def in_a_list_a_dict_a_tuple_and_a_set() -> Made:
    p, q, r, s, u = (theta(i) for i in range(5))
    held = [{"deep": (p, {q})}, deque([r]), OrderedDict(a=s), defaultdict(list, b=[u])]

    def f(t: Tensor, y: Tensor) -> Tensor:
        deep = held[0]["deep"]  # type: ignore[index, call-overload]
        (second,) = deep[1]
        return deep[0] * y + second + held[1][0] * held[2]["a"] - held[3]["b"][0]  # type: ignore[index, call-overload]

    return f, [p, q, r, s, u]


@found
def in_a_named_tuple() -> Made:
    p = theta()
    held = Rates(p, 2.0)
    return lambda t, y: held.fast * y * held.slow, [p]


Rates = namedtuple("Rates", "fast slow")


class Reversed(tuple[Any, ...]):
    """Made from its items, but not in their order."""

    def __new__(cls, items: Any) -> Reversed:
        return super().__new__(cls, tuple(items)[::-1])


@found
def in_a_tuple_with_a_mind_of_its_own() -> Made:
    p, q = theta(), theta(3)
    held = Reversed((p, q))
    held.scale = 2.0  # type: ignore[attr-defined]
    return lambda t, y: held[0] * y + held.scale * held[1], [p, q]  # type: ignore[attr-defined]


@found
def in_a_partial() -> Made:
    p, q = theta(), theta(3)
    return functools.partial(lambda a, t, y, *, b: a * y + b, p, b=q), [p, q]


@found
def in_a_partial_of_a_torch_function() -> Made:
    p = theta()
    times_p = functools.partial(torch.mul, p)
    return lambda t, y: times_p(y), [p]


@found
def in_a_global() -> Made:
    return lambda t, y: GLOBAL * y, [GLOBAL]


GLOBAL = leaf(3, seed=11, on=CPU)


@found
def in_a_global_of_a_global_function() -> Made:
    return lambda t, y: uses_a_global(y), [GLOBAL]


def uses_a_global(y: Tensor) -> Tensor:
    return torch.cos(GLOBAL) * y


@found
def in_a_global_inside_a_comprehension() -> Made:
    return lambda t, y: sum(GLOBAL[i] * y for i in range(3)), [GLOBAL]  # type: ignore[return-value]


@found
def in_a_default() -> Made:
    p, q = theta(), theta(3)

    def f(t: Tensor, y: Tensor, p: Tensor = p, *, q: Tensor = q) -> Tensor:
        return p * y - q

    return f, [p, q]


@found
def in_an_attribute_of_the_function() -> Made:
    p = theta()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return f.p * y  # type: ignore[attr-defined]

    f.p = p  # type: ignore[attr-defined]
    return f, [p]


class Plain:
    def __init__(self, p: Tensor) -> None:
        self.p = p
        self.again = self.slope

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        return self.p * y

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.p * self.again(t, y)


@found
def in_a_bound_method() -> Made:
    p = theta()
    return Plain(p).slope, [p]


@found
def in_a_callable_object_that_holds_its_own_method() -> Made:
    p = theta()
    return Plain(p), [p]


class Slotted:
    __slots__ = ("p",)

    def __init__(self, p: Tensor) -> None:
        self.p = p


@found
def in_a_slot() -> Made:
    p = theta()
    held = Slotted(p)
    return lambda t, y: held.p * y, [p]


@dataclass(frozen=True)
class Frozen:
    p: Tensor
    inner: Any = None


@found
def in_a_frozen_dataclass() -> Made:
    p, q = theta(), theta(3)
    held = Frozen(p, Frozen(q))
    return lambda t, y: held.p * y + held.inner.p, [p, q]


@found
def in_a_cycle() -> Made:
    p = theta()
    held: dict[str, Any] = {"p": p}
    held["self"] = [held]
    return lambda t, y: held["self"][0]["p"] * y, [p]


@found
def in_a_bound_builtin() -> Made:
    p = theta()
    times_p = p.mul
    return lambda t, y: times_p(y), [p]


@found
def in_an_operator_of_a_tensor() -> Made:
    p = theta()
    times_p = p.__mul__
    return lambda t, y: times_p(y), [p]


@found
def behind_a_decorator() -> Made:
    p = theta()

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Tensor:
            return 2 * function(*args)

        return wrapper

    @twice
    def f(t: Tensor, y: Tensor) -> Tensor:
        return p * y

    return f, [p]


@found
def beside_what_was_made_from_it() -> Made:
    """log_theta and theta = exp(log_theta): the gradient through theta must not count twice."""
    log_p = theta()
    p = log_p.exp()
    return lambda t, y: -p * y + 0.1 * log_p, [log_p]


@found
def as_a_view_beside_its_base() -> Made:
    p = theta()
    first, same = p[:1], p.view(3)
    return lambda t, y: first * y + p - torch.sin(same), [p]


@found
def twice_the_same() -> Made:
    p = theta()
    held = {"a": p, "b": [p, p]}
    return lambda t, y: held["a"] * y + held["b"][0] * held["b"][1], [p]  # type: ignore[index, operator]


@found
def as_y0_too() -> Made:
    p = theta()
    return lambda t, y: p * y, [p]


@found
def late_in_time() -> Made:
    p, q = theta(), theta(3)
    return lambda t, y: q * y if t > LATE else p * y, [p, q]


@found
def late_in_a_module() -> Made:
    torch.manual_seed(0)
    early, late = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(late(y) if t > LATE else early(y))

    return f, [*early.parameters(), *late.parameters()]


class Everything(nn.Module):
    """Parameters in every container that torch knows, buffers, plain tensors, hooks and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "b": nn.Linear(4, 3)})
        self.listed = nn.ParameterList([nn.Parameter(numbers(3, seed=i).float()) for i in range(2)])
        self.named = nn.ParameterDict({"x": nn.Parameter(numbers(3, seed=3).float())})
        self.register_buffer("scale", numbers(3, seed=4).float())
        self.tied = self.inner["b"].bias
        self.plain = (numbers(3, seed=5)).requires_grad_()
        self.inner["b"].register_forward_hook(lambda module, args, out: out * self.listed[1] + module.weight.mean())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        z = self.inner["b"](self.inner["a"](y))
        return torch.tanh(z * self.listed[0] + self.named["x"] * self.scale - self.tied * self.plain)


@found
def in_every_corner_of_a_module() -> Made:
    torch.manual_seed(0)
    module = Everything().double()
    return module, [*module.parameters(), module.plain]


@found
def in_a_method_of_a_module() -> Made:
    torch.manual_seed(0)
    module = nn.Linear(3, 3).double()
    return lambda t, y, forward=module.forward: torch.tanh(forward(y)), list(module.parameters())


@found
def behind_weight_norm() -> Made:
    torch.manual_seed(0)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).double())
    return lambda t, y: torch.tanh(module(y)), list(module.parameters())


@found
def behind_a_functional_call() -> Made:
    torch.manual_seed(0)
    module = nn.Linear(3, 3).double()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": 2 * module.weight, "bias": module.bias}, (y,))

    return f, list(module.parameters())


@found
def chosen_by_being_a_parameter() -> Made:
    p = nn.Parameter(numbers(3, seed=1))
    held = {"p": p, "q": numbers(3, seed=3)}
    return lambda t, y: sum(x for x in held.values() if isinstance(x, nn.Parameter)) * y, [p]


@found
def with_an_attribute_of_its_own() -> Made:
    p = nn.Parameter(numbers(3, seed=1))
    p.sign = -1  # type: ignore[attr-defined]
    return lambda t, y: p.sign * p * y, [p]  # type: ignore[attr-defined]


@found
def under_another_gradient() -> Made:
    """A Hamiltonian network calls autograd.grad itself."""
    w = leaf(4, 2, seed=1, on=CPU)

    def f(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            z = y[:2] if y.requires_grad else y.requires_grad_()[:2]
            energy = torch.tanh(w @ z).pow(2).sum()
            (slope,) = torch.autograd.grad(energy, z, create_graph=True)
        return torch.cat((slope[1:], -slope[:1], 0 * y[2:]))

    return f, [w]


@found
def under_another_gradient_of_detached_inputs() -> Made:
    w = leaf(4, 3, seed=1, on=CPU)

    def f(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            z = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.tanh(w @ z).sum(), z, create_graph=True)
        return slope - y

    return f, [w]


@found
def under_vmap() -> Made:
    p = theta()
    return lambda t, y: torch.func.vmap(lambda a, b: torch.sin(a * b))(p, y), [p]


@found
def under_functional_transforms() -> Made:
    p = theta()

    def f(t: Tensor, y: Tensor) -> Tensor:
        slope = torch.func.grad(lambda z: torch.sin(p * z).sum())(y)
        _, along = torch.func.jvp(lambda z: torch.tanh(p * z), (y,), (slope,))
        return torch.func.jacrev(lambda z: p * z**2)(y) @ along

    return f, [p]


@found
def under_a_checkpoint() -> Made:
    p = theta()
    return lambda t, y: checkpoint(lambda z: torch.sin(p * z), y, use_reentrant=False), [p]  # type: ignore[return-value]


@found
def in_a_solve() -> Made:
    p = theta()
    return lambda t, y: -solve(lambda s, z: p * z, y, (0.0, 0.1), method="rk4", slots=1).ys[-1], [p]


@found
def in_a_scan() -> Made:
    p, x = theta(), leaf(4, 3, seed=3, on=CPU)
    return lambda t, y: torch.sin(scan(lambda c, i: (c * p + i, None), y, x, slots=1)[0]), [p, x]


@found
def partly_without_grad() -> Made:
    p = theta()

    def f(t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            factor = torch.sin(p * y)
        return factor * p * y

    return f, [p]


@found
def with_ties_and_cut_gradients() -> Made:
    p = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64).requires_grad_()
    start = numbers(3, seed=2)

    def f(t: Tensor, y: Tensor) -> Tensor:
        kinks = torch.maximum(p, torch.ones(3, dtype=torch.float64)) + torch.clamp(p, -1, 1) + (p - 1).abs()
        return kinks * torch.relu(y) * y.detach() / (1 + y**2) - y.sort().values + (y - start).abs()

    return f, [p]


@found
def detached_and_not() -> Made:
    p = theta()
    copy = p.detach()
    return lambda t, y: copy * p * y, [p]


@found
def through_a_custom_function() -> Made:
    p = theta()
    return lambda t, y: Product.apply(p, y), [p]


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.from_numpy(a.detach().numpy() * b.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return gradient * b, gradient * a


@found
def sparse() -> Made:
    p = numbers(3, 3, seed=1).relu().to_sparse().requires_grad_()
    constant = torch.eye(3, dtype=torch.float64).to_sparse_csr()
    return lambda t, y: torch.sparse.mm(p, y[:, None])[:, 0] - constant @ y, [p]


@found
def kept_by_a_module_that_makes_it_anew() -> Made:
    p = nn.Parameter(numbers(3, seed=1))
    module = nn.Module()
    module.p = p

    def f(t: Tensor, y: Tensor) -> Tensor:
        module.cached = torch.sin(module.p)  # type: ignore[arg-type]
        return module.cached * y  # type: ignore[operator]

    return f, [p]


@found
def beside_a_mask_made_on_first_use() -> Made:
    """What does not depend on numbers may be kept."""
    p = theta()
    kept: dict[str, Tensor] = {}

    def f(t: Tensor, y: Tensor) -> Tensor:
        if "mask" not in kept:
            kept["mask"] = torch.ones_like(y)
            kept["grid"] = torch.linspace(0, 1, 3, dtype=torch.float64)
        return p * y * kept["mask"] + kept["grid"]

    return f, [p]


@found
def beside_a_log() -> Made:
    """Noting values is no use of them."""
    p = theta()
    notes: list[Tensor] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        notes.append(y.detach().clone())
        return p * y

    return f, [p]


# ---- where it cannot be followed, from the first step on -------------------------------------------------------------


class Hidden:
    p = leaf(3, seed=21, on=CPU)
    made = torch.sin(p)


@refused
def in_a_class_attribute() -> Made:
    return lambda t, y: Hidden.p * y, [Hidden.p]


@refused
def as_what_was_made_of_a_class_attribute() -> Made:
    return lambda t, y: Hidden.made * y, [Hidden.p]


@refused
def in_a_simple_namespace() -> Made:
    p = theta()
    held = SimpleNamespace(p=p)
    return lambda t, y: held.p * y, [p]


@refused
def in_a_module() -> Made:
    return lambda t, y: np.theta_of_a_test * y, [np.theta_of_a_test]  # type: ignore[attr-defined]


np.theta_of_a_test = leaf(3, seed=22, on=CPU)  # type: ignore[attr-defined]


@refused
def behind_a_cache() -> Made:
    p = theta()

    @functools.lru_cache
    def doubled() -> Tensor:
        return 2 * p

    return lambda t, y: doubled() * y, [p]


@refused
def behind_a_property_of_a_global() -> Made:
    return lambda t, y: WITH_PROPERTY.p * y, [GLOBAL]


class WithProperty:
    @property
    def p(self) -> Tensor:
        return 2 * GLOBAL


WITH_PROPERTY = WithProperty()


@refused
def in_an_iterator() -> Made:
    p = theta()
    endless = iter([p] * 10_000)
    return lambda t, y: next(endless) * y, [p]


@refused
def in_an_array_of_objects() -> Made:
    p = theta()
    held = np.empty(1, dtype=object)
    held[0] = p
    return lambda t, y: held[0] * y, [p]


@refused
def in_a_long_list() -> Made:
    p = theta()
    held = [p] + [0.0] * 20_000
    return lambda t, y: held[0] * y, [p]


@refused
def in_an_attribute_of_a_tensor() -> Made:
    p, carrier = theta(), numbers(3)
    carrier.p = p  # type: ignore[attr-defined]
    return lambda t, y: carrier.p * y, [p]  # type: ignore[attr-defined]


@refused
def in_a_script_module() -> Made:
    module = torch.jit.trace(nn.Linear(3, 3).double(), numbers(3))
    return lambda t, y: torch.tanh(module(y)), list(module.parameters())


@refused
def inside_a_custom_function() -> Made:
    return lambda t, y: Product.apply(Hidden.p, y), [Hidden.p]


@refused
def under_a_transform() -> Made:
    return lambda t, y: torch.func.grad(lambda p: torch.sin(p * y).sum())(Hidden.p), [Hidden.p]


@refused
def under_hidden_vmap() -> Made:
    return lambda t, y: torch.func.vmap(lambda a, b: a * b)(Hidden.p, y), [Hidden.p]


# ---- kept from one call to the next ----------------------------------------------------------------------------------


@refused
def kept_in_a_dict() -> Made:
    p = theta()
    kept: dict[str, Tensor] = {}
    return lambda t, y: kept.setdefault("p", torch.sin(p)) * y, [p]


@refused
def kept_as_it_is() -> Made:
    p = theta()
    kept: dict[str, Tensor] = {}
    return lambda t, y: kept.setdefault("p", p) * y, [p]


@refused
def kept_in_a_nonlocal_name() -> Made:
    p, kept = theta(), None

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal kept
        kept = torch.sin(p) if kept is None else kept
        return kept * y

    return f, [p]


@refused
def kept_in_a_class() -> Made:
    p = theta()

    class Kept:
        value: Tensor | None = None

    def f(t: Tensor, y: Tensor) -> Tensor:
        Kept.value = torch.sin(p) if Kept.value is None else Kept.value
        return Kept.value * y

    return f, [p]


@refused
def kept_by_a_module() -> Made:
    module = nn.Linear(3, 3).double()
    module.cached = None

    def f(t: Tensor, y: Tensor) -> Tensor:
        if module.cached is None:
            module.cached = torch.sin(module.weight)
        return module.cached @ y

    return f, [module.weight]


@refused
def kept_since_the_first_state() -> Made:
    p = theta()
    kept: list[Tensor] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        if not kept:
            kept.append(y)
        return p * (y - kept[0])

    return f, [p]


def late(make: Callable[[], Made]) -> Callable[[], Made]:
    """The same hiding place, used only from a later time on."""

    def make_late() -> Made:
        f, wanted = make()
        p = theta(5)
        return lambda t, y: f(t, y) if t > LATE else p * y, [*wanted, p]

    return make_late


LATE_REFUSED = {name: late(make) for name, make in REFUSED.items() if not name.startswith("kept")}
LATE_KEPT = {name: late(make) for name, make in REFUSED.items() if name.startswith("kept_in_a_d")}


# ---- the laws --------------------------------------------------------------------------------------------------------


@some_methods
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_gets_its_gradient(name: str, method: str) -> None:
    make, how = FOUND[name], steps_of(method)
    y0 = None if name != "as_y0_too" else theta()
    expected = gradients(case_of(make, y0), gradient="backprop", **how)
    first = gradients(case_of(make, y0), slots="all", **how)
    assert any(g is not None and g.to_dense().any() for g in expected)
    assert_close(dense(first), dense(expected))
    for slots in (1, 3):
        assert_same_bits(dense(gradients(case_of(make, y0), slots=slots, **how)), dense(first))


def dense(gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g.to_dense() for g in gradients]


UNLIKE_THEIR_SOLUTION = ("with_ties_and_cut_gradients", "partly_without_grad", "late_in_time", "late_in_a_module")
"""Functions whose gradient is not that of their solution."""


@pytest.mark.parametrize("name", [name for name in FOUND if name not in UNLIKE_THEIR_SOLUTION])
def test_what_is_found_gets_its_continuous_gradient(name: str) -> None:
    y0 = None if name != "as_y0_too" else theta()
    how = {"method": "rk4", "dt": 0.1}
    found = dense(gradients(case_of(FOUND[name], y0), gradient="backsolve", **how))
    expected = dense(gradients(case_of(FOUND[name], y0), **how))
    assert_close(found, expected, 1e-2 / torch.finfo(torch.float64).eps)


def assert_refused(make: Callable[[], Made], error: type[Exception] = UntrackedTensorError, **how: Any) -> str:
    """Forward or backward, but refused; and never by chance."""
    case = case_of(make, leaf(3, seed=2, on=CPU))
    with pytest.raises(error) as refusal:
        torch.autograd.grad(loss_of(case.solve(**how).ys), case.wanted, allow_unused=True)
    return str(refusal.value)


@some_methods
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str, method: str) -> None:
    for slots in (1, "all"):
        text = assert_refused(REFUSED[name], slots=slots, **steps_of(method))
        assert "gradient would be lost" in text and ("args=" in text or "call" in text)


@some_methods
@pytest.mark.parametrize("name", LATE_REFUSED)
def test_what_is_used_late_and_cannot_be_followed_is_refused(name: str, method: str) -> None:
    for slots in (1, "all"):
        assert "gradient would be lost" in assert_refused(LATE_REFUSED[name], slots=slots, **steps_of(method))


@every_method
@pytest.mark.parametrize("slots", [3, None])
@pytest.mark.parametrize("make", [late(in_a_class_attribute), kept_in_a_dict])
def test_every_method_refuses_whatever_is_kept(make: Callable[[], Made], method: str, slots: int | str | None) -> None:
    assert_refused(make, slots=slots, **steps_of(method))


@some_methods
@slots_matter
@pytest.mark.parametrize("name", LATE_KEPT)
def test_what_is_kept_late_is_refused(name: str, method: str, slots: int | str | None) -> None:
    """Perhaps by torch, when it needs a graph again; a tensor kept within one step is no harm."""
    case = case_of(LATE_KEPT[name])
    expected = gradients(case_of(LATE_KEPT[name]), gradient="backprop", **steps_of(method))
    try:
        found = torch.autograd.grad(loss_of(case.solve(slots=slots, **steps_of(method)).ys), case.wanted)
    except RuntimeError:
        return
    assert_close(found, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_the_continuous_gradient_refuses_it_too(name: str) -> None:
    assert_refused(REFUSED[name], gradient="backsolve", **steps_of("rk4"))
    assert_refused(late(REFUSED[name]), gradient="backsolve", **steps_of("tsit5"))


@pytest.mark.parametrize("name", [name for name in REFUSED if not name.startswith("kept")])
def test_a_scan_refuses_it_too(name: str) -> None:
    for slots in (1, "all"):
        f, wanted = REFUSED[name]()
        with pytest.raises(UntrackedTensorError, match="gradient would be lost"):
            scan(lambda c, x: (f(x, c), c), numbers(3), numbers(4), slots=slots)  # noqa: B023
        f, wanted = LATE_REFUSED[name]()
        with pytest.raises(UntrackedTensorError, match="gradient would be lost"):
            _, ys = scan(lambda c, x: (f(x, c), c), numbers(3), torch.linspace(0, 1, 5), slots=slots)  # noqa: B023
            ys.sum().backward()
        assert wanted


@pytest.mark.parametrize("name", REFUSED)
def test_without_grad_nothing_is_refused(name: str) -> None:
    with torch.no_grad():
        assert case_of(REFUSED[name]).solve(method="rk4").status == "success"


def test_a_refusal_names_the_tensor_and_the_way_out() -> None:
    p = theta()
    held = SimpleNamespace(rate=p)
    with pytest.raises(
        UntrackedTensorError, match=r"f uses a tensor.*\(3,\).*float64, 'rate' of SimpleNamespace.*args="
    ):
        solve(lambda t, y: held.rate * y, numbers(3), TIMES)


@some_methods
def test_what_was_refused_passes_through_args(method: str) -> None:
    ys = solve(lambda t, y, p: p * y, numbers(3), TIMES, args=(Hidden.p,), slots=2, **steps_of(method)).ys
    found = torch.autograd.grad(ys.sum(), Hidden.p)
    ys = solve(lambda t, y: Hidden.p * y, numbers(3), TIMES, gradient="backprop", **steps_of(method)).ys
    assert_close(found, torch.autograd.grad(ys.sum(), Hidden.p))


@some_methods
@slots_matter
def test_a_tensor_appended_to_a_list_inside_f_is_refused(method: str, slots: int | str | None) -> None:
    def make() -> Made:
        p, held = theta(), [theta(3)]

        def f(t: Tensor, y: Tensor) -> Tensor:
            if t > LATE:
                held.append(Hidden.p)
            return held[-1] * p * y

        return f, [p]

    assert "gradient would be lost" in assert_refused(make, slots=slots, **steps_of(method))


def test_a_tensor_that_is_only_looked_at_is_not_refused() -> None:
    """A shape, a number or a detached copy has no gradient to lose."""
    p = theta()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return p * y * Hidden.p.shape[0] * float(Hidden.p.detach()[0]) * Hidden.p.detach()

    for slots in SLOTS:
        (found,) = torch.autograd.grad(solve(f, numbers(3), TIMES, method="rk4", slots=slots).ys.sum(), p)
    (expected,) = torch.autograd.grad(solve(f, numbers(3), TIMES, method="rk4", gradient="backprop").ys.sum(), p)
    assert_close([found], [expected])


def test_the_caller_sees_what_f_counts_and_notes() -> None:
    p, calls, notes = theta(), 0, []

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        notes.append(float(t))
        return p * y

    solution = solve(f, numbers(3), TIMES, method="rk4", dt=0.1, slots=2)
    assert calls == len(notes) >= solution.stats.evaluations > 0


def test_a_solve_leaves_the_function_as_it_was() -> None:
    module = Everything().double()
    before = dict(module.__dict__), {name: id(x) for name, x in module.named_parameters()}
    solve(module, numbers(3), TIMES, method="rk4", slots=2).ys.sum().backward()
    assert before == (dict(module.__dict__), {name: id(x) for name, x in module.named_parameters()})
    assert all(isinstance(x, nn.Parameter) and x.requires_grad for x in module.parameters())
    assert not any(hasattr(x, "grad_fn") and x.grad_fn for x in module.parameters())


# ---- what changes, is drawn, or is written ----------------------------------------------------------------------------


CHANGED = [("p", "f > held"), ("buffer", "buffer"), ("y0", "state|y0"), ("t", "input|y0 or t")]


@some_methods
@pytest.mark.parametrize("slots", ["all", 2])
@pytest.mark.parametrize(
    ("what", "name", "gradient"),
    [
        *((what, name, gradient) for what, name in CHANGED for gradient in ("discrete", "backsolve")),
        ("hidden", "tensor that f uses", "discrete"),  # only a probed step knows of constants that cannot be followed
    ],
)
def test_changing_a_tensor_before_the_reverse_sweep_is_noticed(
    what: str, name: str, method: str, slots: int | str, gradient: str
) -> None:
    p, buffer, y0, t = theta(), numbers(3, seed=3), leaf(3, seed=4, on=CPU), torch.tensor(TIMES, dtype=torch.float64)
    hidden = np.theta_of_a_test.detach()  # type: ignore[attr-defined]
    np.constant_of_a_test = hidden  # type: ignore[attr-defined]
    held = {"p": p, "b": [buffer]}
    f = lambda t, y: held["p"] * y * held["b"][0] * np.constant_of_a_test  # type: ignore[index, operator, attr-defined] # noqa: E731
    ys = solve(f, y0, t.requires_grad_(), slots=slots, gradient=gradient, **steps_of(method)).ys
    with torch.no_grad():
        {"p": p, "buffer": buffer, "y0": y0, "t": t, "hidden": hidden}[what].add_(0.1)
    with pytest.raises(
        RuntimeError, match=rf"({name}|held).*changed in place between the forward and the reverse sweep"
    ):
        torch.autograd.grad(ys.sum(), p)


@some_methods
def test_replacing_a_tensor_before_the_reverse_sweep_changes_nothing(method: str) -> None:
    def run(replace: bool) -> tuple[Tensor, ...]:
        module = nn.Linear(3, 3).double()
        with torch.no_grad():
            for x in module.parameters():
                x.copy_(numbers(*x.shape))
        before = list(module.parameters())
        ys = solve(lambda t, y: torch.tanh(module(y)), numbers(3), TIMES, slots=1, **steps_of(method)).ys
        if replace:
            module.weight = nn.Parameter(numbers(3, 3, seed=9))
        return torch.autograd.grad(ys.sum(), before)

    assert_same_bits(run(True), run(False))


@some_methods
@slots_matter
@pytest.mark.parametrize("starts_with_grad", [True, False])
def test_writing_to_the_state_is_refused(method: str, slots: int | str | None, starts_with_grad: bool) -> None:
    p, y0 = theta(), numbers(3, seed=2).requires_grad_(starts_with_grad)
    with pytest.raises(RuntimeError, match=r"f changed its state in place.*Return a new tensor|a leaf Variable"):
        solve(lambda t, y: y.mul_(2) * p, y0, TIMES, slots=slots, **steps_of(method))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_writing_to_the_state_is_refused_whatever_the_gradient(gradient: str) -> None:
    p = theta()
    with pytest.raises(RuntimeError, match="changed its state in place"):
        solve(lambda t, y: y.mul_(2) * p, numbers(3), TIMES, method="rk4", gradient=gradient)
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed its state in place"):
        solve(lambda t, y: y.mul_(2) * p, numbers(3), TIMES, method="rk4", gradient=gradient)


@some_methods
@slots_matter
def test_writing_to_the_state_late_is_refused(method: str, slots: int | str | None) -> None:
    p = theta()
    with pytest.raises(RuntimeError, match="f changed its state in place|a leaf Variable that requires grad"):
        solve(lambda t, y: (y.mul_(2) if t > LATE else y) * p, numbers(3), TIMES, slots=slots, **steps_of(method))


@pytest.mark.parametrize("jumps", [(), (0.5,)])
@pytest.mark.parametrize("slots", [1, 20, 50])
@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams"])
def test_writing_to_the_time_is_refused(method: str, slots: int, jumps: tuple[float, ...]) -> None:
    """Few steps do, and a step that is computed again would see a time that was moved twice."""
    p = theta()

    def f(t: Tensor, y: Tensor, written: bool) -> Tensor:
        if written and 0.81 < float(t) % 1 < 0.83:
            t += 1
        return -p.sum() * y * (1 + float(t))

    steps: dict[str, Any] = {"method": method, "dt": 0.01, "slots": slots, "jumps": jumps}
    solve(f, numbers(3), [0.0, 1.0], args=(False,), **steps).ys.sum().backward()
    with pytest.raises(RuntimeError, match="f changed its time in place"):
        solve(f, numbers(3), [0.0, 1.0], args=(True,), **steps).ys.sum().backward()


@some_methods
@slots_matter
def test_writing_to_a_buffer_is_refused(method: str, slots: int | str | None) -> None:
    """Batch normalisation in training mode: its running statistics would be updated again by every recomputation."""
    torch.manual_seed(0)
    module = nn.BatchNorm1d(3).double()
    with pytest.raises(RuntimeError, match=r"module\.\w+ .*is changed in place by f itself; .*eval\(\)"):
        solve(lambda t, y: module(y) - y, numbers(4, 3), TIMES, slots=slots, **steps_of(method))
    with pytest.raises(RuntimeError, match=r"module\.\w+ .*is changed in place by f itself"):
        solve(lambda t, y: module(y) if t > LATE else -y, numbers(4, 3), TIMES, slots=slots, **steps_of(method))


GENERATOR, NUMPY, PYTHON = torch.Generator(), np.random.default_rng(0), random.Random(0)
DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "dropout": nn.Dropout(0.5),
    "torch": torch.rand_like,
    "an own torch generator": lambda y: torch.rand(3, generator=GENERATOR, dtype=y.dtype),
    "numpy": lambda y: np.random.rand(),
    "an own numpy generator": lambda y: NUMPY.random(),
    "python": lambda y: random.random(),
    "an own python generator": lambda y: PYTHON.random(),
}


@some_methods
@slots_matter
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("start", [-1.0, LATE])
def test_drawing_random_numbers_is_refused(name: str, start: float, method: str, slots: int | str | None) -> None:
    p, draw = theta(), DRAWS[name]
    before = random_states()
    with pytest.raises(RuntimeError, match="draws random numbers.*args="):
        solve(lambda t, y: p * y * (draw(y) if t > start else 1), numbers(3), TIMES, slots=slots, **steps_of(method))
    assert random_states() == before


@pytest.mark.parametrize("start", [-1.0, LATE])
@pytest.mark.parametrize("slots", [1, 3])
def test_drawing_is_noticed_while_another_thread_may_draw(start: float, slots: int) -> None:
    p, over = theta(), threading.Event()
    another = threading.Thread(target=over.wait)
    another.start()
    try:
        with pytest.raises(RuntimeError, match="draws random numbers.*args="):
            y = solve(lambda t, y: p * y + (0 * torch.rand_like(y) if t > start else 0), numbers(3), TIMES, slots=slots)
            y.ys.sum().backward()
    finally:
        over.set()
        another.join()


def random_states() -> list[Any]:
    states = [torch.get_rng_state(), GENERATOR.get_state()]
    arrays = np.random.get_state()
    return [
        *(x.tolist() for x in states),
        str(arrays),
        str(NUMPY.bit_generator.state),
        random.getstate(),
        PYTHON.getstate(),
    ]


def test_a_solve_draws_nothing_itself() -> None:
    p, before = theta(), random_states()
    solve(lambda t, y: p * y, numbers(3), TIMES, slots=2).ys.sum().backward()
    assert random_states() == before


@pytest.mark.parametrize("slots", ["all", 1])
def test_a_function_that_is_none_is_refused(slots: int | str) -> None:
    """Not a function of its arguments: it counts its calls and uses the count."""
    p, calls = theta(), 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return p * y * calls

    with pytest.raises(RuntimeError, match="gives other values when it is called again"):
        solve(f, numbers(3), TIMES, slots=slots, method="rk4")


@pytest.mark.parametrize("slots", ["all", 1])
def test_a_function_that_asks_whether_grad_is_wanted_is_refused(slots: int | str) -> None:
    p = theta()
    with pytest.raises(RuntimeError, match="gives other values when it is called again"):
        solve(lambda t, y: y * (p if p.requires_grad else 2 * p), numbers(3), TIMES, slots=slots, method="rk4")


ATTENTION = "an encoder layer with a fast path for inference"
RECURRENT = "an LSTM with fused kernels for inference"


@pytest.mark.parametrize("name", [ATTENTION, RECURRENT])
@some_methods
def test_modules_with_fast_paths_keep_their_bits(name: str, method: str) -> None:
    def make() -> Made:
        torch.manual_seed(0)
        if name == ATTENTION:
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double().eval()
            return lambda t, y: torch.tanh(layer(y)), list(layer.parameters())
        module = nn.LSTM(4, 4, batch_first=True).double()
        return lambda t, y: module(y)[0] - y, list(module.parameters())

    y0, how = numbers(2, 3, 4, seed=2), steps_of(method)
    expected = gradients(case_of(make, y0), gradient="backprop", **how)
    first = gradients(case_of(make, y0), slots="all", **how)
    assert_close(first, expected)
    for slots in (1, 3, None):
        assert_same_bits(gradients(case_of(make, y0), slots=slots, **how), first)


@pytest.mark.parametrize("slots", ["all", 1, None])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adaptive])
def test_f_may_differentiate_an_energy_of_what_it_is_given(method: str, batched: bool, slots: int | str | None) -> None:
    """The error of a recorded step is estimated off the graph; what f sees there must not be on it."""

    def slope(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = y[1].real
            x = x if x.requires_grad else x.detach().requires_grad_()
            (force,) = torch.autograd.grad(torch.log1p((p * x**2).sum(-1)).sum(), x, create_graph=True)
        return force, y[1] * torch.cos(y[0])

    p = theta()
    y0 = (numbers(2, 3, seed=2), numbers(2, 3, seed=3, dtype=torch.complex128))
    how: dict[str, Any] = {"method": method, "rtol": 1e-2, "atol": 1e-3, "batched": batched}
    found, expected = (
        torch.autograd.grad(loss_of(solve(slope, y0, TIMES, **how, **more).ys), p)
        for more in ({"slots": slots}, {"gradient": "backprop"})
    )
    assert_close(found, expected)
