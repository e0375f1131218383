"""Averaged models that callbacks of a Trainer keep."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averages(trainer: Trainer) -> Iterator[AveragedModel]:
    """Averaged models that callbacks of the Trainer keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from (value for value in vars(callback).values() if isinstance(value, AveragedModel))


def averaged_copies(trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
    """Copies of the module that callbacks keep: averaged models, and modules of its own class."""
    yield from (average.module for average in averages(trainer))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for value in vars(callback).values():
            if isinstance(value, type(pl_module)) and value is not pl_module:
                yield value
