"""The PQ index accumulated over tensors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.metrics.functional.pq_index import check_pq, index_of_sums, pq_index, wide_dtype


class PQIndex(Metric):
    """PQ index of a model's weights, fed one tensor at a time and keeping none of them.

    For a curve over pruning iterations wrap it in ``torchmetrics.MetricTracker`` and call ``increment`` once an
    iteration.

    Args:
        p: The smaller norm.
        q: The larger norm.
        scope: ``"global"``: one index over everything seen; ``"layer"``: one for each tensor; ``"neuron"``: one for
            each slice of the first dimension of each tensor.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: Not ``0 < p < q``, an unknown scope, or ``compute`` before a nonzero entry was seen.

    Source: Diao et al., ICLR 2023, arXiv 2302.05601.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    sum_p: Tensor
    sum_q: Tensor
    count: Tensor
    indices: list[Tensor] | Tensor

    def __init__(
        self, p: float = 0.5, q: float = 1.0, scope: Literal["global", "layer", "neuron"] = "global", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_pq(p, q)
        if scope not in ("global", "layer", "neuron"):
            raise ValueError(f"`scope` must be 'global', 'layer' or 'neuron'; got {scope!r}.")
        self.p, self.q, self.scope = p, q, scope
        for name in ("sum_p", "sum_q"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("indices", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, weight: Tensor, mask: Tensor | None = None) -> None:
        """Add a weight.

        Args:
            weight: Any shape; ``(neurons, ...)`` for scope ``"neuron"``.
            mask: Of the same shape; only entries where it is true count. ``None``: all.
        """
        if self.scope == "global":
            magnitude = weight.detach().to(wide_dtype(weight)).abs()
            magnitude = magnitude if mask is None else magnitude * (mask != 0)
            self.sum_p = self.sum_p + magnitude.pow(self.p).sum()
            self.sum_q = self.sum_q + magnitude.pow(self.q).sum()
            self.count = self.count + (weight.numel() if mask is None else torch.count_nonzero(mask))
        else:
            assert isinstance(self.indices, list)
            index = pq_index(weight, self.p, self.q, mask=mask, dim=0 if self.scope == "neuron" else None)
            self.indices.append(index.reshape(-1))

    def compute(self) -> Tensor:
        """Scalar for scope ``"global"``, else one index a tensor or neuron, in the order seen (NaN: all zero)."""
        if self.scope == "global":
            if not bool(self.sum_q > 0):
                raise ValueError("no nonzero entry was seen, for which the PQ index is undefined: call `update` first.")
            return index_of_sums(self.sum_p, self.sum_q, self.count, self.p, self.q)
        if isinstance(self.indices, Tensor):  # reduced over processes
            return self.indices
        if not self.indices:
            raise ValueError("no weight was seen: call `update` first.")
        return torch.cat(self.indices)
