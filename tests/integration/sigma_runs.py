"""What the integration tests of SigmaReparam share: quiet Trainers, and modules with one thing about them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from zoo import Classifier

from lightning_efficient import SigmaReparam
from lightning_efficient.testing.checks import flat
from lightning_efficient.weightspace import SpectralTransform


def trainer(root: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 4,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "log_every_n_steps": 1, "default_root_dir": root,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names whose tensors are not equal, and names that only one has."""
    shared = [k for k in a.keys() & b.keys() if isinstance(a[k], Tensor) and isinstance(b[k], Tensor)]
    return sorted((a.keys() ^ b.keys()) | {k for k in shared if not torch.equal(a[k], b[k])})


def written(t: Trainer, path: Path) -> dict[str, Any]:
    """Every tensor of the Trainer's checkpoint, under its path in the file."""
    t.save_checkpoint(path)
    return {k: v for k, v in flat(torch.load(path, weights_only=True)).items() if isinstance(v, Tensor)}


def transforms(callback: SigmaReparam) -> dict[str, SpectralTransform]:
    """The running transforms, for inspection."""
    return dict(callback._transforms)  # type: ignore[arg-type]


@contextmanager
def messages() -> Iterator[list[str]]:
    """What ``rank_zero_info`` says."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


class Do(Callback):
    """Calls functions ``(trainer, module)`` from hooks: ``Do(on_train_start=f)``."""

    def __init__(self, **hooks: Callable[[Trainer, LightningModule], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda t, m, *_, f=function: f(t, m))


def with_optimizers(configure: Callable[[Any], Any], net: str = "cnn", automatic: bool = True) -> Classifier:
    """A classifier with optimizers of its own, ``configure(module)``."""

    class Own(Classifier):
        def configure_optimizers(self) -> Any:
            return configure(self)

    module = Own(net)
    module.automatic_optimization = automatic
    return module


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.05)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
