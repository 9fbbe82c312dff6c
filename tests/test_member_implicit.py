"""batched=True with implicit and Rosenbrock methods: each member is its solve alone, with its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits
from test_members import AMPLIFIED, BATCHES, doomed, gradients, stacked
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint import BDF, IMPLICIT, ROSENBROCK, Implicit, Krylov, Newton, SolveError, check, frozen_steps, solve

D = torch.float64
TABLES: dict[str, Any] = {**IMPLICIT, **ROSENBROCK}
PAIRS = [(name, "predators") for name in TABLES]
PAIRS += [(name, problem) for name in ("kvaerno3", "radau5", "rodas4", "sdirk2") for problem in ("tree", "network")]


def ways(name: str) -> dict[str, Any]:
    if TABLES[name].adaptive:
        return {"method": name, "rtol": 1e-2, "atol": 1e-3}
    return {"method": name, "dt": 0.31}


@pytest.mark.parametrize(("name", "problem"), PAIRS)
def test_a_batch_is_its_members_one_by_one(name: str, problem: str) -> None:
    batch, how = BATCHES[problem](*((2,) if problem == "predators" else ())), ways(name)
    alone = batch.apart(**how)
    expected = gradients(stacked(alone), batch.wanted)
    found = []
    thorough = problem != "predators" or name in ("kvaerno3", "radau5", "rodas4")
    for memory in ({"slots": 3}, {"slots": "all"}, {"gradient": "backprop"})[: 3 if thorough else 1]:
        together = batch.together(**how, **memory)
        assert together.status == ("success",) * len(batch.t)
        assert together.stats.steps.tolist() == [s.stats.steps for s in alone]
        assert together.stats.rejected.tolist() == [s.stats.rejected for s in alone]
        values = pytree.tree_leaves(together.ys)
        assert_close(values, pytree.tree_leaves(stacked(alone)), AMPLIFIED)
        found.append([*values, *gradients(together.ys, batch.wanted)])
        assert_close(found[-1][len(values) :], expected, AMPLIFIED)
    if thorough:
        assert_same_bits(found[1], found[0])


STIFF = torch.tensor([1.0, 30.0, 300.0, 1e3], dtype=D)


def stiff(t: Tensor, y: Tensor, rates: Tensor, shared: Tensor) -> Tensor:
    """Not linear, and with another Jacobian at every time."""
    x, z = y.unbind(-1)
    forced = torch.cos(3 * t) * (1 + 0.1 * z)
    return torch.stack((-rates * (x - forced) * (1 + shared * x * x), z * (shared - x)), -1)


def beginning() -> tuple[Tensor, Tensor, Tensor]:
    y0 = torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.0, 1.0], [2.0, 0.2]], dtype=D)
    return y0.requires_grad_(), STIFF.clone().requires_grad_(), torch.tensor(0.3, dtype=D, requires_grad=True)


@pytest.mark.parametrize("name", ["kvaerno5", "radau5", "rodas5p", "trbdf2"])
def test_each_member_keeps_its_own_jacobian(name: str) -> None:
    """Far apart in stiffness, they renew their Jacobians at other steps, and take as many iterations as alone."""
    newton = Newton(reuse=0.1)
    method = Implicit(name, newton=newton)
    how: dict[str, Any] = {"method": method, "rtol": 1e-4, "atol": 1e-6}
    y0, rates, shared = beginning()
    found = []
    for memory in ({"slots": "all"}, {"slots": 6}):
        together = solve(stiff, y0, [0.0, 0.5, 1.0], args=(rates, shared), batched=True, **how, **memory)
        total = (together.ys[1:] ** 2).sum()
        found.append([together.ys.detach(), *torch.autograd.grad(total, (y0, rates, shared))])
    assert_same_bits(*found)
    ys, each = [], [torch.zeros_like(x) for x in (y0, rates, shared)]
    for b in range(4):
        one = solve(stiff, y0[b], [0.0, 0.5, 1.0], args=(rates[b], shared), **how)
        assert int(together.stats.steps[b]) == one.stats.steps
        ys.append(one.ys)
        for total, x in zip(each, torch.autograd.grad((one.ys[1:] ** 2).sum(), (y0, rates, shared)), strict=True):
            total += x
    assert_close([found[0][0]], [torch.stack(ys, 1).detach()], AMPLIFIED)
    assert_close(found[0][1:], each, AMPLIFIED)


def test_the_gradient_is_that_of_the_tangents_through_the_same_steps() -> None:
    found = []
    with frozen_steps() as replay:
        for gradient in ("discrete", "tangent"):
            y0, rates, shared = beginning()
            ys = solve(
                stiff,
                y0,
                [0.0, 0.5],
                args=(rates, shared),
                batched=True,
                gradient=gradient,
                method="kvaerno3",
                rtol=1e-3,
                atol=1e-5,
            ).ys
            found.append(torch.autograd.grad((ys[1:] ** 2).sum(), (rates, shared)))
            replay.rewind()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["kvaerno3", "gauss4", "ros3p"])
def test_the_taylor_test_passes_in_parameters_states_and_times(name: str) -> None:
    batch = BATCHES["predators"](3)  # type: ignore[call-arg]
    p, shared, y0, t = (x.detach() for x in batch.wanted)

    def loss(shared: Tensor, y0: Tensor, t: Tensor) -> Tensor:
        def f(s: Tensor, y: Tensor) -> Tensor:
            slope = torch.stack((y[:, 0] * (1 - y[:, 1]), y[:, 1] * (y[:, 0] - p[:, 0])), 1)
            return slope * shared * torch.cos(s)[:, None]

        method = Implicit(name, newton=Newton(kappa=1e-7, most=30))
        return (solve(f, y0, t, batched=True, slots=5, **(ways(name) | {"method": method})).ys ** 2).sum()

    assert check.taylor_test(loss, (shared, y0, t)).slope == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("how", [{"slots": "all"}, {"gradient": "backprop"}], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kvaerno3", "born"),
        ("rodas4", "never"),
        ("rodas4", "root"),
        ("sdirk2", "root"),
        ("sdirk2", "vertical"),
    ],
)
def test_a_member_that_fails_does_not_disturb_the_rest(kind: str, name: str, how: dict[str, Any]) -> None:
    f, y0, rate, shared = doomed(kind)
    t = torch.tensor([0.0, 0.4, 1.5], dtype=D)
    dt = 0.1 if name == "sdirk2" else None
    loose = {"method": name, "dt": dt, "rtol": 1e-3, "atol": 1e-4, "batched": True, "max_steps": 150}
    solution = solve(f, y0, t, throw=False, **loose, **how)
    good = torch.tensor([kind == "nothing" or b != 1 for b in range(4)])
    assert bool(solution.stats.succeeded[good].all())
    assert (solution.status[1] == "success") == bool(torch.isfinite(solution.ys[-1, 1]).all())
    sane, other, *_ = doomed("nothing")
    alone = solve(lambda t, y: -rate[good, None] * shared * y, other.detach()[good], t, **loose)
    assert_close([solution.ys[:, good]], [alone.ys], 1e5)
    found_rate, found_shared, found_y0 = torch.autograd.grad((solution.ys[:, good] ** 3).sum(), (rate, shared, y0))
    expected = torch.autograd.grad((alone.ys**3).sum(), (rate, shared))
    assert_close([found_rate[good], found_shared], [expected[0][good], expected[1]], 1e5)
    assert bool(torch.isfinite(found_y0[good]).all())


def test_a_fixed_step_that_newton_does_not_find_is_its_own_members_failure() -> None:
    slope = torch.tensor([1.0, 0.1], dtype=D, requires_grad=True)
    f = lambda t, y: torch.where(y > 0, -slope, slope)  # noqa: E731
    how: dict[str, Any] = {"method": "backward_euler", "dt": 0.75, "batched": True}
    y0, t = torch.ones(2, dtype=D), [0.0, 0.75, 3.0]
    with pytest.raises(SolveError, match=r"1 of 2 members failed \(1 newton\); member 0 stopped at t=0.75"):
        solve(f, y0, t, **how)
    for slots in ("all", 2):
        found = solve(f, y0, t, throw=False, slots=slots, **how)
        assert found.status == ("newton", "success")
        assert found.last_t.tolist() == [0.75, 3.0] and found.last_y.tolist() == [0.25, pytest.approx(0.7)]
        assert torch.equal(found.ys.isnan(), torch.tensor([[False, False], [False, False], [True, False]]))
        (of_slope,) = torch.autograd.grad(found.ys[1, 0] + found.ys[2, 1], slope)
        assert of_slope.tolist() == [-0.75, pytest.approx(-3)]


@pytest.mark.parametrize("name", ["radau5", "rodas4"])
def test_members_of_a_singular_system_may_wait(name: str) -> None:
    """y' = -z y, 0 = y - a z: so y = y0 / (1 + y0 t / a); the matrix of a step of no length is singular."""
    a = torch.tensor([0.5, 0.8, 2.0], dtype=D, requires_grad=True)
    y0 = torch.tensor([1.5, 1.0, 0.3], dtype=D)
    f = lambda t, y: torch.stack((-y[:, 0] * y[:, 1], y[:, 0] - a * y[:, 1]), 1)  # noqa: E731
    mass = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D)
    t = torch.tensor([[0.0, 2.0], [0.0, 0.1], [0.0, 1.0]], dtype=D)
    begin = torch.stack((y0, y0 / a), 1)
    y = solve(f, begin, t, method=Implicit(name, mass=mass), batched=True, rtol=1e-7, atol=1e-9, slots=4).ys[-1, :, 0]
    (of_a,) = torch.autograd.grad(y.sum(), a)
    s = 1 + y0 * t[:, 1] / a.detach()
    assert torch.allclose(y, y0 / s, rtol=1e-5)
    assert torch.allclose(of_a, y0 / s**2 * y0 * t[:, 1] / a.detach() ** 2, rtol=1e-4)


@pytest.mark.parametrize("name", ["kvaerno3", "radau5", "rodas4", "sdirk2"])
def test_costs_jumps_and_observations_go_along(name: str) -> None:
    y0, rates, shared = beginning()
    at = torch.tensor([[0.2], [0.3], [0.25], [torch.nan]], dtype=D)
    how = ways(name) | ({"dt": 0.05} if name == "sdirk2" else {"rtol": 1e-4, "atol": 1e-6})

    def jumping(t: Tensor, y: Tensor, rates: Tensor, shared: Tensor, at: Tensor) -> Tensor:
        return stiff(t, y, rates, shared) + (t > at[..., 0])[..., None].to(y)

    cost = lambda t, y, *args: y[..., 0] ** 2  # noqa: E731
    see = lambda t, y: y[..., 0] * shared  # noqa: E731
    all_of = solve(
        jumping, y0, [0.0, 0.2, 0.5], args=(rates, shared, at), batched=True, jumps=at, cost=cost, observe=see, **how
    )
    for b in range(4):
        jumps = [x for x in at[b].tolist() if x == x]
        one = solve(
            jumping,
            y0[b],
            [0.0, 0.2, 0.5],
            args=(rates[b], shared, at[b]),
            jumps=jumps,
            cost=cost,
            observe=see,
            **how,
        )
        assert int(all_of.stats.steps[b]) == one.stats.steps
        assert_close([all_of.costs[:, b], all_of.observed[:, b]], [one.costs, one.observed], AMPLIFIED)
        inputs = (y0, rates, shared)
        found, expected = (
            torch.autograd.grad(x, inputs, retain_graph=True)
            for x in (all_of.costs[-1, b] + all_of.observed[1, b], one.costs[-1] + one.observed[1])
        )
        assert_close(found, expected, AMPLIFIED)


def test_what_members_cannot_have_is_refused_by_name() -> None:
    y0, rates, shared = beginning()
    run = lambda **how: solve(stiff, y0, [0.0, 1.0], args=(rates, shared), batched=True, **how)  # noqa: E731
    with pytest.raises(ValueError, match=r"linear=Krylov\(\) solves the systems of one state"):
        run(method=Implicit("kvaerno3", linear=Krylov()))
    with pytest.raises(ValueError, match="mass has 3 rows, and each member 2 numbers"):
        run(method=Implicit("radau5", mass=torch.eye(3, dtype=D)))
    with pytest.raises(ValueError, match="solves one state at a time; with batched=True give 'kvaerno5'"):
        run(method=BDF())
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=D))
    with pytest.raises(ValueError, match="consistent='solve' changes the first state of one solve"):
        run(method=Implicit("radau5", mass=mass, consistent="solve"))
    with pytest.raises(ValueError, match="y0 of member 3 does not fulfil the algebraic equations"):
        solve(
            lambda t, y: torch.stack((-y[:, 0], y[:, 0] - y[:, 1]), 1),
            torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 2.0]], dtype=D),
            [0.0, 1.0],
            batched=True,
            method=Implicit("radau5", mass=mass),
        )
    with pytest.raises(ValueError, match="f mixes members"):
        solve(lambda t, y: -y * y.sum(), y0, [0.0, 1.0], batched=True, method="kvaerno3")
