"""How close together embeddings lie: mean pairwise cosine (by length), alignment, uniformity.

"Length collapse" (Zhou et al., ACL 2025, arXiv 2410.24200): embeddings of long texts lie closer together than those of
short ones, so that the mean cosine between texts rises with their length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.metrics.functional.lengths import EDGES, length_bins

_ROWS = 2**20  # pairs of `uniformity` held at once


def mean_cosine(embeddings: Tensor) -> Tensor:
    """Mean cosine over all pairs of different samples.

    From the sum of the unit vectors, ``(‖Σ u‖² - Σ ‖u‖²) / (n (n - 1))``: one pass, no matrix of pairs. An embedding of
    zeros has cosine 0 with every other.

    Args:
        embeddings: ``(samples, features)``.

    Returns:
        Scalar, float32 or wider; NaN below two samples.

    Raises:
        ValueError: ``embeddings`` is not a matrix.
    """
    one_bin = torch.zeros(len(embeddings), dtype=torch.long, device=embeddings.device)
    return cosine_from_sums(*cosine_sums(embeddings, one_bin, 1))[0]


def cosine_by_length(embeddings: Tensor, lengths: Tensor, edges: Sequence[int] = EDGES) -> Tensor:
    """Mean cosine over all pairs of different samples within each bin of lengths; it rises where length collapses.

    Args:
        embeddings: ``(samples, features)``.
        lengths: Tokens that the model saw of each, int ``(samples,)``.
        edges: Upper ends of all bins but the last: ``(128, 256)`` makes ≤128, 129–256 and >256.

    Returns:
        ``(len(edges) + 1,)``, float32 or wider; NaN for a bin of fewer than two samples.

    Raises:
        ValueError: Shapes that do not fit, or ``edges`` that do not rise.
        TypeError: ``lengths`` are not integers.

    Source: Zhou et al., arXiv 2410.24200, section 1.
    """
    check_lengths(embeddings, lengths)
    return cosine_from_sums(*cosine_sums(embeddings, length_bins(lengths, edges), len(edges) + 1))


def cosine_sums(embeddings: Tensor, bins: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What adds up over batches and processes.

    Args:
        embeddings: ``(samples, features)``.
        bins: Bin of each sample, int64 ``(samples,)``.
        count: Number of bins.

    Returns:
        Sum of unit vectors ``(count, features)``, of their squared norms ``(count,)``, number of samples ``(count,)``.
    """
    unit = _unit(embeddings, "embeddings")
    ones = torch.ones(len(unit), dtype=unit.dtype, device=unit.device)
    return (
        unit.new_zeros(count, unit.shape[1]).index_add(0, bins, unit),
        unit.new_zeros(count).index_add(0, bins, unit.square().sum(1)),
        unit.new_zeros(count).index_add(0, bins, ones),
    )


def cosine_from_sums(total: Tensor, squares: Tensor, samples: Tensor) -> Tensor:
    """Mean cosine per bin from :func:`cosine_sums`, ``(bins,)``."""
    mean = (total.square().sum(1) - squares) / (samples * (samples - 1)).clamp(min=1)
    return torch.where(samples > 1, mean, torch.nan)


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """Mean distance of positive pairs on the unit sphere, to the power ``alpha``; 0 is perfect. Differentiable.

    Args:
        x: ``(pairs, features)``.
        y: The other side of each pair, same shape.
        alpha: Power, above 0.

    Returns:
        Scalar in ``[0, 2 ** alpha]``; NaN without pairs.

    Raises:
        ValueError: Shapes that do not fit, or ``alpha`` out of range.

    Source: Wang and Isola, ICML 2020, arXiv 2005.10242, section 4.1.
    """
    return alignment_terms(x, y, alpha).mean()


def alignment_terms(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """The same per pair, ``(pairs,)``."""
    if x.shape != y.shape:
        raise ValueError(f"`x` {tuple(x.shape)} and `y` {tuple(y.shape)} are no pairs; expected one shape.")
    if not alpha > 0:
        raise ValueError(f"`alpha` is {alpha}; expected a power above 0.")
    squared = (_unit(x, "x") - _unit(y, "y")).square().sum(1)
    return squared if alpha == 2.0 else squared ** (alpha / 2)


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential over all pairs of different samples: lower is more uniform. Differentiable.

    ``log mean exp(-t ‖x - y‖²)`` on the unit sphere. Takes n² time; memory is bounded.

    Args:
        x: ``(samples, features)``.
        t: Sharpness of the potential, above 0.

    Returns:
        Scalar in ``[-4 t, 0]``, 0 when all embeddings coincide; NaN below two samples.

    Raises:
        ValueError: ``x`` is not a matrix, or ``t`` out of range.

    Source: Wang and Isola, ICML 2020, arXiv 2005.10242, section 4.1.
    """
    if not t > 0:
        raise ValueError(f"`t` is {t}; expected a number above 0.")
    unit = _unit(x, "x")
    n = len(unit)
    if n < 2:
        return unit.sum() * torch.nan
    parts = []
    with torch.autocast(unit.device.type, enabled=False):
        for rows in torch.split(torch.arange(n, device=unit.device), max(1, _ROWS // n)):
            squared = 2.0 - 2.0 * unit[rows] @ unit.T
            same = rows[:, None] == torch.arange(n, device=unit.device)
            parts.append(torch.logsumexp((-t * squared.clamp(min=0)).masked_fill(same, -torch.inf).flatten(), 0))
    return torch.logsumexp(torch.stack(parts), 0) - torch.log(unit.new_tensor(n * (n - 1.0)))


def check_lengths(embeddings: Tensor, lengths: Tensor) -> None:
    """Refuse lengths that do not belong to the embeddings.

    Raises:
        ValueError: Not one length per sample.
    """
    if embeddings.dim() != 2 or lengths.shape != embeddings.shape[:1]:
        raise ValueError(
            f"`embeddings` {tuple(embeddings.shape)} and `lengths` {tuple(lengths.shape)} do not fit; expected "
            "(samples, features) and (samples,)."
        )


def _unit(x: Tensor, name: str) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"`{name}` has shape {tuple(x.shape)}; expected (samples, features).")
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)
