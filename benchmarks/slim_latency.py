"""Measured speed of slim models against the multiply-accumulates that cutting saved.

Half of the units of every group are cut out of randomly initialised networks. Dense and slim run in the same process,
in alternating order, single-threaded by default; the figure of a batch size is the median over rounds of the ratio
within each round. "share" is the speed-up divided by the reduction of multiply-accumulates: 1 means that every
multiply-accumulate saved is time saved.

    python benchmarks/slim_latency.py
    python benchmarks/slim_latency.py --only "resnet" --rounds 40 --threads 2
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import RESULTS, arguments, markdown, save
from structured_zoo import half
from timm.models import VisionTransformer
from torch import Tensor, nn

from lightning_efficient.deploy.measure import slim_report
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.slim import apply_slim

BATCHES = (1, 16)
COLUMNS = {
    "model": "model", "params": "parameters, dense ÷ slim", "macs": "MACs, dense ÷ slim",
    **{f"speed {n}": f"speed-up, batch {n}" for n in BATCHES},
    **{f"share {n}": f"share, batch {n}" for n in BATCHES},
}  # fmt: skip


def _vgg() -> nn.Module:
    """A plain stack of convolutions."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate([(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def _vit() -> nn.Module:
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=4, num_heads=6, num_classes=10)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain CNN": (_vgg, 32),
    "ResNet-18": (_timm("resnet18"), 48),
    "MobileNetV2": (_timm("mobilenetv2_100"), 64),
    "ViT (FFN and heads)": (_vit, 64),
}


def run(name: str, build: Callable[[], nn.Module], size: int, rounds: int) -> dict[str, Any]:
    """Cut half of the units and measure."""
    torch.manual_seed(0)
    model = build().eval()
    example: Tensor = torch.randn(2, 3, size, size)
    groups = find_groups(model, example)
    slim = copy.deepcopy(model)
    apply_slim(slim, half(groups), groups)
    report = slim_report(model, slim, example, BATCHES, rounds)
    if name == "ResNet-18":
        RESULTS.mkdir(exist_ok=True)
        report.draw(RESULTS / "slim_widths.png")
    rows = {row.quantity: row for row in report.measured.rows}
    macs = 1 / (rows["MACs, batch 1"].ratio or 1)
    row = {"model": name, "params": 1 / (rows["parameters"].ratio or 1), "macs": macs}
    for batch in BATCHES:
        speed = 1 / (rows[f"latency, batch {batch}"].ratio or 1)
        row |= {f"speed {batch}": speed, f"share {batch}": speed / macs}
    return row | {"raw": report.to_dict()}


def main() -> None:
    """Measure every model and write the table."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, (build, size) in MODELS.items():
        if any(part.lower() in name.lower() for part in args.only):
            rows.append(run(name, build, size, args.rounds))
            print(markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
            if args.only == [""]:
                save("slim_latency", rows)
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
