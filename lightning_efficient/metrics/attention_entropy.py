"""Attention entropy accumulated over batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.metrics.functional.attention_entropy import attention_rows
from lightning_efficient.metrics.functional.heads import HEAD_STATES, head_compute, head_update

_START = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}


class AttentionEntropy(Metric):
    """Entropy of softmax attention per head, in nats, with the fraction that has collapsed.

    ``update`` takes queries and keys, not the attention matrix, so it works beside fused kernels. ``compute`` returns
    tensors of shape ``(heads,)``: ``entropy`` and ``normalized`` (mean over rows, in nats and divided by the log of the
    visible keys), ``entropy_min`` and ``normalized_min`` (lowest row), ``collapsed`` (fraction of rows below the
    threshold), ``first_key`` (mean weight on key 0; above 0.5 is an attention sink, low in entropy and healthy),
    ``logit_norm_max``, ``ceiling`` (mean log of the visible keys), ``bound`` (mean of the lower bound that the logits'
    norms imply) and ``rows`` (how many). Rows that see fewer than two keys are left out. The queries of padded tokens
    count: mask them out with all keys to leave them out.

    Args:
        num_heads: Number of query heads.
        threshold: A row is collapsed when its normalised entropy is below this, in ``(0, 1)``. A convention,
            not the paper's.
        max_queries: Measure at most this many evenly spaced queries of every call. ``None``: all.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_heads``, ``threshold`` or ``max_queries`` out of range; ``update`` with another
            number of heads.

    Source: Zhai et al., arXiv 2303.06296.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, num_heads: int, threshold: float = 0.05, max_queries: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_heads < 1:
            raise ValueError(f"`num_heads` is {num_heads}; expected at least 1.")
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"`threshold` is {threshold}; expected a normalised entropy between 0 and 1.")
        if max_queries is not None and max_queries < 1:
            raise ValueError(f"`max_queries` is {max_queries}; expected at least 1, or None.")
        self.num_heads = num_heads
        self.threshold = threshold
        self.max_queries = max_queries
        for name, how in HEAD_STATES.items():
            # Counts must not stop at 2**24 rows, as they would in float32.
            start = torch.full((num_heads,), _START[how], dtype=torch.float64)
            self.add_state(name, start, dist_reduce_fx=how)

    @torch.no_grad()
    def update(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Add one attention call; arguments of :func:`lightning_efficient.functional.attention_entropy`.

        Args:
            q: Queries ``(batch, num_heads, queries, dim)``.
            k: Keys ``(batch, key heads, keys, dim)``.
            mask: Boolean (``True`` = may attend) or additive.
            is_causal: Query ``i`` sees keys ``0..i`` only.
            scale: Factor on ``q @ k.T``. ``None``: ``1 / sqrt(dim)``.
        """
        if q.dim() == 4 and q.shape[1] != self.num_heads:
            raise ValueError(f"q has {q.shape[1]} heads; this metric was made with num_heads={self.num_heads}.")
        rows = attention_rows(q, k, mask=mask, is_causal=is_causal, scale=scale, max_queries=self.max_queries)
        combine: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "sum": torch.add,
            "min": torch.minimum,
            "max": torch.maximum,
        }
        for name, value in head_update(rows, self.threshold).items():
            state = getattr(self, name)
            setattr(self, name, combine[HEAD_STATES[name]](state, value.to(state)))

    def compute(self) -> dict[str, Tensor]:
        """Per head, float64; NaN for every head before the first update."""
        return head_compute({name: getattr(self, name) for name in HEAD_STATES})
