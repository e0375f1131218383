"""Share of weights that are zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sparsity(tensors: Tensor | Iterable[Tensor]) -> Tensor:
    """Entries that are exactly zero, as a share of all.

    Args:
        tensors: One tensor or several, of any shapes; all count by their number of entries.

    Returns:
        Scalar float64 (float32 on MPS) in [0, 1]; NaN for no entries at all.
    """
    everything = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    total = sum(t.numel() for t in everything)
    if not total:
        return torch.tensor(torch.nan, dtype=torch.float64)
    zeros = torch.stack([t.numel() - torch.count_nonzero(t) for t in everything]).sum()
    return zeros.to(torch.float32 if zeros.device.type == "mps" else torch.float64) / total
