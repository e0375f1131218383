"""What the metrics of embeddings cost on 25,600 embeddings of 768 features, against one SVD of all of them.

The SVD needs all embeddings at once; the metrics get them in batches of 256 and keep one Gram matrix. CPU time of the
process, the best of ``--rounds``; the embeddings decay as k^-1, as a trained encoder's do.

    OMP_NUM_THREADS=1 python benchmarks/spectrum_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, markdown, save

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
from lightning_efficient.metrics.functional import rank_of_spectrum

SAMPLES, WIDTH, BATCH = 25_600, 768, 256
FAMILY = {cls.__name__: cls for cls in (RankMe, EffectiveRank, StableRank, ParticipationRatio, AlphaReQ)}


def best(work: Callable[[], Any], rounds: int) -> float:
    """Seconds of CPU time."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    z = torch.randn(SAMPLES, WIDTH) / torch.arange(1, WIDTH + 1)
    held, state = z.numel() * 4 / 2**20, WIDTH**2 * 8 / 2**20

    def filled(metric: Any, data: torch.Tensor = z) -> Any:
        for part in data.split(BATCH):
            metric.update(part)
        return metric

    def svd(dtype: torch.dtype) -> float:
        return float(rank_of_spectrum(torch.linalg.svdvals(z.to(dtype))))

    exact = best(lambda: svd(torch.float64), args.rounds)
    single = best(lambda: svd(torch.float32), args.rounds)
    rows = [
        {"what": "one SVD, float32", "update": "", "compute": single, "total": single, "ratio": 1.0, "mib": held},
        {"what": "one SVD, float64", "update": "", "compute": exact, "total": exact, "ratio": exact / single,
         "mib": 2 * held},
    ]  # fmt: skip
    update = best(lambda: filled(RankMe()), args.rounds)
    kept = filled(RankMe())
    for name, cls in FAMILY.items():
        metric = cls()
        metric.gram, metric.total, metric.samples = kept.gram, kept.total, kept.samples
        compute = best(lambda metric=metric: metric.measure(metric.seen(metric.center)), args.rounds)
        rows.append({"what": name, "update": update, "compute": compute, "total": update + compute, "mib": state})
    together = best(lambda: [kept.seen(center).singular_values for center in (False, True)], args.rounds)
    rows.append(
        {"what": "all five, one state", "update": update, "compute": together, "total": update + together, "mib": state}
    )
    views = z.view(-1, 2, WIDTH)
    total = best(lambda: filled(LiDAR(), views), args.rounds)
    lidar = filled(LiDAR(compute_with_cache=False), views)
    compute = best(lidar.compute, args.rounds)
    rows.append(
        {"what": "LiDAR, two views", "update": total, "compute": compute, "total": total + compute, "mib": 2 * state}
    )
    labels, weight = torch.arange(SAMPLES) % 10, torch.randn(10, WIDTH)
    # Name → how to make it, what it is given, MiB that it keeps.
    others: dict[str, tuple[Any, tuple[torch.Tensor, ...], float]] = {
        "Alignment": (Alignment, (z, z.flip(0)), 0.0),
        "NeuralCollapse, 10 classes": (lambda: NeuralCollapse(10), (z, labels), state),
        "NeuralCollapse with NC3 and NC4": (lambda: NeuralCollapse(10), (z, labels, weight), state + held),
        "PosteriorCollapse": (PosteriorCollapse, (0.1 * z, 0.1 * z), 0.2),
        "StateDrift, 100 tokens": (lambda: StateDrift(10, 100), (z.view(-1, 100, 12, 64),), 0.01),
    }
    for name, (make, given, kept_mib) in others.items():

        def updated(make: Any = make, given: Any = given) -> Any:
            metric = make()
            for parts in zip(*(t.split(max(1, BATCH * len(t) // SAMPLES)) for t in given[:2]), strict=True):
                metric.update(*parts, *given[2:])
            metric.compute_with_cache = False
            return metric

        total = best(updated, args.rounds)
        compute = best(updated().compute, args.rounds)
        rows.append({"what": name, "update": total, "compute": compute, "total": total + compute, "mib": kept_mib})
    spread = filled(Uniformity(compute_with_cache=False))
    compute = best(spread.compute, 1)
    rows.append({"what": "Uniformity, all pairs", "update": "", "compute": compute, "total": compute, "mib": held})
    for row in rows:
        row["ratio"] = row["total"] / single
    difference = abs(float(kept.compute()) / svd(torch.float64) - 1)
    columns = {
        "what": f"{SAMPLES:,} × {WIDTH}", "update": "100 updates, s", "compute": "compute, s", "total": "total, s",
        "ratio": "÷ SVD", "mib": "kept, MiB",
    }  # fmt: skip
    table = markdown(rows, columns)
    print(table, f"\nRankMe differs from that of the SVD in float64 by {difference:.1e}")
    save("spectrum_cost", rows, relative_difference_to_svd=difference).with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
