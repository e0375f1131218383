"""The spectrum of all embeddings seen, and what is read off it: five metrics on one state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.spectrum import (
    alpha_of_spectrum,
    check_embeddings,
    check_range,
    participation_of_gram,
    rank_of_spectrum,
    stable_rank_of_spectrum,
)
from lightning_efficient.metrics.streaming import StreamingMetric


@dataclass(frozen=True)
class Gram:
    """``ZᵀZ`` of all embeddings ``Z``, and how many.

    Args:
        matrix: ``(features, features)`` float64.
        samples: Rows of ``Z``.
    """

    matrix: Tensor
    samples: int

    @cached_property
    def singular_values(self) -> Tensor:
        """Those of ``Z``, largest first: ``(min(samples, features),)`` float64, zero where within rounding of it."""
        squared = torch.linalg.eigvalsh(self.matrix).flip(0)[: self.samples]
        # Smaller ones are rounding of the largest, and a thousand of them would count as directions.
        rounding = len(self.matrix) * torch.finfo(squared.dtype).eps * squared[0]
        return torch.where(squared > rounding, squared, 0.0).sqrt()


class SpectrumMetric(StreamingMetric):
    """Base of the metrics of the spectrum.

    Keeps the features x features Gram matrix and the sum of the embeddings in float64 (and no embeddings), which add up
    over batches and processes. In float32 the small singular values would be lost: an embedding of rank 1 of 256 would
    get a RankMe of 1.06. All metrics of the family have the same state, so that a ``torchmetrics.MetricCollection``
    accumulates it once for all of them.

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        center: Take the mean embedding out.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_features`` below 1; ``update`` with another shape, or with NaN or infinite values; ``compute``
            before the first embedding.
    """

    gram: Tensor
    total: Tensor
    samples: Tensor

    def __init__(self, num_features: int | None = None, center: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_features is not None and num_features < 1:
            raise ValueError(f"`num_features` is {num_features}; expected at least 1.")
        self.num_features = num_features
        self.center = center
        self.add_sum("gram", 2)
        self.add_sum("total", 1)
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Add embeddings.

        Args:
            embeddings: ``(samples, num_features)``.
        """
        check_embeddings(embeddings, self.width(self.total, 1 if int(self.samples) else self.num_features))
        z = self.wide(embeddings)
        with torch.autocast(z.device.type, enabled=False):
            self.add(gram=z.t() @ z, total=z.sum(0), samples=len(z))

    def seen(self, center: bool) -> Gram:
        """Of everything seen so far.

        Args:
            center: Take the mean embedding out.

        Raises:
            ValueError: Nothing was seen.
        """
        count = int(self.samples)
        if not count:
            raise ValueError(f"{type(self).__name__}: no embedding was seen: call `update` first.")
        return Gram(self.gram - torch.outer(self.total, self.total) / count if center else self.gram, count)

    def measure(self, gram: Gram) -> Tensor:
        """What this metric reads off a spectrum, a scalar."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Scalar float64; NaN where no direction is used."""
        return self.measure(self.seen(self.center))


class RankMe(SpectrumMetric):
    """Effective rank of all embeddings seen, a label-free measure of representation collapse.

    ``exp`` of the entropy of the normalised singular values, each plus ``eps``. Meant "only to compare different runs
    of a given method" (section 3 of the paper), on the 25,600 samples that the paper uses, and in any case on equally
    many: fewer samples give lower values, so report the number beside it. Reported to be weak for models of the I-JEPA
    kind (arXiv 2606.03338).

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        eps: Added to every normalised singular value, as in the paper.
        center: Take the mean embedding out first; the paper does not.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_features`` below 1; ``update`` with another shape, or with NaN or infinite values; ``compute``
            before the first embedding.

    Source: Garrido et al., ICML 2023, arXiv 2210.02885.
    """

    higher_is_better = True

    def __init__(self, num_features: int | None = None, eps: float = 1e-7, center: bool = False, **kwargs: Any) -> None:
        super().__init__(num_features, center, **kwargs)
        self.eps = eps

    def measure(self, gram: Gram) -> Tensor:
        """Scalar float64, from about 1 to ``min(samples, num_features)``; NaN if all embeddings are zero."""
        return rank_of_spectrum(gram.singular_values, self.eps)


class EffectiveRank(SpectrumMetric):
    """``exp`` of the entropy of the normalised singular values of all embeddings seen.

    Grows with the number of samples: compare at the same number.

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        center: Take the mean embedding out first.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: As :class:`RankMe`.

    Source: Roy and Vetterli, EUSIPCO 2007.
    """

    higher_is_better = True

    def measure(self, gram: Gram) -> Tensor:
        """Scalar float64, from 1 to ``min(samples, num_features)``; NaN if all embeddings are zero."""
        return rank_of_spectrum(gram.singular_values, 0.0)


class StableRank(SpectrumMetric):
    """Sum of the squared singular values of all embeddings seen, over the largest.

    Grows with the number of samples: compare at the same number.

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        center: Take the mean embedding out first.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: As :class:`RankMe`.
    """

    higher_is_better = True

    def measure(self, gram: Gram) -> Tensor:
        """Scalar float64, from 1 to ``min(samples, num_features)``; NaN if all embeddings are zero."""
        return stable_rank_of_spectrum(gram.singular_values)


class ParticipationRatio(SpectrumMetric):
    """``tr(C)² / ‖C‖_F²`` of the covariance ``C`` of all embeddings seen; needs no eigenvalues.

    Grows with the number of samples: independent Gaussian embeddings give about ``d n / (n + d)`` for ``n`` samples of
    ``d`` features.

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        center: Take the mean embedding out, as a covariance does.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: As :class:`RankMe`.
    """

    higher_is_better = True

    def __init__(self, num_features: int | None = None, center: bool = True, **kwargs: Any) -> None:
        super().__init__(num_features, center, **kwargs)

    def measure(self, gram: Gram) -> Tensor:
        """Scalar float64, from 1 to ``min(samples, num_features)``; NaN if all embeddings are equal."""
        return participation_of_gram(gram.matrix)


class AlphaReQ(SpectrumMetric):
    """Decay ``α`` of the eigenvalues ``λ_i ~ i^-α`` of all embeddings seen; near 1 is said to be good.

    Least squares of ``log λ_i`` on ``-log i`` with weights ``1 / i``. With few samples the small eigenvalues are too
    small, and ``α`` too large: compare at the same number.

    Args:
        num_features: Width of the embeddings. ``None``: that of the first ones.
        first: Rank of the largest eigenvalue in the fit, from 1; the first few follow no power law.
        last: Rank of the smallest in it. ``None``: all.
        center: Take the mean embedding out first.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: As :class:`RankMe`; not ``1 <= first < last``.

    Source: Agrawal et al., NeurIPS 2022; the fit is that of Stringer et al., Nature 2019.
    """

    def __init__(
        self,
        num_features: int | None = None,
        first: int = 5,
        last: int | None = 100,
        center: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, center, **kwargs)
        check_range(first, last)
        self.first, self.last = first, last

    def measure(self, gram: Gram) -> Tensor:
        """Scalar float64; NaN if fewer than two eigenvalues in the range are above rounding."""
        return alpha_of_spectrum(gram.singular_values, self.first, self.last)
