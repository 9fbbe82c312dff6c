"""A compiled program for one right-hand side and method: made once, tried against torch, and called with a block of words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.engines.native import run
from adjoint.engines.native.cells import Refused
from adjoint.engines.native.compose import compose
from adjoint.engines.native.driver import FIELDS, module
from adjoint.engines.native.fingerprint import fingerprint
from adjoint.engines.native.program import Kind
from adjoint.engines.native.trace import Held, trace
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.tensors import State
from adjoint.timeline import FixedTimeline
from revolve.actions import RECORD, REVERSE

MOST = 60_000
"""Operations of f and its transpose beyond which it is left to torch."""
MOST_OF_STEP = 40_000
"""And those of a step with its transpose: they compile in seconds."""
KEPT = 64
"""Programs kept in memory, the last ones used."""


@dataclass(frozen=True)
class Kernel:
    compiled: run.Compiled
    kind: Kind
    leaves: int
    """Numbers in a state."""
    held: int
    """Numbers in the tensors that f holds."""
    reached: frozenset[int]
    """Which of these the slope depends on."""
    hoisted: int
    width: int
    times: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.kind == "f64" else torch.float32

    def call(self, words: dict[str, Tensor | np.ndarray | int]) -> None:
        """Carry out rows. What is not among the words is a place for what this kernel does not make."""
        block = np.zeros(len(FIELDS), dtype=np.int64)
        for i, name in enumerate(FIELDS):
            x = words.get(name, 0)
            block[i] = x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data if isinstance(x, np.ndarray) else x
        self.compiled.sweep(block.ctypes.data)


_known: OrderedDict[Any, Kernel | str] = OrderedDict()


def kernel_for(program: ExplicitProgram, held: Held, state: State) -> tuple[Kernel, bool]:
    """The compiled step, and whether it was known already; Refused with the reason if there is none."""
    if run.MISSING:
        raise Refused(run.MISSING)
    forms = tuple((tuple(x.shape), x.dtype) for x in state)
    ambient = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), program.dtype, bool(program.inputs)
    key = (fingerprint(held), forms, program.structure, program.tableau, ambient)
    known = _known.get(key)
    if known is None:
        try:
            known = _made(program, held, state)
            if fingerprint(held) != key[0]:
                raise Refused("what f holds changes when it is called")
        except Refused as reason:
            known = str(reason)
        except Exception as error:  # of f itself, it may be: then the eager engine meets it too, and says where
            known = f"f, which raised {type(error).__name__} when it was traced ({error})"
        _known[key] = known
        if len(_known) > KEPT:
            _known.popitem(last=False)
        if isinstance(known, Kernel):
            return known, False
    _known.move_to_end(key)
    if isinstance(known, str):
        raise Refused(known)
    return known, True


def _made(program: ExplicitProgram, held: Held, state: State) -> Kernel:
    if torch.is_autocast_enabled("cpu"):
        raise Refused("autocast is on")
    start = program.time(program.asked.t[0])
    traced = trace(held.reach.root, held, program.structure, state, start, MOST)
    formulas = compose(traced, program.tableau)
    if len(formulas.graph.nodes) > MOST_OF_STEP:
        raise Refused(f"a step of {len(formulas.graph.nodes)} operations on numbers, more than {MOST_OF_STEP}")
    leaves, numbers = len(traced.slope), sum(x.numel() for x in held.tensors)
    made = module(formulas, traced.kind, leaves, numbers, 1, bool(program.inputs))
    reached = frozenset(formulas.of_held)
    kernel = Kernel(
        run.Compiled(made.text), traced.kind, leaves, numbers, reached, made.hoisted, 1, bool(program.inputs)
    )
    _compare(kernel, program, held, state)
    return kernel


def flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The numbers of all tensors in a row, in memory of their own."""
    if not tensors:
        return torch.empty(0, dtype=dtype)
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def _compare(kernel: Kernel, program: ExplicitProgram, held: Held, state: State) -> None:
    """One step and its transpose at another point, natively and by torch: whatever was taken for a constant shows."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-4, 0.0):
        y = [_moved(x, size, generator) for x in state]
        p = [_moved(x, size, generator) for x in held.tensors]
        seeds = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in state]
        wanted = _by_torch(program, held, y, p, seeds)
        if all(bool(x.isfinite().all()) for x in wanted):
            break
    else:
        raise Refused("values that are not finite near the first state, so that nothing could be compared")
    if not size:
        raise Refused("f is not finite a little off the first state, so that nothing could be compared")
    found = _natively(kernel, program, held, y, p, seeds)
    digits = 1e-13 if kernel.kind == "f64" else 2e-5
    eps = torch.finfo(kernel.dtype).eps
    bases = [flat(y, kernel.dtype), flat(seeds, kernel.dtype), *(torch.zeros(()) for _ in found[2:])]
    rounding = [0.0] * len(found)
    for _ in range(3):  # how much the last digits of y and p matter
        near_y, near_p = ([_moved(x, 2 * eps, generator) for x in xs] for xs in (y, p))
        others = _by_torch(program, held, near_y, near_p, seeds)
        rounding = [max(r, _size(a - b)) for r, a, b in zip(rounding, others, wanted, strict=True)]
    names = ("step", *["transpose"] * len(found))
    for name, mine, theirs, base, noise in zip(names, found, wanted, bases, rounding, strict=False):
        allowed = digits * _size(theirs - base) + 8 * eps * _size(base) + 20 * noise
        off = _size(mine - theirs)
        if not off <= allowed:
            raise Refused(
                f"a {name} that differs from torch's by {off:.1e}, where {allowed:.1e} is rounding; f may hand numbers to "
                f"something that is not torch"
            )


def _size(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _moved(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) + 0.5
    scale = x.detach().abs().mean() if x.numel() else 0.0
    return (x.detach() + size * noise * (x.detach().abs() + 1e-3 * scale)).contiguous()


def _ends(program: ExplicitProgram) -> list[float]:
    return list(program.timeline.ends(0))


def _by_torch(
    program: ExplicitProgram, held: Held, y: Sequence[Tensor], p: Sequence[Tensor], seeds: Sequence[Tensor]
) -> list[Tensor]:
    sample = program.sample()
    sample.timeline = FixedTimeline(_ends(program), None)
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
    program: ExplicitProgram,
    held: Held,
    y: Sequence[Tensor],
    p: Sequence[Tensor],
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    dtype = kernel.dtype
    work, lam, mu = flat(y, dtype), flat(seeds, dtype), torch.zeros(kernel.held, dtype=dtype)
    ends = torch.zeros(2, dtype=torch.float64)
    rows = np.array([(RECORD, 0, 1, 0, 1), (REVERSE, 0, 1, 0, 1)], dtype=np.int64)
    words: dict[str, Any] = {
        "rows": rows, "row_count": 2, "times": np.array(_ends(program)), "index": np.array([-1]), "x0": work,
        "tape": torch.empty_like(work), "work": work, "lam": lam, "mu": mu, "p": flat(p, dtype), "ends": ends,
        "pre": torch.empty(kernel.hoisted, dtype=torch.float64), "last_tile": 1, "tape_each": 1,
    }  # fmt: skip
    kernel.call(words)
    by_tensor = mu.split([x.numel() for x in p]) if p else ()
    mine = [work, lam, *(g for g, x in zip(by_tensor, held.tensors, strict=True) if x.requires_grad)]
    return [*mine, ends] if kernel.times else mine
