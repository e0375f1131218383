"""Neural collapse accumulated over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_efficient.metrics.functional.neural_collapse import (
    ClassSums,
    GlobalMean,
    class_sums,
    collapse_of_sums,
    cosines,
)
from lightning_efficient.metrics.functional.spectrum import check_embeddings
from lightning_efficient.metrics.streaming import StreamingMetric, share

_AXES = {"counts": 1, "totals": 2, "squares": 1, "moment": 2}


class NeuralCollapse(StreamingMetric):
    """NC1 to NC4 of a classifier's last features, in one pass, balanced or not.

    ``compute`` returns a dictionary of scalars, 0 at full collapse. With class means ``μ_k`` (centred: ``M``) of the
    classes that have samples, scatter within ``Σ_W`` and between classes ``Σ_B``:

    - ``nc1``: ``tr(Σ_W Σ_B⁺) / K``; ``nc1_quotient``: ``tr Σ_W / tr Σ_B``; ``nc1_cdnv``: mean over pairs of classes of
      their variance over their squared distance;
    - ``nc2``: distance of ``M Mᵀ`` to that of a simplex, both of norm 1; ``nc2_norms``: deviation of the lengths over
      their mean; ``nc2_angles``: mean distance of the cosines to ``-1 / (K - 1)``; the same of the classifier as
      ``nc2_weights``, ``nc2_weight_norms``, ``nc2_weight_angles``;
    - ``nc3``: ``‖W/‖W‖ - M/‖M‖‖²``; ``nc3_etf``: distance of ``W Mᵀ`` to that of a simplex;
    - ``nc4``: share of samples whose nearest class mean is not what the classifier says;
    - of the general orthogonal frame that imbalanced classes end in without biases: ``gof_cosine``, the mean absolute
      cosine between means that are not centred, and ``gof_length_count``, the correlation of their lengths with the
      number of samples (NaN where all are equal); :func:`lightning_efficient.functional.gof` gives its closed form;
    - ``classes``: how many have samples. ``Σ_B`` weighs them equally.

    ``nc3``, ``nc4`` and what is said of weights need the classifier. Sums are float64: in float32 an offset of 1000
    changes ``tr Σ_W`` by a tenth. The paper measures the training set at the end of an epoch.

    Args:
        num_classes: ``K``.
        num_features: ``D``. ``None``: that of the first features.
        global_mean: ``"classes"``: the mean of the class means, ``"samples"``: of all samples. They differ only for
            classes of different size.
        nc4_samples: Features that are kept for ``nc4``, which needs the final means: the first so many over all
            processes. 0: no ``nc4``.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: An argument out of range; ``update`` with shapes that do not fit, labels out of range, NaN or
            infinite values; ``compute`` with samples of fewer than two classes.

    Source: Papyan, Han and Donoho, PNAS 2020, arXiv 2008.08186.
    """

    full_state_update = True
    higher_is_better = False
    counts: Tensor
    totals: Tensor
    squares: Tensor
    moment: Tensor
    weight: Tensor
    kept: list[Tensor] | Tensor

    def __init__(
        self,
        num_classes: int,
        num_features: int | None = None,
        global_mean: GlobalMean = "classes",
        nc4_samples: int = 25_600,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"`num_classes` is {num_classes}; expected at least 2.")
        if num_features is not None and num_features < 1:
            raise ValueError(f"`num_features` is {num_features}; expected at least 1.")
        if global_mean not in ("classes", "samples"):
            raise ValueError(f"`global_mean` is {global_mean!r}; expected 'classes' or 'samples'.")
        if nc4_samples < 0:
            raise ValueError(f"`nc4_samples` is {nc4_samples}; expected at least 0.")
        self.num_classes, self.num_features = num_classes, num_features
        self.global_mean: GlobalMean = global_mean
        self.nc4_samples = nc4_samples
        for name, axes in _AXES.items():
            self.add_sum(name, axes)
        self.add_state("weight", torch.zeros(1, 1, dtype=torch.float64), dist_reduce_fx=_of_any_process)
        self.add_state("kept", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Add samples.

        Args:
            features: What the classifier gets, ``(samples, D)``.
            labels: Integers from 0 below ``num_classes``, ``(samples,)``.
            weight: Of the classifier, ``(K, D)``; the last one given counts. ``None``: as before.
            bias: Of the classifier, ``(K,)``, for its decisions.
            logits: What the classifier says, ``(samples, K)``. ``None``: computed from ``weight`` and ``bias``.
        """
        known = self.moment.shape[0] if self.moment.numel() > 1 else self.num_features
        check_embeddings(features, known)
        self._check(features, labels, weight, logits)
        h, y = self.wide(features), labels.to(self.device).long()
        self.add(**class_sums(h, y, self.num_classes)._asdict())
        if weight is not None:
            self.weight = self.wide(weight)
            if logits is None:
                logits = h @ self.weight.t() + (0.0 if bias is None else self.wide(bias))
        if logits is not None and (room := share(self.nc4_samples) - self._held(h.shape[1])) > 0:
            # Rows of features and decision, flat: torchmetrics gathers vectors, also from processes without any.
            rows = torch.cat([h, logits.to(self.device).argmax(1, keepdim=True)], 1)[:room]
            self.kept = [*self.kept, rows.flatten().float()]

    def _held(self, width: int) -> int:
        return sum(part.numel() for part in self.kept) // (width + 1)

    def _check(self, features: Tensor, labels: Tensor, weight: Tensor | None, logits: Tensor | None) -> None:
        n, d = features.shape
        for name, tensor, expected in (
            ("labels", labels, (n,)),
            ("weight", weight, (self.num_classes, d)),
            ("logits", logits, (n, self.num_classes)),
        ):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; expected {expected}.")
        if labels.is_floating_point() or (n and not bool(((labels >= 0) & (labels < self.num_classes)).all())):
            raise ValueError(
                f"`labels` holds {labels.dtype} from {labels.min()} to {labels.max()}; expected integers from 0 below "
                f"num_classes={self.num_classes}."
            )

    def sums(self) -> ClassSums:
        """What has been added up."""
        return ClassSums(self.counts, self.totals, self.squares, self.moment)

    def cosines(self) -> Tensor:
        """Between the centred class means, ``(classes seen, classes seen)``, of this process."""
        return cosines(self.sums().centred(self.global_mean))

    def compute(self) -> dict[str, Tensor]:
        """Scalars, float64."""
        return self.measured()

    def measured(self) -> dict[str, Tensor]:
        """The same of the sums as they are, without gathering those of other processes."""
        sums = self.sums()
        out = collapse_of_sums(sums, self.weight if self.weight.numel() > 1 else None, self.global_mean)
        if len(self.kept):
            rows = dim_zero_cat(self.kept).to(torch.float64).view(-1, sums.moment.shape[0] + 1)
            classes = sums.seen().nonzero().flatten()
            nearest = classes[torch.cdist(rows[:, :-1], sums.means()).argmin(1)]
            out["nc4"] = (nearest != rows[:, -1]).double().mean()
        return {**out, "classes": sums.seen().sum().double()}


def _of_any_process(weights: Tensor) -> Tensor:
    """The classifier of a process that has one; they are the same."""
    return weights[int(weights.flatten(1).any(1).long().argmax())]
