"""From scores to masks: what goes first is the lowest score, ties in the order of their position."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_efficient.common.schedule import check_amount
from lightning_efficient.pruning.granularity import Granularity
from lightning_efficient.pruning.shared import Spread, lowest_of_all
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.sums import run

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
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Tensor]:
    """Choose what to prune in several weights.

    Args:
        scores: Name → score of every entry, ``(outputs, inputs, ...)``; the lowest go first. Of what is here of a
            weight that is cut over processes, and then not negative.
        amount: Share of the units to prune, those pruned already included, in [0, 1). For ``n:m`` every run of ``m``
            inputs loses the same number, so that ``1 - n/m`` gives ``n`` of ``m``.
        granularity: As :meth:`Granularity.parse`; a unit's score is the mean of its entries'.
        scope: Which units compete: of all weights together (``"global"``), of each weight (``"layer"``), or of each
            output of each weight (``"neuron"``, for single entries only). ``n:m`` has its own scope, the run.
        kept: Earlier masks; what they drop stays dropped.
        heads: Name → number of heads along the inputs, for ``"head"``.
        layouts: Name → how the weight is cut, which :func:`check_layout` allows; all processes come here. None: whole.

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
        # Not `reshape(outputs, inputs, -1)`: a part may have no outputs.
        flat = score.flatten(2) if score.ndim > 2 else score.unsqueeze(2)
        shapes[name] = (flat.shape[0], flat.shape[1], flat.shape[2])
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f"the scores of {name!r} are not finite: did training diverge?")
        cut.check(name, shapes[name])
        if kept is not None and name in kept:
            flat = flat.masked_fill(~kept[name].reshape(flat.shape), -torch.inf)
        units[name] = cut.units(flat, None if heads is None else heads.get(name))
    scope = "neuron" if cut.kind == "n:m" else scope
    if layouts is None or scope == "neuron":
        pruned = _choose(units, amount, scope)
    else:
        spreads = {name: _spread(layouts[name], cut, shapes[name], u) for name, u in units.items()}
        pruned = _choose_among_all(units, amount, scope, spreads)
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


def check_layout(name: str, granularity: str, scope: str, layout: Layout) -> None:
    """Refuse to prune a weight whose units are cut into pieces over processes.

    Args:
        name: Of the weight.
        granularity: As :meth:`Granularity.parse`.
        scope: As :func:`make_masks`.
        layout: How the weight is cut, seen as ``(outputs, inputs, ...)``.

    Raises:
        ValueError: Says which granularity and scope it can have.
    """
    kind = Granularity.parse(granularity).kind
    inside = kind in ("element", "row", "n:m") and (kind == "element" or not any(layout.groups.keys() - {0}))
    ranked = scope != "neuron" or not any(layout.groups.keys() - {0})
    if not layout.groups or (inside and ranked and max(layout.groups) < 2):
        return
    where = "inputs" if 1 in layout.groups else "outputs"
    can = "'element', 'row' and 'n:m'" if where == "outputs" else "'element' with scope='global' or 'layer'"
    raise ValueError(
        f"{name!r} is cut along its {where} over processes, so that what granularity={granularity!r}, scope={scope!r} "
        f"compares is in pieces: it can have granularity {can}. Exclude it, or shard it otherwise."
    )


def _spread(layout: Layout, cut: Granularity, shape: tuple[int, int, int], units: Tensor) -> Spread:
    """How the units of a weight are shared out."""
    inner = shape[2]
    if not layout.groups:
        return Spread((units.shape[0], units.shape[1]))
    if cut.kind == "row":
        return Spread((1, layout.shape[0]), (0, layout.offset[0]), layout.everyone)
    columns = layout.shape[1] * inner
    return Spread((layout.shape[0], columns), (layout.offset[0], layout.offset[1] * inner), layout.everyone)


def _choose_among_all(
    units: Mapping[str, Tensor], amount: float, scope: str, spreads: Mapping[str, Spread]
) -> dict[str, Tensor]:
    names = list(units)
    sizes = {name: math.prod(spreads[name].shape) for name in names}
    races = [names] if scope == "global" else [[name] for name in names]
    found = run(
        lowest_of_all(
            [units[n] for n in race], [spreads[n] for n in race], count_of(amount, sum(sizes[n] for n in race))
        )
        for race in races
    )
    return {
        name: gone for race, marks in zip(races, found, strict=True) for name, gone in zip(race, marks, strict=True)
    }
