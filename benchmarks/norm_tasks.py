"""What the norm-swap studies share: Fashion-MNIST, a small ViT, a Trainer, and a memory of finished runs."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from stability_tasks import RUNS, scaled_to_width
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

FASHION = (Path("/usr/share/datasets/fashion-mnist"), RUNS / "fashion-mnist")

Batch = tuple[Tensor, Tensor]


# -- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Three splits; the test split is looked at once, at the end of a run."""

    train: Batch
    validation: Batch
    test: Batch


def fashion(train: int = 10_000, validation: int = 2_000, test: int = 10_000) -> Images:
    """Fashion-MNIST: train and validation are disjoint draws from the 60,000 training images; test is the official one.

    Raises:
        SystemExit: The data set is not installed.
    """
    folder = next((f for f in FASHION if (f / "train-images-idx3-ubyte.gz").exists()), None)
    if folder is None:
        raise SystemExit(
            "Fashion-MNIST is missing: `apt-get install dataset-fashion-mnist` (Debian; MIT licence, 31 MB), or put "
            "its four .gz files into benchmarks/runs/fashion-mnist."
        )
    x, y = idx(folder / "train-images-idx3-ubyte.gz"), idx(folder / "train-labels-idx1-ubyte.gz")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: train + validation]
    x, y = x[order], y[order].long()
    x_test, y_test = idx(folder / "t10k-images-idx3-ubyte.gz")[:test], idx(folder / "t10k-labels-idx1-ubyte.gz")[:test]
    std, mean = torch.std_mean(x[:train].float())

    def scaled(images: Tensor) -> Tensor:
        return ((images.float() - mean) / std)[:, None]

    return Images(
        (scaled(x[:train]), y[:train]), (scaled(x[train:]), y[train:]), (scaled(x_test), y_test.long())
    )  # fmt: skip


def idx(path: Path) -> Tensor:
    """The array in a gzipped idx file: two zeros, a type (8: bytes), the number of axes, their sizes, the bytes."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def batches(data: Batch, size: int, seed: int) -> DataLoader[Any]:
    """Shuffled whole batches; the order depends on the seed alone."""
    order = RandomSampler(data[0], generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    sampler = BatchSampler(order, size, drop_last=True)
    return DataLoader(TensorDataset(*data), sampler=sampler, batch_size=None)


# -- model -----------------------------------------------------------------------------------------------------------


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all tokens, where a ViT has LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


def vit(norm: Callable[..., nn.Module] | None = None, depth: int = 4) -> nn.Module:
    """timm's ViT: patches of 7 pixels, width 64, 4 heads, stochastic depth 0.1; None: its LayerNorm."""
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "mlp_ratio": 2}
    net = timm.models.VisionTransformer(**size, depth=depth, num_heads=4, drop_path_rate=0.1, norm_layer=norm)
    return scaled_to_width(net)


class Learner(LightningModule):
    """AdamW without clipping; 10 % linear warm-up, then half a cosine to 0.

    Args:
        net: Returns scores, classes last.
        lr: Peak learning rate.
        steps: Optimizer steps in the run.
    """

    def __init__(self, net: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.steps = net, lr, steps
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate(step: int, steps: int, warm: float = 0.1) -> float:
    first = max(1, round(warm * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - first) / max(1, steps - first)))


def fit(module: Learner, data: Any, callbacks: Sequence[Callback]) -> None:
    """A plain Trainer run on one CPU device that leaves no files."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(
        accelerator="cpu", devices=1, logger=False, max_steps=module.steps, callbacks=list(callbacks), **quiet
    ).fit(module, data)  # fmt: skip


# -- memory ----------------------------------------------------------------------------------------------------------


class Finished:
    """Rows of finished runs, one JSON line each, so that a study can be killed and continued.

    Args:
        name: Of the file in ``benchmarks/runs``.
    """

    def __init__(self, name: str) -> None:
        RUNS.mkdir(exist_ok=True)
        (RUNS / ".gitignore").write_text("*\n")
        self.path = RUNS / name
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {}
        for line in lines:
            row = json.loads(line)
            self.rows[json.dumps(row.pop("key"))] = row

    def get(self, key: Sequence[Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of ``key``; made and kept if there is none."""
        name = json.dumps(list(key))
        if name not in self.rows:
            row = run()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": list(key), **row}) + "\n")
            self.rows[name] = row
        return self.rows[name]
