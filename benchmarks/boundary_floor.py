"""What the optimizer boundary itself takes, against the floor: its passes over the weights as plain memory traffic.

A step of sigmaReparam reads the weights 5 times and writes them twice, and reads the gradients 3 times and writes them
twice (one inner product, the rank-one correction and its scaling, two rescalings, two matrix-vector products): 12
passes. The floor here is 6 copies of the weights with ``torch.Tensor.copy_``, one read and one write each, matrix by
matrix.

    OMP_NUM_THREADS=1 python benchmarks/boundary_floor.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import timm
import torch
from common import markdown, save

from lightning_efficient.weightspace.sigma_reparam import apply_sigma_reparam

PASSES = 12


def cpu_ms(work: Callable[[], None], rounds: int = 20) -> float:
    times = []
    for _ in range(rounds + 3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[3:]) * 1e3


def main() -> None:
    rows = []
    for title, name in (("ViT-Tiny", "vit_tiny_patch16_224"), ("ViT-Small", "vit_small_patch16_224")):
        model = timm.create_model(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        plain = cpu_ms(optimizer.step)
        _, boundary = apply_sigma_reparam(model, optimizer)
        with_boundary = cpu_ms(optimizer.step)
        weights = [site.param.detach() for site in boundary.sites.values()]
        other = [torch.empty_like(w) for w in weights]

        def floor(weights: list[torch.Tensor] = weights, other: list[torch.Tensor] = other) -> None:
            for w, o in zip(weights, other, strict=True):
                for _ in range(PASSES // 2):
                    o.copy_(w)

        rows.append(
            {
                "model": f"{title}, {len(weights)} matrices, {sum(w.numel() for w in weights) / 1e6:.1f} M weights",
                "boundary_ms": with_boundary - plain,
                "floor_ms": cpu_ms(floor),
            }
        )
    columns = {"model": "model", "boundary_ms": "boundary, ms a step", "floor_ms": "floor, ms a step"}
    table = markdown(rows, columns)
    print(table)
    save("boundary_floor", rows).with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
