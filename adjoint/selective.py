"""Selective recomputation: a block runs again, and its dear operations give what they gave the first time.

What chosen operations return is kept while the block first runs; when it runs again these return that, and the cheap
ones between them are done again. Results that were written to in place since are not used: then the operation runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from adjoint.tensors import bytes_of, tensors_in

PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""Matrix products, convolutions, fused attention, by torch's names (aten)."""

Key = tuple[str, int]
"""An operation of a block's run: its name, and how many of that name came before it."""


@dataclass(frozen=True)
class Selective:
    """Tapes of which only the results of these operations are kept, by torch's names; the rest is run again."""

    keep: tuple[str, ...] = PRODUCTS

    def __post_init__(self) -> None:
        unknown = [name for name in self.keep if not hasattr(torch.ops.aten, name)]
        if unknown or not self.keep:
            raise ValueError(
                f"keep={self.keep!r}: torch has no operation {''.join(unknown[:1])!r}; name some of torch.ops.aten"
            )


class Chosen(NamedTuple):
    """Operations whose results are kept: of these names; ``keys``: only these of them."""

    names: frozenset[str]
    keys: frozenset[Key] | None = None


class Results:
    """What operations returned, with the versions of the tensors."""

    def __init__(self) -> None:
        self._kept: dict[Key, tuple[Any, list[int]]] = {}

    def keep(self, key: Key, result: Any) -> None:
        """An alias of each tensor, which shares its count of writes."""
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            alias = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, result)
        self._kept[key] = alias, _versions(alias)

    def take(self, key: Key) -> Any:
        """What was kept, once; None if there is nothing, or if it was written to."""
        alias, versions = self._kept.pop(key, (None, []))
        return alias if alias is not None and _versions(alias) == versions else None

    def prune(self) -> None:
        """Let go of what was written to."""
        self._kept = {key: kept for key, kept in self._kept.items() if _versions(kept[0]) == kept[1]}

    def __contains__(self, key: Key) -> bool:
        return key in self._kept


class _Numbered(TorchDispatchMode):
    """Numbers the operations that may be kept: those that draw no random numbers and write to nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, chosen: Chosen) -> None:
        super().__init__()
        self.chosen = chosen
        self._count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name not in self.chosen.names or function._schema.is_mutable or _draws(function, args, kwargs):
            return self.other(function, args, kwargs)
        key = name, self._count[name]
        self._count[name] += 1
        if self.chosen.keys is not None and key not in self.chosen.keys:
            return self.other(function, args, kwargs)
        return self.one(key, function, args, kwargs)

    def other(self, function: Any, args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def one(self, key: Key, function: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class Keeping(_Numbered):
    """Keeps the results of the chosen operations."""

    def __init__(self, chosen: Chosen) -> None:
        super().__init__(chosen)
        self.results = Results()

    def one(self, key: Key, function: Any, args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        self.results.keep(key, result)
        return result


class Giving(_Numbered):
    """Gives back kept results in place of running their operations."""

    def __init__(self, chosen: Chosen, results: Results) -> None:
        super().__init__(chosen)
        self._results = results

    def one(self, key: Key, function: Any, args: Any, kwargs: Any) -> Any:
        kept = self._results.take(key)
        return function(*args, **kwargs) if kept is None else kept


class Operation(NamedTuple):
    key: Key
    cost: float
    bytes: int


class Timing(_Numbered):
    """Times every operation up to the last one before which something was saved, and weighs those that may be kept."""

    def __init__(self, names: frozenset[str], flops_per_byte: float) -> None:
        super().__init__(Chosen(names))
        self._results, self._rate = Results(), flops_per_byte
        self._spent = 0.0
        self._found: list[Operation] = []
        self._last = 0.0, 0

    def saved(self) -> None:
        """A tensor was saved just now."""
        self._last = self._spent, len(self._found)

    @property
    def needed(self) -> float:
        """What the operations cost that lead to something saved."""
        return self._last[0]

    @property
    def operations(self) -> list[Operation]:
        """Those that may be kept, and that lead to something saved."""
        self._results.prune()
        return [op for op in self._found[: self._last[1]] if op.key in self._results and op.bytes]

    def other(self, function: Any, args: Any, kwargs: Any) -> Any:
        result, cost = self._timed(function, args, kwargs)
        self._spent += cost
        return result

    def one(self, key: Key, function: Any, args: Any, kwargs: Any) -> Any:
        result, cost = self._timed(function, args, kwargs)
        self._spent += cost
        self._found.append(Operation(key, cost, bytes_of(tensors_in([result]))))
        self._results.keep(key, result)
        return result

    def _timed(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
        start = perf_counter()
        result = function(*args, **kwargs)
        made = list(tensors_in([result]))
        if any(x.is_meta for x in made):
            count = flop_registry.get(function._overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count is not None else 0
            return result, flops + self._rate * bytes_of(made)
        for device in {x.device for x in made if x.device.type not in ("cpu", "meta")}:
            torch.accelerator.synchronize(device)
        return result, perf_counter() - start


class Enough(BaseException):
    """Everything that was asked for has been saved again: the rest of a block need not run."""


@contextmanager
def until_enough() -> Iterator[None]:
    with suppress(Enough):
        yield


def _draws(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether this operation draws random numbers, as attention with dropout does."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.name == "dropout_p":
            value = kwargs.get("dropout_p", args[place] if place < len(args) else 0.0)
            return bool(value)
    return torch.Tag.nondeterministic_seeded in function.tags


def _versions(alias: Any) -> list[int]:
    return [0 if x.is_inference() else x._version for x in tensors_in([alias])]
