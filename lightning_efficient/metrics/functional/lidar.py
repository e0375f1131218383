"""LiDAR: the effective rank of what tells samples apart, relative to how their views scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.spectrum import check_embeddings, rank_of_spectrum


def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> Tensor:
    """Effective rank of the linear discriminant analysis in which every sample is a class.

    Args:
        views: ``(samples, views, features)``: embeddings of at least two views of each of at least two samples; the
            paper takes about 1000 samples with 50 views. Few samples limit the rank.
        delta: Added to the diagonal of the scatter within samples.
        eps: Added to every normalised eigenvalue.

    Returns:
        Scalar float64 (float32 on MPS); NaN if all samples have the same mean.

    Raises:
        ValueError: Another shape, NaN or infinite values, or a scatter that is singular.

    Source: Thilak et al., ICLR 2024, arXiv 2312.04000.
    """
    wide = torch.float32 if views.device.type == "mps" else torch.float64
    return lidar_of_scatter(*view_sums(views.to(wide)), delta, eps)


def view_sums(views: Tensor, features: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What adds up over batches and processes.

    Args:
        views: ``(samples, views, features)``.
        features: Expected width. ``None``: any.

    Returns:
        Samples, views beyond the first of each, sum of the samples' means ``(features,)``, of their outer products
        ``(features, features)``, and scatter within samples ``(features, features)``.
    """
    if views.dim() != 3 or views.shape[1] < 2:
        raise ValueError(
            f"`views` has shape {tuple(views.shape)}; expected (samples, views, features) with at least 2 views."
        )
    check_embeddings(views.flatten(0, 1), features)
    with torch.autocast(views.device.type, enabled=False):
        mean = views.mean(1)
        apart = (views - mean[:, None]).flatten(0, 1)
        count, more = views.new_tensor(len(views)), views.new_tensor(len(views) * (views.shape[1] - 1))
        return count, more, mean.sum(0), mean.t() @ mean, apart.t() @ apart


def lidar_of_scatter(
    samples: Tensor, more: Tensor, total: Tensor, between: Tensor, within: Tensor, delta: float, eps: float
) -> Tensor:
    """:func:`lidar` from :func:`view_sums`."""
    if not samples > 1:
        raise ValueError(f"LiDAR needs at least 2 samples; got {int(samples)}.")
    means = (between - torch.outer(total, total) / samples) / (samples - 1)
    noise = within / more + delta * torch.eye(len(total), dtype=total.dtype, device=total.device)
    factor, failed = torch.linalg.cholesky_ex(noise)
    if bool(failed):
        raise ValueError(
            f"the scatter of views within samples is singular, so that nothing can be measured against it; `delta` is "
            f"{delta:g}: raise it."
        )
    half = torch.linalg.solve_triangular(factor, means, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.t(), upper=False)
    values = torch.linalg.eigvalsh((whitened + whitened.t()) / 2).clamp(min=0).flip(0)
    return rank_of_spectrum(values[: int(samples)], eps)
