"""The arithmetic of slots that hold a state or the tape of one step, both of one size, in exact integers.

With c slots, that of x_0 included, c + 1 steps are recorded in the first sweep and nothing runs twice. A longer chain is
split: keep x_0, run i steps, reverse what lies above with c - 1 slots, come back, reverse the i steps with c. A part
that begins after r such returns, and q states below it, can record c - q + 1 steps; splitting it makes room for c - q
more, each of which runs r + 1 times plainly, and moves one step more to the left. So the parts are split in the order of
r, and for one r in that of q; there are C(q+r, q) of each sort. That gives, in c slots and r returns at most, chains of
C(c+r+1, c) steps.

Found here, and equal to the recursion of :mod:`revolve.mixed` (n <= 200, c <= 21); Maddison (2024), SIAM J. Sci. Comput.
46(1), has the recursion p(n, s).
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from revolve.binomial import least_from


class _Last(NamedTuple):
    """The last sort of parts that are split, after ``returns - 1`` returns and with ``below`` states kept below."""

    returns: int
    below: int
    before: int
    """Steps that the sorts of the same number of returns made room for."""
    rest: int
    """Steps that this sort makes room for."""


def extra_steps(steps: int, slots: int) -> int:
    """The least number of plain runs; steps >= 1, slots >= 1 unless steps = 1."""
    if steps <= slots + 1:
        return 0
    r, q, before, rest = _last(steps, slots)
    full = (r - 1) * comb(slots + r, slots) - comb(slots + r, slots + 1) + comb(slots + r - 1, slots)
    splits = comb(q + r - 1, r) - (-rest // (slots - q))
    return full + r * (before + rest) + splits


def split(steps: int, slots: int) -> int:
    """How far to run before the next part begins; 0: keep the tape of the first step. One that costs least."""
    if steps <= slots + 1:
        return 0
    r, q, _, rest = _last(steps, slots)
    if r == 1:
        return steps - slots if q == 0 else slots + 1
    here = comb(q + r - 2, q) * (slots - q)
    return comb(slots + r - 1, slots) + _room(slots, r - 2, q) + min(rest, here)


def _last(steps: int, slots: int) -> _Last:
    r = least_from(lambda r: comb(slots + r + 1, slots) >= steps, 1)
    beyond = steps - comb(slots + r, slots)
    q, high = 0, slots
    while high - q > 1:
        middle = (q + high) // 2
        q, high = (middle, high) if _room(slots, r - 1, middle) < beyond else (q, middle)
    before = _room(slots, r - 1, q)
    return _Last(r, q, before, beyond - before)


def _room(slots: int, r: int, q: int) -> int:
    """Steps that the parts after r returns, with fewer than q states below them, make room for."""
    return slots * comb(q + r, r + 1) - (r + 1) * comb(q + r, r + 2)
