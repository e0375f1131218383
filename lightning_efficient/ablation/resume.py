"""The point a killed run continues from, exactly: kept beside the user's checkpoints, replaced as training goes on."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_efficient.ablation.files import CHECKPOINT

_RANDOM = "lightning_efficient_random"


class ResumePoint(Checkpoint):
    """Keeps one checkpoint, written at the end of an epoch, with the state of the random generators.

    A run on one process that is killed and continued sees the batches and dropout masks it would have seen. Being a
    ``Checkpoint``, it comes after every other callback, early stopping included.

    Args:
        folder: The run's.
        every: Least number of seconds between two of them.
    """

    def __init__(self, folder: str, every: float) -> None:
        self.file = Path(folder) / CHECKPOINT
        self.every = every
        self._saved = time.monotonic()
        self._saving = False
        self._random: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the generators' states out of a resume point."""
        self._random = checkpoint.get(_RANDOM)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the generators as they were: the last moment before the first batch is drawn."""
        if self._random is not None:
            _set_random_state(self._random)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless that was done a moment ago."""
        if trainer.strategy.broadcast(time.monotonic() - self._saved >= self.every):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A Trainer without checkpoints of its own keeps its last weights, so that they can be tested."""
        if trainer.checkpoint_callbacks == [self]:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the generators' states into resume points, and into no other checkpoint."""
        if self._saving:
            checkpoint[_RANDOM] = _random_state()

    def _save(self, trainer: Trainer) -> None:
        written = self.file.with_name(f"writing_{self.file.name}")
        self._saving = True
        try:
            trainer.save_checkpoint(written)
        finally:
            self._saving = False
        if trainer.is_global_zero:
            if self.file.is_dir():  # a sharded strategy's
                shutil.rmtree(self.file)
            os.replace(written, self.file)
        trainer.strategy.barrier()
        self._saved = time.monotonic()


def _random_state() -> dict[str, Any]:
    """The global generators' states as plain data and tensors, safe for ``torch.load(weights_only=True)``."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy: Any = np.random.get_state()
    state["numpy"] = [str(numpy[0]), numpy[1].tolist(), *numpy[2:]]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
