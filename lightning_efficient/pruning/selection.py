"""From scores to masks: what goes first is the lowest score, ties in the order of their position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    if cut.kind == "n:m" or scope == "neuron":
        pruned = {name: lowest(u, count_of(amount, u.shape[1])) for name, u in units.items()}
    else:
        cuts = None if layouts is None else {n: spread(layouts[n], u, shapes[n][2], cut.kind) for n, u in units.items()}
        sizes = {n: u.numel() if cuts is None else math.prod(cuts[n].shape) for n, u in units.items()}
        fields = [list(units)] if scope == "global" else [[name] for name in units]
        races = [(names, count_of(amount, sum(sizes[name] for name in names))) for names in fields]
        pruned = lowest_of_races(units, races, cuts)
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


def lowest_of_races(
    units: Mapping[str, Tensor], races: Sequence[tuple[Sequence[str], int]], spreads: Mapping[str, Spread] | None
) -> dict[str, Tensor]:
    """Mark the lowest scores of weights that compete.

    Args:
        units: Name → scores, ``(rows, units)``; of what is here of a weight that is cut over processes.
        races: Names of weights that compete, and how many scores of theirs are marked.
        spreads: How weights are cut; all processes come here. None: they are whole.

    Returns:
        Name → bool, of the shape of the scores.
    """
    if spreads is None:
        together = [(torch.cat([units[name].reshape(1, -1) for name in names], 1), count) for names, count in races]
        sizes = [[units[name].numel() for name in names] for names, _ in races]
        found = [torch.split(lowest(u, n)[0], size) for (u, n), size in zip(together, sizes, strict=True)]
    else:
        found = run(
            lowest_of_all([units[name] for name in names], [spreads[name] for name in names], count)
            for names, count in races
        )
    pairs = [pair for (names, _), marks in zip(races, found, strict=True) for pair in zip(names, marks, strict=True)]
    return {name: marks.reshape(units[name].shape) for name, marks in pairs}


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


def spread(layout: Layout, units: Tensor, inner: int = 1, kind: str = "element") -> Spread:
    """How the units of a weight are shared out.

    Args:
        layout: Of the weight, seen as ``(outputs, inputs, ...)``.
        units: Those that are here, ``(rows, units)``.
        inner: Entries of the weight for each output and input.
        kind: Of granularity, one that :func:`check_layout` allows.
    """
    if not layout.groups:
        return Spread((units.shape[0], units.shape[1]))
    if kind == "row":
        return Spread((1, layout.shape[0]), (0, layout.offset[0]), layout.everyone)
    columns = layout.shape[1] * inner
    return Spread((layout.shape[0], columns), (layout.offset[0], layout.offset[1] * inner), layout.everyone)
