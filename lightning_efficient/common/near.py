"""Names that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


def near_names(glob: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Existing names that a mistyped glob may have meant, best first.

    Args:
        glob: What the user wrote.
        names: Names that exist.
        count: How many to return at most.
    """
    literal = glob.replace("*", "").replace("?", "").strip(".")
    depth = literal.count(".") + 1
    # "*.atn" should find "blocks.0.attn": compare with the end of each name too, as many segments as were written.
    tails: dict[str, str] = {}
    names = [name for name in names if name]
    for name in names:
        tails.setdefault(".".join(name.split(".")[-depth:]), name)
    # The module of a parameter, wherever it is.
    parts = tuple(f".{end}" for end in [literal.rpartition(".")[0]] if end)
    close = [name for name in names if f".{name}".endswith(parts)]
    close += difflib.get_close_matches(literal, names, count)
    close += [tails[tail] for tail in difflib.get_close_matches(literal, tails, count)]
    return list(dict.fromkeys(close))[:count]


def hint(glob: str, names: Mapping[str, object]) -> str:
    """What to write instead of a glob that matches nothing: near misses, or what names there are.

    Args:
        glob: What the user wrote.
        names: Name → what bears it.
    """
    if near := near_names(glob, names):
        return f" (did you mean {quote(near)}?)"
    if typed := [name for name, thing in names.items() if name and type(thing).__name__ == glob]:
        return f": it is a type, and globs are names ({quote(typed[:3])}{', ...' if len(typed) > 3 else ''})"
    # Those that one would write: the shallowest with siblings, below wrappers that hold one part.
    depth = next((d for d in range(9) if sum(name.count(".") == d for name in names if name) > 1), 0)
    there = [name for name in names if name and name.count(".") == depth]
    return f"; there are {quote(there[:6])}{', ...' if len(there) > 6 else ''}" if there else ""


def quote(names: Sequence[str]) -> str:
    """Names in a message."""
    return ", ".join(repr(name) for name in names)
