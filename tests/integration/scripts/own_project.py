"""A user's own project, which knows nothing of this package: model, data, LightningCLI."""

import os
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 16, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2)
        )
        self.initial = sum(p.abs().sum().item() for p in self.parameters())

    def training_step(self, batch, batch_idx):
        if os.environ.get("OWN_PROJECT_HANGS") == self.trainer.default_root_dir and self.global_step == 6:
            time.sleep(3600)
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        seen = (inputs[:, 0] * torch.arange(len(inputs))).sum()
        self.log_dict({"train_loss": loss, "batch": seen, "initial": self.initial})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Data(LightningDataModule):
    def setup(self, stage):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(96, 8, generator=generator)
        self.parts = torch.utils.data.random_split(
            TensorDataset(inputs, (inputs[:, 0] > 0).long()), [32, 32, 32], generator
        )

    def train_dataloader(self):
        return DataLoader(self.parts[0], 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 32)

    def test_dataloader(self):
        return DataLoader(self.parts[2], 32)


if __name__ == "__main__":
    LightningCLI(Net, Data)
