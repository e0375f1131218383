"""How the published HESSO code chooses units, for those who must reproduce it (microsoft/only_train_once, 4517648).

From its description, in words of our own. It differs from ours in four points:

1. Of the ``n + k`` units with the lowest saliency, ``n`` being gone already, those that are not gone are taken by
   position, the earliest layers first, until there are ``k``. Units that are gone do not have the lowest saliency.
2. A period of ``D`` steps has ``D - 1`` in which its units shrink.
3. The norms by which the criteria are divided go over all units, those included that are gone.
4. The criterion of the cosine is ``1 + cos(x, g)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_efficient.structured.hesso import Pruner


def published_share(total: int, target: float, periods: int, period: int) -> int:
    """How many units a period takes.

    Args:
        total: Units.
        target: Share of them that goes.
        periods: How many there are; the last takes what the others leave.
        period: Which, from 0.
    """
    count = int(total * min(target, 0.999))
    return count // periods if period < periods - 1 else count - (periods - 1) * (count // periods)


def published_choice(
    pruner: Pruner, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """The units of a period.

    Args:
        pruner: All units, layers in their order. The survivors of a layer are rounded up to a multiple of its divisor,
            so that fewer may go.
        scores: Group → ``(units,)``.
        gone: Group → bool, ``(units,)``.
        count: How many are to go.

    Returns:
        Group → bool, ``(units,)``: the units that go beside those gone.
    """
    groups = pruner.groups
    done = torch.cat([gone[name] for name in groups.found])
    lowest = torch.cat([scores[name] for name in groups.found]).topk(int(done.sum()) + count, largest=False).indices
    chosen = torch.zeros_like(done)
    chosen[[i for i in lowest.sort().values.tolist() if not done[i]][:count]] = True
    redundant = {}
    start = 0
    for name, group in groups.found.items():
        marked = chosen[start : start + group.units]
        start += group.units
        where = marked.nonzero().flatten().tolist()
        left = group.units - int(gone[name].sum())
        after, divisor = left - len(where), pruner.divisors[name]
        if where and (after <= 0 or after % divisor):
            after = min(max(after // divisor + 1, 1) * divisor, left)
            where = where[: left - after]
        redundant[name] = torch.zeros_like(marked)
        redundant[name][where] = True
    return redundant
