"""Bins of sequence length, shared by everything that is told apart by length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

EDGES = (128, 256, 512)


def length_bins(lengths: Tensor, edges: Sequence[int] = EDGES) -> Tensor:
    """The bin of each length: ``i`` where ``edges[i - 1] < length <= edges[i]``; the last bin is open.

    Args:
        lengths: Number of tokens that the model saw, integers of any shape.
        edges: Upper ends of all bins but the last, rising.

    Returns:
        int64, same shape, in ``[0, len(edges)]``.

    Raises:
        ValueError: ``edges`` is empty, does not rise, or is not positive.
        TypeError: ``lengths`` is not an integer tensor.
    """
    check_edges(edges)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"`lengths` is {lengths.dtype}; expected integers, such as `attention_mask.sum(-1)`.")
    return torch.bucketize(lengths, torch.tensor(list(edges), device=lengths.device))


def bin_labels(edges: Sequence[int] = EDGES) -> list[str]:
    """What to call the bins: ``≤128``, ``129–256``, ..., ``>512``.

    Args:
        edges: Upper ends of all bins but the last, rising.
    """
    check_edges(edges)
    between = [f"{low + 1}–{high}" for low, high in pairwise(edges)]
    return [f"≤{edges[0]}", *between, f">{edges[-1]}"]


def check_edges(edges: Sequence[int]) -> None:
    """Refuse edges that make no bins.

    Raises:
        ValueError: They are empty, do not rise, or are not positive.
    """
    if not edges or edges[0] < 1 or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"`edges` is {tuple(edges)}; expected rising lengths of at least 1, such as {EDGES}.")
