"""Let a checkpoint written without a method resume a run that has it: its optimizer groups start untrained."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer

from lightning_efficient.surgery.optimizer import Scheduler


def adopt_untrained_groups(
    checkpoint: dict[str, Any], index: int, optimizer: Optimizer, schedulers: Sequence[Scheduler]
) -> None:
    """Append the groups that ``optimizer`` has and the checkpoint lacks to the checkpoint, in place, without state.

    Args:
        checkpoint: A Lightning checkpoint that is about to be restored.
        index: Position of ``optimizer`` in the Trainer.
        optimizer: The optimizer, its new groups at the end.
        schedulers: All schedulers of the Trainer, in order, already grown.
    """
    saved = checkpoint["optimizer_states"][index]
    live = optimizer.state_dict()
    old, new = len(saved["param_groups"]), len(live["param_groups"])
    saved["param_groups"] = [*saved["param_groups"], *deepcopy(live["param_groups"][old:])]
    for state, scheduler in zip(checkpoint.get("lr_schedulers", []), schedulers, strict=False):
        if scheduler.optimizer is optimizer:
            _grow(state, scheduler.state_dict(), old, new)


def _grow(saved: dict[str, Any], live: dict[str, Any], old: int, new: int) -> None:
    for key, value in saved.items():
        other = live.get(key)
        if key == "_schedulers" and isinstance(other, list):
            for inner, inner_live in zip(value, other, strict=True):
                _grow(inner, inner_live, old, new)
        elif isinstance(value, list) and isinstance(other, list) and (len(value), len(other)) == (old, new):
            saved[key] = [*value, *other[old:]]
