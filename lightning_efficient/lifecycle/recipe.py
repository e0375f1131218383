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

KEY = "lightning_efficient"
VERSION = 1

_LONGEST_NAME = 4096
_MOST_METHODS = 64
_MOST_NAMES = 1_000_000


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
        return {"method": self.method, "key": self.key, "config": self.config, "tensors": self.tensors}


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
    _expect(isinstance(recipe, Mapping), "a mapping", "the recipe", recipe)
    version = recipe.get("version")
    _expect(type(version) is int and version >= 1, "a whole number from 1", "`version`", version)
    if version > VERSION:
        raise RecipeError(
            f"the checkpoint's recipe has version {version}; this lightning_efficient reads up to {VERSION}. "
            "Upgrade lightning_efficient to load it."
        )
    methods = recipe.get("methods")
    _expect(
        isinstance(methods, (list, tuple)) and len(methods) <= _MOST_METHODS,
        f"a list of at most {_MOST_METHODS}",
        "`methods`",
        methods,
    )
    return [_entry(item) for item in methods]


def _entry(item: Any) -> Entry:
    _expect(isinstance(item, Mapping), "a mapping", "a method of the recipe", item)
    method, key, config, tensors = (item.get(k) for k in ("method", "key", "config", "tensors"))
    _expect(_is_name(method), f"a string up to {_LONGEST_NAME} characters", "`method`", method)
    if method not in METHODS:
        raise RecipeError(
            f"the checkpoint names the method {_short(method)}{near(method, METHODS)}, which is not known here; known "
            f"are {', '.join(METHODS)}. Import the package that it comes from first, or upgrade lightning_efficient."
        )
    _expect(_is_name(key), f"a string up to {_LONGEST_NAME} characters", "`key`", key)
    _expect(isinstance(config, Mapping) and _is_plain(config), "plain data", f"`config` of {method}", config)
    _expect(
        isinstance(tensors, Mapping) and len(tensors) <= _MOST_NAMES,
        "a mapping",
        f"`tensors` of {method}",
        tensors,
    )
    for name, group in tensors.items():
        ok = _is_name(name) and isinstance(group, Mapping)
        ok = ok and all(_is_name(k) and type(v) is Tensor for k, v in group.items())
        _expect(ok, "named tensors", f"`tensors[{_short(name)}]` of {method}", group)
    return Entry(method, key, dict(config), {n: dict(g) for n, g in tensors.items()})


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= _LONGEST_NAME


def _is_plain(value: Any, depth: int = 0) -> bool:
    if value is None or type(value) in (bool, int, float):
        return True
    if type(value) is str:
        return len(value) <= _LONGEST_NAME
    if depth > 8:
        return False
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v, depth + 1) for v in value)
    if isinstance(value, Mapping):
        return all(_is_name(k) and _is_plain(v, depth + 1) for k, v in value.items())
    return False


def _expect(condition: bool, expected: str, what: str, value: Any) -> None:
    if not condition:
        raise RecipeError(f"{what} in the checkpoint's {KEY!r} recipe should be {expected}; got {_short(value)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
