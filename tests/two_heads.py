"""A two-task model as a user writes it: which digit, and whether it is even; 8x8 images, seconds to train."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class TwoHeads(nn.Module):
    """A trunk with batch norm, a hidden layer, two heads."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.hidden = nn.Linear(12 * 16, 16)
        self.drop = nn.Dropout(dropout)
        self.digit, self.parity = nn.Linear(16, 10), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        h = self.drop(F.relu(self.hidden(x.flatten(1))))
        return self.digit(h), self.parity(h)


class TwoTasks(pl.LightningModule):
    """Logs in every way that there is: numbers, a metric, and at the end of the epoch."""

    def __init__(self, dropout: float = 0.0, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = TwoHeads(dropout)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.right: list[Tensor] = []

    def losses(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = batch
        digit, parity = self.net(x.to(next(self.parameters()).dtype))
        return F.cross_entropy(digit, y), F.cross_entropy(parity, y % 2), digit, parity

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        digit, parity, *_ = self.losses(batch)
        self.log("train_loss", digit + parity)
        return digit + parity

    def on_validation_epoch_start(self) -> None:
        self.right = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        digit, parity, logits, even = self.losses(batch)
        self.accuracy(logits, batch[1])
        self.right.append((even.argmax(1) == batch[1] % 2).float())
        self.log_dict({"val_digit": digit, "val_parity": parity})
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_even", torch.cat(self.right).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        digit, parity, *_ = self.losses(batch)
        self.log_dict({"test_digit": digit, "test_parity": parity})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9), "interval": "step"},
        }


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


def train_loader(batches: int = 8, size: int = 32, shuffle: bool = False) -> DataLoader[Any]:
    x, y = digits()
    return DataLoader(TensorDataset(x[: batches * size], y[: batches * size]), size, shuffle=shuffle)


def val_loader(images: int = 150, size: int = 64, shuffle: bool = False) -> DataLoader[Any]:
    """The last batch is smaller than the others."""
    x, y = digits()
    return DataLoader(TensorDataset(x[-images:], y[-images:]), size, shuffle=shuffle)
