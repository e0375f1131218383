"""Each of two processes sees its part of the data, or none; all metrics must come to what one process gets of all."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.metrics import (
    Alignment,
    AlphaReQ,
    EffectiveRank,
    LiDAR,
    NeuralCollapse,
    ParticipationRatio,
    PosteriorCollapse,
    RankMe,
    StableRank,
    StateDrift,
    Uniformity,
)

g = torch.Generator().manual_seed(0)
z = torch.randn(60, 12, generator=g) + 2
pairs = torch.randn(60, 12, generator=g)
labels = torch.arange(60) % 4
weight = torch.randn(4, 12, generator=g)
views = torch.randn(40, 3, 12, generator=g)
CASES = {
    **{kind.__name__: (kind, (z,)) for kind in (RankMe, EffectiveRank, StableRank, ParticipationRatio, AlphaReQ)},
    "LiDAR": (LiDAR, (views,)),
    "Uniformity": (Uniformity, (z,)),
    "Alignment": (Alignment, (z, pairs)),
    "NeuralCollapse": (lambda: NeuralCollapse(4), (z, labels)),
    "NeuralCollapse with a classifier": (lambda: NeuralCollapse(4), (z, labels, weight)),
    "StateDrift": (lambda: StateDrift(4, 12), (z.view(60, 6, 1, 2).cumsum(1),)),
    "PosteriorCollapse": (PosteriorCollapse, (0.1 * z, 0.1 * pairs)),
}
NEEDS_SAMPLES = ("Uniformity",)  # torchmetrics gathers lists of samples from processes that have some


def flat(value: object) -> Tensor:
    values = list(value.values()) if isinstance(value, dict) else [value]
    return torch.cat([torch.as_tensor(v).double().flatten() for v in values])


expected = {}
for name, (kind, data) in CASES.items():
    metric = kind()
    metric.update(*data)
    expected[name] = flat(metric.compute())

dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
for share in (25, 0):  # of process 0; the rest, in two updates, is the other's
    for name, (kind, data) in CASES.items():
        if share == 0 and name in NEEDS_SAMPLES:
            continue
        metric = kind()
        for lo, hi in ((0, share),) if rank == 0 else ((share, share + 7), (share + 7, None)):
            if rank or share:
                metric.update(*(part if part is weight else part[lo:hi] for part in data))
        metric._update_count = 1  # torchmetrics warns of processes that have seen nothing
        found = flat(metric.compute())
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12, equal_nan=True)
        metric.update(*data)  # goes on with its own part alone
print(f"agreed {rank}", file=sys.stdout)
dist.destroy_process_group()
