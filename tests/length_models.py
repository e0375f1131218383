"""Texts of uneven length, and a model that tags their tokens, as a user would write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_efficient import (
    BalancedDistributedBatchSampler,
    LengthGroupedBatchSampler,
    TokenBudgetBatchSampler,
)
from lightning_efficient.functional import token_mean

VOCABULARY, PAD = 17, 0


class Texts(Dataset[dict[str, Any]]):
    """Token ids from 1 up, and the length of every text."""

    def __init__(self, count: int, longest: int = 40, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(count).log_normal_(2.3, 0.7, generator=generator)
        self.n_tokens = drawn.clamp(1, longest).long().tolist()
        self.ids = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in self.n_tokens]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "index": index}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    ids = nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "index": torch.tensor([s["index"] for s in samples])}


def samplers(texts: Texts, batch_size: int = 4) -> dict[str, Any]:
    return {
        "grouped": LengthGroupedBatchSampler("n_tokens", batch_size, texts),
        "balanced": BalancedDistributedBatchSampler("n_tokens", batch_size, texts, d_model=16),
        "budget": TokenBudgetBatchSampler("n_tokens", 80, dataset=texts),
    }


class Tagger(LightningModule):
    """Names the successor of every token; the loss is the mean over the tokens of a step, in all processes."""

    def __init__(self, batch_sampler: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, VOCABULARY)
        self.seen: list[list[list[int]]] = [[]]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(hidden)  # type: ignore[no-any-return]

    def on_train_epoch_end(self) -> None:
        self.seen.append([])

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen[-1].append(batch["index"].tolist())
        logits, mask = self(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"].bool()
        losses = F.cross_entropy(logits[mask], (batch["input_ids"][mask] + 1) % VOCABULARY, reduction="sum")
        return token_mean(losses, mask.sum())

    def predict_step(self, batch: dict[str, Tensor], _: int) -> list[int]:
        return batch["index"].tolist()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)
