"""The recipe: plain, versioned data in a checkpoint that says which methods were on and what state they were in.

Nothing in a recipe is executed. Method names are looked up in the registry, everything else is numbers, strings and
tensors, so files stay loadable with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_efficient.common.registry import METHODS, near
from lightning_efficient.common.schema import Anything, Int, ListOf, MapOf, Plain, Record, TensorOf, Text, check, short

KEY = "lightning_efficient"
VERSION = 1

_MOST_METHODS = 64
_NAME = Text()
CONFIG = MapOf(_NAME, Plain())
_ENTRY = Record(
    {
        "method": _NAME,
        "key": _NAME,
        "config": CONFIG,
        "tensors": MapOf(_NAME, MapOf(_NAME, TensorOf())),
    },
    optional={"count": Int(low=0)},
)
_RECIPE = Record({"version": Int(low=1), "methods": ListOf(MapOf(_NAME, Anything()), most=_MOST_METHODS)})


class RecipeError(ValueError):
    """A checkpoint's recipe is malformed, from a newer version, or does not fit the run that loads it."""


@dataclass(frozen=True)
class Entry:
    """What one callback leaves in a checkpoint.

    Args:
        method: Name of the method, one of :data:`lightning_efficient.common.registry.METHODS`.
        key: ``state_key`` of the callback.
        config: The callback's arguments.
        tensors: Name of the parameter or module → name of the tensor → tensor.
    """

    method: str
    key: str
    config: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """The entry as plain data."""
        plain = {"method": self.method, "key": self.key, "config": self.config, "tensors": self.tensors}
        return plain | {"count": len(self.tensors)}


def check_config(who: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a file of a run with other arguments.

    Args:
        who: Name of the callback.
        then: Its arguments in the file.
        now: Those that have to be the same.

    Raises:
        RecipeError: Names the arguments that are not.
    """
    changed = [f"`{name}`: {then.get(name)!r} then, {now[name]!r} now" for name in now if then.get(name) != now[name]]
    if changed:
        raise RecipeError(
            f"{who} was configured differently when the checkpoint was written: {'; '.join(changed)}. Resume with the "
            "saved values."
        )


def write(checkpoint: dict[str, Any], entry: Entry) -> None:
    """Add an entry to a checkpoint's recipe."""
    recipe = checkpoint.setdefault(KEY, {"version": VERSION, "methods": []})
    recipe["methods"].append(entry.as_plain())


def read(checkpoint: Mapping[str, Any]) -> list[Entry]:
    """The recipe of a checkpoint, checked; empty for a checkpoint written without this package.

    Raises:
        RecipeError: The recipe is of a newer version, names an unknown method, or is not plain data.
    """
    recipe = checkpoint.get(KEY)
    if recipe is None:
        return []
    version = recipe.get("version") if isinstance(recipe, Mapping) else None
    if type(version) is int and version > VERSION:
        raise RecipeError(
            f"the checkpoint's recipe has version {short(version)}; this lightning_efficient reads up to {VERSION}. "
            "Upgrade lightning_efficient to load it."
        )
    check(recipe, _RECIPE, f"the checkpoint's {KEY!r} recipe", RecipeError)
    entries = [_entry(item) for item in recipe["methods"]]
    names = [(entry.method, entry.key) for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"the checkpoint's {KEY!r} recipe has {twice[0]} more than once; each should be there once.")
    return entries


def _entry(item: Mapping[str, Any]) -> Entry:
    method: Any = item.get("method")
    check(method, _NAME, f"the method of an entry in the checkpoint's {KEY!r} recipe", RecipeError)
    if method not in METHODS:
        raise RecipeError(
            f"the checkpoint names the method {short(method)}{near(method, METHODS)}, which is not known here; known "
            f"are {', '.join(METHODS)}. Import the package that it comes from first, or upgrade lightning_efficient."
        )
    check(item, _ENTRY, f"{method} in the checkpoint's {KEY!r} recipe", RecipeError)
    # Names that the model lacks are refused by name, where it is known; what is missing would go unnoticed.
    if len(item["tensors"]) < item.get("count", 0):
        raise RecipeError(
            f"{method} in the checkpoint's recipe, `tensors`, should name {item['count']} parameters or modules, as "
            f"its `count` says; it names {len(item['tensors'])}."
        )
    return Entry(method, item["key"], dict(item["config"]), {n: dict(g) for n, g in item["tensors"].items()})
