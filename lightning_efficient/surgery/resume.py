"""Let a checkpoint written without a method resume a run that has it: its optimizer groups start untrained."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_efficient.surgery.optimizer import Scheduler


def adopt_untrained_groups(
    checkpoint: dict[str, Any],
    index: int,
    optimizer: Optimizer,
    new: Sequence[tuple[nn.Parameter, nn.Parameter]],
    schedulers: Sequence[Scheduler],
) -> None:
    """Append the groups that ``optimizer`` has and the checkpoint lacks to the checkpoint, in place, without state.

    They take over the learning rate, the schedule and everything else the checkpoint has for the groups they follow.

    Args:
        checkpoint: A Lightning checkpoint that is about to be restored.
        index: Position of ``optimizer`` in the Trainer.
        optimizer: The optimizer, its new groups at the end.
        new: (new parameter, source weight) pairs, as given to ``add_parameters``.
        schedulers: All schedulers of the Trainer, in order, already grown.
    """
    saved = checkpoint["optimizer_states"][index]["param_groups"]
    live = optimizer.state_dict()["param_groups"]
    home = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    follows = {home[parameter]: home[source] for parameter, source in new}
    if len(saved) + len(follows) != len(live):
        return  # not the same optimizer: torch says so when it loads the state
    for group, source in sorted(follows.items()):
        own = {key: live[group][key] for key in ("params", "weight_decay", "name", "param_names") if key in live[group]}
        saved.append({**deepcopy(saved[source]), **own})
    sources = [source for _, source in sorted(follows.items())]
    for state, scheduler in zip(checkpoint.get("lr_schedulers", []), schedulers, strict=False):
        if scheduler.optimizer is optimizer:
            _grow(state, scheduler.state_dict(), len(live), sources)


def _grow(saved: dict[str, Any], live: dict[str, Any], groups: int, sources: Sequence[int]) -> None:
    for key, value in saved.items():
        other = live.get(key)
        if key == "_schedulers" and isinstance(other, list):
            for inner, inner_live in zip(value, other, strict=True):
                _grow(inner, inner_live, groups, sources)
        elif isinstance(value, list) and isinstance(other, list) and len(other) == groups == len(value) + len(sources):
            saved[key] = [*value, *(deepcopy(value[source]) for source in sources)]
