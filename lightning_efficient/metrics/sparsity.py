"""Sparsity accumulated over tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Sparsity(Metric):
    """Entries that are exactly zero, as a share of all entries seen.

    Args:
        kwargs: Of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    zeros: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("zeros", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Add a weight of any shape."""
        self.zeros = self.zeros + (weight.numel() - torch.count_nonzero(weight))
        self.total = self.total + weight.numel()

    def compute(self) -> Tensor:
        """Scalar in [0, 1]; NaN before the first update."""
        return self.zeros / self.total
