"""Effective rank of a set of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(embeddings: Tensor, eps: float = 1e-7) -> Tensor:
    """RankMe: ``exp`` of the entropy of the normalised singular values, a smooth rank.

    Args:
        embeddings: ``(samples, features)``; more samples than features give a meaningful upper limit.
        eps: Added to every normalised singular value, as in the paper.

    Returns:
        Scalar, float32 or wider, from about 1 (all embeddings on one line) to ``min(samples, features)``; NaN
        if all embeddings are zero, as no direction is used.

    Raises:
        ValueError: ``embeddings`` is not a matrix with at least one row and column.

    Source: Garrido et al., ICML 2023, arXiv 2210.02885, equations 1 and 2. Nothing is centred.
    """
    if embeddings.dim() != 2 or not embeddings.numel():
        raise ValueError(f"`embeddings` has shape {tuple(embeddings.shape)}; expected (samples, features), neither 0.")
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    with torch.autocast(embeddings.device.type, enabled=False):
        return rank_of_spectrum(torch.linalg.svdvals(embeddings.to(wide)), eps)


def rank_of_spectrum(singular_values: Tensor, eps: float = 1e-7) -> Tensor:
    """The same from singular values.

    Args:
        singular_values: Non-negative, ``(count,)``.
        eps: Added to every normalised singular value.
    """
    p = singular_values / singular_values.sum() + eps
    return torch.exp(-(p * p.log()).sum())
