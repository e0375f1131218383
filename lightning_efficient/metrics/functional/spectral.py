"""Spectral norms of the weights of a model, by power iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_efficient.common.shards import whole


@torch.no_grad()
def spectral_norms(
    model: nn.Module, *, iterations: int = 8, vectors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Largest singular value of every weight matrix, estimated from below.

    A weight is a parameter of two or more axes, read as a matrix with the first axis as rows (so a
    convolution's is not its operator norm, and a fused query-key-value projection is one matrix). Embedding
    tables and parameters that are vectors in that reading (biases, position embeddings with a leading 1) are
    left out; tied weights count once.

    Args:
        model: Any module; nothing in it changes, and the global random state is not used. Weights that are cut over
            processes are gathered one after the other, so all processes have to come here.
        iterations: Power iterations per weight, two matrix-vector products each.
        vectors: Parameter name -> right singular vector. Updated in place: pass the same dictionary again and
            the estimate goes on from where it was, so that one or two iterations follow a slowly moving
            weight.

    Returns:
        Parameter name -> scalar on the parameter's device, float32 or wider. A zero matrix gives 0.

    Raises:
        ValueError: ``iterations`` is below 1.

    Source: power method; Miyato et al., arXiv 1802.05957, carry the vectors along in the same way.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` is {iterations}; expected at least 1.")
    vectors = {} if vectors is None else vectors
    generator = torch.Generator().manual_seed(0)
    norms: dict[str, Tensor] = {}
    for name, weight in _matrices(model).items():
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrix = whole(weight).flatten(1).to(wide)
        v = vectors.get(name)
        if v is None or v.shape[0] != matrix.shape[1]:
            v = torch.randn(matrix.shape[1], generator=generator)
        v = v.to(matrix)
        with torch.autocast(matrix.device.type, enabled=False):
            for _ in range(iterations):
                v = _step(matrix, v)
            norms[name] = torch.linalg.vector_norm(matrix @ v)
        vectors[name] = v
    return norms


def _step(matrix: Tensor, v: Tensor) -> Tensor:
    """One power iteration; normalised twice, as the square of a tiny weight underflows. Keeps ``v`` at zero
    weights."""
    u = nn.functional.normalize(matrix @ v, dim=0, eps=torch.finfo(matrix.dtype).tiny)
    w = matrix.t() @ u
    length = torch.linalg.vector_norm(w)
    return torch.where(length > 0, w / length, v)


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.dim() >= 2 and p.numel() > p.shape[0] > 1 and id(p) not in tables
    }
