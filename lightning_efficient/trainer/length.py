"""The length of a run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging


def remaining_steps(trainer: Trainer) -> int | None:
    """Optimizer steps from now to the end of the run; None: it has no end.

    To be asked in ``on_train_start`` and not earlier: asking makes the train loader, whose restored position Lightning
    would then forget.
    """
    estimate = trainer.estimated_stepping_batches
    if math.isinf(estimate) or estimate < 0:  # -1: a loader without a length
        return None
    if trainer.max_epochs in (None, -1):
        return max(int(estimate) - trainer.global_step, 0)
    # Not the estimate itself: epochs that lie behind may have had other lengths (another model, data set or batch size
    # on the same Trainer), and some of those to come have no steps.
    epochs = trainer.max_epochs - trainer.current_epoch - _epochs_without_steps(trainer)
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * epochs
    progress = trainer.fit_loop.epoch_loop.batch_progress  # of an epoch that is over until the next one begins
    done = 0 if progress.is_last_batch else progress.current.completed // trainer.accumulate_grad_batches
    limit = math.inf if trainer.max_steps in (None, -1) else trainer.max_steps - trainer.global_step
    return max(int(min(steps - done, limit)), 0)


def _epochs_without_steps(trainer: Trainer) -> int:
    """``StochasticWeightAveraging`` adds one for the statistics of batch norm."""
    averages = any(isinstance(cb, StochasticWeightAveraging) for cb in trainer.callbacks)  # type: ignore[attr-defined]
    contains = StochasticWeightAveraging.pl_module_contains_batch_norm
    return int(averages and contains(trainer.lightning_module))
