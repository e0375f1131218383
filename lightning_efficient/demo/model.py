"""A small vision transformer as a user writes it: nothing here knows of this package."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy


class DigitsViT(pl.LightningModule):
    """Classifies 8×8 images; AdamW, linear warm-up, cosine schedule.

    Args:
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        depth: Transformer blocks.
        embed_dim: Width.
        num_heads: Attention heads a block.
        warmup: Share of the run in which the learning rate rises.
        pool: ``"token"``: a class token is read off; ``"avg"``: the mean of the patches, and there is no class token.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        depth: int = 4,
        embed_dim: int = 64,
        num_heads: int = 4,
        warmup: float = 0.0,
        pool: str = "token",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.example_input_array = torch.zeros(1, 1, 8, 8)
        self.net = VisionTransformer(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            class_token=pool == "token",
            global_pool=pool,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{split}_loss", cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{split}_acc", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """AdamW, warmed up and annealed by a cosine over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        rising = max(self.warmup * steps, 1)

        def factor(step: int) -> float:
            return min((step + 1) / rising, 1) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
