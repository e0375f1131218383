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
from lightning_efficient.metrics.functional import pq_bound, pq_index
from lightning_efficient.metrics.functional.pq_index import check_pq
from lightning_efficient.pruning.selection import SCOPES, lowest
from lightning_efficient.weightspace.snapshot import SNAPSHOT


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


def sap_step(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], config: SapConfig) -> SapStep:
    """One iteration of algorithm 1 on trained weights: steps 4 to 7.

    Args:
        weights: Name → trained weight, ``(outputs, inputs, ...)``.
        kept: Name → the mask so far, same shapes.
        config: Hyper-parameters.

    Raises:
        ValueError: Nothing that is left is nonzero.
    """
    magnitude = {name: weight.detach().abs().flatten(1) for name, weight in weights.items()}
    alive = {name: kept[name].flatten(1) for name in weights}
    together = torch.cat([magnitude[name][alive[name]] for name in weights])
    overall = pq_index(together, config.p, config.q)
    # One row for each group of the scope.
    if config.scope == "global":
        rows = {"": torch.cat([m.reshape(-1) for m in magnitude.values()])[None]}
        live = {"": torch.cat([a.reshape(-1) for a in alive.values()])[None]}
    elif config.scope == "layer":
        rows = {name: m.reshape(1, -1) for name, m in magnitude.items()}
        live = {name: a.reshape(1, -1) for name, a in alive.items()}
    else:
        rows, live = magnitude, alive
    chosen: dict[str, Tensor] = {}
    indices: list[Tensor] = []
    pruned = 0
    for name, row in rows.items():
        index = pq_index(row, config.p, config.q, mask=live[name], dim=0)
        count = prune_count(index, live[name].sum(1), config)
        gone = (~live[name]).sum(1)
        chosen[name] = ~lowest(row.masked_fill(~live[name], -1.0), gone + count)
        indices.append(index)
        pruned += int(count.sum())
    if config.scope == "global":
        parts = torch.split(chosen[""][0], [m.numel() for m in magnitude.values()])
        chosen = dict(zip(magnitude, parts, strict=True))
    masks = {name: chosen[name].reshape(weight.shape) for name, weight in weights.items()}
    scoped = torch.cat(indices).nanmean()
    total = sum(m.numel() for m in magnitude.values())
    return SapStep(masks, pruned, len(together), total, float(overall), float(scoped))


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
