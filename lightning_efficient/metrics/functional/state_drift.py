"""Whether a recurrent state keeps its scale on sequences longer than those of training."""

from __future__ import annotations

import torch
from torch import Tensor


def state_variance(states: Tensor) -> Tensor:
    """Unbiased variance over the entries of a head's state.

    Args:
        states: ``(samples, tokens, heads, ...)``, the state after each token.

    Returns:
        ``(samples, tokens, heads)`` float64 (float32 on devices without it).

    Raises:
        ValueError: Fewer than four axes, or heads of a single entry.
    """
    if states.dim() < 4 or states.shape[3:].numel() < 2:
        raise ValueError(
            f"`states` has shape {tuple(states.shape)}; expected (samples, tokens, heads, ...) with at least two "
            "entries a head."
        )
    wide = states.detach() if states.device.type == "mps" else states.detach().double()
    return wide.flatten(3).var(-1)


def state_drift(states: Tensor, train_length: int) -> Tensor:
    """How much larger a recurrent state becomes past the training length than it ever is within it.

    Args:
        states: ``(samples, tokens, heads, ...)``, the state after each token, from the first on.
        train_length: Tokens of the longest sequence in training; fewer than ``tokens``.

    Returns:
        ``(heads,)``: largest variance of a head's state, mean over samples, at a token past ``train_length`` over the
        largest one up to it. Near 1: the state keeps its scale.

    Raises:
        ValueError: Another shape, or no token past ``train_length``, or none before it.

    Source: Chen et al., *Stuffed Mamba*, 2024, arXiv 2410.07145.
    """
    curve = state_variance(states).mean(0)
    if not 0 < train_length < len(curve):
        raise ValueError(
            f"`train_length` is {train_length}; expected from 1 below the {len(curve)} tokens of `states`."
        )
    return curve[train_length:].amax(0) / curve[:train_length].amax(0)


def buckets(train_length: int, max_length: int, width: int) -> Tensor:
    """Last token of each bucket, whole ones counted from ``train_length`` to both sides; int64, ascending."""
    before, after = -(-train_length // width), -(-(max_length - train_length) // width)
    return train_length + width * torch.arange(1 - before, after + 1)
