"""Linear recurrences h_k = a_k h_{k-1} + b_k and their transpose, which is the same recurrence run backwards:

    lam_k = g_k + a_{k+1}^H lam_{k+1},     da_k = lam_k h_{k-1}^H,     db_k = lam_k,     dh_{-1} = a_0^H lam_0

So a gradient keeps a and h, 2 L S numbers, where autograd through a tree of combinations keeps 2 log2(L) L S. A chunk
of rows is done in parallel by such a tree, (a, b) then (a', b') being (a' a, a' b + b'), and chunks one after another.

Source of the tree: Blelloch (1990), Prefix sums and their applications, section 1.4; the odd-even form is Ladner &
Fischer (1980), J. ACM 27(4), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adjoint.fastest import fastest_chunk

BLOCK = 4096
"""So many rows at most are taken apart at once: each is an object of Python."""
SHORT = 8
"""So many rows are done one by one at the bottom of a tree."""


def linear_scan(
    a: Tensor, b: Tensor, start: Tensor | None = None, *, batch_first: bool = False, chunk: int | None = None
) -> Tensor:
    """All states h_0 .. h_{L-1} of h_k = a_k h_{k-1} + b_k, of the shape of ``b``; h_{-1} is ``start``, or zero.

    Gradients of any order reach a, b and start; real or complex numbers. Not in forward mode: a Hessian by torch.func is
    jacrev(grad(f)).

    Args:
        b: (time, ..., states).
        a: diagonal: as many dimensions as b, each of the same size or 1. A size of 1 in time is one a for every step, in
            the states a multiple of the identity. Or one matrix for each: (time or 1, ..., states, states).
        start: (..., states).
        batch_first: a and b are (batch, time, ...).
        chunk: so many rows at a time are done in parallel, 1: one by one. They agree to rounding. None: what is fastest,
            as measured on the first call with these shapes, and remembered as long as the process lives.
    """
    for name, x in {"a": a, "b": b, "start": start}.items():
        if x is not None and not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"{name} is of {x.dtype}; give real or complex numbers")
    if batch_first:
        if b.ndim < 2 or a.ndim < 2:
            raise ValueError(f"b has the shape {tuple(b.shape)}; with batch_first=True it is (batch, time, ...)")
        a, b = a.transpose(0, 1), b.transpose(0, 1)
    _check(a, b, start)
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = dtype if start is None else torch.promote_types(dtype, start.dtype)
    a, b = a.to(dtype), b.to(dtype)
    start = b.new_zeros(b.shape[1:]) if start is None else start.to(dtype)
    if chunk is None:
        chunk = fastest_chunk(a, b, lambda a, b, chunk: solved(a, b, b[0], chunk))
    elif chunk < 1:
        raise ValueError(f"chunk={chunk} is not a number of rows; give at least 1")
    h: Tensor = _Scan.apply(a, b, start, chunk)
    return h.transpose(0, 1) if batch_first else h


def _check(a: Tensor, b: Tensor, start: Tensor | None) -> None:
    if b.ndim < 1 or len(b) == 0:
        raise ValueError(f"b has the shape {tuple(b.shape)}; give (time, ..., states) with at least one row")
    like = (*b.shape, b.shape[-1]) if a.ndim == b.ndim + 1 and b.ndim > 1 else tuple(b.shape)
    fits = len(like) == a.ndim and all(x in (1, y) for x, y in zip(a.shape, like, strict=True))
    if not fits or (len(like) > b.ndim and a.shape[-2:] != like[-2:]):
        raise ValueError(
            f"a has the shape {tuple(a.shape)} and b {tuple(b.shape)} (time first); give a as many dimensions as b has, "
            f"each of the same size or 1, or matrices of shape {(*b.shape, b.shape[-1])}"
        )
    if start is not None and start.shape != b.shape[1:]:
        raise ValueError(f"start has the shape {tuple(start.shape)}; one state has {tuple(b.shape[1:])}")


def is_dense(a: Tensor, b: Tensor) -> bool:
    return a.ndim > b.ndim


def applied(a: Tensor, h: Tensor) -> Tensor:
    """a h: of matrices and vectors if a has a dimension more."""
    return (a @ h.unsqueeze(-1)).squeeze(-1) if is_dense(a, h) else a * h


def composed(later: Tensor, earlier: Tensor, dense: bool) -> Tensor:
    return later @ earlier if dense else later * earlier


def transposed(a: Tensor, dense: bool) -> Tensor:
    return a.mH if dense else a.conj()


def outer(lam: Tensor, h: Tensor, a: Tensor) -> Tensor:
    """The cotangent of a in a h, from that of the product: lam h^H, summed to the shape of a."""
    full = lam.unsqueeze(-1) * h.conj().unsqueeze(-2) if is_dense(a, h) else lam * h.conj()
    return full.sum_to_size(a.shape)


def solved(a: Tensor, b: Tensor, start: Tensor, chunk: int) -> Tensor:
    """h_k = a_k h_{k-1} + b_k, in the dtype that these have: autocast would take products in another."""
    out, h = torch.empty_like(b, memory_format=torch.contiguous_format), start
    with torch.autocast(b.device.type, enabled=False):
        for rows in _blocks(len(b), chunk):
            _fill(out[rows], _rows(a, rows), b[rows], h, chunk)
            h = out[rows.stop - 1]
    return out


def solved_backwards(a: Tensor, g: Tensor, chunk: int) -> Tensor:
    """lam_k = g_k + a_{k+1}^H lam_{k+1}."""
    out, last = torch.empty_like(g, memory_format=torch.contiguous_format), len(g) - 1
    dense, lam = is_dense(a, g), g[last]
    out[last] = lam
    with torch.autocast(g.device.type, enabled=False):
        for upside in _blocks(last, chunk):
            rows = slice(last - upside.stop, last - upside.start)
            later = _rows(a, slice(rows.start + 1, rows.stop + 1))
            block = torch.empty_like(g[rows], memory_format=torch.contiguous_format)
            _fill(block, transposed(later, dense).flip(0), g[rows].flip(0), lam, chunk)
            out[rows] = block.flip(0)
            lam = out[rows.start]
    return out


def _blocks(length: int, chunk: int) -> Iterator[slice]:
    size = BLOCK if chunk == 1 else chunk
    return (slice(k, min(k + size, length)) for k in range(0, length, size))


def _rows(a: Tensor, rows: slice) -> Tensor:
    return a if len(a) == 1 else a[rows]


def _fill(out: Tensor, a: Tensor, b: Tensor, h: Tensor, chunk: int) -> None:
    """The states of one block, into ``out``."""
    if chunk == 1:
        _one_by_one(out, a, b, h)
        return
    first = b[0] + applied(a[0], h)
    b = torch.cat((first[None], b[1:]))
    _tree(out, a, b)


def _one_by_one(out: Tensor, a: Tensor, b: Tensor, h: Tensor) -> None:
    each = [a[0]] * len(b) if len(a) == 1 else a.unbind(0)
    dense = is_dense(a, b)
    for to, a_k, b_k in zip(out.unbind(0), each, b.unbind(0), strict=True):
        if dense:
            torch.add(b_k, (a_k @ h.unsqueeze(-1)).squeeze(-1), out=to)
        else:
            torch.addcmul(b_k, a_k, h, out=to)
        h = to


def _tree(out: Tensor, a: Tensor, b: Tensor) -> None:
    """From zero. Pairs of rows are one row of a recurrence half as long, which gives every second state."""
    n = len(b)
    if n <= SHORT:
        _one_by_one(out, a, b, torch.zeros_like(b[0]))
        return
    even, dense, same = n // 2 * 2, is_dense(a, b), len(a) == 1
    earlier, later = (a, a) if same else (a[0:even:2], a[1:even:2])
    half = torch.empty_like(b[1:even:2], memory_format=torch.contiguous_format)
    pairs = torch.addcmul(b[1:even:2], later, b[0:even:2]) if not dense else b[1:even:2] + applied(later, b[0:even:2])
    _tree(half, composed(later, earlier, dense), pairs)
    out[1::2] = half
    out[0] = b[0]
    between = a if same else a[2::2]
    if dense:
        torch.add(b[2::2], applied(between, half[: (n - 1) // 2]), out=out[2::2])
    else:
        torch.addcmul(b[2::2], between, half[: (n - 1) // 2], out=out[2::2])


class _Scan(torch.autograd.Function):
    """h from (a, b, start)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, start: Tensor, chunk: int) -> Tensor:
        return solved(a, b, start, chunk)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, _, start, ctx.chunk = inputs
        ctx.save_for_backward(a, start, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, start, h = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(g):
            return *_transpose_of_many(a, start, h, g), None
        of_a, lam, of_start = _Transpose.apply(a, start, h, g, ctx.chunk, ctx.needs_input_grad[0])
        return of_a, lam, of_start, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, start: Tensor, chunk: int) -> Any:
        a, b, start = (_with_members(info, *x) for x in zip((a, b, start), in_dims, (1, 1, 0), strict=False))
        return _Scan.apply(a, b, start, chunk), 1


class _Transpose(torch.autograd.Function):
    """The cotangents of (a, b, start) from that of h; differentiable again."""

    @staticmethod
    def forward(a: Tensor, start: Tensor, h: Tensor, g: Tensor, chunk: int, wanted: bool) -> Any:
        lam = solved_backwards(a, g, chunk)
        with torch.autocast(g.device.type, enabled=False):
            of_start = applied(transposed(a[0], is_dense(a, g)), lam[0])
        if not wanted:
            return None, lam, of_start
        if len(a) == 1:
            of_a = outer(lam[:1], start[None], a)
            for rows in _blocks(len(h) - 1, 1):  # a sum: no series of products
                of_a += outer(lam[rows.start + 1 : rows.stop + 1], h[rows], a)
        else:
            of_a = torch.empty_like(a, memory_format=torch.contiguous_format)
            of_a[:1] = outer(lam[:1], start[None], a[:1])
            for rows in _blocks(len(h) - 1, 1):
                later = slice(rows.start + 1, rows.stop + 1)
                of_a[later] = outer(lam[later], h[rows], a[later])
        return of_a, lam, of_start

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, start, h, _, ctx.chunk, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, start, h, output[1])

    @staticmethod
    def backward(ctx: Any, of_a: Tensor | None, of_lam: Tensor | None, of_start: Tensor | None) -> Any:
        """By operations that have derivatives themselves: nu_k = a_k nu_{k-1} + (direction of lam_k + of a_k  h_{k-1})."""
        a, start, h, lam = ctx.saved_tensors
        dense = is_dense(a, h)
        with torch.autocast(h.device.type, enabled=False):
            direction = torch.zeros_like(h) if of_lam is None else of_lam
            to_start = to_h = None
            if of_a is not None:
                direction = direction + applied(of_a, torch.cat((start[None], h[:-1])))
                before = applied(transposed(of_a, dense), lam)
                to_start, to_h = before[0], torch.cat((before[1:], torch.zeros_like(before[:1])))
            first = torch.zeros_like(start) if of_start is None else of_start
            nu = _Scan.apply(a, direction, first, ctx.chunk)
            to_a = outer(lam, torch.cat((first[None], nu[:-1])), a) if ctx.needs_input_grad[0] else None
        return to_a, to_start, to_h, nu, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, start: Tensor, h: Tensor, g: Tensor, chunk: int, wanted: bool) -> Any:
        a, start, h, g = (_with_members(info, *x) for x in zip((a, start, h, g), in_dims, (1, 0, 1, 1), strict=False))
        return _Transpose.apply(a, start, h, g, chunk, wanted), (1 if wanted else None, 1, 0)


def _transpose_of_many(a: Tensor, start: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for is_grads_batched=True of torch.autograd.grad, which no operation survives that writes into another."""
    dense = is_dense(a, h)
    with torch.autocast(h.device.type, enabled=False):
        each = [transposed(a_k, dense) for a_k in a.expand(len(h), *a.shape[1:]).unbind(0)]
        lam = [g[-1]]
        for a_k, g_k in zip(each[:0:-1], g[:-1].flip(0).unbind(0), strict=True):
            lam.append(g_k + applied(a_k, lam[-1]))
        every = torch.stack(lam[::-1])
        return outer(every, torch.cat((start[None], h[:-1])), a), every, applied(each[0], lam[-1])


def _with_members(info: Any, x: Tensor, dim: int | None, to: int) -> Tensor:
    """The members of a vmap as one more dimension, behind that of time; each with a cotangent of its own."""
    if dim is not None:
        return x.movedim(dim, to)
    return x.unsqueeze(to).expand(*x.shape[:to], info.batch_size, *x.shape[to:])
