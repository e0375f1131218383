"""Length collapse accumulated over batches and processes: cosine between embeddings, and attention's filter rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.metrics.functional.embedding_spread import check_lengths, cosine_from_sums, cosine_sums
from lightning_efficient.metrics.functional.filter_rate import attention_filter_rate
from lightning_efficient.metrics.functional.lengths import EDGES, check_edges, length_bins


class CosineByLength(Metric):
    """Mean cosine over all pairs of embeddings seen, within each bin of lengths; it rises where length collapses.

    Keeps the sum of the unit vectors of each bin in float64, and no embeddings. ``compute`` returns ``(bins,)``; plot
    several of them with :func:`lightning_efficient.metrics.plot_by_length`.

    Args:
        num_features: Width of the embeddings.
        edges: Upper ends of all bins but the last, in tokens: ``(128, 256)`` makes ≤128, 129–256 and >256.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_features`` or ``edges`` out of range; ``update`` with another shape.

    Source: Zhou et al., ACL 2025, arXiv 2410.24200.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    squares: Tensor
    samples: Tensor

    def __init__(self, num_features: int, edges: Sequence[int] = EDGES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise ValueError(f"`num_features` is {num_features}; expected at least 1.")
        check_edges(edges)
        self.num_features = num_features
        self.edges = tuple(edges)
        bins = len(self.edges) + 1
        self.add_state("total", torch.zeros(bins, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, embeddings: Tensor, lengths: Tensor) -> None:
        """Add embeddings.

        Args:
            embeddings: ``(samples, num_features)``.
            lengths: Tokens that the model saw of each, int ``(samples,)``.
        """
        check_lengths(embeddings, lengths)
        if embeddings.shape[1] != self.num_features:
            raise ValueError(
                f"`embeddings` has shape {tuple(embeddings.shape)}; expected (samples, {self.num_features})."
            )
        sums = cosine_sums(embeddings.double(), length_bins(lengths, self.edges), len(self.edges) + 1)
        self.total, self.squares, self.samples = (
            state + new.to(state) for state, new in zip((self.total, self.squares, self.samples), sums, strict=True)
        )

    def compute(self) -> Tensor:
        """``(len(edges) + 1,)`` float64; NaN for a bin of fewer than two samples."""
        return cosine_from_sums(self.total, self.squares, self.samples)


class FilterRate(Metric):
    """Mean filter rate ``σ_a = ‖H A‖₂`` of attention within each bin of lengths; it falls where length collapses.

    ``update`` takes queries and keys, not the attention matrix. ``compute`` returns ``(bins,)``, the mean over samples
    and heads.

    Args:
        edges: Upper ends of all bins but the last, in tokens.
        iterations: Of the power iteration, see :func:`lightning_efficient.functional.filter_rate`.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``edges`` or ``iterations`` out of range; ``update`` with shapes that do not fit.

    Source: Zhou et al., ACL 2025, arXiv 2410.24200, lemma 1.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, edges: Sequence[int] = EDGES, iterations: int = 50, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_edges(edges)
        if iterations < 1:
            raise ValueError(f"`iterations` is {iterations}; expected at least 1.")
        self.edges = tuple(edges)
        self.iterations = iterations
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(len(self.edges) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Add one attention call; arguments of :func:`lightning_efficient.functional.attention_filter_rate`.

        Args:
            q: Queries ``(batch, heads, queries, dim)``.
            k: Keys ``(batch, key heads, keys, dim)``.
            mask: Boolean (``True`` = may attend) or additive.
            is_causal: Query ``i`` sees keys ``0..i`` only.
            scale: Factor on ``q @ k.T``. ``None``: ``1 / sqrt(dim)``.
            tokens: Boolean ``(batch, queries)``: ``False`` = padding. ``None``: no padding. Samples of fewer than two
                tokens are left out.
        """
        rates = attention_filter_rate(
            q, k, scale=scale, mask=mask, is_causal=is_causal, tokens=tokens, iterations=self.iterations
        )
        full = torch.full((len(q),), q.shape[2], device=q.device)
        lengths = full if tokens is None else tokens.sum(-1)
        use = lengths > 1
        bins = length_bins(lengths[use], self.edges)
        sums = rates[use].sum(1).to(self.total)
        self.total = self.total.index_add(0, bins, sums)
        self.count = self.count.index_add(0, bins, torch.full_like(sums, rates.shape[1]))

    def compute(self) -> Tensor:
        """``(len(edges) + 1,)`` float64; NaN for a bin without samples."""
        return torch.where(self.count > 0, self.total / self.count, torch.nan)
