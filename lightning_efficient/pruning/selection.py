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
from lightning_efficient.weightspace.sums import Sums, run

SCOPES = ("global", "layer", "neuron")
# Units that lie along an axis → which, of ``(outputs, inputs, kernel)``: what is known of them is a vector a weight.
_ALONG = {"row": 0, "channel": 1, "head": 1}


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
    flats: dict[str, Tensor] = {}
    for name, score in scores.items():
        # Not `reshape(outputs, inputs, -1)`: a part may have no outputs.
        flat = flats[name] = score.flatten(2) if score.ndim > 2 else score.unsqueeze(2)
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f"the scores of {name!r} are not finite: did training diverge?")
        cut.check(name, _three(flat.shape if layouts is None else layouts[name].shape))
        if kept is not None and name in kept:
            flats[name] = flat.masked_fill(~kept[name].reshape(flat.shape), -torch.inf)
    axis, lined = _ALONG.get(cut.kind, 0), None
    if layouts is not None and cut.kind in _ALONG:  # every process gets to know them all, and chooses for itself
        lines = run(_line(flat, layouts[name], axis) for name, flat in flats.items())
        flats, lined, layouts = dict(zip(flats, lines, strict=True)), layouts, None
    shapes = {name: _three(flat.shape) for name, flat in flats.items()}
    units = {name: cut.units(flat, None if heads is None else heads.get(name)) for name, flat in flats.items()}
    if cut.kind == "n:m" or scope == "neuron":
        pruned = {name: lowest(u, count_of(amount, u.shape[1])) for name, u in units.items()}
    else:
        cuts = None if layouts is None else {n: spread(layouts[n], u, shapes[n][2], cut) for n, u in units.items()}
        sizes = {n: u.numel() if cuts is None else math.prod(cuts[n].shape) for n, u in units.items()}
        fields = [list(units)] if scope == "global" else [[name] for name in units]
        races = [(names, count_of(amount, sum(sizes[name] for name in names))) for names in fields]
        pruned = lowest_of_races(units, races, cuts)
    masks = {}
    for name, score in scores.items():
        mask = cut.entries(~pruned[name], shapes[name])
        if lined is not None:
            here = lined[name].along(axis, mask.flatten())
            mask = here.view([-1 if dim == axis else 1 for dim in range(score.ndim)]).expand(score.shape)
        mask = mask.reshape(score.shape)
        masks[name] = mask & kept[name] if kept is not None and name in kept else mask
    return masks


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    """A shape as ``(outputs, inputs, kernel)``."""
    return shape[0], shape[1], math.prod(shape[2:])


def _line(scores: Tensor, layout: Layout, axis: int) -> Sums[Tensor]:
    """The mean score at every position of an axis of the whole; ``(outputs, 1, 1)`` or ``(1, inputs, 1)``."""
    others = [dim for dim in range(3) if dim != axis]
    sums = scores.new_zeros(layout.shape[axis])
    layout.along(axis, sums).copy_(scores.sum(others))
    (sums,) = yield layout.everyone, [sums]
    line: Tensor = sums.div_(math.prod(layout.shape) // layout.shape[axis])
    return line.view([-1 if dim == axis else 1 for dim in range(3)])


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
    if not layout.groups:
        return
    cut, pieces = Granularity.parse(granularity), ""
    inner = math.prod(layout.shape[2:]) if cut.kind == "block" else 1
    sides = {"n:m": {1: cut.second}, "block": {0: cut.first, 1: cut.second}}.get(cut.kind, {})
    for dim, groups in layout.groups.items():
        length = -(-layout.shape[dim] // groups[0].size()) * (inner if dim else 1)
        what = f"its {('outputs', 'inputs', 'kernel')[min(dim, 2)]} over processes"
        if dim > 1 or (dim == 1 and cut.kind == "element" and scope == "neuron"):
            pieces = what
        elif dim in sides and (len(groups) > 1 or length % sides[dim]):
            pieces = f"{what}, into parts of {length}"
    if pieces:
        raise ValueError(
            f"{name!r} is cut along {pieces}, so that what granularity={granularity!r}, scope={scope!r} compares is in "
            "pieces. Exclude it, shard it otherwise, or use granularity 'element', 'row', 'channel' or 'head' with "
            "scope='global' or 'layer'."
        )


def spread(layout: Layout, units: Tensor, inner: int = 1, cut: Granularity | None = None) -> Spread:
    """How the units of a weight are shared out.

    Args:
        layout: Of the weight, seen as ``(outputs, inputs, ...)``.
        units: Those that are here, ``(rows, units)``.
        inner: Entries of the weight for each output and input.
        cut: Single entries, or blocks that :func:`check_layout` allows. None: entries.
    """
    if not layout.groups:
        return Spread((units.shape[0], units.shape[1]))
    high, wide = (cut.first, cut.second) if cut is not None and cut.kind == "block" else (1, 1)
    shape = (layout.shape[0] // high, layout.shape[1] * inner // wide)
    return Spread(shape, (layout.offset[0] // high, layout.offset[1] * inner // wide), layout.everyone)
