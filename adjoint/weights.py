"""What each block of a network costs and takes, measured on a sample: one block at a time, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from adjoint.blocks import Block
from adjoint.choices import Choice, Tape, choices
from adjoint.memory import Meter
from adjoint.passage import Habits, Wiring, copied_tree, fleeting, on_graph, sample
from adjoint.put_away import Kept, Tapes
from adjoint.shelves import Tree, leaves_of
from adjoint.tensors import bytes_of, differentiable
from revolve import Network, Node

FLOPS_PER_BYTE = 10
"""Without a clock (on meta) a run costs its operations, and so many for each byte of its tensors."""

ANCHOR = 4
"""Bytes of the tensor that ties the inputs to torch's graph."""


class Weighed(NamedTuple):
    """The network with its numbers, and how its blocks treat memory."""

    network: Network
    habits: Habits
    kept: tuple[dict[str, Kept], ...] = ()
    """By block, what the names of its ways mean."""


def weigh(wiring: Wiring, inputs: Tree, tapes: Sequence[Tapes] = ()) -> Weighed:
    """Run each block three times and reverse it once, from a copy of what it gets; ``tapes``: ways to keep them, priced.

    Random states, buffers, attributes and gradients are afterwards as they were.
    """
    state: Tree = {}
    needs = {name: _flags(value) for name, value in inputs.items()}
    given = {x.untyped_storage()._cdata for x in leaves_of(inputs)}
    since: dict[int, int] = {}
    habits, measured, saved = Habits(), [], []
    for k, block in enumerate(wiring.blocks):
        if block.sharded:
            raise NotImplementedError(
                f"{block.name} has sharded parameters, which are not there when a block is measured alone; plan the network "
                f"before it is sharded, or give slots= or every="
            )
        names = wiring.network.nodes[k].dependencies
        arguments = wiring.arguments(k, inputs, state)
        live = leaves_of((state, inputs))
        since = {x.untyped_storage()._cdata: since.get(x.untyped_storage()._cdata, k) for x in live}
        one = _One(block, arguments, [needs[name] for name in names], given)
        if one.written:
            habits.writers.add(k)
            first = min(since[storage] for storage in one.written)
            habits.touched |= set(range(first, k + 1))
        needs[wiring.name(k)] = one.needs
        measured.append(one)
        own = one.saved_outputs
        if tapes and k not in habits.writers:
            places = [wiring.network.place.get(name) for name in names]
            one.choose(tapes, arguments, {n: measured[n].bytes for n in places if n is not None}, places, names)
        saved.append(
            [name for name, used in zip(names, one.saved_arguments, strict=True) if used] + [wiring.name(k)] * own
        )
        state = wiring.after(k, state, one.result)
        one.result = None
    nodes = []
    for k, one in enumerate(measured):
        node = wiring.network.nodes[k]
        nodes.append(
            Node(
                node.name,
                node.dependencies,
                one.cost,
                one.bytes,
                one.tape,
                one.running,
                one.recording,
                one.reversing,
                tuple(dict.fromkeys(saved[k])),
                tuple(one.cotangents),
                one.notes + (ANCHOR if k == 0 else 0),
                tuple(choice.way for choice in one.choices) if k not in habits.touched else (),
            )
        )
    kept = tuple({choice.way.name: choice.kept for choice in one.choices} for one in measured)
    return Weighed(Network(nodes, wiring.network.outputs), habits, kept)


class _One:
    """One block, weighed."""

    def __init__(
        self,
        block: Block,
        arguments: Sequence[Any],
        needs: Sequence[Sequence[bool]],
        given: set[int],
    ) -> None:
        self._block, self._needs = block, needs
        self.choices: list[Choice] = []
        self.cost = self._timed(arguments)
        self._plainly(arguments)
        self._recorded(arguments, given)

    def _copies(self, arguments: Sequence[Any]) -> list[Any]:
        return [on_graph(copied_tree(x), flags) for x, flags in zip(arguments, self._needs, strict=True)]

    def _timed(self, arguments: Sequence[Any]) -> float:
        copies = self._copies(arguments)
        if any(x.is_meta for x in leaves_of(arguments)):
            with FlopCounterMode(display=False) as flops, Meter() as meter, _unsaved():
                result = self._block.aside(copies)
            del result
            return float(flops.get_total_flops() + FLOPS_PER_BYTE * meter.made)
        start = perf_counter()
        with _unsaved():
            result = self._block.aside(copies)
        for device in {x.device for x in leaves_of(result) if x.device.type not in ("cpu", "meta")}:
            torch.accelerator.synchronize(device)
        return perf_counter() - start

    def _plainly(self, arguments: Sequence[Any]) -> None:
        copies = self._copies(arguments)
        leaves = leaves_of(copies)
        versions = [x._version for x in leaves]
        with Meter() as meter, _unsaved():
            result = self._block.aside(copies)
            peak = meter.peak
        originals = leaves_of(arguments)
        pairs = zip(originals, leaves, versions, strict=True)
        self.written = {x.untyped_storage()._cdata for x, y, version in pairs if y._version != version}
        self.needs = _flags(result)
        self.result = pytree.tree_map_only(Tensor, Tensor.detach, result)
        self.bytes = sum({x.untyped_storage()._cdata: _own(x) for x in leaves_of(self.result)}.values())
        self.running = max(0, peak - self.bytes)
        self.notes = self._block.noted_bytes + bytes_of(map(sample, leaves_of(self.result)))

    def _recorded(self, arguments: Sequence[Any], given: set[int]) -> None:
        """Tape and the most that is held, with parameters whose gradients are added to buffers that are there."""
        block, copies = self._block, self._copies(arguments)
        aliases = {id(x): _alias(x) for x in block.owned() if x.requires_grad}
        own = {x.untyped_storage()._cdata for x in block.owned()}
        places = [{x.untyped_storage()._cdata for x in leaves_of(copy)} for copy in copies]
        inputs = [bool({x.untyped_storage()._cdata for x in leaves_of(x)} & given) for x in arguments]
        entries = leaves_of(copies)
        versions = [x._version for x in entries]
        saved: dict[int, int] = {}
        self.cotangents = [0] * len(copies)
        for k, copy in enumerate(copies):
            for x in leaves_of(copy):
                if x.requires_grad:
                    x.register_hook(partial(self._arrived, k))

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x.detach()

        with Meter() as meter:
            with torch.enable_grad(), fleeting(True), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                result = block.aside(copies, aliases)
            self.recording = meter.peak
            outputs = {x.untyped_storage()._cdata for x in leaves_of(result)}
            written = {
                x.untyped_storage()._cdata for x, old in zip(entries, versions, strict=True) if x._version != old
            }
            self.saved_arguments = [
                bool(place & saved.keys() - written) and not known for place, known in zip(places, inputs, strict=True)
            ]
            unwritten = set().union(*places) - written
            self.saved_outputs = bool(outputs & saved.keys() - unwritten)
            known = own.union(outputs, *places)
            self.tape = sum(size for key, size in saved.items() if key not in known)
            kept = self.bytes if self.saved_outputs else 0
            wanted = [x for x in leaves_of(result) if x.requires_grad and differentiable(x)]
            if wanted:
                total = _Cotangents.apply(*wanted)
                del result, wanted
                meter.restart()
                # what a function holds itself gets no gradient from measuring, nor does the graph behind it
                inside = [x for x in (*aliases.values(), *entries) if x.requires_grad]
                total.backward(inputs=inside if block.captures and inside else None)
            self.reversing = max(0, meter.peak - kept)

    def choose(
        self,
        tapes: Sequence[Tapes],
        arguments: Sequence[Any],
        sizes: dict[int, int],
        places: Sequence[int | None],
        names: Sequence[str],
    ) -> None:
        """Price the ways to keep the tape; ``places``: of the nodes that are used, None for what the caller holds."""
        copies = self._copies(arguments)
        used = [n for n, saved in zip(places, self.saved_arguments, strict=True) if saved and n is not None]
        tape = Tape(
            self.cost,
            self.bytes,
            self.running,
            self.recording,
            sum(sizes[n] for n in used),
            self.saved_outputs,
            tuple(name for name, n in zip(names, places, strict=True) if n is not None),
        )
        given = [x for x, n in zip(copies, places, strict=True) if n is None]
        stays = {x.untyped_storage()._cdata for x in (*self._block.owned(), *leaves_of(given))}
        self.choices = choices(tapes, tape, partial(self._block.aside, copies), stays, FLOPS_PER_BYTE)

    def _arrived(self, argument: int, cotangent: Tensor) -> None:
        self.cotangents[argument] += cotangent.untyped_storage().nbytes()


class _Cotangents(torch.autograd.Function):
    """A sum whose gradient makes the cotangents of the outputs when they are wanted, and holds on to nothing."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in outputs]
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _alias(x: Tensor) -> Tensor:
    alias: Tensor = x.detach()
    if isinstance(x, nn.Parameter):
        alias = nn.Parameter(alias)
    alias.requires_grad_()
    alias.grad = torch.zeros_like(alias)
    return alias


@contextmanager
def _unsaved() -> Iterator[None]:
    """On a graph, as when it counts, that saves nothing."""
    with torch.enable_grad(), fleeting(True), torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
        yield


def _own(x: Tensor) -> int:
    return min(x.untyped_storage().nbytes(), 2 * bytes_of([x]))


def _flags(value: Any) -> list[bool]:
    return [x.requires_grad for x in leaves_of(value)]
