"""The arithmetic of binomial checkpointing, in exact integers.

Source: Griewank & Walther (2000), ACM TOMS 26(1) 19-45 (Algorithm 799); Griewank (1992), Optim. Methods Softw. 1.
``slots`` includes the slot that holds x_0. The literature writes the capacity both as beta(r, c) and as beta(c, r), so
every argument here is given by keyword. Sizes may be any integer; nothing loops over the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from operator import index


def beta(*, slots: int, repetitions: int) -> int:
    """The longest chain that ``slots`` reverse with no step run plainly more than ``repetitions`` times: C(c+r, c)."""
    return _beta(whole("slots", slots), whole("repetitions", repetitions))


def repetitions(*, steps: int, slots: int) -> int:
    """The least r with beta(c, r) >= n: how often, at most, a step runs plainly."""
    steps, slots = check(steps, slots)
    return _repetitions(steps, slots)


def extra_steps(*, steps: int, slots: int) -> int:
    """The least number of plain runs that reverse the chain: t(n, c) = r n - beta(c+1, r-1)."""
    steps, slots = check(steps, slots)
    r = _repetitions(steps, slots)
    return r * steps - _beta(slots + 1, r - 1)


def optimal_splits(*, steps: int, slots: int) -> range:
    """Every m for which "keep x_0, run to x_m, keep it" begins a schedule of least recomputation.

    A single step (n = 1) is recorded at once and has no split.
    """
    steps, slots = check(steps, slots)
    return _splits(steps, slots)


def fewest_writes(*, steps: int, slots: int) -> int:
    """The least number of saves, that of x_0 included, among schedules of least recomputation."""
    steps, slots = check(steps, slots)
    if steps == 1:
        return 0
    r = _repetitions(steps, slots)
    return max(_beta(slots - 1, r - 1), steps - _beta(slots, r - 1))


def first_split(steps: int, slots: int) -> int:
    """The largest optimal split that also begins a schedule of fewest writes; steps >= 2, slots >= 1.

    Writes are flat in the length of a chain, then rise by one a step (see :func:`fewest_writes`). The left part is
    taken to the end of its flat stretch, or further when the right part would otherwise leave its own.
    """
    if slots == 1:
        return steps - 1
    r = _repetitions(steps, slots)
    splits = _splits(steps, slots)
    left_flat = _beta(slots, r - 2) + _beta(slots - 1, r - 2)
    right_flat = _beta(slots - 1, r - 1) + _beta(slots - 2, r - 1)
    return max(splits[0], min(splits[-1], max(left_flat, steps - right_flat)))


def fewest_slots(*, steps: int, repetitions: int | None = None, extra_steps: int | None = None) -> int:
    """The fewest slots that reverse the chain within the wanted repetitions, or the wanted number of plain runs."""
    steps = whole("steps", steps, least=1)
    _one_of(repetitions, extra_steps)
    if steps == 1:
        return 0
    if repetitions is not None:
        wanted = whole("repetitions", repetitions, least=1)
        return least_from(lambda c: _beta(c, wanted) >= steps, 1)
    limit = whole("extra_steps", extra_steps)
    if limit < steps - 1:
        raise ValueError(
            f"extra_steps={limit} cannot reverse {steps} steps: the first sweep alone runs {steps - 1}; "
            f"give at least {steps - 1}"
        )
    return least_from(lambda c: _extra(steps, c) <= limit, 1)


def longest_chain(*, slots: int, repetitions: int | None = None, extra_steps: int | None = None) -> int:
    """The longest chain that the slots reverse within the wanted repetitions, or the wanted number of plain runs."""
    slots = whole("slots", slots)
    _one_of(repetitions, extra_steps)
    if repetitions is not None:
        return beta(slots=slots, repetitions=repetitions)
    limit = whole("extra_steps", extra_steps)
    if slots == 0:
        return 1
    return least_from(lambda n: _extra(n + 1, slots) > limit, 1)


def check(steps: int, slots: int) -> tuple[int, int]:
    """Both as integers; raises unless the slots can reverse the chain at all."""
    steps, slots = whole("steps", steps, least=1), whole("slots", slots)
    if slots == 0 and steps > 1:
        raise ValueError(f"slots=0 cannot reverse {steps} steps; give at least 1")
    return steps, slots


def whole(name: str, value: object, *, least: int = 0) -> int:
    """The argument as a Python integer of at least ``least``."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is not an integer") from None
    if number < least:
        raise ValueError(f"{name}={number} is too small; give at least {least}")
    return number


def _one_of(repetitions: int | None, extra_steps: int | None) -> None:
    if (repetitions is None) == (extra_steps is None):
        raise ValueError("give exactly one of repetitions= and extra_steps=")


def _beta(c: int, r: int) -> int:
    return comb(c + r, c if c < r else r) if r >= 0 else 0


def _repetitions(n: int, c: int) -> int:
    return 0 if n == 1 else least_from(lambda r: _beta(c, r) >= n, 1)


def _extra(n: int, c: int) -> int:
    r = _repetitions(n, c)
    return r * n - _beta(c + 1, r - 1)


def _splits(n: int, c: int) -> range:
    if n == 1:
        return range(0)
    if c == 1:
        return range(n - 1, n)
    r = _repetitions(n, c)
    least = max(1, _beta(c, r - 2), n - _beta(c - 1, r))
    most = min(n - 1, _beta(c, r - 1), n - _beta(c - 1, r - 1))
    return range(least, most + 1)


def least_from(holds: Callable[[int], bool], start: int) -> int:
    """The least integer from start on for which a monotone predicate holds."""
    high = start
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return max(high, start)
