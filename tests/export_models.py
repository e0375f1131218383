"""Small models as users write them, each with example inputs, for the tests of exporting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def vit() -> tuple[nn.Module, Any]:
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    return net, torch.randn(2, 3, 32, 32)


class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Decoder(nn.Module):
    """Causal, plain attention, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.head(h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def cnn() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    net(torch.randn(4, 3, 8, 8))  # sizes the head, moves the running statistics
    return net


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    net = BertModel(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return net, {"input_ids": torch.randint(20, (2, 5)), "attention_mask": mask}


class Lit(pl.LightningModule):
    """A user's module around a small net with dropout."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ManyOutputs(nn.Module):
    """Keyword inputs in another order than the signature's, and outputs whose names are not sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"z": self.linear(a) - b, "a": (a + b, b * 2)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm_vit": vit,
    "encoder": lambda: (EncoderClassifier(), torch.randn(2, 5, 16)),
    "decoder": lambda: (Decoder(), torch.randint(12, (2, 7))),
    "cnn": lambda: (cnn(), torch.randn(2, 3, 8, 8)),
    "bert": bert,
    "lightning": lambda: (Lit(), torch.randn(2, 4)),
    "weight_norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)),
    "many_outputs": lambda: (ManyOutputs(), {"b": torch.randn(2, 3), "a": torch.randn(2, 3)}),
}
