"""A solve that is made again goes straight to its program, and sees whatever has changed."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adjoint
from adjoint import again
from adjoint.engines.native import kernel
from revolve import Periodic

pytest.importorskip("llvmlite")
double = {"dtype": torch.float64}
factor = 0.5


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path_factory.getbasetemp() / "native"))
    kernel._known.clear()
    again._known.clear()


HOW: dict[str, dict[str, Any]] = {
    "fixed": {"method": "rk4", "dt": 0.1},
    "slots": {"method": "rk4", "dt": 0.1, "slots": 3},
    "schedule": {"method": "heun2", "dt": 0.1, "schedule": Periodic(4)},
    "adaptive": {"method": "dopri5", "rtol": 1e-6},
}


def gradient(f: Any, y0: Tensor, wanted: list[Tensor], engine: str, **how: Any) -> tuple[Any, list[Tensor | None]]:
    solution = adjoint.solve(f, y0, [0.0, 0.4, 1.0], engine=engine, **(how or HOW["slots"]))
    loss = (solution.ys * torch.linspace(1, 2, solution.ys.numel(), **double).view(solution.ys.shape)).sum()
    if not loss.requires_grad:
        return solution, [solution.ys]
    return solution, [solution.ys, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def close(a: list[Tensor | None], b: list[Tensor | None], rtol: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-13)


class Net(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.3, 0.2], [0.1, -0.4]], **double))
        self.register_buffer("shift", torch.tensor([0.1, 0.2], **double))
        self.power = 2

    def slope(self, y: Tensor) -> Tensor:
        return self.scale * (self.matrix @ y) ** self.power + self.shift

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.slope(y)


@pytest.mark.parametrize("how", HOW)
def test_a_call_made_again_gives_the_same_bits_and_reads_nothing_anew(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)
    wanted = [y0, net.matrix]
    first, found = gradient(net, y0, wanted, "native", **HOW[how])
    monkeypatch.setitem(adjoint.solve.__wrapped__.__globals__, "control_asked_for", None)  # type: ignore[attr-defined]
    second, other = gradient(net, y0, wanted, "native", **HOW[how])
    for x, y in zip(found, other, strict=True):
        assert x is not None and y is not None and torch.equal(x, y)
    assert first.plan == second.plan and second.status == "success" and torch.equal(first.ts, second.ts)
    for name in ("steps", "rejected", "plain_runs", "recorded_runs"):
        assert getattr(first.stats, name) == getattr(second.stats, name)
    assert "known already" in second.engine


def changes() -> dict[str, Callable[[Net, dict[str, Any]], None]]:
    """Of a module, and of what stands in the cells of a function."""

    def tensor(net: Net, cells: dict[str, Any]) -> None:
        net.matrix = nn.Parameter(2 * net.matrix.detach())

    def method(net: Net, cells: dict[str, Any]) -> None:
        net.slope = lambda y: -y  # type: ignore[method-assign]

    def of_class(net: Net, cells: dict[str, Any]) -> None:
        Net.scale = 1.5

    def of_globals(net: Net, cells: dict[str, Any]) -> None:
        globals()["factor"] = 0.75

    def shadow(net: Net, cells: dict[str, Any]) -> None:
        globals()["abs"] = lambda x: x * x

    return {
        "a number of a module": lambda net, cells: setattr(net, "power", 3),
        "a buffer in place": lambda net, cells: net.shift.add_(1.0),
        "a buffer behind torch's back": lambda net, cells: net.shift.data.mul_(3.0),
        "another parameter": tensor,
        "a method of an object": method,
        "a number of a class": of_class,
        "a global": of_globals,
        "a global that hides a function of the language": shadow,
        "a number in a list": lambda net, cells: cells["list"].__setitem__(0, 0.7),
        "a longer list": lambda net, cells: cells["list"].append(0.7),
        "the sign of a zero": lambda net, cells: cells["list"].__setitem__(1, -0.0),
        "a number of numpy": lambda net, cells: cells["array"].__setitem__(0, 2.0),
        "a tensor of another type": lambda net, cells: cells["single"].mul_(2),
        "a truth in place of a number": lambda net, cells: cells["dict"].__setitem__("on", False),
        "what wants a gradient": lambda net, cells: net.matrix.requires_grad_(False),
        "two tensors become one": lambda net, cells: cells["pair"].__setitem__(1, cells["pair"][0]),
        "a default": lambda net, cells: setattr(cells["inner"], "__defaults__", (0.3,)),
        "a default by name": lambda net, cells: setattr(cells["inner"], "__kwdefaults__", {"more": 0.9}),
        "the code of an inner function": lambda net, cells: setattr(
            cells["inner"], "__code__", (lambda y, by=0.2, *, more=0.0: by * y * y + more).__code__
        ),
    }


@pytest.mark.parametrize("what", changes())
def test_whatever_changes_between_two_calls_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "scale", 1.0)
    monkeypatch.setitem(globals(), "factor", 0.5)
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)

    def inner(y: Tensor, by: float = 0.1, *, more: float = 0.0) -> Tensor:
        return by * y + more

    cells: dict[str, Any] = {
        "list": [0.4, 0.0],
        "array": np.array([1.0, 0.3]),
        "single": torch.tensor([0.5, 0.25], dtype=torch.float32),
        "dict": {"on": True},
        "pair": [torch.tensor(0.3, **double, requires_grad=True), torch.tensor(0.3, **double, requires_grad=True)],
        "inner": inner,
    }

    def f(t: Tensor, y: Tensor) -> Tensor:
        x = (
            net(t, y)
            + sum(cells["list"]) * y
            + cells["inner"](y)
            - abs(factor) * y
            + cells["pair"][0]
            - cells["pair"][1]
        )
        x = x + torch.atan2(torch.full_like(y, cells["list"][1]), -y * y - 1) * 0.1
        x = x * torch.as_tensor(cells["array"][0]) + cells["single"].double()
        return x if cells["dict"]["on"] else -x

    def both() -> tuple[list[Tensor | None], list[Tensor | None]]:
        wanted = [y0, *cells["pair"], *([net.matrix] if net.matrix.requires_grad else [])]
        found, mine = gradient(f, y0, wanted, "native")
        assert found.engine.startswith("native"), found.engine
        return mine, gradient(f, y0, wanted, "eager")[1]

    close(*both())
    before, _ = both()
    try:
        changes()[what](net, cells)
        after, theirs = both()
        close(after, theirs)
        assert len(before) != len(after) or not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    finally:
        globals().pop("abs", None)


def test_what_is_changed_before_the_backward_is_refused_and_a_kept_graph_is_reversed_again() -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)
    for _ in range(2):
        solution = adjoint.solve(net, y0, [0.0, 1.0], engine="native", **HOW["slots"])
        loss = solution.ys.square().sum()
        one, two = (torch.autograd.grad(loss, net.matrix, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(one, two)
        with torch.no_grad():
            net.shift += 1.0
        with pytest.raises(
            RuntimeError, match=r"shift.* was changed in place between the forward and the reverse sweep"
        ):
            loss.backward()


@pytest.mark.parametrize("how", HOW)
def test_second_derivatives_are_torchs(how: str) -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)
    found = []
    for engine in ("native", "native", "eager"):
        solution = adjoint.solve(net, y0, [0.0, 1.0], engine=engine, **HOW[how])
        (first,) = torch.autograd.grad(solution.ys[-1].square().sum(), net.matrix, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (y0, net.matrix)))
    for mine, other, theirs in zip(*found, strict=True):
        torch.testing.assert_close(other, mine, rtol=0.0, atol=0.0)
        torch.testing.assert_close(other, theirs, rtol=1e-7 if how == "adaptive" else 1e-12, atol=0.0)


def test_nothing_of_the_callers_is_kept_alive() -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return net(t, y)  # noqa: F821

    for _ in range(2):
        gradient(f, y0, [y0], "native")
    assert again._known
    references = [weakref.ref(x) for x in (net, net.matrix, net.shift, y0, f)]
    del net, y0, f
    gc.collect()
    assert [x() for x in references] == [None] * 5


def test_wrong_calls_are_refused_after_right_ones() -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double)
    adjoint.solve(net, y0, [0.0, 1.0], engine="native", **HOW["slots"])
    with pytest.raises(ValueError, match="y0 holds a NaN"):
        adjoint.solve(net, y0 * torch.nan, [0.0, 1.0], engine="native", **HOW["slots"])
    with pytest.raises(ValueError, match="slots"):
        adjoint.solve(net, y0, [0.0, 1.0], engine="native", method="rk4", dt=0.1, slots=0)
    with pytest.raises(adjoint.SolveError, match="not finite"):
        adjoint.solve(net, 1e200 * y0, [0.0, 1.0], engine="native", **HOW["slots"])
    with pytest.raises(TypeError, match="args"):
        adjoint.solve(net, y0, [0.0, 1.0], args=[1.0], engine="native", **HOW["slots"])  # type: ignore[arg-type]


def test_only_plans_that_still_fit_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)
    how = {"method": "rk4", "dt": 0.01}
    roomy = adjoint.solve(net, y0, [0.0, 1.0], engine="native", **how)
    for where in ("adjoint.again", "adjoint.engines.native.sweep", "adjoint.probe"):
        monkeypatch.setattr(f"{where}.free_bytes", lambda device: 4000)
    monkeypatch.setattr(again, "_read", (-1.0, 0))
    tight = adjoint.solve(net, y0, [0.0, 1.0], engine="native", **how)
    assert roomy.plan is not None and tight.plan is not None
    assert tight.plan.bytes <= 1000 < roomy.plan.bytes and torch.equal(roomy.ys, tight.ys)


def test_many_threads_get_the_same_bits() -> None:
    net, y0 = Net(), torch.tensor([1.0, 0.5], **double, requires_grad=True)
    wanted = [y0, net.matrix]
    _, first = gradient(net, y0, wanted, "native")
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda _: gradient(net, y0, wanted, "native")[1], range(40)))
    for found in every:
        assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(first, found, strict=True))


class Settings:
    """What some keep their numbers in."""

    rate = 1.0

    class Inner:
        rate = 1.0


class Heir(Settings):
    inner = Settings()


LOOKS: dict[str, Callable[[], float]] = {
    "an attribute of a class": lambda: Settings.rate,
    "one that is inherited": lambda: Heir.rate,
    "one of a class in a class": lambda: Settings.Inner.rate,
    "one of an object that a class holds": lambda: Heir.inner.rate,
    "the environment": lambda: float(os.environ["ADJOINT_TEST_RATE"]),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_a_function_looks_up_is_looked_up_at_every_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look, p = LOOKS[name], torch.tensor([0.5, 0.6], dtype=torch.float64, requires_grad=True)

    def gradient(rate: float, engine: str) -> Tensor:
        monkeypatch.setattr(Settings, "rate", rate)
        monkeypatch.setattr(Heir.inner, "rate", rate)
        monkeypatch.setattr(Settings.Inner, "rate", rate)
        monkeypatch.setenv("ADJOINT_TEST_RATE", str(rate))
        y0 = torch.ones(2, dtype=torch.float64)
        how: dict[str, Any] = {"method": "euler", "dt": 0.1, "engine": engine}
        ys = adjoint.solve(lambda t, y: -p * y * look(), y0, [0.0, 1.0], **how).ys
        return torch.autograd.grad(ys[-1].sum(), p)[0]

    for rate in (1.0, 1.0, 2.0, 1.0):
        torch.testing.assert_close(gradient(rate, "native"), gradient(rate, "eager"), rtol=1e-12, atol=0.0)
