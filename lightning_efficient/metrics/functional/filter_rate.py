"""How much of the differences between tokens an attention lets through: the norm of its high-pass part.

Attention mixes tokens, ``A X``; the part of the result that differs from token to token is ``H A X`` with the centring
``H = I - 11ᵀ / n``, so its size falls at least by ``σ_a = ‖H A‖₂`` a layer. Below 1 attention is a low-pass filter; the
flatter its rows, and the more there are of them, the lower it lies (Zhou et al., ACL 2025, arXiv 2410.24200, lemma 1).
Their bound on it from the logits' spread does not hold for spread-out logits; this measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.attention_entropy import logit_blocks

_Product = Callable[[Tensor], Tensor]


def filter_rate(attention: Tensor, tokens: Tensor | None = None, iterations: int = 50) -> Tensor:
    """``‖H A‖₂`` of attention weights, by power iteration; the centred matrix is not made.

    Args:
        attention: Rows of weights ``(..., queries, keys)``.
        tokens: Boolean, broadcastable to ``(..., queries)``: ``False`` = padding, whose rows are left out. For weights
            ``(batch, heads, n, n)`` and a mask ``(batch, n)`` give ``mask[:, None]``.
        iterations: More of them cost more and come closer, from below. 50: within 0.1 % unless the two largest singular
            values nearly coincide, and within a few percent always.

    Returns:
        ``(...)``, float32 or wider; NaN for fewer than two tokens.

    Raises:
        ValueError: Shapes that do not fit, or ``iterations`` below 1.
    """
    if attention.dim() < 2:
        raise ValueError(f"`attention` has shape {tuple(attention.shape)}; expected (..., queries, keys).")
    shape = attention.shape[:-1]
    real = torch.ones(shape, dtype=torch.bool, device=attention.device)
    if tokens is not None:
        try:
            real = tokens.expand(shape)
        except RuntimeError:
            raise ValueError(f"`tokens` {tuple(tokens.shape)} does not broadcast to {tuple(shape)}.") from None
    wide = attention if attention.dtype == torch.float64 else attention.float()
    with torch.autocast(attention.device.type, enabled=False):
        return _largest(lambda x: wide @ x, lambda y: wide.mT @ y, real, attention.shape[-1], wide.dtype, iterations)


def attention_filter_rate(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    tokens: Tensor | None = None,
    iterations: int = 50,
) -> Tensor:
    """The same from queries and keys; rows of attention are made block by block and dropped again.

    Args:
        q: Queries ``(batch, heads, queries, dim)``, after rotary embeddings and query norms.
        k: Keys ``(batch, key heads, keys, dim)``.
        scale: Factor on ``q @ k.T``. ``None``: ``1 / sqrt(dim)``.
        mask: As in :func:`~lightning_efficient.functional.attention_entropy`.
        is_causal: Query ``i`` sees keys ``0..i`` only.
        tokens: Boolean ``(batch, queries)``: ``False`` = padding, left out as a query, and as a key where there are as
            many keys as queries. A query that sees no key at all counts as a row of zeros.
        iterations: See :func:`filter_rate`.

    Returns:
        ``(batch, heads)``.

    Raises:
        ValueError: Shapes that do not fit, or ``iterations`` below 1.
        TypeError: A mask that is neither boolean nor floating point.
    """
    if tokens is not None:
        if tokens.dtype != torch.bool or tokens.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"`tokens` is {tokens.dtype} {tuple(tokens.shape)}; expected bool, (batch, queries) = "
                f"{(q.shape[0], q.shape[2])}."
            )
        mask = _without_padding(mask, tokens) if k.shape[2] == q.shape[2] else mask

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, logits, seen in logit_blocks(q, k, scale=scale, mask=mask, is_causal=is_causal):
            hidden = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
            weights = hidden.softmax(-1)
            yield rows, weights if seen is None else weights.masked_fill(~seen, 0.0)

    def mix(x: Tensor) -> Tensor:
        return torch.cat([weights @ x for _, weights in blocks()], dim=2)

    def spread(y: Tensor) -> Tensor:
        return torch.stack([weights.mT @ y[:, :, rows] for rows, weights in blocks()]).sum(0)

    real = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    real = real if tokens is None else real & tokens[:, None]
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return _largest(mix, spread, real, k.shape[2], dtype, iterations)


def _largest(mix: _Product, spread: _Product, real: Tensor, keys: int, dtype: torch.dtype, iterations: int) -> Tensor:
    """Largest singular value of ``H A``, given ``x -> A x`` and ``y -> Aᵀ y``; ``real`` says which rows there are."""
    if iterations < 1:
        raise ValueError(f"`iterations` is {iterations}; expected at least 1.")
    count = real.sum(-1)
    rows = real.unsqueeze(-1).to(dtype)
    seed = torch.Generator().manual_seed(0)  # the same start every time, whatever the device
    x = torch.randn(keys, generator=seed, dtype=torch.float64).to(real.device, dtype)
    x = _normal(x.expand(*real.shape[:-1], keys).unsqueeze(-1))
    for step in range(iterations):
        y = mix(x) * rows
        y = (y - y.sum(-2, keepdim=True) / count.clamp(min=1)[..., None, None]) * rows
        if step < iterations - 1:
            x = _normal(spread(y))
    norm: Tensor = torch.linalg.vector_norm(y.squeeze(-1), dim=-1)
    return norm.masked_fill(count < 2, torch.nan)


def _normal(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return x / norm.clamp(min=torch.finfo(x.dtype).tiny)


def _without_padding(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """The mask, with padded keys hidden."""
    keys = tokens[:, None, None]
    if mask is None:
        return keys
    return mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, -torch.inf)
