"""A linear recurrence is its loop, and its transpose the loop's, whatever is done in parallel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits, leaf, loss_of
from torch import Tensor

import adjoint.fastest
from adjoint import linear_scan, scan

CPU = torch.device("cpu")
BATCH, STATES = 2, 3
KINDS: dict[str, tuple[int | None, ...]] = {
    "diagonal": (None, BATCH, STATES),
    "shared by the batch": (None, 1, STATES),
    "the same at every step": (1, BATCH, STATES),
    "one for all": (1, 1, STATES),
    "a multiple of the identity": (None, BATCH, 1),
    "one number": (1, 1, 1),
    "blocks": (None, BATCH, STATES, STATES),
    "one block": (1, 1, STATES, STATES),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = (1, 2, 3, 10, 33)
CHUNKS = (1, 4, 16, 100)


def parts(kind: str, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """a, b and the start."""
    shape = [length if size is None else size for size in KINDS[kind]]
    a = leaf(*shape, seed=1, on=CPU, dtype=dtype, scale=0.4)
    b = leaf(length, BATCH, STATES, seed=2, on=CPU, dtype=dtype)
    return [a, b, leaf(BATCH, STATES, seed=3, on=CPU, dtype=dtype)]


def loop(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    rows = []
    for k, b_k in enumerate(b.unbind(0)):
        a_k = a[k % len(a)]
        h = ((a_k @ h.unsqueeze(-1)).squeeze(-1) if a.ndim > b.ndim else a_k * h) + b_k
        rows.append(h)
    return torch.stack(rows)


def gradients(h: Tensor, wanted: list[Tensor], **how: Any) -> list[Tensor]:
    return [h.detach(), *torch.autograd.grad(loss_of([h]), wanted, **how)]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_linear_scan_is_its_loop(kind: str, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        wanted = parts(kind, length, dtype)
        expected = gradients(loop(*wanted), wanted)
        for chunk in CHUNKS:
            assert_close(gradients(linear_scan(*wanted, chunk=chunk), wanted), expected)


@every_kind
@pytest.mark.parametrize("chunk", [1, 4])
def test_it_can_be_differentiated_twice_and_thrice(kind: str, chunk: int) -> None:
    def third(run: Any) -> list[Tensor]:
        wanted = parts(kind, 5)
        found = torch.autograd.grad(loss_of([run(*wanted)]), wanted, create_graph=True)
        found = torch.autograd.grad(loss_of(list(found)), wanted, create_graph=True)
        return [x.detach() for x in found] + list(torch.autograd.grad(loss_of(list(found)), wanted))

    assert_close(third(lambda *given: linear_scan(*given, chunk=chunk)), third(loop))


def test_complex_second_derivatives_pass_torchs_own_check() -> None:
    for kind in ("diagonal", "one block"):
        assert torch.autograd.gradgradcheck(lambda *x: linear_scan(*x, chunk=4), parts(kind, 5, torch.complex128))


@pytest.mark.parametrize("kind", ["diagonal", "one for all", "blocks"])
def test_torch_func_goes_through(kind: str) -> None:
    a, b, start = (x.detach() for x in parts(kind, 6))

    def loss(run: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        return (run(a, b, start) ** 3).sum()

    def ours(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        return linear_scan(a, b, start, chunk=4)

    many = torch.stack((start, 2 * start, -start))
    for argument in range(3):
        grad = torch.func.grad(loss, argnums=1 + argument)
        found = torch.func.vmap(lambda s, grad=grad: grad(ours, a, b, s))(many)
        assert_close([found], [torch.stack([grad(loop, a, b, s) for s in many])])
    values = torch.func.vmap(ours, (None, None, 0))(a, b, many)
    assert_close([values], [torch.stack([loop(a, b, s) for s in many])])


@pytest.mark.parametrize("kind", ["diagonal", "one for all", "blocks"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_second_derivatives_by_torch_func_are_those_of_the_loop(kind: str, chunk: int) -> None:
    """A backward that calls torch.autograd.grad leaves them out without a word."""
    given = tuple(x.detach() for x in parts(kind, 6))

    def hessian(run: Any) -> list[Tensor]:
        func = torch.func
        inner = func.grad(lambda *x: (run(*x) ** 3).sum(), argnums=(0, 1, 2))
        return [block for row in func.jacrev(inner, argnums=(0, 1, 2))(*given) for block in row]

    assert_close(hessian(lambda *x: linear_scan(*x, chunk=chunk)), hessian(loop))


@every_kind
def test_a_batch_of_cotangents_gives_a_jacobian(kind: str) -> None:
    wanted = parts(kind, 5)
    units = torch.eye(5 * BATCH * STATES, dtype=torch.float64).reshape(-1, 5, BATCH, STATES)

    def jacobian(h: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(h, wanted, units, is_grads_batched=True))

    assert_close(jacobian(linear_scan(*wanted, chunk=4)), jacobian(loop(*wanted)))


def test_only_a_and_the_states_are_kept() -> None:
    a, b, start = parts("diagonal", 64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        h = linear_scan(a, b, start, chunk=16)
    assert sum(x.numel() for x in kept) == 2 * b.numel() + start.numel()
    assert {x.data_ptr() for x in kept} == {a.data_ptr(), h.data_ptr(), start.data_ptr()}


@pytest.mark.parametrize("chunk", [1, 8])
def test_inside_of_a_scan_the_bits_do_not_depend_on_the_slots(chunk: int) -> None:
    """Sequential or in parallel inside of chunks, Binomial over them; a and b are made in the chunk and never kept."""
    p, x, start = (
        leaf(STATES, seed=1, on=CPU),
        leaf(30, BATCH, STATES, seed=2, on=CPU),
        leaf(BATCH, STATES, seed=3, on=CPU),
    )

    def rows(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        states = linear_scan(torch.sigmoid(x * p), torch.tanh(x + p), h, chunk=chunk)
        return states[-1], states.sum(-1)

    def found(**how: Any) -> list[Tensor]:
        final, y = scan(rows, start, x, parallel=True, chunk=8, **how)
        return [final.detach(), y.detach(), *torch.autograd.grad(loss_of([final, y]), (p, x, start))]

    everything = found(slots="all")
    for slots in (1, 2, 3):
        assert_same_bits(found(slots=slots), everything)
    states = loop(torch.sigmoid(x * p), torch.tanh(x + p), start)
    final, y = states[-1], states.sum(-1)
    expected = [final.detach(), y.detach(), *torch.autograd.grad(loss_of([final, y]), (p, x, start))]
    assert_close(everything, expected)
    assert_close(found(gradient="tangent"), expected)


def test_batch_first_dtypes_and_a_start_of_zero() -> None:
    a, b, start = parts("diagonal", 7)
    h = linear_scan(a.transpose(0, 1), b.transpose(0, 1), start, batch_first=True, chunk=4)
    assert_close([h.transpose(0, 1)], [loop(a, b, start)])
    assert_close([linear_scan(a, b, chunk=4)], [loop(a, b, torch.zeros_like(start))])
    mixed = linear_scan(a.to(torch.complex128) * 1j, b, start, chunk=4)
    assert_close([mixed], [loop(a * 1j, b, start + 0j)])
    (back,) = torch.autograd.grad(mixed.abs().sum(), b)
    assert back.dtype == b.dtype
    line = linear_scan(a[:, 0, 0], b[:, 0, 0], start[0, 0], chunk=4)
    assert_close([line], [loop(a, b, start)[:, 0, 0]])


def test_the_fastest_chunk_is_measured_once_for_a_kind_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seconds(a: Tensor, b: Tensor, chunk: int, run: Any) -> float:
        asked.append(chunk)
        return abs(chunk - 256)

    monkeypatch.setattr(adjoint.fastest, "_seconds", seconds)
    adjoint.fastest.forget()
    a, b, start = parts("one for all", 3000)
    h = linear_scan(a, b, start)
    assert asked == [1, 64, 256, 1024, 4096]
    assert_same_bits([h], [linear_scan(a, b, start, chunk=256)])
    linear_scan(a * 2, b, start)
    assert len(asked) == 5
    linear_scan(a, b[:20])
    assert asked[5:] == [1]  # too short for more
    adjoint.fastest.forget()


def test_what_is_measured_is_not_seen_by_a_scan_around_it() -> None:
    adjoint.fastest.forget()
    x = leaf(200, 4, seed=1, on=CPU)

    def rows(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        states = linear_scan(torch.sigmoid(x), x, h)
        return states[-1], states

    final, y = scan(rows, torch.zeros(4, dtype=torch.float64), x, parallel=True, chunk=70, slots=2)
    expected = loop(torch.sigmoid(x), x, torch.zeros(4, dtype=torch.float64))
    assert_close([y, *torch.autograd.grad(loss_of([y]), x)], [expected, *torch.autograd.grad(loss_of([expected]), x)])
    assert adjoint.fastest._known


@pytest.mark.parametrize(
    ("a", "b", "more", "error", "match"),
    [
        ((5, 3), (4, 3), {}, ValueError, r"a has the shape \(5, 3\) and b \(4, 3\)"),
        ((3,), (4, 3), {}, ValueError, r"a as many dimensions as b has.*\(4, 3, 3\)"),
        ((4, 3, 1), (4, 3), {}, ValueError, r"matrices of shape \(4, 3, 3\)"),
        ((4, 4), (4,), {}, ValueError, "a has the shape"),
        ((0, 3), (0, 3), {}, ValueError, "at least one row"),
        ((4, 3), (4, 3), {"start": torch.zeros(4)}, ValueError, r"start has the shape \(4,\); one state has \(3,\)"),
        ((4, 3), (4, 3), {"chunk": 0}, ValueError, "chunk=0 is not a number of rows"),
        ((4,), (4,), {"batch_first": True}, ValueError, r"it is \(batch, time"),
        ((4, 3), (4, 3), {"start": torch.zeros(3).int()}, TypeError, "start is of torch.int32"),
    ],
)
def test_a_wrong_call_gets_a_sentence(a: Any, b: Any, more: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        linear_scan(torch.zeros(a), torch.zeros(b), **more)


@pytest.mark.parametrize("kind", ["diagonal", "blocks"])
def test_autocast_does_not_reach_inside(kind: str) -> None:
    wanted = parts(kind, 12, torch.float32)
    expected = gradients(linear_scan(*wanted, chunk=4), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = linear_scan(*wanted, chunk=4)
    assert_same_bits(gradients(h, wanted), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(gradients(linear_scan(*wanted, chunk=4), wanted), expected)
