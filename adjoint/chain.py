"""Networks within a memory budget: ``chain`` of modules, ``graph`` of modules with skips, drop-ins for torch's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from adjoint.blocks import Block
from adjoint.captured import transformed
from adjoint.passage import Passage, Wiring
from adjoint.put_away import Kept, Tapes, check_tapes
from adjoint.selective import Chosen, Selective
from adjoint.shelves import leaves_of
from adjoint.tiers import Device, Files, Host, Kind
from adjoint.weights import Weighed, weigh
from revolve import Binomial, Network, Node, Plan, Schedule, Segments, StoreAll, parse_bytes, plan_graph
from revolve.binomial import whole

Wires = Mapping[str, Sequence[Any]]
"""By its name, what each node runs and the names of what it uses: {"up": (module, "down", "skip")}."""
X = "x"
"""What the input of a chain is called."""


@dataclass(frozen=True)
class Memory:
    """What a network may keep: at most one of ``slots``, ``budget`` and ``every``; none of them keeps every tape."""

    slots: int | str | None = None
    budget: int | str | None = None
    every: int | None = None
    schedule: Schedule | None = None
    tier: Kind | None = None
    tapes: tuple[Tapes, ...] = ()
    """How tapes may be kept besides as they are: a budget chooses; without one, how all of them are kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tapes", check_tapes(self.tapes or ()))
        said = [name for name in ("slots", "budget", "every", "schedule") if getattr(self, name) is not None]
        if len(said) > 1:
            one, two = said[:2]
            raise ValueError(
                f"{one}={getattr(self, one)!r} and {two}={getattr(self, two)!r} were both given; one of them decides"
            )
        if self.budget is not None:
            parse_bytes(self.budget, "budget")
        if self.every is not None:
            whole("every", self.every, least=1)
        if self.slots not in (None, "all"):
            whole("slots", self.slots, least=1)
        all_tapes = self.schedule is None and self.every is None and self.slots in (None, "all")
        if self.tapes and self.budget is None and not (all_tapes and len(self.tapes) == 1):
            raise ValueError(
                f"tapes={self.tapes!r} needs a budget= to choose, or be one way alone with slots='all', for every tape"
            )
        if self.tier is not None and not isinstance(self.tier, (Device, Host, Files)):
            raise TypeError(f"tier={self.tier!r} is no kind of memory; give a Device, Host or Files")

    def ways(self, steps: int) -> dict[int, Kept]:
        """How tapes are kept without a budget."""
        if self.budget is not None or not self.tapes:
            return {}
        (kind,) = self.tapes
        return dict.fromkeys(range(steps), Chosen(frozenset(kind.keep)) if isinstance(kind, Selective) else kind)

    def schedule_for(self, steps: int) -> Schedule:
        """The schedule of all but a budget."""
        if self.schedule is not None:
            return self.schedule
        if self.every is not None:
            return Segments(tuple(range(0, steps, self.every)))
        return StoreAll() if self.slots in (None, "all") else Binomial(min(self.slots, max(1, steps - 1)))  # type: ignore[arg-type]


def chain(
    modules: Iterable[Callable[[Any], Any]],
    x: Any,
    *,
    slots: int | str | None = None,
    budget: int | str | None = None,
    every: int | None = None,
    schedule: Schedule | None = None,
    tier: Kind | None = None,
    tapes: Tapes | Sequence[Tapes] = (),
    check: bool = False,
) -> Any:
    """``modules[-1](...(modules[0](x)))``, differentiable while few of the states between the modules are kept.

    The result, its gradients and the random numbers drawn are those of the plain loop, bit for bit. ``x`` and what the
    modules return are tensors or trees of tensors. Buffers (as of BatchNorm) are updated once, dropout draws once.

    Args:
        slots: states kept at once, ``x`` among them; "all" (or nothing said) keeps every tape.
        budget: bytes for all that the gradient holds besides ``x``, parameters and their gradients. The blocks are
            measured on ``x`` when they first meet inputs of its shapes, and the cheapest plan is taken.
        every: keep the state before every so many modules, and run each such segment again as a whole.
        schedule: one of your own.
        tier: where states are kept: ``Device(codec=...)``, ``Host()`` or ``Files()``.
        tapes: ways in which tapes may be kept besides as they are, for a budget to choose from block by block:
            ``Selective()``, ``Host()``, ``Files()``, ``Device(codec=revolve.Cast("bfloat16"))`` (another gradient). With
            ``slots="all"`` one way, for every tape.
        check: run every block twice, and name one that gives other bits (:class:`ReproducibilityError`).
    """
    wires = wires_of(modules)
    if not wires:
        return x
    memory = Memory(slots, budget, every, schedule, tier, tapes)  # type: ignore[arg-type]
    return _run(wired(wires, None), {X: x}, memory, check)[f"block {len(wires) - 1}"]


def wires_of(modules: Iterable[Callable[[Any], Any]]) -> dict[str, tuple[Callable[[Any], Any], str]]:
    """Modules in a row as nodes."""
    return {f"block {k}": (module, X if k == 0 else f"block {k - 1}") for k, module in enumerate(modules)}


def graph(
    nodes: Wires,
    inputs: Mapping[str, Any],
    *,
    budget: int | str | None = None,
    slots: int | str | None = None,
    outputs: str | Sequence[str] | None = None,
    schedule: Schedule | None = None,
    tier: Kind | None = None,
    tapes: Tapes | Sequence[Tapes] = (),
    check: bool = False,
) -> Any:
    """A network with skips: ``nodes = {"up": (module, "down", "skip"), ...}``, in an order in which they can run.

    Each node calls its module with the values named after it, of earlier nodes or of ``inputs``. Returns the value of
    the last node, of the one that ``outputs`` names, or a dict of those that it lists. Everything else as in
    :func:`chain`.
    """
    names = [outputs] if isinstance(outputs, str) else None if outputs is None else list(outputs)
    wiring = wired(nodes, names)
    found = _run(wiring, dict(inputs), Memory(slots, budget, None, schedule, tier, tapes), check)  # type: ignore[arg-type]
    return found if names is not None and not isinstance(outputs, str) else found[wiring.network.outputs[0]]


def wired(wires: Wires, outputs: Sequence[str] | None) -> Wiring:
    """The blocks of a network, with names checked."""
    if not isinstance(wires, Mapping):
        raise TypeError(f"nodes={wires!r} must map names to (module, names of what it uses)")
    for name, wire in wires.items():
        if not isinstance(wire, (tuple, list)) or len(wire) < 2 or not all(isinstance(used, str) for used in wire[1:]):
            raise TypeError(f"nodes[{name!r}]={wire!r} must be (module, name, ...): a callable and what it uses")
    network = Network([Node(name, tuple(wire[1:])) for name, wire in wires.items()], outputs)
    return Wiring(tuple(Block(wire[0], name) for name, wire in wires.items()), network)


def _run(wiring: Wiring, inputs: dict[str, Any], memory: Memory, check: bool) -> dict[str, Any]:
    missing = [name for name in wiring.network.inputs if name not in inputs]
    if missing:
        raise ValueError(f"inputs lacks {missing[0]!r}, which a node uses; known are {', '.join(inputs) or 'none'}")
    inputs = {name: inputs[name] for name in wiring.network.inputs}
    if not torch.is_grad_enabled():
        return plainly(wiring, inputs)
    refuse_transforms()
    weighed = measured(wiring, inputs, memory.tapes) if memory.budget is not None else None
    plan = Plan(len(wiring), memory.schedule_for(len(wiring))) if weighed is None else plan_of(weighed, memory)
    return passage_of(wiring, inputs, plan, memory, weighed, check).forward()


def passage_of(
    wiring: Wiring, inputs: dict[str, Any], plan: Plan, memory: Memory, weighed: Weighed | None, check: bool
) -> Passage:
    habits = weighed.habits if weighed is not None else None
    ways = memory.ways(len(wiring))
    if weighed is not None:
        ways |= {k: weighed.kept[k][name] for k, name in enumerate(plan.ways) if name is not None}
    return Passage(wiring, inputs, plan.schedule, tier=memory.tier, habits=habits, ways=ways, check=check)


def refuse_transforms() -> None:
    """Raise inside of torch.func's transforms and forward mode."""
    if transformed():
        raise NotImplementedError(
            "a network that is run again cannot be followed by a torch.func transform or forward mode; call its modules "
            "one by one inside of transforms (torch.func.functional_call around the whole call works)"
        )


def plainly(wiring: Wiring, inputs: dict[str, Any]) -> dict[str, Any]:
    """The values alone."""
    state: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for k, block in enumerate(wiring.blocks):
        result = block.function(*wiring.arguments(k, inputs, state))
        if wiring.name(k) in wiring.network.outputs:
            found[wiring.name(k)] = result
        state = wiring.after(k, state, result)
    return found


_known: weakref.WeakKeyDictionary[Any, dict[Any, Weighed]] = weakref.WeakKeyDictionary()
"""What was measured, by the first module of a network."""


def measured(wiring: Wiring, inputs: dict[str, Any], tapes: tuple[Tapes, ...] = ()) -> Weighed:
    """The weights of these blocks on inputs like these, measured once."""
    first = wiring.blocks[0].function
    if not all(isinstance(block.function, nn.Module) for block in wiring.blocks):
        return weigh(wiring, inputs, tapes)
    known = _known.setdefault(first, {})
    kind = signature(wiring, inputs), tapes
    if kind not in known:
        known[kind] = weigh(wiring, inputs, tapes)
    return known[kind]


def signature(wiring: Wiring, inputs: dict[str, Any]) -> Any:
    """What decides the weights: shapes, dtypes, devices, what needs a gradient, training or not, autocast."""
    like = tuple((x.shape, x.dtype, x.device, x.requires_grad) for x in leaves_of(inputs))
    modules = [m for block in wiring.blocks for m in block.modules]
    trained = tuple(m.training for m in modules)
    needed = tuple(p.requires_grad for m in modules for p in m._parameters.values() if p is not None)
    kinds = sorted({x.device.type for x in leaves_of(inputs)} | {"cpu"} - {"meta"})
    casts = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds if kind != "meta"
    )
    wires = tuple((id(block.function), node) for block, node in zip(wiring.blocks, wiring.network.nodes, strict=True))
    return like, trained, needed, casts, wires, wiring.network.outputs, str(pytree.tree_structure(inputs))


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    context_fn: Callable[[], Any] = lambda: (nullcontext(), nullcontext()),
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)``, run again in backward: torch.utils.checkpoint.checkpoint's signature.

    Random state is kept where the function draws, of every generator; buffers are updated once; another result is
    refused. ``determinism_check="none"`` and ``preserve_rng_state=False`` change nothing here, nor do ``debug`` and
    ``early_stop``. ``use_reentrant=True`` and a ``context_fn`` are refused.
    """
    if use_reentrant:
        raise ValueError("use_reentrant=True loses gradients of tensors that the function holds; leave it out")
    if not _is_plain(context_fn):
        raise ValueError(
            "context_fn= runs the function in contexts of torch's own; use torch.utils.checkpoint for that, or say "
            "budget= to adjoint.chain, which chooses what is kept"
        )
    names = [f"argument {k}" for k in range(len(args))]
    called = partial(function, **kwargs) if kwargs else function
    if not args:
        called, names, args = _Ignoring(called), ["argument 0"], (None,)
    wiring = wired({"function": (called, *names)}, None)
    memory = Memory(schedule=Segments((0,), last=True))
    return _run(wiring, dict(zip(names, args, strict=True)), memory, False)["function"]


class _Ignoring:
    """A function of nothing as one of a value that it does not use."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __call__(self, unused: None) -> Any:
        return self.function()


def _is_plain(context_fn: Callable[[], Any]) -> bool:
    return all(isinstance(context, nullcontext) for context in context_fn())


def checkpoint_sequential(
    functions: nn.Sequential | Sequence[Callable[[Any], Any]],
    segments: int,
    input: Any,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """A chain in so many segments, each but the last run again: torch.utils.checkpoint.checkpoint_sequential's signature."""
    if use_reentrant:
        raise ValueError("use_reentrant=True loses gradients of tensors that the functions hold; leave it out")
    unknown = sorted(kwargs.keys() - {"preserve_rng_state"})
    if unknown:
        raise ValueError(f"unexpected keyword arguments: {', '.join(unknown)}")
    modules: list[Callable[[Any], Any]] = list(functions)
    if not 1 <= segments <= max(1, len(modules)):
        raise ValueError(f"segments={segments} cannot cut {len(modules)} functions; give 1 to {len(modules)}")
    size = len(modules) // segments
    return chain(modules, input, schedule=Segments(tuple(range(0, size * segments, size))))


def plan_of(weighed: Weighed, memory: Memory) -> Plan:
    """What a network will keep and redo."""
    if memory.budget is not None:
        return plan_graph(weighed.network, memory.budget)
    return weighed.network.plan(memory.schedule_for(len(weighed.network.nodes)))
