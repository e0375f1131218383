"""SAP, sparsity-informed adaptive pruning: the PQ index says how much to prune (Diao et al., arXiv 2302.05601).

One iteration of algorithm 1: from the PQ index ``I`` of the ``d`` weights that are left, theorem 2 bounds how many have
to stay, ``r = d (1 + η)^(-q/(q - p)) (1 - I)^(q p/(q - p))``; then ``c = ⌊d · min(γ (1 - ⌈r⌉/d), β)⌋`` of the smallest
magnitudes go. The ceiling is the published code's (diaoenmao/Pruning-Deep-Neural-Networks-from-a-Sparsity-Perspective,
``src/modules/compression.py``), not the paper's. Where the published code prunes what lies strictly below a threshold,
so that equal magnitudes stay, exactly ``c`` weights go here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_efficient.common.schema import (
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    OrNone,
    Record,
    Such,
    TensorOf,
    Text,
)
from lightning_efficient.metrics.functional import pq_bound
from lightning_efficient.metrics.functional.pq_index import check_pq, index_of_sums, wide_dtype
from lightning_efficient.pruning.selection import SCOPES, lowest, lowest_of_races, spread
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.snapshot import SNAPSHOT
from lightning_efficient.weightspace.sums import run, total


@dataclass(frozen=True)
class SapConfig:
    """Hyper-parameters of SAP, with the paper's defaults.

    Args:
        p: The smaller norm of the PQ index.
        q: The larger norm.
        eta: Tolerated share of ``Σ|w|^p`` in what is pruned; larger prunes more.
        gamma: Factor on the share to prune; larger prunes more.
        beta: Largest share of what is left that one iteration may prune.
        scope: The weights that share an index and a count: all (``"global"``), each tensor's (``"layer"``), or each
            output's (``"neuron"``).
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    scope: Literal["global", "layer", "neuron"] = "global"

    def __post_init__(self) -> None:
        check_pq(self.p, self.q)
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"`eta` must be 0 or larger; got {self.eta}.")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"`gamma` must be above 0; got {self.gamma}. 1 is the paper's.")
        if not 0 < self.beta < 1:
            raise ValueError(f"`beta` must be within (0, 1); got {self.beta}. 0.9 is the paper's.")
        if self.scope not in SCOPES:
            raise ValueError(f"`scope` must be one of {SCOPES}; got {self.scope!r}.")


def prune_count(index: Tensor, left: Tensor, config: SapConfig) -> Tensor:
    """``c``: how many of the weights that are left one iteration prunes.

    Args:
        index: PQ index of the weights that are left, any shape; NaN (nothing but zeros left) prunes nothing.
        left: Their number ``d``, same shape.
        config: Hyper-parameters.

    Returns:
        int64, same shape.
    """
    d = left.to(torch.float64)
    bound = pq_bound(index.to(torch.float64).nan_to_num(0.0), d, config.p, config.q, config.eta)
    # 1e-9: a bound that is whole, such as d (1 - 0), must not be rounded up for its last bit.
    keep = torch.ceil(bound - 1e-9)
    # d γ (1 - ⌈r⌉/d) without the division, which would cost whole numbers their last bit.
    share = torch.minimum(config.gamma * (d - keep), config.beta * d).clamp_min(0)
    count = torch.floor(share + 1e-9).long()
    return torch.where(index.isnan(), torch.zeros_like(count), count)


_ROW = Record(
    {
        "iteration": Int(low=0), "step": Int(low=0), "left": Number(low=0, high=1), "pqi": Number(finite=False),
        "pqi_scope": Number(finite=False), "score": OrNone(Number(finite=False)), "next_pruned": Int(low=0),
        "phase": Text(),
    }
)  # fmt: skip
_HISTORY = Such(
    ListOf(_ROW),
    lambda rows: [row["iteration"] for row in rows] == list(range(len(rows))),
    "one for each iteration, in their order",
)
_MASKS = MapOf(Text(), TensorOf(torch.uint8, ndim=1))
# Where a run stands, in files.
SAP_STATE = Record(
    {
        "history": _HISTORY, "stopped": OneOf((None, "collapse", "stalled")), "closed_step": Int(low=0),
        "next": OrNone(_MASKS), "score": OrNone(Number(finite=False)), "snapshot": OrNone(SNAPSHOT),
        "keep": OrNone(Record({"snapshot": SNAPSHOT, "masks": _MASKS})), "best": OrNone(SNAPSHOT),
    }
)  # fmt: skip


@dataclass(frozen=True)
class SapStep:
    """What one iteration decided.

    Args:
        masks: Name → the next mask, True where the weight is kept.
        pruned: How many weights go.
        left: How many there were.
        total: How many there are in all, pruned ones included.
        index: PQ index of all weights that are left, taken together.
        scoped: Mean over the groups of the scope that have one; equal to ``index`` for ``"global"``.
    """

    masks: dict[str, Tensor]
    pruned: int
    left: int
    total: int
    index: float
    scoped: float


def sap_step(
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    config: SapConfig,
    layouts: Mapping[str, Layout] | None = None,
) -> SapStep:
    """One iteration of algorithm 1 on trained weights: steps 4 to 7.

    Args:
        weights: Name → trained weight, ``(outputs, inputs, ...)``; what is here of one that is cut over processes.
        kept: Name → the mask so far, same shapes.
        config: Hyper-parameters.
        layouts: Name → how the weight is cut; all processes come here. None: whole.

    Raises:
        ValueError: Nothing that is left is nonzero.
    """
    magnitude = {name: weight.detach().abs().flatten(1) for name, weight in weights.items()}
    alive = {name: kept[name].flatten(1) for name in weights}
    cuts = {name: Layout.find(name, weight) for name, weight in weights.items()} if layouts is None else layouts
    sizes = {name: math.prod(layout.shape) for name, layout in cuts.items()}
    rows = {name: _sums(magnitude[name], alive[name], config) for name in weights}
    whole = dict(zip(weights, run(total(cuts[name], rows[name].sum(1)) for name in weights), strict=True))
    together = torch.stack(list(whole.values())).sum(0)
    if not together[0]:
        raise ValueError(f"the PQ index of weights without a nonzero entry is undefined ({list(weights)[:3]}).")
    scores = {name: m.masked_fill(~alive[name], -torch.inf) for name, m in magnitude.items()}
    if config.scope == "neuron":  # a row is in one place
        indices = {name: _index(rows[name], config) for name in weights}
        counts = {name: prune_count(indices[name], rows[name][2], config) for name in weights}
        chosen = {name: lowest(scores[name], (~alive[name]).sum(1) + counts[name]) for name in weights}
        found = {n: torch.stack([i.nansum(), (~i.isnan()).sum(), counts[n].sum()]) for n, i in indices.items()}
        summed, defined, pruned = torch.stack(run(total(cuts[n], value) for n, value in found.items())).sum(0).tolist()
        scoped = summed / defined
    else:
        fields = [[name] for name in weights] if config.scope == "layer" else [list(weights)]
        sums = torch.stack([torch.stack([whole[name] for name in names]).sum(0) for names in fields], dim=1)
        index = _index(sums, config)
        count = prune_count(index, sums[2], config)
        gone = [sum(sizes[name] for name in names) - int(left) for names, left in zip(fields, sums[2], strict=True)]
        races = [(names, dead + int(more)) for names, dead, more in zip(fields, gone, count, strict=True)]
        inner = {name: math.prod(weight.shape[2:]) for name, weight in weights.items()}
        spreads = None if layouts is None else {n: spread(layouts[n], m, inner[n]) for n, m in magnitude.items()}
        chosen = lowest_of_races(scores, races, spreads)
        scoped, pruned = float(index.nanmean()), int(count.sum())
    masks = {name: ~chosen[name].reshape(weight.shape) for name, weight in weights.items()}
    overall = float(_index(together, config))
    return SapStep(masks, int(pruned), int(together[2]), sum(sizes.values()), overall, scoped)


def _sums(magnitude: Tensor, alive: Tensor, config: SapConfig) -> Tensor:
    """``Σ|w|^p``, ``Σ|w|^q`` and the number of what is left of each row, (3, rows)."""
    wide = magnitude.to(wide_dtype(magnitude)) * alive
    return torch.stack([wide.pow(config.p).sum(1), wide.pow(config.q).sum(1), alive.sum(1)])


def _index(sums: Tensor, config: SapConfig) -> Tensor:
    return index_of_sums(sums[0], sums[1], sums[2], config.p, config.q)


def phase(indices: Sequence[float], scores: Sequence[float | None], tolerance: float, mode: str) -> str:
    """Which of the three phases of pruning the last iteration is in.

    Args:
        indices: PQ index of each iteration so far, the dense one first.
        scores: A validation metric likewise; None where there is none.
        tolerance: How much worse than the dense model, as a share of its score, is collapse.
        mode: ``"min"`` or ``"max"``, whichever is better for the metric.

    Returns:
        ``"dense"``, then ``"regularise"`` (the index falls: what is left gets more equal), ``"compress"`` (it rises:
        there is again something to prune) or ``"collapse"`` (the model is worse by more than the tolerance).

    Source: hypothesis of arXiv 2302.05601, section 3, where collapse shows as a falling index too; performance decides
        here, which is what a user wants to keep.
    """
    if len(indices) == 1:
        return "dense"
    first, last = scores[0], scores[-1]
    if first is not None and last is not None:
        worse = last - first if mode == "min" else first - last
        if not worse <= tolerance * abs(first):  # a NaN is collapse, too
            return "collapse"
    return "regularise" if indices[-1] < indices[-2] else "compress"
