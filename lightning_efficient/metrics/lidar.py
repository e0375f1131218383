"""LiDAR accumulated over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.lidar import lidar_of_scatter, view_sums
from lightning_efficient.metrics.streaming import StreamingMetric

_AXES = {"samples": 0, "more": 0, "total": 1, "between": 2, "within": 2}  # of the sums


class LiDAR(StreamingMetric):
    """Effective rank of what tells samples apart, relative to how the views of a sample scatter.

    Where :class:`RankMe` counts every direction, this one counts those in which samples differ by more than their
    augmentations do. Keeps sums in float64 and no embeddings. Few samples limit the rank: compare at the same number.

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        delta: Added to the diagonal of the scatter within samples. With 0 the value does not change under invertible
            linear maps.
        eps: Added to every normalised eigenvalue.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_features`` below 1 or a negative ``delta``; ``update`` with another shape, fewer than two
            views, NaN or infinite values; ``compute`` below two samples, or with a scatter that is singular.

    Source: Thilak et al., ICLR 2024, arXiv 2312.04000.
    """

    higher_is_better = True
    samples: Tensor
    total: Tensor

    def __init__(self, num_features: int | None = None, delta: float = 1e-4, eps: float = 1e-7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features is not None and num_features < 1:
            raise ValueError(f"`num_features` is {num_features}; expected at least 1.")
        if not delta >= 0:
            raise ValueError(f"`delta` is {delta}; expected at least 0.")
        self.num_features, self.delta, self.eps = num_features, delta, eps
        for name, axes in _AXES.items():
            self.add_sum(name, axes)

    @torch.no_grad()
    def update(self, views: Tensor) -> None:
        """Add samples, each with all of its views.

        Args:
            views: ``(samples, views, num_features)``; the number of views may differ between updates.
        """
        known = self.width(self.total, 1 if int(self.samples) else self.num_features)
        self.add(**dict(zip(_AXES, view_sums(self.wide(views), known), strict=True)))

    def compute(self) -> Tensor:
        """Scalar float64; NaN if all samples have the same mean."""
        sums: dict[str, Tensor] = {name: getattr(self, name) for name in _AXES}
        return lidar_of_scatter(**sums, delta=self.delta, eps=self.eps)
