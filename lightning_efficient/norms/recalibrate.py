"""Fresh running statistics for a finished network ("precise BatchNorm"; SLAB's ``update_model`` does the like)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.running import evaluating
from lightning_efficient.norms.blend import BlendNorm, blend_norms


@dataclass(frozen=True)
class Recalibration:
    """What ``recalibrate`` did.

    Args:
        batches: How many batches went through the model.
        norms: How many norms have new statistics.
        untouched: Names of norms that kept theirs, because no batch had two rows for them.
    """

    batches: int
    norms: int
    untouched: list[str] = field(default_factory=list)


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Recalibration:
    """Replace the running statistics of every swapped norm by plain averages over batches.

    The moving averages of training lag behind the weights, and dropout and drop-path shift variances. Here everything
    is in evaluation mode, except that the swapped norms normalize with, and average, the statistics of each batch.
    Modes, gates and random states are as before afterwards; after an error the old statistics are too.

    Args:
        model: The model; norms without batch statistics do not take part.
        batches: Training batches, as many as should count; not read if there is nothing to recalibrate.
        device: Where to put tensors of a batch; None: leave them.
        forward: How to run a batch. None: ``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple or list,
            ``model(batch)`` for anything else.

    Returns:
        Counts.

    Raises:
        ValueError: There was no batch.
    """
    norms = {name: norm for name, norm in blend_norms(model).items() if norm.target.batch_statistics}
    if not norms:
        return Recalibration(0, 0)
    count, done = 0, False
    with evaluating(model, apart=[norm.target for norm in norms.values()]), uncompiled():
        for norm in norms.values():
            norm.target.begin_recalibration()
        try:
            for batch in batches:
                batch = batch if device is None else _to(batch, device)
                (forward or _forward)(model, batch)
                count += 1
            done = count > 0
        finally:
            untouched = _end(norms, keep=done)
    if not done:
        raise ValueError("recalibrate got no batches; expected an iterable with at least one.")
    return Recalibration(count, len(norms) - len(untouched), untouched)


def _end(norms: Mapping[str, BlendNorm], keep: bool) -> list[str]:
    return [name for name, norm in norms.items() if not norm.target.end_recalibration(keep)]


def _forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _to(batch: Any, device: torch.device | str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    return [_to(value, device) for value in batch] if isinstance(batch, (tuple, list)) else batch
