"""Networks whose blocks are run again: result, gradients, buffers and random numbers are those of plain torch, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adjoint
from adjoint import chain, checkpoint, checkpoint_sequential, graph
from adjoint.memory import Meter
from revolve import BudgetError

MEMORIES: list[dict[str, Any]] = [
    {"slots": 1},
    {"slots": 2},
    {"slots": 4},
    {"slots": "all"},
    {"every": 1},
    {"every": 2},
    {"every": 3},
    {"budget": "16 KiB"},
    {"budget": "24 KiB"},
    {"budget": "1 MiB"},
    {"slots": 3, "tier": adjoint.Host()},
    {"every": 2, "tier": adjoint.Files()},
    {"slots": 3, "check": True},
]
memories = pytest.mark.parametrize(
    "memory", MEMORIES, ids=lambda memory: "-".join(f"{k}={v}" for k, v in memory.items())
)


class Noisy(nn.Module):
    """Draws from a generator of its own, from numpy's and from Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self.numbers = np.random.default_rng(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        factor = self.numbers.random() + np.random.rand() + random.random()
        return x * torch.rand(x.shape, generator=self.generator) * factor


class Twice(nn.Module):
    """Two tensors from one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        return a, b


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([pair[0] * self.scale, pair[1].sigmoid()], dim=1)


def everything() -> nn.Sequential:
    """Dropout, statistics, writes in place, views, a pair between blocks, generators, and a weight used twice."""
    torch.manual_seed(0)
    tied = nn.Linear(16, 16)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        tied,
        nn.BatchNorm1d(16),
        Twice(),
        Joined(),
        Noisy(),
        nn.Unflatten(1, (4, 4)),
        nn.Flatten(),
        nn.Dropout(0.5, inplace=True),
        tied,
        nn.GELU(),
        nn.utils.spectral_norm(nn.Linear(16, 4)),
    )


def trained(model: nn.Sequential, run: Callable[[nn.Sequential, Tensor], Tensor], steps: int = 2) -> list[Tensor]:
    """All that can be seen of some steps of training: results, gradients, buffers, random numbers afterwards."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    seen: list[Tensor] = []
    for _ in range(steps):
        x = torch.randn(32, 8, requires_grad=True)
        y = run(model, x)
        seen += [y.detach().clone(), torch.rand(2), torch.tensor([np.random.rand(), random.random()])]
        optimizer.zero_grad()
        y.square().mean().backward()
        assert x.grad is not None
        seen += [x.grad, torch.rand(2), torch.tensor([np.random.rand(), random.random()])]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    noisy = [torch.tensor(m.calls) for m in model.modules() if isinstance(m, Noisy)]
    return [*seen, *(x.clone() for x in (*model.parameters(), *model.buffers())), *noisy]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert [k for k, (x, y) in enumerate(zip(found, wanted, strict=True)) if not torch.equal(x, y)] == []


PLAIN = trained(everything(), lambda model, x: model(x))


@memories
def test_training_is_plain_training_bit_for_bit(memory: dict[str, Any]) -> None:
    assert_same(trained(everything(), lambda model, x: chain(model, x, **memory)), PLAIN)


def test_the_drop_ins_are_plain_training_bit_for_bit() -> None:
    assert_same(trained(everything(), lambda model, x: checkpoint_sequential(model, 3, x)), PLAIN)
    assert_same(trained(everything(), lambda model, x: checkpoint_sequential(model, 14, x)), PLAIN)
    halves = trained(everything(), lambda model, x: checkpoint(model[7:], checkpoint(lambda x: model[:7](x), x)))
    assert_same(halves, PLAIN)


def test_nested_networks_are_plain_training_bit_for_bit() -> None:
    def inner(model: nn.Sequential, x: Tensor) -> Tensor:
        middle = lambda x: chain(model[3:9], x, every=2)  # noqa: E731
        return chain([*model[:3], middle, *model[9:]], x, slots=2)

    assert_same(trained(everything(), inner), PLAIN)
    torchs = trained(everything(), lambda model, x: torch.utils.checkpoint.checkpoint(
        lambda x: chain(model, x, slots=3), x, use_reentrant=False))  # fmt: skip
    assert_same(torchs, PLAIN)
    part = lambda model: lambda x: torch.utils.checkpoint.checkpoint(model[11:13], x, use_reentrant=False)  # noqa: E731
    both = trained(everything(), lambda model, x: chain([*model[:11], part(model), model[13]], x, every=1))
    assert_same(both, PLAIN)


@pytest.mark.parametrize("memory", MEMORIES[:8], ids=str)
def test_autocast_is_entered_again(memory: dict[str, Any]) -> None:
    def run(how: Callable[[nn.Sequential, Tensor], Tensor]) -> list[Tensor]:
        def cast(model: nn.Sequential, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return how(model, x).float()

        return trained(everything(), cast)

    assert_same(run(lambda model, x: chain(model, x, **memory)), run(lambda model, x: model(x)))


def counted(model: nn.Sequential) -> list[int]:
    calls = [0] * len(model)
    for k, block in enumerate(model):
        block.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    return calls


def test_blocks_run_as_often_as_planned() -> None:
    for memory, runs in (
        ({"slots": "all"}, [1] * 8),
        ({"every": 3}, [2] * 6 + [1] * 2),
        ({"slots": 1}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"schedule": adjoint_bisection()}, None),
    ):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
        calls = counted(model)
        chain(model, torch.ones(2, 4), **memory).sum().backward()
        if runs is None:
            report = memory["schedule"].price(8)
            assert sum(calls) == report.plain_runs + report.recorded_runs
        else:
            assert calls == runs


def adjoint_bisection() -> Any:
    from revolve import Bisection

    return Bisection()


def deep(width: int = 64, depth: int = 12) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = []
    for k in range(depth):
        inner = width * (1 + k % 3)
        blocks.append(nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width), nn.ReLU()))
    return nn.Sequential(*blocks)


def peak_of(run: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """The most bytes of tensors at once in a forward and backward pass; gradients lie ready."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    with Meter() as meter:
        y = run()
        y.sum().backward()
    return meter.peak


def test_the_peak_stays_within_the_budget_and_near_the_plan() -> None:
    model, x = deep(), torch.randn(512, 64)
    parameters = list(model.parameters())
    plain = peak_of(lambda: model(x), parameters)
    before = None
    for share in (0.25, 0.5, 0.8, 1.1):
        budget = int(share * plain)
        module = adjoint.checkpointed(model, budget=budget)
        with Meter() as meter:
            module.measure(x)
        assert meter.peak <= plain / 2  # a few of the largest blocks
        peak = peak_of(lambda module=module: module(x), parameters)
        assert module.plan is not None
        assert 0.95 * module.plan.bytes <= peak <= 1.02 * module.plan.bytes <= 1.02 * budget
        runs = sum(module.runs().values())
        assert before is None or runs <= before
        before = runs
    assert before == 48


def test_a_budget_too_small_names_the_smallest_that_works() -> None:
    model, x = deep(), torch.randn(64, 64)
    with pytest.raises(BudgetError, match="cannot reverse a network of 12 nodes; give at least") as error:
        chain(model, x, budget=1000)
    chain(model, x, budget=error.value.smallest).sum().backward()


def test_check_names_the_block_that_is_not_reproducible() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden.append(0)
            return x * len(hidden)

    hidden: list[int] = []
    blocks = [nn.Linear(3, 3), nn.Tanh(), Counting(), nn.Linear(3, 3)]
    with pytest.raises(adjoint.ReproducibilityError, match=r"block 2 \(Counting\) is not reproducible") as error:
        chain(blocks, torch.ones(2, 3), every=1, check=True)
    assert error.value.step == 2
    y = chain(blocks, torch.ones(2, 3), every=1)
    with pytest.raises(adjoint.ReproducibilityError, match=r"block 2 \(Counting\).* its output is another one"):
        y.sum().backward()


def test_what_changed_between_forward_and_backward_is_refused() -> None:
    def pass_through() -> tuple[nn.Sequential, Tensor, Tensor]:
        model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.ones(2, 3)
        return model, x, chain(model, x, every=1)

    model, x, y = pass_through()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter 'weight' of block 0 \(Linear\).* was changed in place"):
        y.sum().backward()
    model, x, y = pass_through()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.ones(2, 3)
    y = chain(model, x, slots="all")
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match=r"block 1 \(Tanh\) needs for its gradient .* was changed in place"):
        y.sum().backward()


def test_a_first_block_that_writes_to_the_input_is_refused_or_measured() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=r"block 0 \(ReLU\) writes in place to an input of the network"):
        chain(model, torch.randn(2, 3), every=1)
    x = torch.randn(2, 3)
    chain(model, x, budget="1 MiB").sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x.clone()).sum().backward()
    assert_same(found, [p.grad for p in model.parameters() if p.grad is not None])


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.relu(self.layer(torch.cat([x, skip], dim=1)))


def u_net(depth: int = 4, width: int = 16) -> dict[str, tuple[Any, ...]]:
    """Skips from each level to its mirror, and one from the input to the end."""
    torch.manual_seed(2)
    nodes: dict[str, tuple[Any, ...]] = {}
    name = "x"
    for k in range(depth):
        nodes[f"down{k}"] = (nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.Tanh()), name)
        name = f"down{k}"
    for k in reversed(range(depth - 1)):
        nodes[f"up{k}"] = (Up(width), name, f"down{k}")
        name = f"up{k}"
    nodes["sum"] = (lambda a, x: a + x, name, "x")
    return nodes


@pytest.mark.parametrize(
    "memory", [{"slots": 1}, {"slots": 3}, {"budget": "64 KiB"}, {"budget": "80 KiB"}, {"budget": "1 MiB"}], ids=str
)
def test_a_graph_with_skips_is_plain_torch_bit_for_bit(memory: dict[str, Any]) -> None:
    def run(how: Callable[[dict[str, tuple[Any, ...]], Tensor], dict[str, Any]]) -> list[Tensor]:
        nodes, x = u_net(), torch.linspace(-1, 1, 64 * 16).reshape(64, 16).requires_grad_()
        torch.manual_seed(3)
        found = how(nodes, x)
        (found["sum"].square().sum() + found["down2"].sin().sum()).backward()
        parameters = [p for wire in nodes.values() if isinstance(wire[0], nn.Module) for p in wire[0].parameters()]
        return [x.grad, *(p.grad for p in parameters), torch.rand(2)]  # type: ignore[list-item]

    def plainly(nodes: dict[str, tuple[Any, ...]], x: Tensor) -> dict[str, Any]:
        values: dict[str, Any] = {"x": x}
        for name, (module, *used) in nodes.items():
            values[name] = module(*(values[one] for one in used))
        return values

    wanted = run(plainly)
    assert_same(run(lambda nodes, x: graph(nodes, {"x": x}, outputs=["sum", "down2"], **memory)), wanted)


def test_gradients_twice_and_of_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 1)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def second(y: Tensor) -> list[Tensor]:
        wanted = [x, *model.parameters()]
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        again = torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True)
        return [
            *first,
            *again,
            *torch.autograd.grad(first[0].square().sum() + first[1].sum(), wanted, allow_unused=True)[:4],
        ]

    plain = [g.detach() for g in second(model(x))]
    for memory in ({"slots": 1}, {"slots": 2}, {"every": 2}, {"slots": "all"}):
        assert_same([g.detach() for g in second(chain(model, x, **memory))], plain)


def test_only_what_is_asked_for_is_made_again() -> None:
    model, x = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))), torch.ones(2, 3)
    calls = counted(model)
    y = chain(model, x, every=1)
    torch.autograd.grad(y.sum(), list(model[4].parameters()))
    assert calls == [1, 1, 1, 1, 2, 1]  # the last keeps its tape


def test_hooks_of_parameters_fire_once_and_gradients_accumulate() -> None:
    model, fired = everything(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))
    x = torch.randn(32, 8)
    losses = [chain(model, x, slots=2).sum(), chain(model, x, every=3).sum()]  # both passes before any backward
    for loss in losses:
        fired.clear()
        loss.backward()
        assert sorted(fired) == sorted(id(p) for p in model.parameters())


def test_functional_call_and_grad_scaler() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    module = adjoint.checkpointed(model, every=1)
    x = torch.randn(4, 3)
    others = {f"module.{name}": torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    found = torch.autograd.grad(torch.func.functional_call(module, others, (x,)).square().sum(), list(others.values()))
    named = {name.removeprefix("module."): p for name, p in others.items()}
    wanted = torch.autograd.grad(torch.func.functional_call(model, named, (x,)).square().sum(), list(others.values()))
    assert_same(list(found), list(wanted))

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    grads = []
    for run in (module, model):
        model.zero_grad()
        scaler.scale(run(x).square().sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_same(*grads)


def test_without_gradients_nothing_is_kept() -> None:
    model, x = deep(depth=3), torch.randn(4, 64)
    with torch.no_grad():
        y = chain(model, x, slots=1)
    assert y.grad_fn is None and torch.equal(y, model(x))
    assert torch.equal(chain([], x), x)


def test_forward_transforms_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="torch.func transform"):
        torch.func.grad(lambda x: chain([torch.sin, torch.cos], x, every=1).sum())(torch.ones(3))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: chain([torch.sin], x, slots=2, every=3), ValueError, "slots=2 and every=3 were both given"),
        (lambda x: chain([torch.sin], x, slots=0), ValueError, "slots=0 is too small; give at least 1"),
        (lambda x: chain([torch.sin], x, every=0), ValueError, "every=0 is too small; give at least 1"),
        (lambda x: chain([3], x), TypeError, "block 0 is 3; a block must be callable"),
        (lambda x: chain([torch.sin], x, tier="disk"), TypeError, "tier='disk' is no kind of memory"),
        (lambda x: graph({"a": torch.sin}, {"x": x}), TypeError, r"must be \(module, name, ...\)"),
        (lambda x: graph({"a": (torch.sin, "y")}, {"x": x}), ValueError, "inputs lacks 'y', which a node uses"),
        (lambda x: graph({"a": (torch.sin, "x")}, {"x": x}, outputs="b"), ValueError, "outputs names 'b'"),
        (lambda x: checkpoint(torch.sin, x, use_reentrant=True), ValueError, "use_reentrant=True loses gradients"),
        (lambda x: checkpoint_sequential([torch.sin], 2, x), ValueError, "segments=2 cannot cut 1 functions"),
    ],
)
def test_a_wrong_call_gets_a_sentence(call: Callable[[Tensor], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call(torch.ones(3, requires_grad=True))
