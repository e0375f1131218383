"""A small timm ViT whose tokens are a square grid and nothing else, and LightningModules around it."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn
from zoo import CLASSES, Classifier, Lazy, Manual


def grid_vit(**options: Any) -> VisionTransformer:
    """8×8 images of one channel; patches of 2 make 4×4 tokens, more than a head has dimensions (8), so Q(KV)."""
    defaults: dict[str, Any] = {
        "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2,
        "num_classes": CLASSES, "class_token": False, "global_pool": "avg",
    }  # fmt: skip
    return VisionTransformer(**{**defaults, **options})


class _Grid:
    """Args: net: ``"pairs"`` for 2×2 tokens with query-key norm, where (QK)V is cheaper; anything else: 4×4 tokens."""

    hparams: Any

    def _make(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return grid_vit(patch_size=4, qk_norm=True) if self.hparams["net"] == "pairs" else grid_vit()


class GridClassifier(_Grid, Classifier):
    pass


class GridLazy(_Grid, Lazy):
    pass


class GridManual(_Grid, Manual):
    pass


class GridPrebuilt(GridClassifier):
    """Holds an optimizer that was made before any Trainer, as LightningCLI's ``optimizer:`` key does."""

    def __init__(self, net: str) -> None:
        super().__init__(net)
        self.made = super().configure_optimizers()

    def configure_optimizers(self) -> Any:
        return self.made
