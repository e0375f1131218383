"""What the optimizer boundary itself takes, against the floor: its passes over the weights as plain memory traffic.

A step of sigmaReparam reads the weights 5 times and writes them twice, and reads the gradients 3 times and writes them
twice (one inner product, the rank-one correction and its scaling, two rescalings, two matrix-vector products): 12
passes. The floor here is 6 copies of the weights with ``torch.Tensor.copy_``, one read and one write each, matrix by
matrix.

    OMP_NUM_THREADS=1 python benchmarks/boundary_floor.py
    python benchmarks/boundary_floor.py --device cuda
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import arguments, machine, markdown, save

from lightning_efficient.weightspace.sigma_reparam import apply_sigma_reparam

PASSES = 12


def spent_ms(work: Callable[[], Any], device: str) -> float:
    """CPU time, or a GPU's wall time."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def stepping(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer that leaves the weights where they are, with gradients."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return torch.optim.SGD(model.parameters(), lr=0.0)


def measure(title: str, name: str, rounds: int, device: str) -> dict[str, Any]:
    """Three kinds of work in turn: a plain step, one with the boundary, the copies."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    plain, optimizer = stepping(copy.deepcopy(model)), stepping(model)
    _, boundary = apply_sigma_reparam(model, optimizer)
    weights = [site.param.detach() for site in boundary.sites.values()]
    other = [torch.empty_like(w) for w in weights]

    def floor() -> None:
        for w, o in zip(weights, other, strict=True):
            for _ in range(PASSES // 2):
                o.copy_(w)

    times = [[spent_ms(work, device) for work in (plain.step, optimizer.step, floor)] for _ in range(rounds + 3)][3:]
    ratios = [(boundary - plain) / floor for plain, boundary, floor in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "model": f"{title}, {len(weights)} matrices, {sum(w.numel() for w in weights) / 1e6:.1f} M weights",
        "boundary_ms": statistics.median(boundary - plain for plain, boundary, _ in times),
        "floor_ms": statistics.median(floor for *_, floor in times),
        "ratio": middle, "quartiles": f"{low:.2f} to {high:.2f}",
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    models = (("ViT-Tiny", "vit_tiny_patch16_224"), ("ViT-Small", "vit_small_patch16_224"))
    rows = [measure(title, name, args.rounds, args.device) for title, name in models]
    columns = {
        "model": "model", "boundary_ms": "boundary, ms a step", "floor_ms": "floor, ms a step", "ratio": "÷ floor",
        "quartiles": "quartiles",
    }  # fmt: skip
    table = markdown(rows, columns)
    print(table)
    name = "boundary_floor" if args.device == "cpu" else f"boundary_floor_{args.device}"
    save(name, rows).with_suffix(".md").write_text(f"{table}\n\n`{machine()}`\n")


if __name__ == "__main__":
    main()
