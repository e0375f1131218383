"""The length of a run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def remaining_steps(trainer: Trainer) -> int | None:
    """Optimizer steps from now to the end of the run; None: it has no end.

    To be asked in ``on_train_start`` and not earlier: asking makes the train loader, whose restored position Lightning
    would then forget.
    """
    estimate = trainer.estimated_stepping_batches
    if math.isinf(estimate) or estimate < 0:  # -1: a loader without a length
        return None
    if trainer.current_epoch == 0 or trainer.max_epochs in (None, -1):
        return max(int(estimate) - trainer.global_step, 0)
    # Epochs that lie behind may have had other lengths: another model, data set or batch size on the same Trainer.
    epochs = trainer.max_epochs - trainer.current_epoch
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * epochs
    progress = trainer.fit_loop.epoch_loop.batch_progress  # of an epoch that is over until the next one begins
    done = 0 if progress.is_last_batch else progress.current.completed // trainer.accumulate_grad_batches
    limit = math.inf if trainer.max_steps in (None, -1) else trainer.max_steps - trainer.global_step
    return max(int(min(steps - done, limit)), 0)
