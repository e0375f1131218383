"""RankMe accumulated over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.metrics.functional.rankme import rank_of_spectrum


class RankMe(Metric):
    """Effective rank of all embeddings seen, a label-free measure of representation collapse.

    Keeps the features x features Gram matrix in float64 (and no embeddings), which adds up over batches and
    processes; its eigenvalues are the squared singular values. Singular values below ``1e-8`` of the largest
    are rounding noise there, less than ``eps``.

    Args:
        num_features: Width of the embeddings.
        eps: Added to every normalised singular value, as in the paper.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_features`` below 1; ``update`` with another shape.

    Source: Garrido et al., ICML 2023, arXiv 2210.02885.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    gram: Tensor
    samples: Tensor

    def __init__(self, num_features: int, eps: float = 1e-7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise ValueError(f"`num_features` is {num_features}; expected at least 1.")
        self.num_features = num_features
        self.eps = eps
        self.add_state("gram", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Add embeddings.

        Args:
            embeddings: ``(samples, num_features)``.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.num_features:
            raise ValueError(
                f"`embeddings` has shape {tuple(embeddings.shape)}; expected (samples, {self.num_features})."
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            wide = embeddings.to(self.gram.dtype)
            self.gram = self.gram + wide.t() @ wide
        self.samples = self.samples + embeddings.shape[0]

    def compute(self) -> Tensor:
        """Scalar float64; NaN before the first update."""
        squared = torch.linalg.eigvalsh(self.gram).clamp(min=0).flip(0)
        count = max(1, min(int(self.samples), self.num_features))
        return rank_of_spectrum(squared[:count].sqrt(), self.eps)
