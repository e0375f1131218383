"""``F.scaled_dot_product_attention``: timm (fused), Hugging Face ``sdpa``, and most modern code."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lightning_efficient.metrics.functional import AttentionRows, attention_rows


def rows_of_sdpa(limits: Limits, *args: Any, **kwargs: Any) -> AttentionRows:
    """Attention rows of one call, from the arguments it was given.

    Args:
        limits: How much of the call is measured.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        UnknownAttentionError: The shapes do not say which axis holds the heads, or the tensors are nested.
    """
    q, k, mask, is_causal, scale = _arguments(*args, **kwargs)
    if q.is_nested or k.is_nested:
        raise UnknownAttentionError("scaled_dot_product_attention on nested tensors")
    if q.dim() < 3 or k.dim() != q.dim():
        raise UnknownAttentionError(
            f"scaled_dot_product_attention on queries of shape {tuple(q.shape)}, keys {tuple(k.shape)}"
        )
    if q.dim() > 4 and mask is not None:
        mask = mask.expand(*q.shape[:-2], *mask.shape[-2:])
    if mask is not None and mask.dim() == q.dim() != 4:
        mask = limits.by_head(mask)
    elif mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[: limits.samples(q.shape[0])]
    q, k = limits.by_head(q), limits.by_head(k)
    return attention_rows(q, k, mask=mask, is_causal=is_causal, scale=scale, max_queries=limits.max_queries)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, bool, float | None]:
    return query, key, attn_mask, is_causal, scale


class UnknownAttentionError(ValueError):
    """A call that looks like attention and cannot be read without guessing; the message says why."""


class Limits(NamedTuple):
    """What is measured of each call.

    Args:
        max_samples: Rows of the batch, from the first. ``None``: all.
        max_queries: Evenly spaced queries. ``None``: all.
    """

    max_samples: int | None = None
    max_queries: int | None = None

    def by_head(self, tensor: Tensor) -> Tensor:
        """The samples that are measured, as ``(samples, heads, length, ...)``.

        Three axes may have batch and heads merged in the first, in either order, and more than four hold heads and
        windows in either order. Nothing says which, and a mean over heads would hide a collapsed one: every entry of
        the leading axes counts as a head then, and of three axes all are measured.

        Args:
            tensor: ``(batch, heads, length, ...)``; or another number of leading axes.
        """
        if tensor.dim() == 3:
            return tensor.unsqueeze(0)
        return tensor[: self.samples(tensor.shape[0])].flatten(1, -3)

    def samples(self, batch: int) -> int:
        """How many samples of a batch of this size are measured."""
        return batch if self.max_samples is None else min(batch, self.max_samples)
