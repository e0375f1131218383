"""Neural collapse: how near the features of a classifier's classes are to a simplex, and its weights to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

GlobalMean = Literal["classes", "samples"]
# Directions of the class means below this share of the largest are rounding.
_ROUNDING = 1e-12


class ClassSums(NamedTuple):
    """What adds up over batches and processes, float64, for ``K`` classes and ``D`` features.

    Args:
        counts: Samples of each class, ``(K,)``.
        totals: Sum of the features of each class, ``(K, D)``.
        squares: Sum of their squared lengths, ``(K,)``.
        moment: Sum of their outer products over all classes, ``(D, D)``.
    """

    counts: Tensor
    totals: Tensor
    squares: Tensor
    moment: Tensor

    def seen(self) -> Tensor:
        """Which classes have samples, bool ``(K,)``."""
        return self.counts > 0

    def means(self) -> Tensor:
        """Of the classes with samples, ``(seen, D)``."""
        seen = self.seen()
        return self.totals[seen] / self.counts[seen, None]

    def centred(self, global_mean: GlobalMean) -> Tensor:
        """Class means without the global one, ``(seen, D)``."""
        means = self.means()
        by_samples = self.totals.sum(0) / self.counts.sum()
        return means - (means.mean(0) if global_mean == "classes" else by_samples)


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> ClassSums:
    """The sums of one batch.

    Args:
        features: ``(samples, D)``.
        labels: Integers from 0 below ``num_classes``, ``(samples,)``.
        num_classes: ``K``.
    """
    ones = torch.ones(len(features), dtype=features.dtype, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        return ClassSums(
            ones.new_zeros(num_classes).index_add(0, labels, ones),
            features.new_zeros(num_classes, features.shape[1]).index_add(0, labels, features),
            ones.new_zeros(num_classes).index_add(0, labels, features.square().sum(1)),
            features.t() @ features,
        )


def collapse_of_sums(sums: ClassSums, weight: Tensor | None, global_mean: GlobalMean) -> dict[str, Tensor]:
    """NC1 to NC3 and their parts; see :class:`lightning_efficient.metrics.NeuralCollapse`.

    Args:
        sums: Of all samples.
        weight: Of the classifier, ``(K, D)``. ``None``: without what needs it.
        global_mean: Mean of the class means, or of the samples.
    """
    seen = sums.seen()
    k = int(seen.sum())
    if k < 2:
        raise ValueError(f"neural collapse is about classes: samples of {k} were seen; expected at least 2.")
    means, centred, counts = sums.means(), sums.centred(global_mean), sums.counts[seen]
    gram = centred @ centred.t()
    # Σ_W between the class means: K × K, whatever the number of features.
    own = centred @ means.t()
    total = counts.sum()
    within = (centred @ sums.moment @ centred.t() - (own * counts) @ own.t()) / total
    inverse = torch.linalg.pinv(gram, rtol=_ROUNDING, hermitian=True)
    scatter = (sums.squares[seen] / counts - means.square().sum(1)).clamp(min=0)
    etf = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / k) / (k - 1) ** 0.5
    out = {
        "nc1": (inverse @ within @ inverse).diagonal().sum().clamp(min=0),
        "nc1_quotient": (scatter * counts).sum() / total / (gram.diagonal().sum() / k),
        "nc1_cdnv": _off_diagonal((scatter[:, None] + scatter) / 2 / torch.cdist(means, means).square()).mean(),
        "nc2": torch.linalg.norm(_unit(gram) - etf),
        "nc2_norms": _spread(centred),
        "nc2_angles": (_off_diagonal(cosines(centred)) + 1 / (k - 1)).abs().mean(),
        "gof_cosine": _off_diagonal(cosines(means)).abs().mean(),
        "gof_length_count": _correlation(means.norm(dim=1), counts),
    }
    if weight is not None:
        rows = weight[seen]
        out |= {
            "nc2_weights": torch.linalg.norm(_unit(rows @ rows.t()) - etf),
            "nc2_weight_norms": _spread(rows),
            "nc2_weight_angles": (_off_diagonal(cosines(rows)) + 1 / (k - 1)).abs().mean(),
            "nc3": (_unit(rows) - _unit(centred)).square().sum(),
            "nc3_etf": torch.linalg.norm(_unit(rows @ centred.t()) - etf),
        }
    return out


def cosines(rows: Tensor) -> Tensor:
    """Cosine between all pairs of rows, ``(rows, rows)``."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit @ unit.t()


def _unit(matrix: Tensor) -> Tensor:
    return torch.div(matrix, torch.linalg.norm(matrix))


def _spread(rows: Tensor) -> Tensor:
    norms = torch.linalg.norm(rows, dim=1)
    return torch.div(norms.std(), norms.mean())


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return torch.div((x * y).sum(), torch.linalg.norm(x) * torch.linalg.norm(y))


class GeneralOrthogonalFrame(NamedTuple):
    """Where training without biases ends on classes of different size, each ``(K,)`` float64.

    Args:
        weight_squared: ``‖w_k‖²`` of the classifier's rows (of the product of all layers).
        mean_squared: ``‖μ_k‖²`` of the class means.
        dot: ``w_k · μ_k``.
        collapsed: Whether the class is at zero: minority collapse.
        threshold: Samples up to which a class collapses, a scalar.
    """

    weight_squared: Tensor
    mean_squared: Tensor
    dot: Tensor
    collapsed: Tensor
    threshold: Tensor


def gof(
    weight_decay: float, feature_decay: float, counts: Sequence[int] | Tensor, layers: int = 1
) -> GeneralOrthogonalFrame:
    """Closed form of neural collapse on imbalanced classes: bias-free, mean squared error, free features.

    The global minimum of ``‖W H - Y‖² / 2N + weight_decay/2 ‖W‖² + feature_decay/2 ‖H‖²`` with at least as many
    features as classes: the class means are orthogonal, larger classes have longer weights, and a class of at most
    ``threshold`` samples (``N² weight_decay feature_decay`` for one layer) has both at zero.

    Args:
        weight_decay: Of every layer, above 0.
        feature_decay: Of the features, above 0.
        counts: Samples of each class, at least 1.
        layers: Linear layers in place of one ``W``.

    Raises:
        ValueError: An argument out of range.

    Source: Dang et al., ICML 2023, arXiv 2301.00437; the threshold is ours (their code takes the largest root of the
    stationarity condition, also where zero is lower).
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    for name, value in (("weight_decay", weight_decay), ("feature_decay", feature_decay)):
        if not value > 0:
            raise ValueError(f"`{name}` is {value}; expected a number above 0.")
    if n.dim() != 1 or not len(n) or not bool((n >= 1).all()):
        raise ValueError(f"`counts` is {counts}; expected the samples of each class, at least 1.")
    if layers < 1:
        raise ValueError(f"`layers` is {layers}; expected at least 1.")
    m, total = layers, float(n.sum())
    scale = m * total * (total * weight_decay**m * feature_decay) ** (1 / m)
    threshold = torch.tensor(scale * m / (m - 1) ** ((m - 1) / m), dtype=torch.float64)
    # Largest root of m x^(m-1) / (x^m + 1)² = scale / n, right of the maximum of the left side, where it falls.
    low = torch.full_like(n, ((m - 1) / (m + 1)) ** (1 / m))
    high = (m * n / scale) ** (1 / (m + 1)) + 1
    for _ in range(200):
        middle = (low + high) / 2
        above = m * middle ** (m - 1) / (middle**m + 1) ** 2 > scale / n
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    collapsed = n <= threshold
    noise = total * feature_decay
    squared = torch.where(collapsed, 0.0, noise * low**m)
    return GeneralOrthogonalFrame(
        squared, squared / (squared + noise) ** 2, squared / (squared + noise), collapsed, threshold
    )
