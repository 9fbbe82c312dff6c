"""Tapes kept otherwise: in part, in a file, in a lower precision; one budget chooses, and lossless ways change no bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_chain import PLAIN, assert_same, everything, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adjoint
from adjoint import Device, Files, Host, Selective, chain, checkpointed
from adjoint.memory import Meter
from revolve import BudgetError, Cast


class Attention(nn.Module):
    """A block of a transformer, with dropout and, if asked, a write in place."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.1, in_place: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.into, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = (
            nn.Linear(width, 4 * width),
            nn.ReLU(inplace=in_place),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.into(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + nn.functional.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), 0.1, self.training)
        return x + self.down(nn.functional.gelu(self.act(self.up(x))))


def transformer(blocks: int = 4, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention(**options) for _ in range(blocks)))


def gradient(model: nn.Sequential, run: Callable[[Tensor], Tensor], twice: bool = False) -> list[Tensor]:
    torch.manual_seed(2)
    x = torch.randn(4, 16, 32, requires_grad=True)
    y = run(x)
    inputs = [x, *model.parameters()]
    found = torch.autograd.grad(y.square().sum(), inputs, retain_graph=twice)
    more = torch.autograd.grad(y.sum(), inputs) if twice else ()
    return [y.detach(), *found, *more, torch.rand(3)]


@pytest.mark.parametrize("tapes", [Selective(), Selective(("gelu",)), Files(), Host()], ids=str)
def test_every_tape_kept_otherwise_is_plain_training_bit_for_bit(tapes: Any) -> None:
    assert_same(trained(everything(), lambda model, x: chain(model, x, slots="all", tapes=tapes)), PLAIN)


@pytest.mark.parametrize("tapes", [Selective(), Files()], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.0}, {"in_place": False}], ids=str)
def test_transformers_give_the_same_bits_once_and_twice(tapes: Any, options: dict[str, Any]) -> None:
    model = transformer(**options)
    for twice in (False, True):
        plain = gradient(model, model, twice)
        assert_same(gradient(model, lambda x: chain(model, x, tapes=tapes), twice), plain)


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def test_selected_operations_run_once_and_the_others_again() -> None:
    model = transformer(dropout=0.0, in_place=False)
    counted = []
    for run in (model, lambda x: chain(model, x, tapes=Selective()), lambda x: chain(model, x, every=1)):
        with Counts() as counts:
            gradient(model, run)
        counted.append(counts.names)
    plain, selective, again = counted
    for name in ("addmm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert 0 < plain.count(name) == selective.count(name) < again.count(name)
    for name in ("native_layer_norm", "gelu"):
        assert plain.count(name) < selective.count(name)


def test_selected_tapes_hold_less_than_whole_ones_and_files_next_to_nothing() -> None:
    model = transformer(8)
    peaks = []
    for run in (model, *(lambda x, t=t: chain(model, x, tapes=t) for t in (Selective(), Files()))):
        torch.manual_seed(2)
        x = torch.randn(4, 64, 32, requires_grad=True)
        with Meter() as meter:
            y = run(x)
            peaks.append(meter.live)
        del y
    plain, selective, files = peaks
    assert selective < 0.75 * plain
    assert files < 0.05 * plain + plain / 8  # the thread that writes may hold the tape of the last block still


@pytest.mark.parametrize("tapes", [Selective(), [Selective(), Files()]], ids=str)
def test_one_budget_chooses_and_keeps_to_it(tapes: Any) -> None:
    model = transformer(4, dropout=0.0)
    x = torch.randn(8, 64, 32)
    whole = checkpointed(model, slots="all").measure(x).bytes
    chosen = set()
    for share in (0.9, 0.7, 0.5):
        run = checkpointed(model, budget=int(share * whole), tapes=tapes)
        plan = run.measure(x)
        chosen |= {name.split(",")[0] for name in plan.ways if name}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with torch.no_grad():
            cotangent = torch.ones_like(model(x))
        torch.manual_seed(3)
        with Meter() as meter:
            run(x).backward(cotangent)
        assert 0.8 * plan.bytes < meter.peak <= 1.005 * plan.bytes <= 1.005 * share * whole
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        torch.manual_seed(3)
        model(x).backward(cotangent)
        assert_same(found, [p.grad for p in model.parameters() if p.grad is not None])
        assert f"kept otherwise: {next(iter(filter(None, plan.ways)), '')}" in run.report() or not any(plan.ways)
    assert chosen


def test_a_lower_precision_is_another_gradient_and_a_near_one() -> None:
    model = transformer(dropout=0.0)
    plain = gradient(model, model)
    for precision, near in (("bfloat16", 3e-2), ("float16", 4e-3)):
        found = gradient(model, lambda x, p=precision: chain(model, x, tapes=Device(codec=Cast(p))))
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(found[1:-1], plain[1:-1], strict=True))
        assert 0 < off < near
    with pytest.raises(ValueError, match="float8"):
        chain(model, torch.zeros(1), tapes=Device(codec=Cast("float8_e4m3fn")))


def test_what_was_written_to_meanwhile_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4, requires_grad=True) * 1
    y = chain(model, x, tapes=Selective())
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace|written to in place"):
        y.sum().backward()
    y = chain(model, torch.randn(3, 4), tapes=Selective())
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_a_block_that_is_not_reproducible_is_refused() -> None:
    calls = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        y = torch.tanh(x @ x.T)
        return y.sin() if len(calls) == 1 else y.reshape(-1).sin()

    y = chain([moody], torch.randn(3, 3, requires_grad=True), tapes=Selective())
    with pytest.raises(adjoint.ReproducibilityError, match="not reproducible"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"tapes": Selective(), "slots": 2}, ValueError, "needs a budget= to choose"),
        ({"tapes": [Selective(), Files()]}, ValueError, "needs a budget= to choose"),
        ({"tapes": Device()}, ValueError, "keeps tapes as they are anyway"),
        ({"tapes": "host"}, TypeError, "no way to keep tapes"),
        ({"budget": 10, "tapes": Selective()}, BudgetError, "cannot reverse a network"),
    ],
)
def test_a_wrong_call_gets_a_sentence(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        chain(transformer(2), torch.randn(2, 4, 32), **options)
    with pytest.raises(ValueError, match="torch has no operation 'nonsense'"):
        Selective(("nonsense",))


@pytest.mark.parametrize("tapes", [(), Selective(), Files()], ids=str)
def test_measuring_leaves_no_gradient_in_what_a_function_holds(tapes: Any) -> None:
    leaf = torch.randn(4, 4, requires_grad=True)
    made = leaf.exp()
    blocks = [lambda x: (x @ leaf).tanh(), lambda x: x @ made]
    x = torch.randn(3, 4)
    adjoint.chain(blocks, x, budget="1 MiB", tapes=tapes).sum().backward()
    found, leaf.grad = leaf.grad, None
    made = leaf.exp()
    blocks[1](blocks[0](x)).sum().backward()
    assert found is not None and torch.equal(found, leaf.grad)
