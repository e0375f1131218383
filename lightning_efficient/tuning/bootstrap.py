"""Several variants scored on the same units (queries, samples): differences to a baseline, with paired intervals.

Picking the best of several variants and testing it as if it had been the only one finds "gains" in noise. The
intervals here hold for all variants at once: units are resampled together, and the half-widths come from the largest
studentized deviation over the variants (the idea of White's reality check, Econometrica 2000, in the studentized form
of Romano and Wolf, Econometrica 2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BLOCK = 2**22  # resampling counts held at once


@dataclass(frozen=True)
class Paired:
    """Mean differences to the baseline and their simultaneous interval; every array is ``(variants,)``.

    Args:
        mean: Weighted mean of each variant.
        difference: Of the means, variant minus baseline.
        low: Lower end; all intervals hold at once with the confidence asked for.
        high: Upper end.
    """

    mean: Array
    difference: Array
    low: Array
    high: Array


def compare_paired(
    scores: Array,
    baseline: int = 0,
    weights: Array | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Bootstrap over units, the same resample for every variant.

    Args:
        scores: ``(variants, units)``.
        baseline: Row that the others are compared with.
        weights: Of the units in the means, ``(units,)``, positive. ``None``: equal.
        resamples: Number of bootstrap samples.
        confidence: Of all intervals together, in (0, 1).
        seed: Of the resampling.

    Returns:
        Intervals are NaN for fewer than two units.

    Raises:
        ValueError: ``resamples`` below 100, or ``confidence`` out of range.
    """
    if resamples < 100 or not 0 < confidence < 1:
        raise ValueError(
            f"`resamples` is {resamples} and `confidence` {confidence}; expected at least 100, and between 0 and 1."
        )
    units = scores.shape[1]
    weights = np.ones(units) if weights is None else np.asarray(weights, dtype=np.float64)
    gaps = scores - scores[baseline]
    mean, difference = scores @ weights / weights.sum(), gaps @ weights / weights.sum()
    if units < 2:
        nothing = np.full(len(scores), np.nan)
        return Paired(mean, difference, nothing, nothing)
    drawn = _resampled(gaps, weights, resamples, seed)
    error = drawn.std(axis=0)
    moves = error > 1e-12 * np.abs(scores).max()  # a variant that differs by a constant, or not at all, has no error
    largest = np.abs((drawn - difference)[:, moves] / error[moves]).max(axis=1, initial=0.0)
    half = np.where(moves, np.quantile(largest, confidence) * error, 0.0)
    return Paired(mean, difference, difference - half, difference + half)


def _resampled(gaps: Array, weights: Array, resamples: int, seed: int) -> Array:
    """Weighted mean differences of bootstrap samples, ``(resamples, variants)``."""
    rng = np.random.default_rng(seed)
    units = len(weights)
    weighted = np.concatenate([gaps * weights, weights[None]]).T  # (units, variants + 1)
    means = []
    rows = max(1, _BLOCK // units)
    for start in range(0, resamples, rows):
        counts = rng.multinomial(units, np.full(units, 1 / units), size=min(rows, resamples - start))
        sums = counts.astype(np.float64) @ weighted
        means.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(means)
