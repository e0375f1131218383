"""What ``pruning_study.py`` trains: digits or Fashion-MNIST, an MLP and a CNN of any width, and what it measures."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_efficient.metrics.functional import pq_index

FASHION = Path("/usr/share/datasets/fashion-mnist")
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Images and labels, whole in memory.

    Args:
        name: Of the data set.
        train: For training.
        val: For every choice that is made.
        test: For the numbers that are reported, and nothing else.
    """

    name: str
    train: Split
    val: Split
    test: Split


def digits() -> Data:
    """scikit-learn's 1,797 images of 8 × 8: 1,005 for training, 252 for validation, 540 for the test."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (images.float().view(-1, 1, 8, 8) / 8 - 1)[order], labels[order]
    return Data("digits", (x[:1005], y[:1005]), (x[1005:1257], y[1005:1257]), (x[1257:], y[1257:]))


def fashion(folder: Path = FASHION, train: int = 2000, test: int = 4000) -> Data:
    """Fashion-MNIST: some of its 60,000 training images, 1,000 others for validation, of its own test images the first.

    Args:
        folder: With the idx files.
        train: Images for training.
        test: Images for the test, at most 10,000.
    """
    if not folder.is_dir():
        raise SystemExit(
            f"no {folder}: apt-get install dataset-fashion-mnist, or give --data FOLDER with its idx files."
        )
    x, y = (read_idx(folder / f"train-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    held = [read_idx(folder / f"t10k-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = scaled(x)[order], y.long()[order]
    end = train + 1000
    held_out = scaled(held[0])[:test], held[1].long()[:test]
    return Data("Fashion-MNIST", (x[:train], y[:train]), (x[train:end], y[train:end]), held_out)


def scaled(images: Tensor) -> Tensor:
    return images.float().unsqueeze(1) / 127.5 - 1


def read_idx(path: Path) -> Tensor:
    """A file of unsigned bytes in the idx format: two zeros, type, number of dimensions, their sizes, the data."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)


class Batches:
    """Shuffled batches from an own generator: the same ones in every run of a seed."""

    def __init__(self, split: Split, size: int, seed: int) -> None:
        self.split, self.size, self.seed, self.epoch = split, size, seed, 0

    def __len__(self) -> int:
        return len(self.split[0]) // self.size

    def __iter__(self) -> Iterator[Split]:
        g = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        self.epoch += 1
        for index in torch.randperm(len(self.split[0]), generator=g)[: len(self) * self.size].split(self.size):
            yield self.split[0][index], self.split[1][index]


def mlp(side: int, width: float = 1.0) -> nn.Module:
    """``d-128-256-10``, the paper's shape."""
    a, b = max(round(128 * width), 1), max(round(256 * width), 1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side * side, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10)
    )


def cnn(side: int, width: float = 1.0) -> nn.Module:
    """Convolution, batch norm, ReLU and pooling three times, 16-32-64 channels, then the mean and a linear layer.

    The first convolution steps over every second position of images above 16 × 16, for the sake of a study in an hour.
    """
    layers: list[nn.Module] = []
    before, stride = 1, 2 if side > 16 else 1
    for channels in (16, 32, 64):
        after = max(round(channels * width), 1)
        convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        before, stride = after, 1
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


MODELS = {"MLP": mlp, "CNN": cnn}


def prunable(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def narrow_to(model: str, side: int, weights: float) -> float:
    """The width at which the dense model has at most this many weights."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        size = sum(p.numel() for p in prunable(MODELS[model](side, middle)))
        low, high = (middle, high) if size <= weights else (low, middle)
    return low


class Module(pl.LightningModule):
    """SGD with Nesterov momentum, the rate down to zero by a cosine in every period of ``period`` epochs."""

    def __init__(self, net: nn.Module, period: int, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.period, self.lr = net, period, lr

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 0.5 + 0.5 * math.cos(math.pi * min(epoch, self.period) / self.period)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


class Measure(Callback):
    """Accuracy, PQ index and share of weights at the end of every ``every`` epochs."""

    def __init__(self, data: Data, every: int, dense: int) -> None:
        self.data, self.every, self.dense = data, every, dense
        self.points: list[dict[str, float]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every:
            return
        pl_module.eval()
        flat = torch.cat([p.detach().flatten() for p in prunable(pl_module)])
        left = flat[flat != 0]
        self.points.append(
            {
                "epochs": trainer.current_epoch + 1,
                "left": len(left) / self.dense,
                "pqi": float(pq_index(left)) if len(left) else math.nan,
                "val_acc": accuracy(pl_module, self.data.val),
                "test_acc": accuracy(pl_module, self.data.test),
            }
        )
        pl_module.train()


def accuracy(module: Any, split: Split) -> float:
    hits = sum(int((module.net(x).argmax(1) == y).sum()) for x, y in zip(*(t.split(1000) for t in split), strict=True))
    return hits / len(split[0])
