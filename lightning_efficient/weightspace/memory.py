"""What an optimizer remembers of a transform's own parameter, kept while that is not with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_efficient.common.shards import local
from lightning_efficient.weightspace.layout import Layout

# Before the names under which a state of a transform has it in files.
MEMORY = "optimizer."
# Behind that of a number, which becomes a tensor there.
_NUMBER = ".number"

# Parameter of a transform → the optimizer's state of it.
Memory: TypeAlias = dict[nn.Parameter, dict[str, Any]]


def pack(memory: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state of one parameter as tensors: what is neither a tensor nor a number is left out.

    Args:
        memory: Name → value, such as ``exp_avg``.
    """
    tensors = {MEMORY + name: local(value).clone() for name, value in memory.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in memory.items() if type(value) in (int, float)}
    return tensors | {MEMORY + name + _NUMBER: torch.tensor(value) for name, value in numbers.items()}


def without_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transform's own part of its state in a file.

    Args:
        state: With what :func:`pack` has added.
    """
    return {name: value for name, value in state.items() if not name.startswith(MEMORY)}


def misfit(memory: Mapping[str, Any], theta: nn.Parameter, like: Mapping[str, Any]) -> str | None:
    """What is wrong with what an optimizer should remember of a parameter; None: nothing.

    Args:
        memory: As :func:`unpack` returns it.
        theta: The parameter.
        like: What the same optimizer remembers of another parameter: the same things, of that one's shape.
    """
    known = {name: value for name, value in like.items() if isinstance(value, Tensor) or type(value) in (int, float)}
    if memory.keys() != known.keys():
        return f"the optimizer should remember {sorted(known)} of its parameter, and there is {sorted(memory)}"
    for name, value in memory.items():
        other = known[name]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            fits = type(value) is type(other)
        elif other.ndim == 0:
            fits = value.ndim == 0 and value.dtype == other.dtype
        else:
            fits = value.shape == theta.shape and value.dtype == theta.dtype
        if not fits:
            return f"{MEMORY}{name} is {_kind(value)}, beside {_kind(other)} of the weight"
    return None


def is_factored(memory: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    """Whether an optimizer remembers a matrix by other things than a vector (Adafactor, 8 bits).

    Args:
        memory: What it remembers of a parameter.
        parameter: That one.
    """
    return any(isinstance(v, Tensor) and v.ndim > 0 and v.shape != parameter.shape for v in memory.values())


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def unpack(state: Mapping[str, Tensor], theta: nn.Parameter, layout: Layout) -> dict[str, Any]:
    """The inverse of :func:`pack`, from the entries of a state that begin with :data:`MEMORY`.

    Args:
        state: A state of the transform.
        theta: Its parameter.
        layout: Of the weight that it belongs to.
    """
    found: dict[str, Any] = {}
    for name, value in state.items():
        if name.endswith(_NUMBER) and name.startswith(MEMORY):
            found[name.removeprefix(MEMORY).removesuffix(_NUMBER)] = value.item()
        elif name.startswith(MEMORY):
            mine = value.shape == theta.shape  # counters stay where they are, as torch's own do
            value = layout.repeated(value.to(theta.device, copy=True)) if mine else value.clone()
            found[name.removeprefix(MEMORY)] = value
    return found
