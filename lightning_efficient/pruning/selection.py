"""From scores to masks: what goes first is the lowest score, ties in the order of their position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_efficient.common.schedule import check_amount
from lightning_efficient.pruning.granularity import Granularity

SCOPES = ("global", "layer", "neuron")


def count_of(amount: float, size: int) -> int:
    """How many of ``size`` units a share is: rounded down, so that the amount is never exceeded."""
    return int(amount * size + 1e-9)


def lowest(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Mark the ``counts`` lowest scores of every row; of equal ones the first.

    Args:
        scores: ``(rows, units)``.
        counts: How many in each row, ``(rows,)``, or the same in all.

    Returns:
        Bool, ``(rows, units)``, exactly ``counts`` true in each row.
    """
    rows, units = scores.shape
    if rows == 1:  # selection is linear in the number of weights, where sorting millions takes seconds
        count = int(counts)
        if count <= 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = _smallest(scores[0], min(count, units))
        below, ties = scores < threshold, scores == threshold
        return below | (ties & (ties.cumsum(1) <= count - below.sum()))
    order = scores.argsort(dim=1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(units, device=scores.device).expand_as(order))
    return rank < (counts[:, None] if isinstance(counts, Tensor) else counts)


def _smallest(values: Tensor, k: int) -> Tensor:
    # On CUDA sorting is fast, and allowed by torch's deterministic mode.
    return values.sort().values[k - 1] if values.is_cuda else values.kthvalue(k).values


def make_masks(
    scores: Mapping[str, Tensor],
    amount: float,
    *,
    granularity: str = "element",
    scope: str = "global",
    kept: Mapping[str, Tensor] | None = None,
    heads: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Choose what to prune in several weights.

    Args:
        scores: Name → score of every entry, ``(outputs, inputs, ...)``; the lowest go first.
        amount: Share of the units to prune, those pruned already included, in [0, 1). For ``n:m`` every run of ``m``
            inputs loses the same number, so that ``1 - n/m`` gives ``n`` of ``m``.
        granularity: As :meth:`Granularity.parse`; a unit's score is the mean of its entries'.
        scope: Which units compete: of all weights together (``"global"``), of each weight (``"layer"``), or of each
            output of each weight (``"neuron"``, for single entries only). ``n:m`` has its own scope, the run.
        kept: Earlier masks; what they drop stays dropped.
        heads: Name → number of heads along the inputs, for ``"head"``.

    Returns:
        Name → bool mask of the shape of the scores, True where the weight is kept.

    Raises:
        ValueError: An argument is out of range, scores are not finite, or a weight does not divide.
    """
    check_amount(amount)
    cut = Granularity.parse(granularity)
    check_scope(scope, cut)
    shapes: dict[str, tuple[int, int, int]] = {}
    units: dict[str, Tensor] = {}
    for name, score in scores.items():
        flat = score.reshape(score.shape[0], score.shape[1], -1)
        shapes[name] = (flat.shape[0], flat.shape[1], flat.shape[2])
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f"the scores of {name!r} are not finite: did training diverge?")
        cut.check(name, shapes[name])
        if kept is not None and name in kept:
            flat = flat.masked_fill(~kept[name].reshape(flat.shape), -torch.inf)
        units[name] = cut.units(flat, None if heads is None else heads.get(name))
    pruned = _choose(units, amount, "neuron" if cut.kind == "n:m" else scope)
    masks = {}
    for name, score in scores.items():
        mask = cut.entries(~pruned[name], shapes[name]).reshape(score.shape)
        masks[name] = mask & kept[name] if kept is not None and name in kept else mask
    return masks


def check_scope(scope: str, cut: Granularity) -> None:
    """Refuse unknown scopes, and ranking inside a neuron units that are not inside one.

    Raises:
        ValueError: Either of these.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {SCOPES}; got {scope!r}.")
    if scope == "neuron" and cut.kind not in ("element", "n:m"):
        raise ValueError(
            f"scope='neuron' ranks the entries of one output, but granularity {cut.kind!r} prunes larger units. "
            "Use scope='layer' or 'global'."
        )


def _choose(units: Mapping[str, Tensor], amount: float, scope: str) -> dict[str, Tensor]:
    if scope == "neuron":
        return {name: lowest(u, count_of(amount, u.shape[1])) for name, u in units.items()}
    if scope == "layer":
        return {
            name: lowest(u.reshape(1, -1), count_of(amount, u.numel())).reshape(u.shape) for name, u in units.items()
        }
    together = torch.cat([u.reshape(-1) for u in units.values()])
    chosen = lowest(together[None], count_of(amount, together.numel()))[0]
    parts = torch.split(chosen, [u.numel() for u in units.values()])
    return {name: part.reshape(u.shape) for (name, u), part in zip(units.items(), parts, strict=True)}
