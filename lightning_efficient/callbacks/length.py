"""The length of a run, and schedules that must not move when it does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_efficient.recipe import RecipeError


def run_length(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None: it has no end.

    To be asked in ``on_train_start`` and not earlier: asking makes the train loader, whose restored position Lightning
    would then forget.
    """
    estimate = trainer.estimated_stepping_batches
    return None if math.isinf(estimate) else int(estimate)


def check_same_schedule(method: str, saved: Sequence[int] | None, now: Sequence[int], parts: str) -> None:
    """Refuse to go on with a schedule that another length of the run would move.

    Args:
        method: Name of the callback.
        saved: The schedule of the run that is resumed, in steps. None or empty: there is none.
        now: The schedule of this run.
        parts: What the numbers are.

    Raises:
        RecipeError: They differ.
    """
    if saved and tuple(saved) != tuple(now):
        raise RecipeError(
            f"{method}: the schedule of the resumed run was {tuple(saved)} ({parts}), now it is {tuple(now)}: the "
            "length of the run was changed, and the schedule is given as fractions of it. Resume with the same length, "
            "or give steps, as int."
        )
