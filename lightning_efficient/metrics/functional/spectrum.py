"""How many directions a set of embeddings uses: measures of its singular values.

All depend on the number of samples: few samples cannot fill many directions. Compare values at the same number only,
and report it. For independent Gaussian embeddings of ``d`` features the participation ratio of ``n`` samples is near
``d n / (n + d)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(embeddings: Tensor, eps: float = 1e-7, center: bool = False) -> Tensor:
    """RankMe: ``exp`` of the entropy of the normalised singular values, a smooth rank.

    Meant to compare runs of one method, at the same number of samples (section 3 of the paper).

    Args:
        embeddings: ``(samples, features)``; more samples than features give a meaningful upper limit.
        eps: Added to every normalised singular value, as in the paper.
        center: Take the mean embedding out first; the paper does not. An offset that all embeddings share counts as one
            large direction otherwise.

    Returns:
        Scalar, float32 or wider, from about 1 (all embeddings on one line) to ``min(samples, features)``; NaN
        if all embeddings are zero, as no direction is used.

    Raises:
        ValueError: ``embeddings`` is not a matrix with at least one row and column, or holds NaN or infinite values.

    Source: Garrido et al., ICML 2023, arXiv 2210.02885, equations 1 and 2.
    """
    return rank_of_spectrum(singular_values(embeddings, center), eps)


def effective_rank(embeddings: Tensor, center: bool = False) -> Tensor:
    """``exp`` of the entropy of the normalised singular values, without the constant of :func:`rankme`.

    Args:
        embeddings: ``(samples, features)``.
        center: Take the mean embedding out first.

    Returns:
        Scalar, float32 or wider, from 1 to ``min(samples, features)``; NaN if all embeddings are zero.

    Raises:
        ValueError: As for :func:`rankme`.

    Source: Roy and Vetterli, EUSIPCO 2007.
    """
    return rank_of_spectrum(singular_values(embeddings, center), 0.0)


def stable_rank(embeddings: Tensor, center: bool = False) -> Tensor:
    """``‖Z‖_F² / ‖Z‖₂²``: the sum of the squared singular values over the largest.

    Args:
        embeddings: ``(samples, features)``.
        center: Take the mean embedding out first.

    Returns:
        Scalar, float32 or wider, from 1 to ``min(samples, features)``; NaN if all embeddings are zero.

    Raises:
        ValueError: As for :func:`rankme`.
    """
    return stable_rank_of_spectrum(singular_values(embeddings, center))


def participation_ratio(embeddings: Tensor, center: bool = True) -> Tensor:
    """``tr(C)² / ‖C‖_F²`` of the covariance ``C``; no eigenvalue is computed.

    Args:
        embeddings: ``(samples, features)``.
        center: Take the mean embedding out first, as a covariance does.

    Returns:
        Scalar, float32 or wider, from 1 to ``min(samples, features)``; NaN if all embeddings are equal (zero, without
        ``center``).

    Raises:
        ValueError: As for :func:`rankme`.
    """
    z = _checked(embeddings, center)
    with torch.autocast(z.device.type, enabled=False):
        return participation_of_gram(z @ z.t() if z.shape[0] < z.shape[1] else z.t() @ z)


def alpha_req(embeddings: Tensor, first: int = 5, last: int | None = 100, center: bool = False) -> Tensor:
    """Decay ``α`` of the eigenvalues of the covariance, ``λ_i ~ i^-α``; near 1 is said to be good.

    Least squares of ``log λ_i`` on ``-log i`` with weights ``1 / i``.

    Args:
        embeddings: ``(samples, features)``.
        first: Rank of the largest eigenvalue in the fit, from 1; the first few follow no power law.
        last: Rank of the smallest in it. ``None``: all.
        center: Take the mean embedding out first.

    Returns:
        Scalar, float32 or wider; NaN if fewer than two eigenvalues in that range are above rounding.

    Raises:
        ValueError: As for :func:`rankme`; not ``1 <= first < last``.

    Source: Agrawal et al., NeurIPS 2022; the fit is that of Stringer et al., Nature 2019.
    """
    return alpha_of_spectrum(singular_values(embeddings, center), first, last)


def singular_values(embeddings: Tensor, center: bool = False) -> Tensor:
    """Singular values of a set of embeddings, largest first.

    Args:
        embeddings: ``(samples, features)``.
        center: Take the mean embedding out first.

    Returns:
        ``(min(samples, features),)``, float32 or wider.

    Raises:
        ValueError: As for :func:`rankme`.
    """
    z = _checked(embeddings, center)
    with torch.autocast(z.device.type, enabled=False):
        values: Tensor = torch.linalg.svdvals(z)
    return values


def rank_of_spectrum(singular_values: Tensor, eps: float = 1e-7) -> Tensor:
    """:func:`rankme` from singular values, or :func:`effective_rank` with ``eps=0``.

    Args:
        singular_values: Non-negative, ``(count,)``.
        eps: Added to every normalised singular value.
    """
    p = singular_values / singular_values.sum() + eps
    return torch.exp(-torch.xlogy(p, p).sum())


def stable_rank_of_spectrum(singular_values: Tensor) -> Tensor:
    """:func:`stable_rank` from singular values, ``(count,)``."""
    squared = singular_values.square()
    return squared.sum() / squared.max()


def participation_of_gram(gram: Tensor) -> Tensor:
    """:func:`participation_ratio` from ``ZᵀZ`` or ``ZZᵀ`` of whatever shall be the covariance's ``Z``."""
    return gram.diagonal().sum().square() / gram.square().sum()


def alpha_of_spectrum(singular_values: Tensor, first: int = 5, last: int | None = 100) -> Tensor:
    """:func:`alpha_req` from singular values.

    Args:
        singular_values: Largest first, ``(count,)``; their squares are the eigenvalues.
        first: Rank of the first in the fit, from 1.
        last: Rank of the last in it. ``None``: all.
    """
    check_range(first, last)
    squared = singular_values.square()[first - 1 : last]
    squared = squared[squared > 0]
    if len(squared) < 2:
        return squared.new_tensor(torch.nan)
    rank = torch.arange(first, first + len(squared), dtype=squared.dtype, device=squared.device)
    x, y, weight = -rank.log(), squared.log(), 1 / rank
    x = x - (weight * x).sum() / weight.sum()
    return (weight * x * y).sum() / (weight * x.square()).sum()


def check_range(first: int, last: int | None) -> None:
    """Refuse a range of eigenvalues that a line cannot be fitted to.

    Raises:
        ValueError: Not ``1 <= first < last``.
    """
    if first < 1 or (last is not None and last <= first):
        raise ValueError(f"`first` is {first} and `last` is {last}; expected 1 <= first < last, ranks from 1.")


def check_embeddings(embeddings: Tensor, features: int | None = None) -> None:
    """Refuse what no spectrum can be computed of.

    Args:
        embeddings: Expected to be ``(samples, features)`` and finite; no samples are fine.
        features: Expected width. ``None``: any but 0.

    Raises:
        ValueError: Another shape, or NaN or infinite values.
    """
    shape = tuple(embeddings.shape)
    if len(shape) != 2 or not shape[1] or (features is not None and shape[1] != features):
        expected = "(samples, features)" if features is None else f"(samples, {features})"
        raise ValueError(f"`embeddings` has shape {shape}; expected {expected}.")
    finite = embeddings.isfinite()
    if not bool(finite.all()):
        rows = (~finite).any(1)
        raise ValueError(
            f"`embeddings` holds NaN or infinite values in {int(rows.sum())} of its {shape[0]} rows, row "
            f"{int(rows.nonzero()[0])} the first: it has no spectrum. Has the network diverged?"
        )


def _checked(embeddings: Tensor, center: bool) -> Tensor:
    check_embeddings(embeddings)
    if not len(embeddings):
        raise ValueError(f"`embeddings` has shape {tuple(embeddings.shape)}; expected at least one row.")
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    z = embeddings.to(wide)
    return z - z.mean(0) if center else z
