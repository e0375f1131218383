"""One embedding a sample out of whatever a module returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from lightning_efficient.common.nests import named_tensors

Pool: TypeAlias = Literal["mean", "cls", "flatten"]
POOLS: tuple[str, ...] = get_args(Pool)
# Arguments that say which tokens count, and what they say of those that do.
_MASKS = {"attention_mask": True, "src_key_padding_mask": False, "key_padding_mask": False}


def tensor_of(output: Any, path: str | None = None) -> Tensor:
    """The tensor that is meant by what a module returned.

    Args:
        output: A tensor, or tuples, mappings and dataclasses that hold some (Hugging Face's outputs).
        path: Which, such as ``"last_hidden_state"`` or ``"0"``. ``None``: the first with at least two axes.

    Raises:
        ValueError: There is none, or a plain mapping has several and no ``path`` is given.
    """
    found = {name: t for name, t in named_tensors(output) if t.is_floating_point() and t.dim() > 1}
    shapes = ", ".join(f"{name or 'tensor'} {tuple(t.shape)}" for name, t in found.items())
    kind = type(output).__name__
    if not found:
        raise ValueError(f"it returned {kind} without a floating-point tensor of two axes or more.")
    if path is None:
        # The first is the main one in a tuple and in Hugging Face's outputs, by convention; not in a user's mapping.
        if len(found) > 1 and isinstance(output, Mapping) and not is_dataclass(output):
            raise ValueError(f"it returned several tensors ({shapes}): say which one by `output`.")
        return next(iter(found.values()))
    if path not in found:
        raise ValueError(f"`output={path!r}` is not in the {kind} that it returned; it has {shapes}.")
    return found[path]


def hidden_tokens(kwargs: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    """Which tokens count, by the mask that the module was called with.

    Args:
        kwargs: Keyword arguments of the call; ``attention_mask``, or a key padding mask as torch's modules take it.
        tokens: ``(batch, tokens, features)`` that it returned.

    Returns:
        Boolean ``(batch, tokens)``, or ``None`` if no such mask was given.
    """
    for name, counts in _MASKS.items():
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2] and not mask.is_floating_point():
            return (mask != 0) == counts
    return None


def pooled(tensor: Tensor, pool: Pool | None, mask: Tensor | None = None, channels_last: bool = False) -> Tensor:
    """Embeddings as rows.

    Args:
        tensor: ``(batch, features)``, which stays as it is; ``(batch, tokens, features)``; or a feature map ``(batch,
            channels, ...)``.
        pool: ``"mean"`` over tokens or positions, ``"cls"``: the first token, ``"flatten"``: all of a sample in one
            vector, ``None``: every token or position is a sample.
        mask: Boolean ``(batch, tokens)``: which tokens count, for ``"mean"`` and ``None``.
        channels_last: A feature map is ``(batch, ..., channels)``.

    Returns:
        ``(samples, features)``.

    Raises:
        ValueError: A shape that is none of these, or ``"cls"`` of a feature map.
    """
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() < 2 or (tensor.dim() > 3 and pool == "cls"):
        why = "a feature map has no first token: use 'mean'" if tensor.dim() > 3 else "expected at least two axes"
        raise ValueError(f"its output has shape {tuple(tensor.shape)} and `pool` is {pool!r}: {why}.")
    if pool == "flatten":
        return tensor.flatten(1)
    if tensor.dim() > 3:
        tensor = (tensor if channels_last else tensor.movedim(1, -1)).flatten(1, -2)
    if pool == "cls":
        return tensor[:, 0]
    if mask is None:
        return tensor.flatten(0, 1) if pool is None else tensor.mean(1)
    if pool is None:
        return tensor[mask]
    weight = mask[..., None].to(tensor.dtype)
    return (tensor * weight).sum(1) / weight.sum(1).clamp(min=1)
