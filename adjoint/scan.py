"""``scan``: a recurrence over a sequence, differentiable in the memory of a few states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from adjoint.gradients import gradient_named, is_backprop
from adjoint.problem import Gradient, Problem, check_memory
from adjoint.progress import Progress, progress_ticker
from adjoint.reach import Reach
from adjoint.recurrence import Layout, ScanProgram
from adjoint.tensors import State, Structure, check_dense, map_tree
from adjoint.tiers import Kind
from adjoint.transforms import leaves_of_tree, through_transforms, tree_of_leaves
from revolve import Journal, Schedule


@through_transforms(leaves_of_tree, tree_of_leaves, lambda arguments: is_backprop(arguments["gradient"]))
def scan(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    *,
    args: tuple[Any, ...] = (),
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    parallel: bool = False,
    random: bool = False,
    biased_truncation: int | None = None,
    slots: int | str | None = None,
    budget: int | str | None = None,
    tiers: Sequence[Kind] | None = None,
    schedule: Schedule | None = None,
    journal: str | Path | Journal | None = None,
    gradient: str | Gradient = "discrete",
    progress: bool | Progress = False,
    check: bool = False,
) -> tuple[Any, Any]:
    """Run ``carry, output = step(carry, x, *args)`` over the leading dimension of ``inputs``.

    Returns the last carry and the outputs, stacked along a new leading dimension (None if step returns None for them).
    Gradients reach the first carry, the inputs, ``args`` and every tensor that ``step`` holds, with at most ``slots``
    carries kept (or what fits ``budget`` or ``tiers``, as in :func:`adjoint.solve`); the gradient does not depend on which.

    Args:
        carry: a tree of tensors whose structure, shapes and dtypes step preserves. The last carry of one call may be the
            first of the next, with its gradient or (detached) without.
        inputs: a tree of tensors, each of shape (time, batch or whatever, ...); or one PackedSequence, and then the
            outputs are packed in the same way.
        batch_first: inputs and outputs are (batch, time, ...). The carry never has a dimension of time.
        lengths: for each member of the batch, how many rows of the inputs are its own; or ``mask``, True where a row is
            there, with the two leading dimensions of the inputs. Where a member has no row its carry stays and its
            output is zero. Every leaf of carry, inputs and outputs needs the batch as a dimension.
        chunk: so many rows make one step of the schedule, recorded together; ``slots`` then count carries between
            chunks. Gradients of tensors that step holds are those of other chunks to rounding, not bit for bit.
        parallel: step takes a chunk at once: x of shape (rows, ...), or (batch, rows, ...) with batch_first, to outputs
            with as many rows. The last chunk may be shorter.
        random: step may draw from torch's generators (dropout, say). Their states travel with the carry, 5 KB each,
            so that a step computed again draws the same numbers; the draws are those of a plain loop.
        biased_truncation: the gradient through the carry is cut before every row that is a multiple of this (truncated
            backpropagation through time). What remains is **not** the gradient of the loss: it misses every influence
            that is older than this many rows. Outputs are unchanged.
        check: compute every step twice and compare bits, as in :func:`adjoint.solve`.
    """
    packed = inputs if isinstance(inputs, PackedSequence) else None
    if packed is not None:
        if lengths is not None or mask is not None:
            raise ValueError("a PackedSequence has its own lengths; leave lengths= and mask= out")
        inputs, lengths = pad_packed_sequence(packed, batch_first=batch_first)
    structure, state = Structure.of(carry, "carry")
    input_structure, series = Structure.of(inputs, "inputs")
    check_dense(state, "carry")
    check_dense(series, "inputs")
    if not isinstance(args, tuple):
        raise TypeError(f"args={args!r} must be a tuple; for a single argument write args=(x,)")
    if batch_first:
        series = _time_first(series)
    length = _length(series)
    whole, window = _whole("chunk", chunk), _whole("biased_truncation", biased_truncation)
    if parallel:
        _check_parallel(whole, window, lengths is not None or mask is not None)
    there = _mask(lengths, mask, series, state, length, batch_first)
    generators = generators_of(step, args, (*state, *series)) if random else ()
    layout = Layout(length, whole, parallel, batch_first, window, there, generators)
    check_memory(slots, budget, tiers, schedule)
    memory: dict[str, Any] = {
        "slots": slots,
        "budget": budget,
        "tiers": tiers,
        "schedule": schedule,
        "journal": journal,
        "check": check,
    }
    program = ScanProgram(structure, input_structure, state, series, layout)
    first = (*state, *(g.get_state() for g in generators))
    with progress_ticker(progress, layout.steps) as tick:
        problem = Problem(program, (step, args), first, layout.steps, **memory, wants_final=True, tick=tick)
        outcome = gradient_named(gradient)(problem)
    assert outcome.final is not None
    for generator, left in zip(generators, outcome.final[len(state) :], strict=True):
        generator.set_state(left)
    outputs = program.unflatten(tuple(outcome.outputs))
    if packed is not None:
        outputs = map_tree(lambda y: _packed_like(packed, y, lengths, batch_first), outputs)
    return structure.unflatten(outcome.final[: len(state)]), outputs


def _whole(name: str, number: int | None) -> int | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}={number!r} is not a number of rows; give a positive integer")
    if number < 1:
        raise ValueError(f"{name}={number} is not a number of rows; give at least 1")
    return number


def _check_parallel(chunk: int | None, window: int | None, masked: bool) -> None:
    if chunk is None:
        raise ValueError("parallel=True hands chunks to step; say how long with chunk=, such as chunk=256")
    if masked:
        raise ValueError(
            "parallel=True hands whole chunks to step, which alone knows what a missing row means; "
            "give it the mask as one of the inputs"
        )
    if window is not None and window % chunk:
        raise ValueError(f"biased_truncation={window} cuts inside of a chunk={chunk}; give a multiple of the chunk")


def _time_first(series: State) -> State:
    for x in series:
        if x.ndim < 2:
            raise ValueError(
                f"inputs holds a tensor of shape {tuple(x.shape)}; with batch_first=True each is (batch, time, ...)"
            )
    return tuple(x.transpose(0, 1) for x in series)


def _length(series: State) -> int:
    for x in series:
        if x.ndim == 0:
            raise ValueError("inputs holds a 0-dim tensor; each needs a leading dimension of steps")
    lengths = {len(x) for x in series}
    if len(lengths) > 1:
        raise ValueError(f"inputs have the lengths {sorted(lengths)}; every leaf needs the same number of steps")
    (length,) = lengths
    if length == 0:
        raise ValueError("inputs have length 0; give at least one step")
    return length


def _mask(lengths: Any, mask: Tensor | None, series: State, state: State, length: int, first: bool) -> Tensor | None:
    """(time, batch): where there are rows; None: everywhere."""
    if lengths is None and mask is None:
        return None
    if lengths is not None and mask is not None:
        raise ValueError("lengths= and mask= were both given; one of them says which rows there are")
    if series[0].ndim < 2:
        raise ValueError(
            f"inputs of shape {tuple(series[0].shape)} have no dimension of a batch; {'lengths' if mask is None else 'mask'}="
            f" needs one"
        )
    device, batch = series[0].device, series[0].shape[1]
    for x in (*state, *(s[0] for s in series)):
        if x.ndim == 0 or len(x) != batch:
            raise ValueError(
                f"a leaf of carry or inputs has the shape {tuple(x.shape)} at one time; with lengths= or mask= each begins "
                f"with the batch, {batch}"
            )
    if mask is not None:
        expected = (batch, length) if first else (length, batch)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"mask has the shape {tuple(mask.shape)} and {mask.dtype}; give {expected} and torch.bool, as the inputs"
            )
        return (mask.T if first else mask).to(device)
    own = torch.as_tensor(lengths, device=device)
    if own.shape != (batch,) or own.is_floating_point() or bool(((own < 0) | (own > length)).any()):
        raise ValueError(f"lengths={lengths} must be {batch} integers between 0 and {length}, one for each member")
    return torch.arange(length, device=device)[:, None] < own


def generators_of(step: Any, args: Any, tensors: State) -> tuple[torch.Generator, ...]:
    """Torch's own for the devices in use, and those that step holds."""
    found = [torch.default_generator]
    for device in sorted({x.device.index or 0 for x in tensors if x.is_cuda}):
        torch.cuda.init()
        found.append(torch.cuda.default_generators[device])
    held = (x for x in Reach((step, args), "step").objects if isinstance(x, torch.Generator))
    return (*found, *(g for g in held if all(g is not other for other in found)))


def _packed_like(packed: PackedSequence, y: Tensor, lengths: Any, batch_first: bool) -> PackedSequence:
    sorted_already = packed.sorted_indices is None
    return pack_padded_sequence(y, lengths, batch_first=batch_first, enforce_sorted=sorted_already)
