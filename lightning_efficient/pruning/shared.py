"""The lowest of scores that are shared out over processes, exactly and without gathering them: a radix selection.

The bits of finite numbers that are not negative are in their order, so the threshold is found a digit at a time from
histograms, which add up over processes. Equal scores go in the order of their position, as in one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.weightspace.layout import Groups
from lightning_efficient.weightspace.sums import Sums

_DIGIT = 11  # bits: three rounds for float32


@dataclass(frozen=True)
class Spread:
    """How the units of a weight are shared out.

    Args:
        shape: ``(rows, units)`` of the whole.
        offset: Where those that are here begin.
        groups: The process groups that hold parts.
    """

    shape: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    groups: Groups = ()

    def positions(self, units: Tensor) -> Tensor:
        """The position in the whole, flattened, of everything in ``units``, which is what is here."""
        rows, columns = (torch.arange(size, device=units.device) for size in units.shape)
        return (rows[:, None] + self.offset[0]) * self.shape[1] + columns + self.offset[1]


def lowest_of_all(units: Sequence[Tensor], spreads: Sequence[Spread], count: int) -> Sums[list[Tensor]]:
    """Mark the ``count`` lowest of all scores; of equal ones the first.

    Args:
        units: Scores here, ``(rows, units)`` each: not negative, or minus infinity.
        spreads: Of each.
        count: How many in all processes together; fewer than there are.

    Returns:
        Bool, of the shapes of ``units``.
    """
    if count <= 0:
        return [torch.zeros_like(scores, dtype=torch.bool) for scores in units]
    groups = [spread.groups for spread in spreads]
    keys = [_bits(scores) for scores in units]
    width = 64 if any(scores.dtype == torch.float64 for scores in units) else 33
    threshold, left, ties = yield from _threshold(keys, groups, count, width)
    if left == ties:
        return [key <= threshold for key in keys]
    sizes = [math.prod(spread.shape) for spread in spreads]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    positions = [spread.positions(key) + start for spread, key, start in zip(spreads, keys, starts, strict=True)]
    tied = [position[key == threshold] for position, key in zip(positions, keys, strict=True)]
    last, _, _ = yield from _threshold(tied, groups, left, sum(sizes).bit_length())
    return [
        (key < threshold) | ((key == threshold) & (position <= last))
        for key, position in zip(keys, positions, strict=True)
    ]


def _bits(scores: Tensor) -> Tensor:
    """Whole numbers in the order of the scores."""
    wide = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32).contiguous()
    bits = wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32).to(torch.int64)
    return torch.where(wide == -torch.inf, 0, bits + 1)


def _threshold(keys: Sequence[Tensor], groups: Sequence[Groups], count: int, width: int) -> Sums[tuple[int, int, int]]:
    """The ``count``-th lowest key; how many of those equal to it are among the lowest, and how many there are."""
    prefix, left, ties = 0, count, 0
    for shift in range((width - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(2**_DIGIT, dtype=torch.int64, device=keys[0].device)
        for some in dict.fromkeys(groups):
            mine = torch.zeros_like(histogram)
            for key, own in zip(keys, groups, strict=True):
                if own == some:
                    alive = key[(key >> shift + _DIGIT) == (prefix >> shift + _DIGIT)]
                    mine += torch.bincount((alive >> shift) & (2**_DIGIT - 1), minlength=2**_DIGIT)
            (everywhere,) = yield some, [mine]
            histogram += everywhere
        below = histogram.cumsum(0)
        digit = int((below < left).sum())
        left -= int(below[digit - 1]) if digit else 0
        ties = int(histogram[digit])
        prefix |= digit << shift
    return prefix, left, ties
