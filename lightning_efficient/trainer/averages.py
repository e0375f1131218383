"""Averaged models that callbacks of a Trainer keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_efficient.common.match import parameters_by_name


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


@torch.no_grad()
def prune_copies(trainer: Trainer, pl_module: LightningModule, dropped: Mapping[str, Tensor]) -> None:
    """Zeros where weights are pruned: an average over time forgets those too slowly; averages of zeros stay zero.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        dropped: Canonical name of a parameter → True where it is pruned.
    """
    for copy in averaged_copies(trainer, pl_module):
        params = parameters_by_name(copy)
        for name, where in dropped.items():
            if (param := params.get(name)) is not None:
                param.masked_fill_(where.to(param.device), 0)
