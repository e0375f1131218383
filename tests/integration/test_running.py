"""Methods that run the user's module outside its loop, on models and runs that make it hard.

Each cell is a method on a run with one trait, against the same run where the trait is not needed (inputs prepared in
the data set, say): both must come to the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sigma_runs import Do, differing, trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_efficient import (
    CollapseMonitor,
    HESSOPruning,
    MagnitudePruning,
    PAGCPPruning,
    PRepBN,
    SAPPruning,
    SimplifiedLinearAttention,
    TempScale,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode"),
    pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero"),
]

SHIFT, SCALE = 3.0, 2.0
SIDE, TOKENS, WIDTH, CLASSES = 3, 9, 8, 3


class Grid(nn.Module):
    """A transformer block over a 3 x 3 grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = SelfAttention()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attn(self.norm1(h))
        h = h + self.down(F.silu(self.up(self.norm2(h))))
        return self.head(h.mean(1))


class SelfAttention(nn.Module):
    """As timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 2, WIDTH // 2, (WIDTH // 2) ** -0.5
        self.fused_attn = False
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        a = ((q * self.scale) @ k.mT).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, c))


class Task(pl.LightningModule):
    """Args: prepare: where inputs become what the network was made for: "data", "before" or "after" the transfer."""

    def __init__(self, prepare: str = "data", teacher: bool = False, gradient: bool = False) -> None:
        super().__init__()
        self.prepare, self.gradient = prepare, gradient
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Grid()
        self.teacher = Grid().requires_grad_(False).eval() if teacher else None

    def _prepared(self, batch: Any, where: str) -> Any:
        return {**batch, "x": (batch["x"] - SHIFT) / SCALE} if self.prepare == where else batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._prepared(batch, "before")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._prepared(batch, "after")

    def loss(self, batch: Any) -> Tensor:
        x = batch["x"]
        assert x.dtype == self.net.embed.weight.dtype
        if self.gradient and self.training_step_runs:
            x = x.requires_grad_()
        logits = self.net(x)
        loss = F.cross_entropy(logits, batch["y"])
        if self.gradient and self.training_step_runs:
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            loss = loss + 0.1 * slope.square().mean()
        if self.teacher is not None:
            loss = loss + 0.1 * (logits - self.teacher(batch["x"])).square().mean()
        return loss

    training_step_runs = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.training_step_runs = True
        try:
            return self.loss(batch)
        finally:
            self.training_step_runs = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2, eps=1e-4)


def loader(prepared: bool, batches: int = 8, size: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, TOKENS, 4, generator=g) * SCALE + SHIFT
    y = (x.mean((1, 2)) - SHIFT).mul(3).add(1).round().clamp(0, CLASSES - 1).long()
    if prepared:
        x = (x - SHIFT) / SCALE
    rows = [{"x": a, "y": b} for a, b in zip(x.to(dtype), y, strict=True)]
    return DataLoader(rows, size)  # type: ignore[arg-type]


METHODS: dict[str, Callable[[], Any]] = {
    "prepbn": lambda: PRepBN(transition=4, hold=1),
    "temp_scale": lambda: TempScale(tau=0.5),
    "hesso": lambda: HESSOPruning(target=0.3, start=2, duration=4, periods=2),
    "hesso macs": lambda: HESSOPruning(target=0.3, unit="macs", start=2, duration=4, periods=2),
    "cric": lambda: HESSOPruning(target=0.3, start=2, duration=6, periods=2, cric=True),
    "pagcp": lambda: PAGCPPruning(budgets={"val_loss": 0.2}, start=4),
    "linear attention": lambda: SimplifiedLinearAttention(),
    "monitor": lambda: CollapseMonitor(every_n_steps=2),
    "wanda": lambda: MagnitudePruning(0.3, criterion="wanda", schedule="one_shot"),
    "taylor": lambda: MagnitudePruning(0.3, criterion="taylor", schedule="one_shot"),
}


def fitted(root: Path, method: str, module: Task, prepared: bool, **kwargs: Any) -> dict[str, Tensor]:
    """The weights after ten steps."""
    dtype = kwargs.pop("dtype", torch.float32)
    t = trainer(root, METHODS[method](), max_steps=10, **kwargs)
    t.fit(module, loader(prepared, dtype=dtype), loader(prepared, 2, dtype=dtype))
    return weights(module) | {k: torch.as_tensor(float(v)) for k, v in t.callback_metrics.items()}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_prepared_in_a_hook(tmp_path: Path, method: str, where: str) -> None:
    expected = fitted(tmp_path, method, Task(), True)
    assert differing(fitted(tmp_path, method, Task(where), False), expected) == []
