"""torch.func's transforms over a whole call: what they give over the checkpoints is what they give over torch's graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, numbers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from adjoint import METHODS, UntrackedTensorError, odeint_adjoint, scan, solve

TIMES = (0.0, 0.3, 0.7)
BATCH = 3
Loss = Callable[[Tensor, Tensor], Tensor]
FIXED: dict[str, Any] = {"method": "rk4", "dt": 0.35}

P, Y = numbers(2, seed=1), numbers(2, seed=2)
PS, YS = numbers(BATCH, 2, seed=3), numbers(BATCH, 2, seed=4)
V, W = numbers(2, seed=5), numbers(2, seed=6)
SERIES = numbers(4, 2, seed=9)


def model(p: Tensor, y0: Tensor, **how: Any) -> Tensor:
    """All values of a solve whose right-hand side holds p."""
    return solve(lambda t, y: torch.sin(p * y) + y.flip(0) * torch.cos(t), y0, TIMES, **how).ys  # type: ignore[no-any-return]


NESTINGS: dict[str, Callable[[Loss], Any]] = {
    "vmap over states": lambda loss: vmap(lambda y: loss(P, y))(YS),
    "vmap over parameters": lambda loss: vmap(lambda p: loss(p, Y))(PS),
    "vmap over both": lambda loss: vmap(loss)(PS, YS),
    "vmap over another dimension": lambda loss: vmap(loss, in_dims=(1, 0), out_dims=-1)(PS.T, YS),
    "vmap of vmap": lambda loss: vmap(lambda p: vmap(lambda y: loss(p, y))(YS))(PS),
    "grad": lambda loss: grad(lambda p: loss(p, Y).sum())(P),
    "grad and value": lambda loss: grad_and_value(lambda p, y: (loss(p, y) ** 2).sum(), argnums=(0, 1))(P, Y),
    "vmap of grad": lambda loss: vmap(grad(lambda p, y: (loss(p, y) ** 2).sum()), in_dims=(None, 0))(P, YS),
    "vmap of grad of what is mapped": lambda loss: vmap(grad(lambda p, y: (loss(p, y) ** 2).sum()))(PS, YS),
    "grad of vmap": lambda loss: grad(lambda p: (vmap(lambda y: loss(p, y))(YS) ** 2).sum())(P),
    "vjp": lambda loss: vjp(loss, P, Y)[1](torch.cos(loss(P, Y))),
    "jvp": lambda loss: jvp(loss, (P, Y), (V, W)),
    "jvp of vmap": lambda loss: jvp(lambda p: vmap(lambda y: loss(p, y))(YS), (P,), (V,)),
    "vmap of jvp": lambda loss: vmap(lambda v: jvp(lambda p: loss(p, Y), (P,), (v,)))(PS),
    "jacrev": lambda loss: jacrev(loss, argnums=(0, 1))(P, Y),
    "jacfwd": lambda loss: jacfwd(loss, argnums=(0, 1))(P, Y),
    "vmap of jacrev": lambda loss: vmap(jacrev(loss))(PS, YS),
    "grad of grad": lambda loss: grad(lambda p: (grad(lambda q: (loss(q, Y) ** 2).sum())(p) * V).sum())(P),
    "grad through another path": lambda loss: grad(
        lambda p: (grad(lambda q: (loss(q, p) ** 2).sum() + (q * p) @ p)(p) * V).sum()
    )(P),
    "jvp of grad": lambda loss: jvp(grad(lambda p: (loss(p, Y) ** 2).sum()), (P,), (V,)),
    "grad of jvp": lambda loss: grad(lambda p: (jvp(lambda q: loss(q, Y), (p,), (V,))[1] ** 2).sum())(P),
    "hessian": lambda loss: hessian(lambda p: (loss(p, Y) ** 2).sum())(P),
    "jacrev of jacfwd": lambda loss: jacrev(jacfwd(lambda p: (loss(p, Y) ** 2).sum()))(P),
    "jacrev of jacrev": lambda loss: jacrev(jacrev(lambda p: (loss(p, Y) ** 2).sum()))(P),
    "vmap of hessian": lambda loss: vmap(hessian(lambda p, y: (loss(p, y) ** 2).sum()), in_dims=(0, None))(PS[:2], Y),
}


def assert_same(found: Any, expected: Any, places: float = 45_000) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected), places)


@pytest.mark.parametrize("slots", ["all", 2])
@pytest.mark.parametrize("name", NESTINGS)
def test_a_nesting_gives_what_it_gives_over_torchs_graph(name: str, slots: int | str) -> None:
    expected = NESTINGS[name](lambda p, y: model(p, y, gradient="backprop", **FIXED)[1:])
    assert_same(NESTINGS[name](lambda p, y: model(p, y, slots=slots, **FIXED)[1:]), expected)


ADAPTIVE = ["vmap over both", "vmap of grad", "grad of vmap", "jvp", "jacfwd", "hessian", "vmap of vmap"]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_steps_that_are_controlled_agree_to_their_tolerance(name: str) -> None:
    expected = NESTINGS[name](lambda p, y: model(p, y, gradient="backprop", method="rk4", dt=0.01)[1:])
    found = NESTINGS[name](lambda p, y: model(p, y, slots=3, method="tsit5", rtol=1e-9, atol=1e-9)[1:])
    assert_same(found, expected, 1e-6 / torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("how", [FIXED, {"method": "tsit5", "rtol": 1e-4}])
def test_every_member_of_a_mapped_solve_is_a_solve_by_itself(how: dict[str, Any]) -> None:
    alone = [solve(lambda t, y: torch.sin(p * y), y, TIMES, **how) for p, y in zip(PS, YS, strict=True)]  # noqa: B023
    together = vmap(lambda p, y: solve(lambda t, z: torch.sin(p * z), y, TIMES, **how).ys)(PS, YS)
    assert_close([together], [torch.stack([x.ys for x in alone])])


@pytest.mark.parametrize("gradient", ["backprop", "tangent", "backsolve", "discrete"])
@pytest.mark.parametrize("name", ["vmap of grad", "grad of vmap", "jvp"])
def test_other_gradients_work_under_transforms(name: str, gradient: str) -> None:
    how = {"method": "tsit5", "rtol": 1e-9, "atol": 1e-9}
    expected = NESTINGS[name](lambda p, y: model(p, y, gradient="backprop", method="rk4", dt=0.01)[1:])
    if (name, gradient) == ("jvp", "backsolve"):
        with pytest.raises(RuntimeError, match="in forward mode; use gradient='discrete'"):
            NESTINGS[name](lambda p, y: model(p, y, gradient=gradient, **how)[1:])
        return
    found = NESTINGS[name](lambda p, y: model(p, y, gradient=gradient, **how)[1:])
    assert_same(found, expected, 1e-6 / torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_under_transforms(method: str) -> None:
    how = {"method": method, "dt": 0.2} | ({"rtol": 1e-3} if METHODS[method].adaptive else {})
    found = vmap(grad(lambda p, y: (model(p, y, slots=2, **how) ** 2).sum()))(PS, YS)
    for b in range(BATCH):
        p = PS[b].clone().requires_grad_()
        (expected,) = torch.autograd.grad((model(p, YS[b], slots=2, **how) ** 2).sum(), p)
        assert_close([found[b]], [expected])


@pytest.mark.parametrize("name", ["grad", "vmap of grad", "hessian", "jvp"])
def test_f_may_save_tensors_by_hooks_of_its_own(name: str) -> None:
    """As torch.utils.checkpoint does; torch.func switches such hooks off."""

    def loss(p: Tensor, y: Tensor, f: Callable[..., Tensor], slots: int) -> Tensor:
        return solve(lambda t, y: f(p * y), y, TIMES, slots=slots, **FIXED).ys[1:]  # type: ignore[no-any-return]

    saving = functools.partial(checkpoint, torch.sin, use_reentrant=False)
    expected = NESTINGS[name](lambda p, y: loss(p, y, torch.sin, 2))
    assert_same(NESTINGS[name](lambda p, y: loss(p, y, saving, 2)), expected)


def test_torchs_own_graph_may_lie_below() -> None:
    p = P.clone().requires_grad_()
    results = []
    for how in ({"gradient": "backprop"}, {"slots": 2}):
        values = vmap(lambda y: model(p, y, **FIXED, **how))(YS)  # noqa: B023
        (first,) = torch.autograd.grad((values**2).sum(), p, create_graph=True)
        results.append([values.detach(), first.detach(), torch.autograd.grad(first, p, V)[0]])
    assert_same(results[1], results[0])


# ---- other doors, other places ---------------------------------------------------------------------------------------


def recurrence(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    last, outputs = scan(lambda c, x: (torch.tanh(c * p + x), {"out": c * x}), y, SERIES, **how)
    return torch.cat((last[None], outputs["out"]))


def drop_in(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    """A module whose parameters are replaced for a call, as torch.func.functional_call does it."""
    module = FIELD
    t = torch.tensor(TIMES, dtype=torch.float64)
    door = lambda y: odeint_adjoint(module, (y, y * 2), t, method="rk4", **how)[1]  # noqa: E731
    return functional_call(Calling(module, door), {"module.weight": torch.diag(p), "module.bias": p}, (y,))  # type: ignore[no-any-return]


class Field(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2, dtype=torch.float64)

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return torch.sin(super().forward(y[0])) - y[1], y[0] * y[1]


FIELD = Field()


class Calling(nn.Module):
    def __init__(self, module: nn.Module, door: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.door = module, door

    def forward(self, y: Tensor) -> Tensor:
        return self.door(y)


def in_a_tree(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    f = lambda t, y, q: {"a": [torch.sin(q["p"] * y["b"])], "b": y["a"][0] * t}  # noqa: E731
    ys = solve(f, {"a": [y], "b": 2 * y}, TIMES, args=({"p": p},), **FIXED, **how).ys
    return torch.cat((ys["a"][0], ys["b"]))


def in_the_times(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    t = torch.stack((p.new_zeros(()), 0.4 + p[0] ** 2 / 10, 1 + p[1] ** 2 / 10))
    return solve(lambda t, y: torch.sin(y) * t, y, t, **FIXED, **how).ys  # type: ignore[no-any-return]


def beside_a_batch(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    """batched=True, and another batch around it."""
    y0 = torch.stack((y, 2 * y, y + 1))
    return solve(lambda t, y: torch.sin(p * y) * t[:, None], y0, TIMES, batched=True, **FIXED, **how).ys  # type: ignore[no-any-return]


def inside_a_solve(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    inner = lambda y: solve(lambda s, z: p * z, y, (0.0, 0.2), method="euler", **how).ys[-1]  # noqa: E731
    return solve(lambda t, y: torch.sin(inner(y)), y, (0.0, 0.5), method="euler", dt=0.25, **how).ys  # type: ignore[no-any-return]


def with_vmap_inside(p: Tensor, y: Tensor, **how: Any) -> Tensor:
    f = lambda t, y: vmap(lambda a, b: torch.sin(a * b) * t)(p, y) + grad(lambda z: torch.cos(z * p).sum())(y)  # noqa: E731
    return solve(f, y, TIMES, **FIXED, **how).ys  # type: ignore[no-any-return]


DOORS = [recurrence, drop_in, in_a_tree, in_the_times, beside_a_batch, inside_a_solve, with_vmap_inside]
SOME = ["vmap over both", "vmap of grad", "grad of vmap", "jvp", "jacfwd", "hessian"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_works_under_transforms(door: Any, name: str) -> None:
    expected = by_hand(name, lambda p, y: door(p, y, gradient="backprop"))
    assert_same(NESTINGS[name](lambda p, y: door(p, y, slots=2)), expected)


def by_hand(name: str, loss: Loss) -> Any:
    """What a nesting means, by torch.autograd over one solve at a time."""

    def first(p: Tensor, y: Tensor) -> Tensor:
        p = p.clone().requires_grad_()
        return torch.autograd.grad((loss(p, y) ** 2).sum(), p)[0]

    match name:
        case "vmap over both":
            return torch.stack([loss(p, y) for p, y in zip(PS, YS, strict=True)])
        case "vmap of grad":
            return torch.stack([first(P, y) for y in YS])
        case "grad of vmap":
            return torch.stack([first(P, y) for y in YS]).sum(0)
        case "jvp":
            return torch.autograd.functional.jvp(loss, (P, Y), (V, W))
        case "jacfwd":
            return torch.autograd.functional.jacobian(loss, (P, Y))
        case _:
            return torch.autograd.functional.hessian(lambda p: (loss(p, Y) ** 2).sum(), P)


def test_what_is_mapped_over_need_not_have_a_derivative() -> None:
    which = torch.tensor([[0, 1], [1, 0], [1, 1]])
    found = vmap(lambda i: solve(lambda t, y: y[i] * P, Y, TIMES, **FIXED).ys)(which)
    assert_close([found], [torch.stack([solve(lambda t, y: y[i] * P, Y, TIMES, **FIXED).ys for i in which])])  # noqa: B023


def test_a_mapped_solution_says_what_became_of_each_member() -> None:
    seen = []

    def run(p: Tensor) -> Tensor:
        solution = solve(lambda t, y: p * y**2, Y.abs() + 1, (0.0, 1.0), throw=False, method="tsit5", max_steps=50)
        seen.append(solution)
        return solution.ys

    values = vmap(run)(torch.tensor([0.1, 9.0], dtype=torch.float64))
    assert seen[0].status[0] == "success" != seen[0].status[1]
    assert values[0].isfinite().all() and values[1, -1].isnan().all()


# ---- forward mode without torch.func ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [FIXED | {"slots": 2}, {"method": "tsit5", "rtol": 1e-3}, FIXED | {"gradient": "tangent"}]
)
def test_dual_numbers_carry_their_tangents(how: dict[str, Any]) -> None:
    _, expected = torch.autograd.functional.jvp(lambda p, y: model(p, y, **how), (P, Y), (V, W))
    with forward_ad.dual_level():
        dual = model(forward_ad.make_dual(P, V), forward_ad.make_dual(Y, W), **how)
        assert_close([forward_ad.unpack_dual(dual).tangent], [expected])


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_when", [-1.0, 0.5])
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap over parameters", "vmap of grad of what is mapped", "hessian"])
def test_what_cannot_be_followed_is_refused_under_transforms(name: str, from_when: float) -> None:
    """Here it has no gradient of its own that could give it away."""

    def loss(p: Tensor, y: Tensor) -> Tensor:
        hidden = SimpleNamespace(p=p)
        f = lambda t, y: torch.sin(y) * (hidden.p if t > from_when else 1)  # noqa: E731
        return solve(f, y * (1 + 0 * p), TIMES, slots=2, **FIXED).ys  # type: ignore[no-any-return]

    with pytest.raises(UntrackedTensorError, match="its derivative would be lost.*args="):
        NESTINGS[name](loss)


@pytest.mark.parametrize("from_when", [-1.0, 0.5])
def test_hidden_dual_numbers_are_refused(from_when: float) -> None:
    with forward_ad.dual_level(), pytest.raises(UntrackedTensorError, match="its derivative would be lost"):
        hidden = SimpleNamespace(p=forward_ad.make_dual(P, V))
        solve(lambda t, y: y * (hidden.p if t > from_when else 1), forward_ad.make_dual(Y, W), TIMES, **FIXED)


THIRD: dict[str, Callable[[Loss], Any]] = {
    "grad of hessian": lambda loss: grad(lambda p: hessian(lambda q: (loss(q, Y) ** 2).sum())(p).sum())(P),
    "jacfwd of jacfwd": lambda loss: jacfwd(jacfwd(lambda p: (loss(p, Y) ** 2).sum()))(P),
}


@pytest.mark.parametrize("name", THIRD)
def test_what_cannot_be_nested_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(NotImplementedError, match="gradient='backprop'"):
        THIRD[name](lambda p, y: model(p, y, slots=2, **FIXED))
    assert pytree.tree_leaves(THIRD[name](lambda p, y: model(p, y, gradient="backprop", **FIXED)))


def test_other_transforms_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="functionalize.*call it outside"):
        torch.func.functionalize(lambda p: model(p, Y, slots=2, **FIXED))(P)
