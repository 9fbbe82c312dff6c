"""Batches by the native engine: members side by side in the lanes of vectors, each as it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import again
from adjoint.engines.native import kernel

pytest.importorskip("llvmlite")
double = {"dtype": torch.float64}
RATES = torch.tensor([1.1, 0.4, 0.4, 0.1], **double)


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path_factory.getbasetemp() / "native"))
    kernel._known.clear()
    again._known.clear()


def predators(dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def f(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        a, b, c, d = p.unbind(dim)
        prey, predator = y.unbind(dim)
        return torch.stack((a * prey - b * prey * predator.tanh() * (1 + t), d * prey * predator - c * predator), dim)

    return f


def ring(t: Tensor, y: Tensor, force: Tensor) -> Tensor:
    return (y.roll(-1, -1) - y.roll(2, -1)) * y.roll(1, -1) - y + force


def start(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return (5 + torch.rand(*shape, **double)).requires_grad_()


def spread(*shape: int) -> Tensor:
    return RATES * (1 + 0.1 * torch.rand(*shape, 4, **double))


FORCE = torch.tensor(8.0, **double)
CASES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor, str]] = {
    "members first": (predators(-1), start(19, 2), RATES, "19 members of 2"),
    "rates of their own": (predators(-1), start(19, 2), spread(19), "19 members of 2"),
    "members last": (predators(0), start(2, 9), RATES, "9 members of 2"),
    "members last, own": (predators(0), start(2, 9), spread(9).T.contiguous(), "9 members of 2"),
    "as many members as rates": (predators(-1), start(4, 2), RATES, "4 members of 2"),
    "two leading dimensions": (predators(-1), start(5, 3, 2), spread(3), "5 members of 6"),
    "a ring": (ring, start(8, 6), FORCE, "8 members of 6"),
    "single precision": (predators(-1), start(33, 2).detach().float(), RATES.float(), "33 members of 2"),
    "members that depend on each other": (lambda t, y, p: p * (y.mean(0) - y), start(6, 2), FORCE, "12 numbers"),
    "a cumulated sum of members": (lambda t, y, p: -p * y.cumsum(0), start(4, 3), FORCE, "12 numbers"),
}


def gradient(name: str, times: bool = False, **how: Any) -> tuple[Any, list[Tensor]]:
    f, y0, p, _ = CASES[name]
    y0, p = (x.detach().clone().requires_grad_() for x in (y0, p))
    t = torch.linspace(0, 0.5, 4, dtype=y0.dtype).requires_grad_(times)
    solution = adjoint.solve(f, y0, t, args=(p,), **{"method": "rk4", "dt": 0.05, "engine": "native", **how})
    weights = torch.linspace(0.5, 1.5, solution.ys.numel(), dtype=y0.dtype).reshape(solution.ys.shape)
    wanted = [y0, p, t] if times else [y0, p]
    return solution, list(torch.autograd.grad((solution.ys.square() * weights).mean(), wanted))


@pytest.mark.parametrize(("name", "times"), [*((name, False) for name in CASES), ("members last, own", True)])
def test_batches_agree_with_torch_and_no_bit_depends_on_what_is_kept(name: str, times: bool) -> None:
    mine, theirs = (gradient(name, times, engine=engine) for engine in ("native", "eager"))
    digits = 1e-5 if name == "single precision" else 1e-12
    assert CASES[name][3] in mine[0].engine, mine[0].engine
    for a, b in zip([mine[0].ys, *mine[1]], [theirs[0].ys, *theirs[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=digits * float(b.detach().abs().max()))
    for slots in (1, 3, "all"):
        again = gradient(name, times, slots=slots)
        assert all(torch.equal(a, b) for a, b in zip(again[1], mine[1], strict=True))


def test_a_member_is_the_same_whatever_is_beside_it() -> None:
    f, y0, p, _ = CASES["rates of their own"]
    found = []
    for order in (torch.arange(19), torch.arange(18, -1, -1), torch.arange(5, 14)):
        y, rates = y0.detach()[order].requires_grad_(), p.detach()[order].requires_grad_()
        solution = adjoint.solve(f, y, [0.0, 0.5], args=(rates,), method="rk4", dt=0.05, engine="native", slots=3)
        first, second = torch.autograd.grad(solution.ys[-1].square().sum(), [y, rates])
        back = torch.argsort(order)
        found.append([x[back] for x in (solution.ys[-1], first, second)])
    for whole, turned, part in zip(*found, strict=True):
        assert torch.equal(whole, turned) and torch.equal(whole[5:14], part)


def test_a_member_that_blows_up_leaves_the_others_as_they_are() -> None:
    y0 = torch.linspace(0.1, 1.0, 9, **double)
    other = torch.cat((y0[:-1], torch.tensor([1e200], **double)))
    found = []
    for y in (y0, other):
        y = y[:, None].clone().requires_grad_()
        solution = adjoint.solve(lambda t, y: y * y, y, [0.0, 0.5], method="rk4", dt=0.1, engine="native", throw=False)
        assert "9 members" in solution.engine
        found.append((solution.ys[-1], torch.autograd.grad(solution.ys[-1][:-1].sum(), y)[0]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[:-1], b[:-1])


def test_no_bit_depends_on_the_number_of_threads() -> None:
    """A gradient of 1000 members, whose sums have many terms."""
    y0 = torch.linspace(0.5, 1.5, 2000, **double).view(1000, 2).requires_grad_()
    shared = torch.tensor([0.3, 0.7], **double, requires_grad=True)
    own = torch.linspace(0.1, 1.1, 1000, **double).view(1000, 1).requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -own * torch.sin(shared * y) + y.flip(-1) / (1 + shared.exp())

    def found() -> list[Tensor]:
        solution = adjoint.solve(f, y0, [0.0, 0.3, 1.0], method="rk4", dt=0.1, slots=3, engine="native")
        assert "1000 members" in solution.engine
        return [solution.ys, *torch.autograd.grad(solution.ys.square().sum(), (y0, shared, own))]

    before = torch.get_num_threads()
    try:
        every = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            every.append(found())
    finally:
        torch.set_num_threads(before)
    for other in every[1:]:
        assert all(torch.equal(x, y) for x, y in zip(every[0], other, strict=True))
