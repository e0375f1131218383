"""How spread out attention is: entropy per query, exact, without ever holding a whole queries x keys matrix.

The entropy of query ``i`` with weights ``p = softmax(a_i)`` over the keys it may see is ``H_i = -sum_j p_ij
log p_ij``, in nats (natural logarithm), before dropout. ``H_i = 0`` means that one key takes everything;
``log(visible keys)`` is the ceiling. Zhai et al. (ICML 2023, arXiv 2303.06296) tie its collapse to unstable
training, and bound it from below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Largest block of logits held at once (float32: 16 MiB), whatever the number of queries.
_BLOCK = 2**22
# exp(-87) is float32's smallest normal number: an additive term that far below the best one of its row is a mask,
# unless the content makes up for it: weights below 2**-24 of the largest vanish in a sum in float32.
_MASK_GAP = 87.0
_NO_WEIGHT = 24 * math.log(2)


class AttentionRows(NamedTuple):
    """What is known about each query of an attention call; every tensor is ``(batch, heads, queries)``.

    Args:
        entropy: Entropy of the attention weights in nats; NaN where a query sees no key.
        keys: Number of keys the query may see (int64).
        logit_norm: ``||a_i - mean(a_i)||_2`` of the final logits over the visible keys.
        first_key: Attention weight on key 0 (an attention sink when large); NaN where a query sees no key.
    """

    entropy: Tensor
    keys: Tensor
    logit_norm: Tensor
    first_key: Tensor


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    max_queries: int | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Entropy of softmax attention for every query, in nats.

    Exact to rounding: the logits are made block by block in float32 (float64 for float64 inputs) with
    autocast off, so memory grows with the number of keys only. Differentiable.

    Args:
        q: Queries ``(batch, heads, queries, dim)``, after rotary embeddings and query norms.
        k: Keys ``(batch, key heads, keys, dim)``; fewer key heads than heads (grouped-query attention) are
            repeated.
        scale: Factor on ``q @ k.T``. ``None``: ``1 / sqrt(dim)``.
        mask: Broadcastable to ``(batch, heads, queries, keys)``. Boolean: ``True`` = may attend. Floating
            point: added to the logits; see :func:`visible_keys` for which keys it hides.
        is_causal: Query ``i`` sees keys ``0..i`` only; together with ``mask``, both apply.
        max_queries: Use at most this many queries, evenly spaced and always the same ones (first and last
            included). The result is then a sample: entropies of those queries, themselves exact. ``None``:
            all.
        queries: Indices of the queries to use (1-D, int64), instead of ``max_queries``.

    Returns:
        ``(batch, heads, queries used)``; NaN for a query that sees no key.

    Raises:
        ValueError: Shapes that do not fit, or both ``max_queries`` and ``queries``.
        TypeError: A mask that is neither boolean nor floating point.

    Source: Zhai et al., arXiv 2303.06296, section 3.1.
    """
    return attention_rows(
        q, k, scale=scale, mask=mask, is_causal=is_causal, max_queries=max_queries, queries=queries
    ).entropy


def attention_rows(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    max_queries: int | None = None,
    queries: Tensor | None = None,
) -> AttentionRows:
    """Entropy, visible keys, logit norm and weight on key 0 of every query; see :func:`attention_entropy`.

    Args:
        q: Queries ``(batch, heads, queries, dim)``.
        k: Keys ``(batch, key heads, keys, dim)``.
        scale: Factor on ``q @ k.T``. ``None``: ``1 / sqrt(dim)``.
        mask: Boolean (``True`` = may attend) or additive, broadcastable to ``(batch, heads, queries, keys)``.
        is_causal: Query ``i`` sees keys ``0..i`` only.
        max_queries: Use at most this many evenly spaced queries.
        queries: Indices of the queries to use.

    Raises:
        ValueError: Shapes that do not fit, or both ``max_queries`` and ``queries``.
        TypeError: A mask that is neither boolean nor floating point.
    """
    index = query_indices(q.shape[2], max_queries, queries)
    with torch.autocast(q.device.type, enabled=False):
        blocks = [
            _plain_rows(logits) if seen is None else _masked_rows(logits, seen)
            for _, logits, seen in logit_blocks(q, k, scale=scale, mask=mask, is_causal=is_causal, index=index)
        ]
    return AttentionRows(*(torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True)))


def logit_blocks(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    index: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The logits, a bounded number of rows at a time; to be called with autocast off.

    Args:
        q: Queries ``(batch, heads, queries, dim)``.
        k: Keys ``(batch, key heads, keys, dim)``.
        scale: Factor on ``q @ k.T``. ``None``: ``1 / sqrt(dim)``.
        mask: Boolean (``True`` = may attend) or additive, broadcastable to ``(batch, heads, queries, keys)``.
        is_causal: Query ``i`` sees keys ``0..i`` only.
        index: Which queries; ``None``: all.

    Yields:
        Indices of some queries, their logits ``(batch, heads, some, keys)`` in float32 or wider, and which keys they
        see (broadcastable; ``None``: all).

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: A mask that is neither boolean nor floating point.
    """
    _check(q, k, mask)
    dtype = _wide(q)
    index = torch.arange(q.shape[2], device=q.device) if index is None else index.to(q.device)
    mask = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    q = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    rows = max(1, _BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for chosen in torch.split(index, rows):
        logits = q[:, :, chosen] @ k.mT
        if mask is None and not is_causal:
            yield chosen, logits, None
            continue
        seen = torch.ones(k.shape[2], dtype=torch.bool, device=q.device)
        if is_causal:
            seen = torch.arange(k.shape[2], device=q.device) <= chosen[:, None]
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, chosen]
            logits, seen = _apply_mask(logits, seen, part)
        yield chosen, logits, seen


def rows_from_logits(logits: Tensor, visible: Tensor | None = None, bias: Tensor | None = None) -> AttentionRows:
    """The same from the logits themselves, for attention that writes them out.

    Args:
        logits: ``(batch, heads, queries, keys)``, scaled, with biases and masks added.
        visible: Broadcastable boolean, ``True`` = may attend.
        bias: What of the logits is added to the product of queries and keys, masks among it, broadcastable: see
            :func:`visible_keys`. Without both, every key is visible whose logit is above half of the most negative
            number of its dtype, which is what masks of ``-inf`` and ``finfo.min`` leave.
    """
    if bias is not None:
        visible = visible_keys(logits, bias)
    elif visible is None:
        visible = ~(logits <= torch.finfo(logits.dtype).min / 2)  # a NaN is no mask
    return _masked_rows(logits.to(_wide(logits)), visible)


def visible_keys(logits: Tensor, bias: Tensor) -> Tensor:
    """Which keys a query sees, whatever number hides the others: the definition for fused and written-out attention.

    A key is hidden if what is added to its logit lies 87 or more below the largest such term of its row, and it carries
    no weight (2^-24 of the row's largest, which is nothing to a sum in float32). A key without weight that no mask has
    taken is seen: so a collapsed head sees all keys, and looks at one.

    Args:
        logits: ``(..., queries, keys)``, the bias among them.
        bias: What is added to the product of queries and keys, broadcastable; ``-inf`` and the most negative numbers
            of its dtype hide a key in every case.

    Returns:
        Boolean, of the shape of ``logits``.
    """
    lowest = torch.finfo(bias.dtype if bias.dtype == torch.float16 else torch.float32).min / 4
    left = ~(bias <= lowest)  # a NaN is no mask
    top = bias.masked_fill(~left, -torch.inf).amax(-1, keepdim=True)
    weighs = logits >= logits.masked_fill(~left, -torch.inf).amax(-1, keepdim=True) - _NO_WEIGHT
    return left & ((bias >= top - _MASK_GAP) | weighs)


def _plain_rows(logits: Tensor) -> AttentionRows:
    """Every key visible: few passes over the logits, as most attention is like that."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    n = logits.shape[-1]
    return AttentionRows(
        entropy=-torch.linalg.vecdot(p, log_p),
        keys=torch.full(logits.shape[:-1], n, device=logits.device),
        logit_norm=log_p.var(-1, correction=0).sqrt() * n**0.5,  # log p is the logits less a constant
        first_key=p[..., 0],
    )


def _masked_rows(logits: Tensor, visible: Tensor) -> AttentionRows:
    keys = visible.expand(*visible.shape[:-1], logits.shape[-1]).sum(-1).expand(logits.shape[:-1])
    empty = keys == 0
    logits = logits.masked_fill(~visible, -torch.inf).masked_fill(empty.unsqueeze(-1), 0.0)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    # Masked keys have p = 0 and log p = -inf; the fill keeps their product, and its gradient, at zero.
    entropy = -(p * log_p.masked_fill(~visible, 0.0)).sum(-1)
    return AttentionRows(
        entropy=entropy.masked_fill(empty, torch.nan),
        keys=keys,
        logit_norm=row_logit_norm(logits, visible),
        first_key=p[..., 0].masked_fill(empty, torch.nan),
    )


def row_logit_norm(logits: Tensor, visible: Tensor | None = None) -> Tensor:
    """``s_i = ||a_i - mean(a_i)||_2`` over the visible keys: a row's distance from uniform attention.

    Args:
        logits: ``(..., keys)``: final logits.
        visible: Broadcastable boolean, ``True`` = may attend. ``None``: all keys.

    Returns:
        ``(...)``, zero for a row that sees one key or none.
    """
    if visible is None:
        visible = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    seen = logits.masked_fill(~visible, 0.0)
    mean = seen.sum(-1, keepdim=True) / visible.expand(logits.shape).sum(-1, keepdim=True).clamp(min=1)
    norm: Tensor = torch.linalg.vector_norm((seen - mean).masked_fill(~visible, 0.0), dim=-1)
    return norm


def normalized_entropy(entropy: Tensor, keys: Tensor) -> Tensor:
    """Entropy divided by its ceiling ``log(keys)``, so that lengths and masks compare.

    Args:
        entropy: In nats, any shape.
        keys: Number of visible keys, same shape.

    Returns:
        In ``[0, 1]``; NaN where fewer than two keys are visible, as such a row has no choice to make.
    """
    return torch.where(keys > 1, entropy / keys.clamp(min=2).to(entropy.dtype).log(), torch.nan)


def entropy_lower_bound(logit_norm: Tensor, keys: Tensor) -> Tensor:
    """The smallest entropy that a row of logits with this norm can have.

    With ``n`` keys, ``s`` the norm and ``beta = exp(-s sqrt(n / (n - 1)))``:
    ``log(1 + (n - 1) beta) + s sqrt(n (n - 1)) beta / (1 + (n - 1) beta)``. Attained by one raised logit, all
    others equal. The paper states it with ``s`` bounded by spectral norms of the weights and the input, which
    is vacuous at real sizes; the row's own centred norm (:func:`row_logit_norm`) makes it a tight invariant.

    Args:
        logit_norm: ``||a_i - mean(a_i)||_2``, any shape, non-negative.
        keys: Number of visible keys, same shape.

    Returns:
        In nats; 0 where fewer than two keys are visible.

    Source: Zhai et al., arXiv 2303.06296, theorem 3.1.
    """
    n = keys.clamp(min=2).to(logit_norm.dtype)
    beta = torch.exp(-logit_norm * (n / (n - 1)).sqrt())
    rest = (n - 1) * beta
    bound = rest.log1p() + logit_norm * (n * (n - 1)).sqrt() * beta / (1 + rest)
    return torch.where(keys > 1, bound, 0.0)


def query_indices(length: int, max_queries: int | None = None, queries: Tensor | None = None) -> Tensor:
    """Which queries are measured.

    Args:
        length: Number of queries there are.
        max_queries: At most this many, evenly spaced, first and last included.
        queries: Explicit indices instead.

    Returns:
        Sorted int64 indices on the CPU, or ``queries`` itself.

    Raises:
        ValueError: Both arguments are given, or ``max_queries`` is below 1.
    """
    if queries is not None:
        if max_queries is not None:
            raise ValueError(f"give `queries` or `max_queries={max_queries}`, not both.")
        return queries
    if max_queries is None or max_queries >= length:
        return torch.arange(length)
    if max_queries < 1:
        raise ValueError(f"`max_queries` is {max_queries}; expected at least 1, or None for all queries.")
    # Evenly spaced over both ends: on a square grid of patches this walks a diagonal, not a column.
    return torch.linspace(0, length - 1, max_queries, dtype=torch.float64).round().long()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _apply_mask(logits: Tensor, visible: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.dtype == torch.bool:
        return logits, visible & mask
    total = logits + mask.to(logits.dtype)
    return total, visible_keys(total.masked_fill(~visible, -torch.inf), mask.masked_fill(~visible, -torch.inf))


def _check(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"expected q and k of shape (batch, heads, length, dim); got {shapes}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q and k need one batch, one dim, and heads a multiple of key heads; got {shapes}.")
    if not math.prod(q.shape) or not k.shape[2]:
        raise ValueError(f"there is nothing to attend with or to: {shapes}.")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"`mask` is {mask.dtype}; expected bool (True = may attend) or floating point (added).")
    target = (*q.shape[:3], k.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(have not in (1, want) for have, want in zip(sizes, target, strict=True)):
        raise ValueError(f"`mask` {tuple(mask.shape)} does not broadcast to (batch, heads, queries, keys) {target}.")
