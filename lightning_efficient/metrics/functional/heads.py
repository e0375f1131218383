"""From attention rows to one number per head, by sums that add up over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_efficient.metrics.functional.attention_entropy import (
    AttentionRows,
    entropy_lower_bound,
    normalized_entropy,
)

# Name of each per-head state, and how two of them combine.
HEAD_STATES = {
    "rows": "sum",
    "entropy": "sum",
    "normalized": "sum",
    "collapsed": "sum",
    "first_key": "sum",
    "bound": "sum",
    "ceiling": "sum",
    "entropy_min": "min",
    "normalized_min": "min",
    "logit_norm_max": "max",
}


def head_update(rows: AttentionRows, threshold: float = 0.05) -> dict[str, Tensor]:
    """Sums and extremes per head over batch and queries.

    Args:
        rows: Of one attention call, ``(batch, heads, queries)`` each. Queries that see fewer than two keys
            have no choice to make and are left out of everything.
        threshold: A row is collapsed when its normalised entropy is below this.

    Returns:
        The states of ``HEAD_STATES``, each ``(heads,)``. A NaN in a row (diverged logits) shows in its head.
    """
    use = rows.keys > 1
    entropy = rows.entropy
    normalized = normalized_entropy(entropy, rows.keys)
    bound = entropy_lower_bound(rows.logit_norm, rows.keys)

    def total(values: Tensor) -> Tensor:
        return torch.where(use, values, 0.0).sum((0, 2))

    def least(values: Tensor) -> Tensor:
        return torch.where(use, values, torch.inf).amin((0, 2))

    return {
        "rows": total(torch.ones_like(entropy)),
        "entropy": total(entropy),
        "normalized": total(normalized),
        "collapsed": total((normalized < threshold).to(entropy.dtype)),
        "first_key": total(rows.first_key),
        "bound": total(bound),
        "ceiling": total(rows.keys.to(entropy.dtype).log()),
        "entropy_min": least(entropy),
        "normalized_min": least(normalized),
        "logit_norm_max": torch.where(use, rows.logit_norm, -torch.inf).amax((0, 2)),
    }


def head_compute(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means and extremes per head.

    Args:
        states: Of :func:`head_update`, combined over updates as ``HEAD_STATES`` says.

    Returns:
        Name -> ``(heads,)``: ``rows`` (their number), ``entropy``, ``normalized``, ``first_key``, ``bound``,
        ``ceiling`` (log of the visible keys; means over rows), ``collapsed`` (fraction of rows), ``entropy_min``,
        ``normalized_min``, ``logit_norm_max``. NaN for a head without any row.
    """
    rows = states["rows"]
    out = {"rows": rows}
    for name, how in HEAD_STATES.items():
        if name != "rows":
            value = states[name] / rows if how == "sum" else states[name]
            out[name] = torch.where(rows > 0, value, torch.nan)
    return out
