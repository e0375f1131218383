"""Simplified linear attention written from the formulas of the paper, without a line of the package.

Once as loops over numbers, once as a dense matrix of attention weights for gradients. Per head, with φ = ReLU:

    w_ij  = φ(q_i) · φ(k_j + p_j)
    out_i = Σ_j w_ij v_j / (Σ_j w_ij + eps) + Σ_{offsets} dwc[offset] v[position of i + offset] + bias
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def loops(
    q: Sequence[Sequence[float]],
    k: Sequence[Sequence[float]],
    v: Sequence[Sequence[float]],
    p: Sequence[Sequence[float]],
    kernel: Sequence[Sequence[Sequence[float]]],
    bias: Sequence[float],
    eps: float,
) -> list[list[float]]:
    """One head of one sample: q, k, v and p (tokens, dim), kernel (dim, size, size), bias (dim,): Python numbers."""
    tokens, dim, size = len(q), len(q[0]), len(kernel[0])
    side = math.isqrt(tokens)
    out = [[0.0] * dim for _ in range(tokens)]
    for i in range(tokens):
        weights = [sum(max(q[i][c], 0.0) * max(k[j][c] + p[j][c], 0.0) for c in range(dim)) for j in range(tokens)]
        total = sum(weights) + eps
        row, column = divmod(i, side)
        for d in range(dim):
            out[i][d] = sum(weights[j] * v[j][d] for j in range(tokens)) / total + bias[d]
            for a in range(size):
                for b in range(size):
                    y, x = row + a - size // 2, column + b - size // 2
                    if 0 <= y < side and 0 <= x < side:
                        out[i][d] += kernel[d][a][b] * v[y * side + x][d]
    return out


def dense(x: Tensor, state: dict[str, Tensor], heads: int, eps: float) -> Tensor:
    """The whole layer on (batch, tokens, channels), from its tensors by name; every pair of tokens is formed."""
    tokens = x.shape[1]
    qkv = x @ state["qkv.weight"].T + state.get("qkv.bias", torch.zeros((), dtype=x.dtype))
    q, k, v = qkv.chunk(3, dim=-1)
    k = k + state["position"]
    dim, side, size = q.shape[-1] // heads, math.isqrt(tokens), state["dwc.weight"].shape[-1]
    near = neighbours(side, size)
    out = []
    for h in range(heads):
        qh, kh, vh = (t[..., h * dim : (h + 1) * dim] for t in (q, k, v))
        scores = qh.clamp(min=0) @ kh.clamp(min=0).transpose(1, 2)
        attention = scores / (scores.sum(-1, keepdim=True) + eps)
        # near[a] picks the neighbour at offset a of each token; the kernel weighs it channel by channel
        taps = state["dwc.weight"].reshape(dim, size * size)
        local = sum((near[a] @ vh) * taps[:, a] for a in range(size * size)) + state["dwc.bias"]
        out.append(attention @ vh + local)
    return torch.cat(out, -1) @ state["proj.weight"].T + state["proj.bias"]


def neighbours(side: int, size: int) -> Tensor:
    """(offsets, tokens, tokens): 1 where the second token lies at the offset from the first."""
    found = torch.zeros(size * size, side * side, side * side, dtype=torch.float64)
    for i in range(side * side):
        for j in range(side * side):
            down, right = j // side - i // side + size // 2, j % side - i % side + size // 2
            if 0 <= down < size and 0 <= right < size:
                found[down * size + right, i, j] = 1.0
    return found
