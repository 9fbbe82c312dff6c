"""A compiled program for one right-hand side and method: made once, tried against torch, and called with a block of words."""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native import run
from adjoint.engines.native.cells import Refused
from adjoint.engines.native.compose import compose
from adjoint.engines.native.driver import FIELDS, module
from adjoint.engines.native.fingerprint import fingerprint
from adjoint.engines.native.layout import Layout, layouts_for
from adjoint.engines.native.program import Kind
from adjoint.engines.native.rosenbrock import rosenbrock_module
from adjoint.engines.native.trace import Held, Name, Scene, trace
from adjoint.rosenbrock_tableaus import RosenbrockTableau
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.rosenbrock import RosenbrockProgram
from adjoint.tensors import State
from adjoint.timeline import FixedTimeline
from revolve.actions import RECORD, REVERSE

MOST = 30_000
"""Operations of f and its transpose beyond which it is left to torch."""
MOST_OF_STEP = 40_000
"""And those of a step with its transpose: they compile in seconds."""
LARGEST = 1024
"""Numbers in a trajectory beyond which torch's own operations are not slow."""
LARGEST_SYSTEM = 256
"""And those beyond which torch's factorisations are not slow."""
SHARES = ((1e-2, 1.0), (1e-4, 1.0), (1e-4, 1e-3), (1e-4, 1e-6), (1e-4, 1e-9))
"""How far from the first state a step is tried, and how long: where f is stiff, only short ones are finite."""
KEPT = 64
"""Programs kept in memory, the last ones used."""
PLACES = {name: i for i, name in enumerate(FIELDS)}
EACH = 4
"""A thread is worth while from so many tiles on."""
OWN = frozenset(("pre", "g"))
"""What every thread writes for itself; all else belongs to a tile."""


@dataclass(frozen=True)
class Kernel:
    compiled: run.Compiled
    kind: Kind
    layout: Layout
    """Of the state."""
    own: tuple[bool, ...]
    """Of each held tensor, whether every member of the batch has a part of its own."""
    parts: Layout
    """Of those."""
    shared: int
    """Numbers in the others."""
    reached: frozenset[Name]
    """On which of all these the slope depends."""
    hoisted: int
    times: bool
    _uses: tuple[bool, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    def said(self, where: str) -> str:
        """What a solution says of its engine."""
        layout = self.layout
        single = f"{layout.numbers} numbers"
        shape = single if layout.dim is None else f"{layout.members} members of {single}"
        return f"native: {where}, {shape}, every sweep in one call"

    def inputs(self, held: Sequence[Tensor]) -> dict[str, Tensor]:
        """The numbers of the held tensors."""
        shared = [x.detach().reshape(-1) for x, own in zip(held, self.own, strict=True) if not own]
        parts = [x[None] for x, own in zip(held, self.own, strict=True) if own]
        return {
            "p": torch.cat(shared) if shared else torch.empty(0, dtype=self.dtype),
            "q": self.parts.packed(parts, self.layout.members) if parts else torch.empty(0, dtype=self.dtype),
            "pre": torch.empty(self.hoisted, dtype=torch.float64),
        }

    def sums(self) -> dict[str, Tensor]:
        """Room for the cotangents of the held tensors."""
        sizes = {"of_p": self.shared, "of_q": self.parts.numbers}
        tiles, width, dtype = self.tiles, self.layout.width, self.dtype
        return {name: torch.zeros((tiles, 1, size, width), dtype=dtype) for name, size in sizes.items() if size}

    def of_held(self, sums: dict[str, Tensor], held: Sequence[Tensor]) -> list[Tensor | None]:
        """For each held tensor its cotangent; None where nothing depends on it."""
        nothing = torch.zeros((1, 1, 0, 1), dtype=self.dtype)
        of_p, of_q = sums.get("of_p", nothing), self.parts.unpacked(sums["of_q"]) if "of_q" in sums else []
        if self.tiles == self.layout.width == 1:
            of_p = of_p.view(-1)
        else:  # torch's own sum depends on the number of threads
            of_p = torch.from_numpy(np.add.reduce(of_p.numpy(), (0, 1, 3)))
        found: list[Tensor | None] = []
        first = taken = 0
        for x, own, used in zip(held, self.own, self._used(held), strict=True):
            size = 0 if own else x.numel()
            whole = of_q[taken][0] if own else of_p[first : first + size].view(x.shape)
            found.append(whole if used else None)
            first, taken = first + size, taken + own
        return found

    def _used(self, held: Sequence[Tensor]) -> tuple[bool, ...]:
        """Whether the slope depends on anything in each held tensor: these have the same shapes at every call."""
        if self._uses is None:
            found = []
            first = {"p": 0, "q": 0}
            for x, own in zip(held, self.own, strict=True):
                name, size = ("q", x.numel() // self.layout.members) if own else ("p", x.numel())
                found.append(any((name, j) in self.reached for j in range(first[name], first[name] + size)))
                first[name] += size
            object.__setattr__(self, "_uses", tuple(found))
        assert self._uses is not None
        return self._uses

    @cached_property
    def tiles(self) -> int:
        return self.layout.tiles(self.layout.members)

    def call(self, words: Mapping[str, Any]) -> None:
        """Carry out rows, over all tiles, by torch's number of threads. What is not among the words is a place for what this
        kernel does not make."""
        block = array("q", bytes(8 * len(FIELDS)))
        block[PLACES["last_tile"]] = tiles = self.tiles
        for name, x in words.items():
            block[PLACES[name]] = x if isinstance(x, int) else x.data_ptr()
        threads = 1 if self.times else min(torch.get_num_threads(), tiles // EACH)
        if threads < 2:
            return self.compiled.sweep(block.buffer_info()[0])
        own, blocks = [], []
        for i in range(threads):
            part = array("q", block)
            part[PLACES["first_tile"]], part[PLACES["last_tile"]] = tiles * i // threads, tiles * (i + 1) // threads
            for name in OWN & words.keys():
                own.append(torch.empty_like(words[name]))
                part[PLACES[name]] = own[-1].data_ptr()
            blocks.append(part)
        others = [Thread(target=self.compiled.sweep, args=(part.buffer_info()[0],)) for part in blocks[1:]]
        for thread in others:
            thread.start()
        self.compiled.sweep(blocks[0].buffer_info()[0])
        for thread in others:
            thread.join()


_known: OrderedDict[Any, Kernel | str] = OrderedDict()


def kernel_for(program: ExplicitProgram, held: Held, state: State) -> tuple[Kernel, bool]:
    """The compiled step, and whether it was known already; Refused with the reason if there is none."""
    if run.MISSING:
        raise Refused(run.MISSING)
    forms = tuple((tuple(x.shape), x.dtype) for x in state)
    ambient = torch.get_default_dtype(), program.dtype, bool(program.inputs)
    key = (fingerprint(held), forms, program.structure, program.tableau, ambient)
    known = _known.get(key)
    if known is None:
        known = _made(program, held, state)
        if fingerprint(held) != key[0]:
            known = "a function that changes what it holds when it is called"
        _known[key] = known
        if len(_known) > KEPT:
            _known.popitem(last=False)
        if isinstance(known, Kernel):
            return known, False
    _known.move_to_end(key)
    if isinstance(known, str):
        raise Refused(known)
    return known, True


def _made(program: ExplicitProgram, held: Held, state: State) -> Kernel | str:
    """In lanes if members are independent of each other, else as one trajectory; or why not."""
    reasons: dict[str, None] = {}
    for layout in layouts_for(state):
        if not 0 < layout.numbers <= LARGEST:
            reasons[f"a trajectory of {layout.numbers} numbers; it takes up to {LARGEST}"] = None
            continue
        for own in _shares(held, layout):
            try:
                return _compiled(program, held, own, layout, state)
            except Refused as reason:
                reasons[str(reason)] = None
            except Exception as error:  # of f itself, it may be: then the eager engine meets it too, and says where
                reasons[f"f, which raised {type(error).__name__} when it was traced ({error})"] = None
    return ", or as a whole ".join(reasons)


def _shares(held: Held, layout: Layout) -> list[tuple[bool, ...]]:
    """Which held tensors may have a part for each member: those with as many members, or none."""
    none = (False,) * len(held.tensors)
    if layout.dim is None:
        return [none]
    sized = tuple(x.ndim > 0 and x.shape[layout.dim] == layout.members for x in held.tensors)
    return [sized, none] if any(sized) else [none]


def _compiled(program: ExplicitProgram, held: Held, own: tuple[bool, ...], layout: Layout, state: State) -> Kernel:
    if program.tableau.adaptive and layout.dim is not None:
        raise Refused("controlled steps that members of a batch share")
    start, times = program.time(program.asked.t[0]), bool(program.inputs)
    stiff = isinstance(program, RosenbrockProgram)
    if stiff and layout.numbers > LARGEST_SYSTEM:
        raise Refused(f"systems of {layout.numbers} equations in every step; it takes up to {LARGEST_SYSTEM}")
    traced = trace(Scene(held, own, program.structure, state, start, layout.dim, stiff), MOST)
    pairs = list(zip(held.tensors, own, strict=True))
    parts = Layout(tuple(tuple(x.shape) for x, mine in pairs if mine), layout.dtype, layout.dim)
    shared = sum(x.numel() for x, mine in pairs if not mine)
    if isinstance(program, RosenbrockProgram):
        assert isinstance(program.how.tableau, RosenbrockTableau)
        made = rosenbrock_module(traced, program.how.tableau, (shared, parts.numbers))
        reached = frozenset(traced.of_held) | frozenset(traced.bent.of_held if traced.bent is not None else ())
    else:
        formulas = compose(traced, program.tableau)
        if len(formulas.graph.nodes) > MOST_OF_STEP:
            raise Refused(f"a step of {len(formulas.graph.nodes)} operations on numbers, more than {MOST_OF_STEP}")
        sizes = layout.numbers, (shared, parts.numbers), layout.width
        made, reached = (
            module(formulas, program.tableau, traced.kind, *sizes, times),
            frozenset(formulas.transpose.of_held),
        )
    compiled = run.Compiled(made.text)
    kernel = Kernel(compiled, traced.kind, layout, own, parts, shared, reached, made.hoisted, times)
    _compare(kernel, program, held, state)
    return kernel


def flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The numbers of all tensors in a row."""
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def _compare(kernel: Kernel, program: ExplicitProgram, held: Held, state: State) -> None:
    """One step and its transpose at another point, natively and by torch: whatever was taken for a constant shows."""
    generator = torch.Generator().manual_seed(0)
    for size, share in SHARES:
        ends = _ends(program, share)
        y = [_moved(x, size, generator) for x in state]
        p = [_moved(x, size, generator) for x in held.tensors]
        seeds = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in state]
        wanted = _by_torch(program, ends, held, y, p, seeds)
        if all(bool(x.isfinite().all()) for x in wanted):
            break
    else:
        raise Refused("f where it is not finite a little off the first state, so that nothing could be compared")
    found = _natively(kernel, ends, held, y, p, seeds)
    digits = 1e-13 if kernel.kind == "f64" else 2e-5
    eps = torch.finfo(kernel.dtype).eps
    bases = [flat(y, kernel.dtype), flat(seeds, kernel.dtype), *(torch.zeros(()) for _ in found[2:])]
    terms = _size(bases[1]) * _size(wanted[0] - bases[0])
    scales = [1.0, 1.0, *(_size(x) for x, old in zip(p, held.tensors, strict=True) if old.requires_grad)]
    scales += [math.inf] * (len(found) - len(scales))
    rounding = [0.0] * len(found)
    for _ in range(3):  # how much the last digits of y and p matter
        near_y, near_p = ([_moved(x, 2 * eps, generator) for x in xs] for xs in (y, p))
        others = _by_torch(program, ends, held, near_y, near_p, seeds)
        rounding = [max(r, _size(a - b)) for r, a, b in zip(rounding, others, wanted, strict=True)]
    names = ("step", *["transpose"] * (len(found) - 1))
    for name, mine, theirs, base, noise, scale in zip(names, found, wanted, bases, rounding, scales, strict=True):
        allowed = digits * _size(theirs - base) + 8 * eps * _size(base) + 20 * noise
        allowed += (
            8 * eps * terms / scale if scale else 0.0
        )  # lam^T dy/dp is a sum of terms of this size, that may cancel
        off = _size(mine - theirs)
        if not off <= allowed:
            raise Refused(
                f"a {name} that differs from torch's by {off:.1e}, where {allowed:.1e} is rounding; f may hand numbers to "
                f"something that is not torch"
            )


def _size(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _moved(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) + 0.5
    scale = x.detach().abs().mean() if x.numel() else 0.0
    return (x.detach() + size * noise * (x.detach().abs() + 1e-3 * scale)).contiguous()


def _ends(program: ExplicitProgram, share: float) -> list[float]:
    """Of a step to be tried; that of an adaptive solve is not known yet, and may have to be a small share of a long one."""
    timeline = program.timeline
    if timeline.steps:
        return list(timeline.ends(0))
    start, stop = program.asked.t[0], program.asked.t[-1]
    span = stop - start
    return [
        start,
        start + share * (0.01 * span if program.control.dt is None else math.copysign(program.control.dt, span)),
    ]


def _by_torch(
    program: ExplicitProgram,
    ends: list[float],
    held: Held,
    y: Sequence[Tensor],
    p: Sequence[Tensor],
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    sample = program.sample()
    sample.timeline = FixedTimeline(ends, None)
    sample.forget_times()
    aliases = []
    for x, old in zip(p, held.tensors, strict=True):
        x = torch.nn.Parameter(x, old.requires_grad) if isinstance(old, torch.nn.Parameter) else x
        x.__dict__.update(old.__dict__)
        aliases.append(x.requires_grad_(old.requires_grad))
    leaves = tuple(x.requires_grad_() for x in y)
    with torch.enable_grad():
        step = sample.step(held.rebound(aliases), 0, leaves, True, False)
        wished = [x for x in aliases if x.requires_grad]
        roots = [(x, s) for x, s in zip(step.state, seeds, strict=True) if x.requires_grad]
        inputs = [*leaves, *wished, *step.inputs]
        gradients = torch.autograd.grad([x for x, _ in roots], inputs, [s for _, s in roots], allow_unused=True)
    for x in y:
        x.requires_grad_(False)
    whole = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    parts = [flat(step.state, y[0].dtype), flat(whole[: len(leaves)], y[0].dtype)]
    parts += [x.detach().reshape(-1) for x in whole[len(leaves) : len(leaves) + len(wished)]]
    return [*parts, *(x.detach()[:2] for x in whole[len(leaves) + len(wished) :])]


def _natively(
    kernel: Kernel,
    step: list[float],
    held: Held,
    y: Sequence[Tensor],
    p: Sequence[Tensor],
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    layout, members = kernel.layout, kernel.layout.members
    x0 = layout.packed([x[None] for x in y], members)
    lam = layout.packed([x[None] for x in seeds], members, zeros=True).clone()
    sums, ends = kernel.sums(), torch.zeros(2, layout.width, dtype=torch.float64)
    rows = torch.tensor([(RECORD, 0, 1, 0, 1), (REVERSE, 0, 1, 0, 1)])
    work, tape = x0.clone(), torch.empty_like(x0)
    times = torch.tensor(step, dtype=torch.float64)
    words = {"rows": rows, "row_count": 2, "times": times, "index": torch.tensor([-1])}
    places: dict[str, Any] = {"x0": x0, "tape": tape, "work": work, "lam": lam, "ends": ends, "tape_each": 1}
    places["inner"] = torch.zeros(2, dtype=torch.int64)  # no value in between is looked at
    kernel.call({**words, **places, **sums, **kernel.inputs(p)})
    mine = [flat(layout.unpacked(x), kernel.dtype) for x in (work, lam)]
    of_held = zip(kernel.of_held(sums, p), held.tensors, strict=True)
    mine += [(torch.zeros(x.shape) if g is None else g).reshape(-1) for g, x in of_held if x.requires_grad]
    return [*mine, ends.sum(1)] if kernel.times else mine
