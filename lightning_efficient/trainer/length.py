"""The length of a run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def run_length(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None: it has no end.

    To be asked in ``on_train_start`` and not earlier: asking makes the train loader, whose restored position Lightning
    would then forget.
    """
    estimate = trainer.estimated_stepping_batches
    return None if math.isinf(estimate) else int(estimate)
