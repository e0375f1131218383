"""Tensors in nested containers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, sequences and dataclasses, with the path that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, (tuple, list)):
        items = iter(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, item in items:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or the result of a torch function: nested in sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for item in value.values() for t in tensors_in(item))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from (t for item in value for t in tensors_in(item))


def tensors_behind(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in what a model returned: also those in attributes of objects of any class."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for item in value.values() for t in tensors_behind(item, seen))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from (t for item in value for t in tensors_behind(item, seen))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        yield from (t for item in vars(value).values() for t in tensors_behind(item, seen))


def outputs_in(value: Any) -> Iterator[Tensor]:
    """The same, without what a model keeps for its next call: the keys and values of Hugging Face's caches."""
    library = sys.modules.get("transformers.cache_utils")
    if library is not None:
        value = mapped(value, lambda leaf: None if isinstance(leaf, library.Cache) else leaf)
    return tensors_behind(value)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dicts with ``change`` applied to every leaf."""
    if isinstance(value, list | tuple):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return change(value)
