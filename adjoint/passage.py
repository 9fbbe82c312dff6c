"""One pass through a network: torch's own graph, whose saved tensors are kept, or made again when backward asks.

The caller's graph is the graph that plain torch makes, so that gradients, their order of addition and their hooks are
those of plain torch. What its nodes save is put in :class:`Place`\\ s. Where the schedule keeps no tape, a place is empty
until backward asks for it: then the schedule's reverse sweep goes on to the block that is asked for, and the tensors
that this block saves when it is run again fill its places.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adjoint.ambient import Ambient
from adjoint.blocks import Block, Notes
from adjoint.checked import ReproducibilityError
from adjoint.marks import agree
from adjoint.put_away import Kept, Moved, Partly
from adjoint.selective import Chosen, Enough, Giving, Keeping, until_enough
from adjoint.shelves import Tree, copied, leaves_of, shelf_for
from adjoint.tiers import Kind
from revolve import Network, Run, Schedule

SAMPLE = 64
"""So many numbers of each output are compared when a block is run again."""


@dataclass(frozen=True)
class Wiring:
    """Blocks in an order in which they can run, the names that each uses, and what is live between them."""

    blocks: tuple[Block, ...]
    network: Network

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, k: int) -> str:
        return self.network.nodes[k].name

    def arguments(self, k: int, inputs: Tree, state: Tree) -> list[Any]:
        return [state[name] if name in state else inputs[name] for name in self.network.nodes[k].dependencies]

    def passed(self, k: int, state: Tree) -> Tree:
        """What is live on both sides of a block."""
        names = {self.name(i) for i in self.network.live[k + 1]}
        return {name: value for name, value in state.items() if name in names}

    def after(self, k: int, state: Tree, result: Any) -> Tree:
        """The state at cut k+1."""
        made = {self.name(k): result} if k in self.network.live[k + 1] else {}
        return {**self.passed(k, state), **made}


@dataclass
class Habits:
    """What blocks were seen to do to memory."""

    writers: set[int] = field(default_factory=set)
    """Blocks that write to their arguments."""
    touched: set[int] = field(default_factory=set)
    """Cuts whose states are written to by a later block."""


class Place:
    """Where a node of torch's graph finds a tensor that it saved."""

    __slots__ = ("__weakref__", "dtype", "passage", "shape", "step", "value", "version")

    def __init__(self, passage: Passage, step: int, x: Tensor) -> None:
        self.passage, self.step, self.shape, self.dtype = passage, step, x.shape, x.dtype
        self.value: Tensor | None = None
        self.version = 0

    def fill(self, x: Tensor) -> None:
        self.value = x.detach()
        self.version = 0 if x.is_inference() else x._version


def _unpack(place: Place) -> Tensor:
    if place.value is None:
        place.passage.fetch(place)
    value = place.value
    assert value is not None
    if not value.is_inference() and value._version != place.version:
        raise RuntimeError(
            f"a tensor that {place.passage.wiring.blocks[place.step].name} needs for its gradient (shape "
            f"{tuple(place.shape)}) was changed in place after it was saved"
        )
    return value


class _Nested(threading.local):
    fleeting = False
    """Whether what runs now in this thread will be run again, so that nothing inside need be kept."""


_nested = _Nested()


class Passage:
    """A ``revolve.Stepper`` over states that are trees of tensors, and the places of what torch's graph saves."""

    def __init__(
        self,
        wiring: Wiring,
        inputs: Tree,
        schedule: Schedule,
        *,
        tier: Kind | None = None,
        habits: Habits | None = None,
        ways: Mapping[int, Kept] = MappingProxyType({}),
        check: bool = False,
    ) -> None:
        self.wiring, self.check, self._ways = wiring, check, ways
        self._away: dict[int, Moved | Partly] = {}
        """Tapes that are kept otherwise than as they are, until backward asks for them."""
        self.runs = [0] * len(wiring)
        """How often each block has been run."""
        self.partly = [0] * len(wiring)
        """How often with the results of its dear operations at hand."""
        self.learnt = Habits()
        self._habits = habits
        self._exact = all(getattr(kind, "codec", None) is None for kind in (tier, *ways.values()))
        if check and not self._exact:
            raise ValueError(f"check=True compares bits, and {tier} loses some; leave one of them out")
        self._ambient, self._lock = Ambient(), threading.RLock()
        self._inputs = inputs
        self._given: Any = None
        self._leaves: list[Any] = []
        self._spec: Any = None
        self._needs = {name: _flags(value) for name, value in inputs.items()}
        self._places: list[list[weakref.ref[Place]]] = [[] for _ in wiring.blocks]
        self._notes: list[Notes] = []
        self._samples: list[list[Tensor]] = []
        self._since: dict[int, int] = {}
        self.outputs: Tree = {}
        store = shelf_for(tier, lambda step: habits is None or step in habits.touched)
        self._run: Run[Tree, None, None] = Run(schedule, self, {0: store}, given=True)
        self._sweep: Iterator[tuple[int, int, None]] | None = None
        self._at = len(wiring)
        self._filled = range(0)
        self._first = True

    # -- the first sweep

    def forward(self) -> Tree:
        """Run every block, and return the outputs, on torch's graph."""
        steps = len(self.wiring)
        if 0 in (self._habits.touched if self._habits is not None else ()):
            self._inputs = pytree.tree_map_only(Tensor, lambda x: x.clone(), self._inputs)
        self._keep_inputs()
        if _nested.fleeting:
            self.advance({}, 0, steps)
            self._run.adopt({}, steps)
        else:
            self._run.forward({}, steps)
        self._first = False
        self._inputs = {}
        outputs, self.outputs = self.outputs, {}
        return outputs

    def _keep_inputs(self) -> None:
        """As torch's graph keeps what it saves: inside of a surrounding checkpoint they are made again."""
        self._leaves, self._spec = pytree.tree_flatten(self._inputs)
        anchor = torch.ones((), requires_grad=True)
        self._given = _Given.apply(anchor, *(x for x in self._leaves if isinstance(x, Tensor))).grad_fn
        self._leaves = [None if isinstance(x, Tensor) else (x,) for x in self._leaves]

    def _take_inputs(self) -> None:
        """For one reverse sweep: torch's own checkpoint hands out what it saved once only."""
        tensors = iter(self._given.saved_tensors)
        leaves = [next(tensors).detach() if box is None else box[0] for box in self._leaves]
        self._inputs = pytree.tree_unflatten(leaves, self._spec)

    def advance(self, state: Tree, start: int, stop: int) -> Tree:
        box = [state]
        del state
        return self._run_blocks(box, start, stop, False)

    def record(self, state: Tree, start: int, stop: int) -> tuple[Tree, None]:
        box = [state]
        del state
        return self._run_blocks(box, start, stop, True), None

    def _run_blocks(self, box: list[Tree], start: int, stop: int, keep: bool) -> Tree:
        """``box`` holds the state alone, so that what no block needs any more can go."""
        for k in range(start, stop):
            box.append(self._first_time(k, box.pop(), keep) if self._first else self._again(k, box, keep))
        return box.pop()

    def reverse(self, tape: None, cotangent: None) -> None:
        raise AssertionError("torch transposes by itself")

    def last(self, step: int) -> bool:
        return step == len(self.wiring) - 1

    def _first_time(self, k: int, state: Tree, keep: bool) -> Tree:
        wiring, places = self.wiring, self._places[k]
        block = wiring.blocks[k]

        def pack(x: Tensor) -> Place:
            place = Place(self, k, x)
            places.append(weakref.ref(place))
            if keep:
                place.fill(x)
            return place

        arguments = wiring.arguments(k, self._inputs, state)
        before = [(x, _version(x)) for x in leaves_of((state, self._inputs))]
        way = self._ways.get(k) if keep else None
        partly = isinstance(way, Chosen)
        keep = keep and not partly
        entry = [copied_tree(x) for x in arguments] if self.check or (partly and self._habits is None) else None
        with (
            self._partly(k, way, arguments, entry),
            fleeting(not keep),
            torch.autograd.graph.saved_tensors_hooks(pack, _unpack),
        ):
            result, notes = block.first(arguments)
        self.runs[k] += 1
        self._notes.append(notes)
        self._samples.append([sample(x) for x in leaves_of(result)])
        self._learn(k, before)
        if keep and way is not None:
            self._put_away(k, way)
        if self.check:
            assert entry is not None
            self._compare_bits(k, block, entry, result, notes)
        name = wiring.name(k)
        self._needs[name] = _flags(result)
        if name in wiring.network.outputs:
            self.outputs[name] = result
        return wiring.after(k, state, result)

    def _learn(self, k: int, before: Sequence[tuple[Tensor, int]]) -> None:
        """Whether this block wrote to what is live, and since which cut that has been there."""
        live = {x.untyped_storage()._cdata for x, _ in before}
        self._since = {storage: self._since.get(storage, k) for storage in live}
        for x, version in before:
            if _version(x) != version:
                first = self._since[x.untyped_storage()._cdata]
                self.learnt.writers.add(k)
                self.learnt.touched |= set(range(first, k + 1))
                if first == 0 and not (self._habits is not None and 0 in self._habits.touched):
                    raise RuntimeError(
                        f"{self.wiring.blocks[k].name} writes in place to an input of the network, from which everything "
                        f"is run again; pass a clone (x.clone()), or let a budget measure the blocks first"
                    )

    def _compare_bits(self, k: int, block: Block, entry: Sequence[Any], result: Any, notes: Notes) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
            again = block.again(self._sources(k, entry), notes)
        for x, y in zip(leaves_of(result), leaves_of(again), strict=True):
            if not x.is_meta and not _same_bits(x, y):
                raise ReproducibilityError(
                    f"{block.name} is not reproducible: run twice from the same arguments and the same random state, it "
                    f"gave other bits. It keeps something of earlier calls, draws from a generator that cannot be found, "
                    f"or uses kernels that are not deterministic (torch.use_deterministic_algorithms(True) names those)",
                    k,
                )

    # -- the reverse sweep

    def fetch(self, place: Place) -> None:
        """Fill a place: go on with the reverse sweep to its block, or begin again if that is behind."""
        with self._lock, self._ambient.entered(), torch.enable_grad():
            if place.step >= self._at and place.step not in self._away:  # a second backward through the same graph
                self._forget()
                self._run.adopt({}, len(self.wiring))
            if self._sweep is None:
                self._take_inputs()
                self._sweep, self._at = self._run.reversing(), len(self.wiring)
            while self._at > place.step:
                self._empty()
                start, stop, _ = next(self._sweep)
                self._at, self._filled = start, range(start, stop)
            if self._at == 0:
                for _ in self._sweep:
                    pass
                self._inputs = {}
            if place.value is None and place.step in self._away:
                self._bring_back(place.step)
        if place.value is None:
            raise self._differs(place.step, "it saved fewer tensors for its gradient than before")

    # -- tapes that are kept otherwise

    @contextmanager
    def _partly(self, k: int, way: Kept | None, arguments: list[Any], copies: list[Any] | None) -> Iterator[None]:
        """Inside, results of chosen operations are kept, if that is the way; ``copies``: of arguments, if written to."""
        if not isinstance(way, Chosen):
            yield
            return
        entry = [pytree.tree_map_only(Tensor, Tensor.detach, x) for x in arguments]
        versions = [_version(x) for x in leaves_of(entry)]
        with Keeping(way) as keeping:
            yield
        keeping.results.prune()
        if copies is not None and versions != [_version(x) for x in leaves_of(entry)]:
            entry = copies
        self._away[k] = Partly(way, keeping.results, entry, [_version(x) for x in leaves_of(entry)])

    def _put_away(self, k: int, tier: Kept) -> None:
        """Move what the places of a block hold."""
        assert not isinstance(tier, Chosen)
        held = [(n, place) for n, place in enumerate(r() for r in self._places[k]) if place is not None]
        given = {x.untyped_storage()._cdata for x in leaves_of(self._inputs)}
        stays = given.union(x.untyped_storage()._cdata for x in self.wiring.blocks[k].owned())
        moved = Moved(tier, [(n, place.value) for n, place in held if place.value is not None], stays)
        for n, place in held:
            if n in moved.numbers:
                place.value = None
        self._away[k] = moved

    def _bring_back(self, k: int) -> None:
        """Fill the places of a block whose tape was kept otherwise."""
        away = self._away.pop(k)
        if isinstance(away, Moved):
            for n, x in away.back().items():
                place = self._places[k][n]()
                if place is not None:
                    place.fill(x)
            return
        if away.versions != [_version(x) for x in leaves_of(away.arguments)]:
            raise RuntimeError(
                f"an argument of {self.wiring.blocks[k].name} was written to in place after its run, and it is to run again; "
                f"the gradient would be wrong. Write to a clone, or let a budget measure the blocks first"
            )
        waiting = sum(place is not None and place.value is None for place in (r() for r in self._places[k]))
        pack = self._packs(k, waiting)
        with (
            until_enough(),
            fleeting(True),
            torch.autograd.graph.saved_tensors_hooks(pack, _unpack),
            Giving(away.chosen, away.results),
        ):
            self.wiring.blocks[k].again(self._sources(k, away.arguments), self._notes[k])
        self.partly[k] += 1

    def _forget(self) -> None:
        self._away.clear()
        self._empty()
        if self._sweep is not None:
            self._sweep.close()  # type: ignore[attr-defined]
        self._sweep, self._at = None, len(self.wiring)

    def _empty(self) -> None:
        """Let go of the tape that was used last, if somebody keeps its graph."""
        for k in self._filled:
            for reference in self._places[k]:
                place = reference()
                if place is not None:
                    place.value = None

    def _packs(self, k: int, wanted: int | None = None) -> Callable[[Tensor], None]:
        """Fills the places of a block in their order; ``wanted``: so many are empty, and then it is enough."""
        places, left = iter(self._places[k]), [wanted]

        def pack(x: Tensor) -> None:
            reference = next(places, None)
            if reference is None:
                raise self._differs(k, "it saved more tensors for its gradient than before")
            place = reference()
            if place is not None and place.value is None:
                if place.shape != x.shape or place.dtype != x.dtype:
                    raise self._differs(
                        k,
                        f"it saved a tensor of shape {tuple(x.shape)} and {x.dtype}, before one of "
                        f"{tuple(place.shape)} and {place.dtype}",
                    )
                place.fill(x)
                if left[0] is not None:
                    left[0] -= 1
                    if left[0] == 0:
                        raise Enough

        return pack

    def _again(self, k: int, box: list[Tree], keep: bool) -> Tree:
        block, way = self.wiring.blocks[k], self._ways.get(k) if keep and k < self._at - 1 else None
        keep = keep and not isinstance(way, Chosen)
        state = box.pop()
        arguments = self.wiring.arguments(k, self._inputs, state)
        state = self.wiring.passed(k, state) if k < self._at - 1 else {}
        writes = k in self.learnt.writers
        arguments = self._sources(k, [copied_tree(x) for x in arguments] if writes else arguments)
        with (
            self._partly(k, way, arguments, None),
            fleeting(True),
            torch.autograd.graph.saved_tensors_hooks(self._packs(k) if keep else _drop, _unpack),
        ):
            result = block.again(arguments, self._notes[k])
        if keep and way is not None:
            self._put_away(k, way)
        self.runs[k] += 1
        samples = zip(self._samples[k], map(sample, leaves_of(result)), strict=True)
        if self._exact and not all(agree(old, new) for old, new in samples):
            raise self._differs(k, "its output is another one")
        return (
            self.wiring.after(k, state, pytree.tree_map_only(Tensor, Tensor.detach, result)) if k < self._at - 1 else {}
        )

    def _sources(self, k: int, arguments: Sequence[Any]) -> list[Any]:
        """The arguments on a graph of their own, where they were on one: as results, which may be written to."""
        names = self.wiring.network.nodes[k].dependencies
        return [on_graph(value, self._needs[name]) for name, value in zip(names, arguments, strict=True)]

    def _differs(self, k: int, how: str) -> ReproducibilityError:
        return ReproducibilityError(
            f"{self.wiring.blocks[k].name} is not reproducible: run again in the backward pass, {how}; the gradient would "
            f"be wrong. check=True looks at every block in the forward pass",
            k,
        )


class _Given(torch.autograd.Function):
    """Keeps the inputs as torch's graph keeps what it saves: in a surrounding checkpoint they are made again."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise AssertionError("nothing depends on it")


class _Start(torch.autograd.Function):
    """A tensor as the result of a node, which may be written to in place as leaves may not."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor]) -> Tensor:
        return box.pop()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, None


def on_graph(value: Any, flags: Sequence[bool]) -> Any:
    """A tree whose tensors are results of a graph, where the flags say so."""
    leaves, spec = pytree.tree_flatten(value)
    wanted = iter(flags)
    anchor = torch.ones((), requires_grad=True)
    made = []
    for x in leaves:
        needs = isinstance(x, Tensor) and next(wanted)
        made.append(_Start.apply(anchor, [x.detach()]) if needs else x)
    return pytree.tree_unflatten(made, spec)


def _flags(value: Any) -> list[bool]:
    return [x.requires_grad for x in leaves_of(value)]


def _drop(x: Tensor) -> None:
    return None


@contextmanager
def fleeting(yes: bool) -> Iterator[None]:
    """Inside, nothing need be kept that will be run again, if it will."""
    before, _nested.fleeting = _nested.fleeting, _nested.fleeting or yes
    try:
        yield
    finally:
        _nested.fleeting = before


def copied_tree(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, copied, value)


def sample(x: Tensor) -> Tensor:
    """A few of the numbers, evenly spread."""
    line = x.detach()
    if line.numel() > SAMPLE:
        for dim in sorted(range(line.ndim), key=lambda d: -line.shape[d]):
            step = max(1, line.numel() // SAMPLE)
            line = line[(slice(None),) * dim + (slice(None, None, min(step, line.shape[dim])),)]
    return line.clone()


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    a, b = (z.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8) for z in (x, y))
    return torch.equal(a, b)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
