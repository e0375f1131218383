"""``F.multi_head_attention_forward``: ``nn.MultiheadAttention`` and ``nn.TransformerEncoder``.

torch runs the body of that function with function modes off, so what happens inside cannot be watched.
Queries and keys are computed a second time from its arguments; the user's own call is not changed.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.attention.sdpa import Limits
from lightning_efficient.metrics.functional import AttentionRows, attention_rows

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def rows_of_multihead(limits: Limits, *args: Any, **kwargs: Any) -> AttentionRows:
    """Attention rows of one call, from the arguments it was given.

    Args:
        limits: How much of the call is measured.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    call = arguments_of_multihead(*args, **kwargs)
    unbatched = call.query.dim() == 2
    query, key = (x.unsqueeze(1) if unbatched else x for x in (call.query, call.key))
    n = limits.samples(query.shape[1])
    with torch.autocast(query.device.type, enabled=False):
        q, k = project(call, query[:, :n], key[:, :n])
    mask = mask_of_multihead(call, batch=query.shape[1], keep=n, extra=k.shape[2] - key.shape[0])
    return attention_rows(q, k, mask=mask, max_queries=limits.max_queries)


def arguments_of_multihead(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """The arguments of a call by name, defaults included."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def project(call: SimpleNamespace, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(batch, heads, length, head dim)``, with the extra keys that the call asks for.

    Args:
        call: The arguments of the call.
        query: Its query, ``(length, batch, width)``.
        key: Its key, likewise.
    """
    if call.use_separate_proj_weight:
        weights = call.q_proj_weight, call.k_proj_weight
    else:
        weights = call.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if call.in_proj_bias is None else call.in_proj_bias.chunk(3)[:2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32

    def heads(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], call.num_heads, -1).permute(1, 2, 0, 3)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    q = heads(project(query, weights[0], biases[0]))
    if call.static_k is not None:
        k = call.static_k.to(wide).reshape(-1, call.num_heads, *call.static_k.shape[1:])[: q.shape[0]]
    else:
        projected = project(key, weights[1], biases[1])
        if call.bias_k is not None:
            projected = torch.cat([projected, call.bias_k.to(wide).expand(1, projected.shape[1], -1)])
        k = heads(projected)
    if call.add_zero_attn:
        k = F.pad(k, (0, 0, 0, 1))
    return q, k


def mask_of_multihead(call: SimpleNamespace, batch: int, keep: int, extra: int) -> Tensor | None:
    """The call's two masks as one additive term, which is what torch makes of them as well.

    Args:
        call: The arguments of the call.
        batch: Size of the batch.
        keep: How many of its samples are wanted.
        extra: Keys beyond those of ``call.key``, seen by every query.
    """
    unbatched = call.query.dim() == 2
    masks: list[Tensor] = []
    if (padding := call.key_padding_mask) is not None:
        padding = padding.unsqueeze(0) if unbatched else padding[:keep]
        masks.append(padding[:, None, None, :])
    if (blocked := call.attn_mask) is not None:
        if blocked.dim() == 3:
            blocked = blocked.reshape(batch, call.num_heads, *blocked.shape[1:])[:keep]
        masks.append(blocked.reshape((1,) * (4 - blocked.dim()) + blocked.shape))
    total = None
    for mask in masks:
        if mask.dtype == torch.bool:  # True = may not attend
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)
        # Extra keys (bias_k, add_zero_attn) come last, and every query sees them.
        mask = F.pad(mask, (0, extra))
        total = mask if total is None else total + mask
    return total
