"""Alignment and uniformity of embeddings, accumulated over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_efficient.metrics.functional.embedding_spread import alignment_terms, uniformity
from lightning_efficient.metrics.functional.spectrum import check_embeddings


class Alignment(Metric):
    """Mean distance of positive pairs on the unit sphere, to the power ``alpha``.

    Args:
        alpha: Power, above 0.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``alpha`` out of range; ``update`` with shapes that do not fit, or with NaN or infinite values.

    Source: Wang and Isola, ICML 2020, arXiv 2005.10242.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    pairs: Tensor

    def __init__(self, alpha: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not alpha > 0:
            raise ValueError(f"`alpha` is {alpha}; expected a power above 0.")
        self.alpha = alpha
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add pairs.

        Args:
            x: ``(pairs, features)``.
            y: The other side of each pair, same shape.
        """
        terms = alignment_terms(x, y, self.alpha)
        check_embeddings(x)
        check_embeddings(y)
        self.total = self.total + terms.sum(dtype=torch.float64)
        self.pairs = self.pairs + len(terms)

    def compute(self) -> Tensor:
        """Scalar float64; NaN before the first pair."""
        return self.total / self.pairs


class Uniformity(Metric):
    """Log of the mean Gaussian potential over all pairs of embeddings seen; lower is more uniform.

    It is no sum over samples, so the embeddings are kept (and gathered from all processes): give it some thousands.

    Args:
        t: Sharpness of the potential, above 0.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``t`` out of range; ``update`` with something that is no matrix, or with NaN or infinite values.

    Source: Wang and Isola, ICML 2020, arXiv 2005.10242.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    embeddings: list[Tensor] | Tensor

    def __init__(self, t: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not t > 0:
            raise ValueError(f"`t` is {t}; expected a number above 0.")
        self.t = t
        self.add_state("embeddings", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Add embeddings.

        Args:
            embeddings: ``(samples, features)``.
        """
        check_embeddings(embeddings)
        self.embeddings = [*self.embeddings, embeddings.detach()]

    def compute(self) -> Tensor:
        """Scalar; NaN below two samples."""
        if not len(self.embeddings):  # a list, or one tensor once it was gathered from all processes
            return torch.tensor(torch.nan, device=self.device)
        return uniformity(dim_zero_cat(self.embeddings), self.t)
