"""Names looked up in tables: the member, or a sentence with the nearest name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Member = TypeVar("Member")


def named(argument: str, name: object, table: Mapping[str, Member]) -> Member:
    """The member of this name; ValueError that names the argument, the nearest name and all known ones."""
    if not isinstance(name, str) or name not in table:
        near = get_close_matches(str(name), table, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{argument}={name!r} is unknown; {hint}known are {', '.join(map(repr, table))}")
    return table[name]
