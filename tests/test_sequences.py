"""Sequences as they come: batches, lengths, masks, chunks, windows, random draws; each held against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits, leaf, loss_of
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import revolve
from adjoint import scan

CPU = torch.device("cpu")
LENGTH, BATCH = 11, 3
SLOTS = (1, 2, 4, "all")
GRADIENTS = ("discrete", "backprop", "tangent")


def parts() -> list[Tensor]:
    """Weights (2, 2), a carry (batch, 2), inputs (time, batch, 2)."""
    return [leaf(2, 2, seed=1, on=CPU), leaf(BATCH, 2, seed=2, on=CPU), leaf(LENGTH, BATCH, 2, seed=3, on=CPU)]


def cell(w: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(c @ w + x)
        return new, new * x

    return step


def loop(step: Callable[..., Any], c: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    outputs = []
    for row in x.unbind(0):
        c, y = step(c, row, *args)
        outputs.append(y)
    return c, torch.stack(outputs)


def gradients(results: tuple[Tensor, Tensor], wanted: list[Tensor]) -> list[Tensor]:
    return [x.detach() for x in results] + list(torch.autograd.grad(loss_of(list(results)), wanted))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("chunk", [None, 1, 4, LENGTH, 50])
def test_batch_first_is_the_transpose_and_a_chunk_is_so_many_rows(chunk: int | None, gradient: str) -> None:
    wanted = parts()
    expected = gradients(loop(cell(wanted[0]), wanted[1], wanted[2]), wanted)
    assert_close(gradients(scan(cell(wanted[0]), *wanted[1:], chunk=chunk, gradient=gradient), wanted), expected)
    final, outputs = scan(
        cell(wanted[0]), wanted[1], wanted[2].transpose(0, 1), batch_first=True, chunk=chunk, gradient=gradient
    )
    assert outputs.shape == (BATCH, LENGTH, 2)
    assert_close(gradients((final, outputs.transpose(0, 1)), wanted), expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_a_parallel_step_is_handed_chunks_in_the_layout_of_the_inputs(chunk: int, batch_first: bool) -> None:
    wanted = parts()
    expected = gradients(loop(cell(wanted[0]), wanted[1], wanted[2]), wanted)
    seen = []

    def chunks(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape))
        final, outputs = loop(cell(wanted[0]), c, x.transpose(0, 1) if batch_first else x)
        return final, outputs.transpose(0, 1) if batch_first else outputs

    x = wanted[2].transpose(0, 1) if batch_first else wanted[2]
    results = [scan(chunks, wanted[1], x, chunk=chunk, parallel=True, batch_first=batch_first, slots=c) for c in SLOTS]
    last = LENGTH % chunk or chunk
    rows = {min(chunk, LENGTH), min(last, LENGTH)}
    assert set(seen) == {(BATCH, m, 2) if batch_first else (m, BATCH, 2) for m in rows}
    found = [gradients((f, y.transpose(0, 1) if batch_first else y), wanted) for f, y in results]
    assert_close(found[0], expected)
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("chunk", [None, 4])
def test_each_member_has_a_length_of_its_own_and_what_fills_the_rest_is_not_looked_at(chunk: int | None) -> None:
    lengths = [LENGTH, 4, 0]
    wanted = parts()
    padded = wanted[2].detach().clone()
    for b, n in enumerate(lengths):
        padded[n:, b] = torch.nan
    padded.requires_grad_()
    wanted[2] = padded
    step = cell(wanted[0])
    expected_final, expected_outputs = [], []
    for b, n in enumerate(lengths):
        c, rows = wanted[1][b : b + 1], [torch.zeros(1, 2, dtype=torch.float64)] * LENGTH
        for k in range(n):
            c, rows[k] = step(c, padded[k, b : b + 1])
        expected_final.append(c)
        expected_outputs.append(torch.stack(rows))
    expected = gradients((torch.cat(expected_final), torch.cat(expected_outputs, 1)), wanted)
    assert all(x.isfinite().all() for x in expected)
    for gradient in GRADIENTS:
        assert_close(
            gradients(scan(step, *wanted[1:], lengths=lengths, chunk=chunk, gradient=gradient), wanted), expected
        )
    found = [
        gradients(scan(step, *wanted[1:], lengths=torch.tensor(lengths), chunk=chunk, slots=c), wanted) for c in SLOTS
    ]
    for other in found:
        assert_close(other, expected)
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_member_without_rows_is_not_tried_on_zeros(chunk: int | None) -> None:
    """log(0) would be left out of the outputs, and its derivative would come back as NaN."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.rand(6, 3, 2, dtype=torch.float64) + 0.1
    start = torch.ones(3, 2, dtype=torch.float64)

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return c * w + (x * w).log(), None

    last, _ = scan(step, start, x, lengths=[6, 0, 3], chunk=chunk, slots=2)
    first, _ = scan(step, start[:1], x[:, :1])
    third, _ = scan(step, start[2:], x[:3, 2:])
    expected = torch.cat((first, start[1:2], third))
    assert_close([last, *torch.autograd.grad(last.sum(), w)], [expected, *torch.autograd.grad(expected.sum(), w)])


@pytest.mark.parametrize("how", [{}, {"chunk": 4, "slots": 1}, {"gradient": "backprop"}])
def test_a_member_that_has_ended_is_not_tried_further(how: dict[str, Any]) -> None:
    """A stock that is spent: log(0) of the row after the last must not come back as NaN."""
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    stock = torch.tensor([6.0, 3.0, 2.0], dtype=torch.float64)

    def step(left: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return left - x, (rate * left).log()

    last, y = scan(step, stock, torch.ones(6, 3, dtype=torch.float64), lengths=[6, 3, 0], **how)
    assert torch.equal(last, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))
    assert_close(list(torch.autograd.grad(y.sum(), rate)), [9 / rate.detach()])


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_may_have_holes(batch_first: bool) -> None:
    wanted = parts()
    mask = torch.rand(LENGTH, BATCH, generator=torch.Generator().manual_seed(0)) < 0.6
    step = cell(wanted[0])

    def held(c: Tensor, x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        new, y = step(c, x)
        return torch.where(there[:, None], new, c), y * there[:, None]

    c, rows = wanted[1], []
    for x, there in zip(wanted[2].unbind(0), mask, strict=True):
        c, y = held(c, x, there)
        rows.append(y)
    expected = gradients((c, torch.stack(rows)), wanted)
    x, m = (v.transpose(0, 1) if batch_first else v for v in (wanted[2], mask))
    final, y = scan(step, wanted[1], x, mask=m, batch_first=batch_first, slots=2)
    assert_close(gradients((final, y.transpose(0, 1) if batch_first else y), wanted), expected)


@pytest.mark.parametrize("lengths", [[LENGTH, 7, 2], [5, LENGTH, 1]])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_packed_sequence_gives_what_torchs_own_network_gives(lengths: list[int], batch_first: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = nn.GRU(2, 4, batch_first=batch_first).double(), nn.GRUCell(2, 4).double()
    names = [
        ("weight_ih", "weight_ih_l0"),
        ("weight_hh", "weight_hh_l0"),
        ("bias_ih", "bias_ih_l0"),
        ("bias_hh", "bias_hh_l0"),
    ]
    with torch.no_grad():
        for a, b in names:
            getattr(ours, a).copy_(getattr(theirs, b))
    x, c = leaf(LENGTH, BATCH, 2, seed=3, on=CPU), leaf(BATCH, 4, seed=2, on=CPU)
    given = x.transpose(0, 1) if batch_first else x
    packed = pack_padded_sequence(given, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False)
    expected, last = theirs(packed, c[None])

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = ours(x, c)
        return new, new

    final, found = scan(step, c, packed, slots=2, batch_first=batch_first)
    assert isinstance(found, PackedSequence)
    assert torch.equal(found.batch_sizes, expected.batch_sizes)
    of_ours = torch.autograd.grad(
        loss_of([found.data, final]), [x, c, *(getattr(ours, a) for a, _ in names)], retain_graph=True
    )
    of_theirs = torch.autograd.grad(loss_of([expected.data, last[0]]), [x, c, *(getattr(theirs, b) for _, b in names)])
    assert_close([found.data, final], [expected.data, last[0]])
    assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("chunk", [None, 4, 3])
def test_a_biased_truncation_is_a_loop_that_detaches_its_carry(chunk: int | None) -> None:
    wanted = parts()
    step, window = cell(wanted[0]), 4
    c, rows = wanted[1], []
    for k, x in enumerate(wanted[2].unbind(0)):
        if k % window == 0 and k:
            c = c.detach()
        c, y = step(c, x)
        rows.append(y)
    expected = gradients((c, torch.stack(rows)), wanted)
    whole = gradients(loop(step, *wanted[1:]), wanted)
    found = [gradients(scan(step, *wanted[1:], biased_truncation=window, chunk=chunk, slots=s), wanted) for s in SLOTS]
    for other in found:
        assert_close(other, expected)
        assert_same_bits(other, found[0])
    assert_same_bits(found[0][:2], whole[:2])
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(found[0][2:4], whole[2:4], strict=True))
    if chunk == window:
        final, y = scan(
            lambda c, x: loop(step, c, x), *wanted[1:], biased_truncation=window, chunk=chunk, parallel=True, slots=2
        )
        assert_close(gradients((final, y), wanted), expected)


def test_a_carry_goes_from_one_call_into_the_next_with_its_gradient() -> None:
    wanted = parts()
    step = cell(wanted[0])
    whole = gradients(scan(step, *wanted[1:], slots=2), wanted)
    middle, first = scan(step, wanted[1], wanted[2][:4], slots=2)
    final, second = scan(step, middle, wanted[2][4:], slots=3)
    assert_close(gradients((final, torch.cat((first, second))), wanted), whole)
    final, second = scan(step, middle.detach(), wanted[2][4:], slots=3)
    assert torch.autograd.grad(final.sum(), wanted[1], allow_unused=True)[0] is None


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("how", [{}, {"chunk": 4}, {"chunk": 4, "parallel": True}])
def test_a_scan_that_draws_is_the_loop_that_draws(how: dict[str, Any], gradient: str) -> None:
    wanted = parts()
    own = torch.Generator()

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(torch.dropout(c @ wanted[0], 0.4, True) + x * torch.rand(2, generator=own, dtype=x.dtype))
        return new, new * x

    def drawn(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(5)
        own.manual_seed(6)
        results = run()
        after = torch.stack((torch.rand(3), torch.rand(3, generator=own)))
        state = torch.get_rng_state()
        found = gradients(results, wanted)
        assert torch.equal(torch.get_rng_state(), state)  # the reverse sweep draws for itself
        return found, after

    expected, after = drawn(lambda: loop(step, *wanted[1:]))
    run = (lambda c, x: loop(step, c, x)) if how.get("parallel") else step
    kept = SLOTS if gradient == "discrete" else (None,)
    found = [drawn(lambda s=s: scan(run, *wanted[1:], random=True, gradient=gradient, slots=s, **how)) for s in kept]  # type: ignore[misc]
    for values, left in found:
        assert_close(values, expected)
        assert_same_bits(values, found[0][0])
        assert torch.equal(left, after)


def test_draws_are_left_alone_without_a_gradient_too() -> None:
    wanted = parts()

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.dropout(c, 0.5, True) + x, c

    torch.manual_seed(1)
    expected = loop(step, *wanted[1:])
    torch.manual_seed(1)
    with torch.no_grad():
        assert_same_bits(scan(step, *wanted[1:], random=True), [x.detach() for x in expected])


def test_autocast_is_entered_again_for_what_is_computed_again() -> None:
    torch.manual_seed(0)
    linear, c, x = nn.Linear(8, 8), torch.randn(4, 8), torch.randn(LENGTH, 4, 8)

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = linear(c)
        assert y.dtype == torch.bfloat16
        return torch.tanh(y.float() + x), y

    found = []
    for slots in SLOTS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            final, y = scan(step, c, x, slots=slots)
        found.append(list(torch.autograd.grad(final.sum() + y.float().sum(), list(linear.parameters()))))
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        final, y = loop(step, c, x)
    for a, b in zip(
        found[0], torch.autograd.grad(final.sum() + y.float().sum(), list(linear.parameters())), strict=True
    ):
        assert (a - b).norm() < 2**-7 * b.norm()  # sums of the loop are taken in bfloat16
    for other in found:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("how", [{}, {"chunk": 4}, {"lengths": [5, LENGTH, 2]}])
def test_second_derivatives_go_through(how: dict[str, Any]) -> None:
    def curvature(**more: Any) -> list[Tensor]:
        wanted = parts()
        final, y = scan(cell(wanted[0]), *wanted[1:], **how, **more)
        first = torch.autograd.grad(loss_of([final, y]), wanted, create_graph=True)
        return list(torch.autograd.grad(loss_of(list(first)), wanted))

    assert_close(curvature(slots=2), curvature(gradient="backprop"))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_chunks_are_run_as_often_as_the_plan_says(slots: int) -> None:
    wanted = parts()
    rows: list[int] = []

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(1)
        return cell(wanted[0])(c, x)

    def runs(chunk: int | None, length: int) -> int:
        final, _ = scan(step, wanted[1], wanted[2][:length], slots=slots, chunk=chunk)
        first = len(rows)
        torch.autograd.grad(final.sum(), wanted[0])
        again, _ = len(rows) - first, rows.clear()
        return again

    report = revolve.plan(steps=5, slots=slots).report
    in_reverse = report.plain_runs + report.recorded_runs - 5  # the first sweep ran each step once
    assert runs(None, 5) == in_reverse
    assert runs(2, 10) == 2 * in_reverse


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"chunk": 0}, ValueError, "chunk=0 is not a number of rows; give at least 1"),
        ({"chunk": 2.0}, TypeError, "chunk=2.0 is not a number of rows"),
        ({"biased_truncation": -1}, ValueError, "biased_truncation=-1 is not a number of rows"),
        ({"parallel": True}, ValueError, "parallel=True hands chunks to step; say how long with chunk="),
        ({"parallel": True, "chunk": 4, "lengths": [1, 2, 3]}, ValueError, "give it the mask as one of the inputs"),
        ({"parallel": True, "chunk": 4, "biased_truncation": 6}, ValueError, "give a multiple of the chunk"),
        ({"parallel": True, "chunk": 4}, ValueError, r"handed 4 rows and returned an output of shape \(3, 2\)"),
        ({"lengths": [1, 2]}, ValueError, r"lengths=\[1, 2\] must be 3 integers between 0 and 11"),
        ({"lengths": [1, 2, 12]}, ValueError, "must be 3 integers between 0 and 11"),
        ({"lengths": [1.0, 2.0, 3.0]}, ValueError, "must be 3 integers"),
        ({"lengths": [1, 2, 3], "mask": torch.ones(LENGTH, BATCH)}, ValueError, "lengths= and mask= were both given"),
        (
            {"mask": torch.ones(LENGTH, BATCH)},
            ValueError,
            r"mask has the shape.*float32; give \(11, 3\) and torch.bool",
        ),
        ({"mask": torch.ones(BATCH, LENGTH).bool()}, ValueError, r"mask has the shape \(3, 11\)"),
        ({"carry": torch.ones(2), "lengths": [1, 2, 3]}, ValueError, r"shape \(2,\).*begins with the batch, 3"),
        ({"inputs": torch.ones(4), "lengths": [1, 2, 3]}, ValueError, "have no dimension of a batch"),
        ({"inputs": torch.ones(4), "batch_first": True}, ValueError, r"with batch_first=True each is \(batch, time"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_call_gets_a_sentence(how: dict[str, Any], error: type[Exception], match: str) -> None:
    wanted = parts()
    call: dict[str, Any] = {"carry": wanted[1], "inputs": wanted[2]} | how
    with pytest.raises(error, match=match):
        scan(lambda c, x: (c, c if x.ndim == 3 else x * c), **call)


def test_draws_from_elsewhere_are_refused_all_the_same() -> None:
    import random

    wanted = parts()
    with pytest.raises(RuntimeError, match="draws random numbers"):
        scan(lambda c, x: (c @ wanted[0] * random.random(), None), *wanted[1:], random=True)
