"""Checkpoints as a broken disk, another tool or an attacker leaves them: one seeded change to one value of the data."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


def nodes(data: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of everything in nested mappings and lists, the whole first."""
    yield path
    if isinstance(data, dict):
        items: list[tuple[Any, Any]] = list(data.items())
    elif isinstance(data, (list, tuple)):
        items = list(enumerate(data))
    else:
        return
    for key, value in items:
        yield from nodes(value, (*path, key))


def at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def replaced(data: Any, path: Path, new: Callable[[Any], Any]) -> Any:
    """The data with another value at a path; what is beside the path is shared."""
    if not path:
        return new(data)
    changed = copy.copy(data) if isinstance(data, dict) else list(data)
    changed[path[0]] = replaced(data[path[0]], path[1:], new)
    return tuple(changed) if isinstance(data, tuple) else changed


GARBAGE = [None, "x", -5, 3.7, math.nan, math.inf, 2**70, True, [], {}, [[[{"a": [1]}]]], {"x": {"y": None}}]


def _other(value: Any, rng: random.Random) -> Any:
    garbage = [g for g in GARBAGE if type(g) is not type(value) or g != value]
    return rng.choice([*garbage, torch.tensor(math.nan), torch.zeros(2, 2)])


def _without(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        gone = rng.choice(list(value))
        return {k: v for k, v in value.items() if k != gone}
    return type(value)(v for i, v in enumerate(value) if i != rng.randrange(len(value)))


def _swapped(value: Any, rng: random.Random) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    one, two = rng.sample(keys, 2)
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[one], changed[two] = changed[two], changed[one]
    return tuple(changed) if isinstance(value, tuple) else changed


def _tensor(value: Tensor, rng: random.Random) -> Any:
    whole = not value.is_floating_point()
    changes: list[Callable[[], Any]] = [
        lambda: value.flatten()[:-1].clone(),
        lambda: value[None].clone(),
        lambda: torch.cat([value.flatten(), value.flatten()]),
        lambda: value.double().long() if not whole else value.float(),
        lambda: torch.zeros_like(value),
        lambda: value.tolist(),
        lambda: torch.full_like(value, 0 if value.dtype == torch.bool else 100 if whole else math.nan),
        lambda: torch.full_like(value, 1 if whole else math.inf),
        lambda: ~value if value.dtype == torch.bool else -value.abs() - 1 if value.dtype != torch.uint8 else value + 1,
        lambda: value.to(torch.complex64) if value.is_floating_point() else value.double(),
        lambda: torch.empty(0, dtype=value.dtype),
    ]
    return rng.choice(changes)()


def _number(value: float, rng: random.Random) -> Any:
    return rng.choice([-5, -value - 1, math.nan, math.inf, -math.inf, 10**12, 10**400, 1e300, str(value), [value]])


def mutation(data: Any, rng: random.Random, swaps: bool = True) -> tuple[Path, str, Any]:
    """Where, what was done there, and the data with it done.

    Args:
        data: Plain data and tensors.
        rng: Decides.
        swaps: Whether two values beside each other may change places.
    """
    path = rng.choice([p for p in nodes(data) if p])
    value = at(data, path)
    ways: dict[str, Callable[[Any, random.Random], Any]] = {"another": _other}
    if isinstance(value, (dict, list, tuple)) and len(value):
        ways |= {"one item less": _without} | ({"two swapped": _swapped} if len(value) > 1 and swaps else {})
    elif isinstance(value, Tensor):
        ways |= {"another tensor": _tensor, "yet another tensor": _tensor}
    elif type(value) in (int, float):
        ways |= {"another number": _number}
    name = rng.choice(list(ways))
    made = ways[name](value, rng)
    text = repr(made) if not isinstance(made, Tensor) else f"{made.dtype} {tuple(made.shape)}"
    return path, f"{name}, {text[:80]}", replaced(data, path, lambda _: made)


def mutated(data: Any, rng: random.Random, swaps: bool = True) -> tuple[str, Any]:
    """The same, where and what in one text."""
    path, what, changed = mutation(data, rng, swaps)
    return f"{'/'.join(map(str, path))}: {what}", changed
