"""The n:m pattern in weights that are there already: does it hold, and what would a kernel for it gain."""

from __future__ import annotations

from torch import Tensor


def holds_pattern(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether of every ``m`` consecutive inputs of every output at most ``n`` are nonzero.

    Args:
        weight: ``(outputs, inputs)``.
        n: Entries that may be kept.
        m: Length of a run; false if it does not divide the inputs.
    """
    if weight.ndim != 2 or weight.shape[1] % m or not weight.numel():
        return False
    return int((weight.detach() != 0).view(weight.shape[0], -1, m).sum(2).max()) <= n
