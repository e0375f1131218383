"""Text classifiers and their data, as `--model` and `--data` name them: batches are mappings."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Encoder(nn.Module):
    """Ids and a mask, by name; a width that nothing but the run tells."""

    def __init__(self, vocabulary: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.mix = nn.Parameter(torch.randn(width, width) / 4)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padded = None if attention_mask is None else attention_mask == 0
        hidden = self.layer(self.embed(input_ids), src_key_padding_mask=padded) @ self.mix
        return self.head(hidden.mean(1))


class Tokens(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.arange(index, index + 6) % 12
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(index % 3)}


class TokenData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Tokens(), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(Tokens(), batch_size=4)


class Classifier(pl.LightningModule):
    """No forward, no example input: only the step knows how the network is called."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = Encoder()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
        return nn.functional.cross_entropy(logits, batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Callable(Classifier):
    """With a forward, for `export`."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(input_ids, attention_mask)
