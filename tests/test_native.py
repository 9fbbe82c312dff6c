"""The native engine computes what the eager one does, or leaves it to that and says why."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from random_slopes import slope
from torch import Tensor

import adjoint
from adjoint import again
from adjoint.engines.native import cells, kernel, run
from revolve import Binomial, Periodic, StoreNothing

pytest.importorskip("llvmlite")
RANDOM, GROUP = int(os.environ.get("PROGRAMS_NATIVE", 200)), 25
double = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No programs from elsewhere."""
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path_factory.getbasetemp() / "native"))
    kernel._known.clear()
    again._known.clear()


def random_gradient(seeds: range, engine: str, nudge: float = 0.0) -> tuple[str, list[Tensor | None]]:
    """Values and gradients of many random right-hand sides, side by side in one state."""
    parts = [slope(seed) for seed in seeds]
    random = torch.Generator().manual_seed(0)
    y0 = tuple((y * (1 + nudge)).detach().requires_grad_() for _, y, _ in parts)
    with torch.no_grad():
        for x in (x for _, _, xs in parts for x in xs):
            x *= 1 + nudge * (2 * torch.rand(x.shape, generator=random, dtype=x.dtype).round() - 1)
    held = [x for _, _, xs in parts for x in xs]

    def f(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part[0](t, x) for part, x in zip(parts, y, strict=True))

    solution = adjoint.solve(f, y0, [0.0, 0.1, 0.3], method="euler", engine=engine, slots=2)
    torch.manual_seed(1)
    loss = sum((x * torch.randn_like(x)).sum() for x in solution.ys)
    return solution.engine, [*solution.ys, *torch.autograd.grad(loss, [*y0, *held], allow_unused=True)]


@pytest.mark.parametrize("first", range(0, RANDOM, GROUP))
def test_random_right_hand_sides_and_their_gradients_agree_with_torch(first: int) -> None:
    """To what one unit in the last place of y_0 and of every tensor does, times ten: everything here is of order one."""
    seeds = range(first, min(first + GROUP, RANDOM))
    said, mine = random_gradient(seeds, "native")
    assert said.startswith("native"), said
    _, theirs = random_gradient(seeds, "eager")
    _, near = random_gradient(seeds, "eager", torch.finfo(torch.float64).eps)
    for a, b, c in zip(mine, theirs, near, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None and c is not None:
            allowed = 10 * float((b - c).detach().abs().max()) + 1e-13 * float(b.detach().abs().max()) + 1e-15
            assert float((a - b).detach().abs().max()) <= allowed


Problem = tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...], list[Tensor]]


def lotka_volterra(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    a, b, c, d = p.unbind()
    prey, predator = y.unbind()
    return torch.stack((a * prey - b * prey * predator * (1 + 0.1 * torch.sin(t)), d * prey * predator - c * predator))


def predators() -> Problem:
    rates = torch.tensor([1.1, 0.4, 0.4, 0.1], **double).requires_grad_()
    y0 = torch.tensor([10.0, 5.0], **double).requires_grad_()
    return lotka_volterra, y0, (rates,), [y0, rates]


def ring() -> Problem:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return (y.roll(-1) - y.roll(2)) * y.roll(1) - y + force

    force = torch.tensor(8.0, **double).requires_grad_()
    y0 = torch.linspace(-1, 1, 8, **double).requires_grad_()
    return f, y0, (), [y0, force]


def network() -> Problem:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    y0 = torch.randn(3, **double).requires_grad_()
    return lambda t, y: layers(y), y0, (), [y0, *layers.parameters()]


PROBLEMS = {"predators": predators, "ring": ring, "network": network}


def gradient(problem: Problem, times: bool = False, stop: float = 1.0, **how: Any) -> tuple[Any, list[Tensor]]:
    f, y0, args, inputs = problem
    t = torch.linspace(0, stop, 6, **double).requires_grad_(times)
    solution = adjoint.solve(f, y0, t, args=args, **{"method": "rk4", "dt": 0.02, "engine": "native", **how})
    weights = torch.arange(1.0, 7.0, **double).reshape(-1, *[1] * y0.ndim)
    wanted = [*inputs, t] if times else inputs
    return solution, list(torch.autograd.grad((solution.ys.square() * weights).mean(), wanted))


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_whole_solves_agree_to_rounding(name: str, times: bool) -> None:
    problem = PROBLEMS[name]()
    stop = -0.5 if name == "network" else 1.0
    mine, theirs = (gradient(problem, times, stop, engine=engine) for engine in ("native", "eager"))
    assert mine[0].engine.startswith("native") and theirs[0].engine.startswith("eager")
    torch.testing.assert_close(mine[0].ys, theirs[0].ys, rtol=1e-13, atol=1e-13)
    for a, b in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_bit_depends_on_what_is_kept(name: str) -> None:
    problem = PROBLEMS[name]()
    kept, reference = gradient(problem, True)
    assert kept.stats.plain_runs == 0
    wishes: list[dict[str, Any]] = [{"slots": c} for c in (1, 2, 3, 7, 49, 50, 51, "all")]
    wishes += [{"budget": "8 KiB"}, {"schedule": Periodic(7)}, {"schedule": StoreNothing()}, {"schedule": Binomial(4)}]
    for how in wishes:
        solution, found = gradient(problem, True, **how)
        assert solution.engine.startswith("native"), solution.engine
        assert torch.equal(solution.ys, kept.ys)
        for a, b in zip(found, reference, strict=True):
            assert torch.equal(a, b), how


def test_runs_are_counted_as_the_plan_says() -> None:
    solution, _ = gradient(predators(), slots=4)
    assert solution.stats.plain_runs == solution.plan.report.plain_runs
    assert solution.stats.recorded_runs == 50


def test_a_graph_that_is_kept_is_reversed_again() -> None:
    f, y0, args, inputs = predators()
    solution = adjoint.solve(f, y0, [0.0, 1.0], args=args, method="rk4", dt=0.02, engine="native", slots=3)
    loss = solution.ys[-1].square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for _ in range(2):
        again = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_derivatives_are_torchs() -> None:
    found = []
    for engine in ("native", "eager"):
        f, y0, args, inputs = predators()
        solution = adjoint.solve(f, y0, [0.0, 0.2], args=args, method="rk4", dt=0.02, engine=engine, slots=3)
        first = torch.autograd.grad(solution.ys[-1].square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0.0)


def test_single_precision_and_trees() -> None:
    def f(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": y["v"].expand(2, 3) * scale, "v": -torch.sin(y["x"]).sum(0, keepdim=True)}

    scale = torch.tensor(1.5).requires_grad_()
    found = []
    for engine in ("native", "eager"):
        y0 = {"x": torch.ones(2, 3).requires_grad_(), "v": torch.zeros(1, 3)}
        solution = adjoint.solve(f, y0, [0.0, 0.5, 1.0], method="heun2", dt=0.1, engine=engine)
        assert solution.engine.startswith(engine)
        loss = solution.ys["x"].square().sum() + solution.ys["v"][1].sum()
        found.append([*solution.ys.values(), *torch.autograd.grad(loss, [y0["x"], scale])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


def test_without_gradients_and_with_costs() -> None:
    f, y0, args, _ = predators()
    found = []
    for engine in ("native", "eager"):
        with torch.no_grad():
            cost = adjoint.solve(
                f, y0, [0.0, 1.0], args=args, method="rk4", dt=0.1, engine=engine, cost=lambda t, y, p: y.sum()
            )
        assert cost.engine.startswith(engine)
        found.append((cost.ys, cost.costs))
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=0.0)


def test_an_unused_tensor_has_no_gradient() -> None:
    used, unused = (torch.ones((), **double).requires_grad_() for _ in range(2))
    y0 = torch.ones(2, **double)
    solution = adjoint.solve(
        lambda t, y, a, b: -a * y, y0, [0.0, 1.0], args=(used, unused), method="rk4", engine="native"
    )
    first, second = torch.autograd.grad(solution.ys.sum(), [used, unused], allow_unused=True)
    assert solution.engine.startswith("native") and first is not None and second is None


def said(f: Callable[..., Any], y0: Tensor | None = None, **how: Any) -> str:
    y0 = torch.tensor([0.5, 0.7], **double) if y0 is None else y0
    how = {"method": "rk4", "dt": 0.1, "engine": "native", **how}
    return adjoint.solve(f, y0, [0.0, 1.0], **how).engine


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "float": (lambda t, y: y * float(y[0]), "_local_scalar_dense"),
    "if": (lambda t, y: y if y[0] > 0 else -y, "_local_scalar_dense"),
    "time": (lambda t, y: y if t < 0.5 else -y, "_local_scalar_dense"),
    "numpy": (lambda t, y: y * torch.from_numpy(y.numpy(force=True)), "numpy"),
    "tolist": (lambda t, y: y * torch.tensor(y.tolist(), **double), "tolist"),
    "mask": (lambda t, y: torch.cat((y[y > 0], y[y <= 0])), "masks in brackets"),
    "index": (lambda t, y: y[(y > 0).long()], "computed"),
    "sort": (lambda t, y: y.sort().values, "sort"),
    "fft": (lambda t, y: torch.fft.fft(y).real, "fft"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_left_to_torch_and_said(name: str) -> None:
    f, reason = REFUSED[name]
    engine = said(f)
    assert engine.startswith("eager") and reason in engine, engine


def test_other_wishes_are_left_to_torch_and_said() -> None:
    assert "check=True" in said(lambda t, y: -y, torch.ones(2, **double).requires_grad_(), check=True)
    assert "jumps" in said(lambda t, y: -y, jumps=(0.5,))
    assert "2000 numbers" in said(lambda t, y: -y * y.mean(), torch.ones(2000, **double))
    assert "float16" in said(lambda t, y: -y, torch.ones(2, dtype=torch.float16))
    assert "gradient='backprop'" in said(lambda t, y: -y, gradient="backprop")
    assert said(lambda t, y: -y, engine="eager").startswith("eager")
    with pytest.raises(ValueError, match="did you mean 'native'"):
        said(lambda t, y: -y, engine="nativ")


def test_auto_decides_by_the_number_of_fixed_steps() -> None:
    wishes: list[tuple[str, dict[str, Any]]] = [("native", {"dt": 0.001}), ("eager", {"dt": 1 / 999})]
    wishes += [("eager", {"method": "tsit5"}), ("eager", {"dt": 0.001, "check": True})]
    for expected, how in wishes:
        engine = said(lambda t, y: -y, torch.ones(2, **double).requires_grad_(), **{"engine": "auto", **how})
        assert engine.startswith(expected), engine
    assert "1000 fixed steps" in said(lambda t, y: -y, engine="auto")


def test_numbers_baked_in_behind_torchs_back_are_found_at_a_second_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.Unpeeked, "TAKES", frozenset())
    engine = said(lambda t, y: y * y.detach().numpy()[0])
    assert engine.startswith("eager") and "differs from torch's" in engine


def test_what_changes_between_two_calls_is_seen() -> None:
    class Model:
        gain = 2.0

        def __init__(self) -> None:
            self.rate = 1.0

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return -self.rate * self.gain * table["half"] * y

    def last() -> float:
        solution = adjoint.solve(model, torch.ones(1, **double), [0.0, 1.0], method="euler", engine="native")
        assert solution.engine.startswith("native"), solution.engine
        return float(solution.ys[-1])

    table, model = {"half": 0.5}, Model()
    assert last() == 0.0
    model.rate = 0.5
    assert last() == 0.5
    table["half"] = 0.25
    assert last() == 0.75
    Model.gain = 4.0
    assert last() == 0.5
    Model.__call__ = lambda self, t, y: y  # type: ignore[method-assign]
    assert last() == 2.0


def test_a_number_in_a_module_is_seen_to_change() -> None:
    constants = ModuleType("constants")
    constants.rate = 0.5  # type: ignore[attr-defined]

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -constants.rate * y

    for rate in (0.5, 0.25):
        constants.rate = rate  # type: ignore[attr-defined]
        solution = adjoint.solve(f, torch.ones(1, **double), [0.0, 1.0], method="euler", engine="native")
        assert solution.engine.startswith("native") and float(solution.ys[-1]) == 1 - rate


def test_a_function_that_changes_what_it_holds_is_left_to_torch() -> None:
    calls = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return -y

    assert "changes what it holds" in said(f)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MISSING", "llvmlite, which cannot be imported")
    assert "llvmlite" in said(lambda t, y: -y)


def test_programs_are_found_on_disk_and_made_anew_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path))
    values = [gradient(predators())[1]]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content, word in ((whole, "kept on disk"), (whole[:-1], "compiled"), (b"", "compiled")):
        file.write_bytes(content)
        kernel._known.clear()
        again._known.clear()
        solution, found = gradient(predators())
        assert word in solution.engine and file.read_bytes() == whole
        values.append(found)
    assert "known already" in gradient(predators())[0].engine
    assert all(torch.equal(a, b) for found in values for a, b in zip(found, values[0], strict=True))


def solved_at_once(start: Any, answers: Any) -> None:
    y0, p = (torch.tensor([x, 0.5], **double, requires_grad=True) for x in (1.0, 0.3))
    kernel._known.clear()
    again._known.clear()
    start.wait()
    for k in range(2):
        found = adjoint.solve(
            lambda t, y, k=k: torch.sin(p * y) * k, y0, [0.0, 1.0], method="rk4", dt=0.1, engine="native"
        )
        gradient = torch.autograd.grad(found.ys.square().sum(), (y0, p))
        answers.put((k, found.engine.partition(":")[0], tuple(x.hex() for g in gradient for x in g.tolist())))


def test_processes_that_start_at_once_share_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All write and read the same files at the same moment, and get the same bits."""
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.Queue()
    every = [context.Process(target=solved_at_once, args=(start, answers)) for _ in range(3)]
    for process in every:
        process.start()
    start.wait(60)
    found = [answers.get(timeout=60) for _ in range(6)]
    for process in every:
        process.join(60)
        assert process.exitcode == 0
    assert {said for _, said, _ in found} == {"native"} and len({(k, bits) for k, _, bits in found}) == 2
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and all(file.suffix == ".o" for file in files)  # nothing half made is left


def test_a_solve_that_blows_up_says_where() -> None:
    messages = []
    for engine in ("native", "eager"):
        with pytest.raises(adjoint.SolveError) as caught:
            adjoint.solve(lambda t, y: y**3, torch.ones(1, **double), [0.0, 9.0], method="rk4", dt=0.1, engine=engine)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
