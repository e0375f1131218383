"""Drift of recurrent states accumulated over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.state_drift import buckets, state_variance
from lightning_efficient.metrics.streaming import StreamingMetric

# The whole length in training is so many buckets, and so many such lengths are followed, unless said otherwise.
_BUCKETS, _LENGTHS = 16, 16


class StateDrift(StreamingMetric):
    """Whether recurrent states keep their scale on sequences longer than those of training.

    A state that keeps adding up, because its network never had to forget, grows past the training length and takes the
    output with it. ``compute`` returns a dictionary, all of the variance over a head's entries, mean over samples and
    over the tokens of a bucket:

    - ``ratio``: the largest past ``train_length`` over the largest up to it, ``(heads,)``; near 1: no drift;
      ``ratio_max``: the worst head's;
    - ``drifting``: share of heads with a ratio above ``threshold``;
    - ``curve``: of each bucket over the largest up to ``train_length``, ``(buckets, heads)``, NaN where nothing was
      seen, and ``tokens``, the last token of each bucket, ``(buckets,)``.

    Without a state past ``train_length`` the first three are NaN.

    Args:
        train_length: Tokens of the longest sequence in training.
        max_length: Longer sequences count into the last bucket. ``None``: 16 times ``train_length``.
        bucket: Tokens that are taken together. ``None``: a sixteenth of ``train_length``.
        threshold: Ratio above which a head drifts.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: An argument out of range; ``update`` with shapes that do not fit, NaN or infinite values;
            ``compute`` before the first state.

    Source: Chen et al., *Stuffed Mamba*, 2024, arXiv 2410.07145, whose analysis plots these variances of a Mamba's
    state; the ratio is ours.
    """

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(
        self,
        train_length: int,
        max_length: int | None = None,
        bucket: int | None = None,
        threshold: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if train_length < 1:
            raise ValueError(f"`train_length` is {train_length}; expected at least 1.")
        longest = _LENGTHS * train_length if max_length is None else max_length
        width = -(-train_length // _BUCKETS) if bucket is None else bucket
        if longest <= train_length:
            raise ValueError(f"`max_length` is {max_length}; expected more than train_length={train_length}.")
        if width < 1:
            raise ValueError(f"`bucket` is {bucket}; expected at least 1.")
        if not threshold > 0:
            raise ValueError(f"`threshold` is {threshold}; expected a number above 0.")
        self.train_length, self.max_length, self.bucket, self.threshold = train_length, longest, width, threshold
        self._ends = buckets(train_length, longest, width)
        self.add_sum("total", 2)
        self.add_state("count", torch.zeros(len(self._ends), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, states: Tensor, start: int = 0, mask: Tensor | None = None) -> None:
        """Add states of a batch of sequences.

        Args:
            states: ``(samples, tokens, heads, ...)``: the state after each of these tokens.
            start: Tokens of these sequences before the first one given.
            mask: Boolean ``(samples, tokens)``: which count, padding left out. ``None``: all.
        """
        self.update_variance(state_variance(states), start, mask)

    @torch.no_grad()
    def update_variance(self, variance: Tensor, start: int = 0, mask: Tensor | None = None) -> None:
        """The same, of variances that are known already.

        Args:
            variance: Over the entries of each head's state, unbiased: ``(samples, tokens, heads)``.
            start: As in :meth:`update`.
            mask: As in :meth:`update`.
        """
        heads = self.total.shape[-1] if self.total.shape[0] > 1 else variance.shape[2]
        if variance.shape[2] != heads:
            raise ValueError(f"`states` has {variance.shape[2]} heads; expected {heads}, as before.")
        if start < 0:
            raise ValueError(f"`start` is {start}; expected at least 0.")
        if mask is not None and mask.shape != variance.shape[:2]:
            raise ValueError(f"`mask` has shape {tuple(mask.shape)}; expected {tuple(variance.shape[:2])}.")
        values = self.wide(variance)
        weights = values.new_ones(values.shape[:2]) if mask is None else (mask.to(values.device) != 0).to(values.dtype)
        values = torch.where(weights[..., None] > 0, values, 0.0)
        if not bool(values.isfinite().all()):
            raise ValueError("`states` holds NaN or infinite values.")
        tokens = start + torch.arange(1, values.shape[1] + 1)
        where = torch.bucketize(tokens, self._ends).clamp(max=len(self._ends) - 1).to(values.device)
        size = len(self._ends)
        self.add(
            total=values.new_zeros(size, heads).index_add(0, where, values.sum(0)),
            count=values.new_zeros(size).index_add(0, where, weights.sum(0)),
        )

    def compute(self) -> dict[str, Tensor]:
        """Float64; see the class."""
        if not bool(self.count.any()):
            raise ValueError("StateDrift: no state was seen: call `update` first.")
        tokens = self._ends.to(self.total.device)
        mean = self.total / self.count[:, None]  # NaN where nothing was seen
        within, past = (_largest(mean[part]) for part in (tokens <= self.train_length, tokens > self.train_length))
        ratio = past / within
        seen = ratio[~ratio.isnan()]
        return {
            "ratio": ratio,
            "ratio_max": seen.max() if len(seen) else ratio.new_tensor(torch.nan),
            "drifting": (seen > self.threshold).double().mean(),
            "curve": mean / within,
            "tokens": tokens,
        }


def _largest(curve: Tensor) -> Tensor:
    """Of every column, NaN left out; NaN where all are."""
    largest = curve.nan_to_num(nan=-torch.inf).amax(0)
    return torch.where(largest >= 0, largest, torch.nan)
