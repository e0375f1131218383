"""Sums in float64 over batches and processes: what metrics of embeddings stand on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import Self


class StreamingMetric(Metric):
    """A metric whose states are sums in float64, sized by the first update.

    A state that nothing has sized yet is a single zero, to which anything can be added. The states stay float64
    whatever the module around the metric is converted to; on a device without float64 (MPS) they stay on the CPU.

    Args:
        kwargs: Of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gathered, **kwargs})

    def add_sum(self, name: str, axes: int) -> None:
        """A state that adds up, with so many axes."""
        self.add_state(name, torch.zeros((1,) * axes, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, **values: Tensor | float) -> None:
        """Add to states."""
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + value)

    def width(self, state: Tensor, given: int | None) -> int | None:
        """Size of the last axis of a state, or what was ``given`` where nothing has sized it yet."""
        return state.shape[-1] if state.numel() > 1 else given

    def wide(self, tensor: Tensor) -> Tensor:
        """Detached, in float64, where the states are."""
        return tensor.detach().to(self.device).to(torch.float64)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        device = fn(torch.zeros(1, device=self.device)).device
        home = torch.device("cpu") if device.type == "mps" else device
        super()._apply(lambda tensor: tensor.to(home), exclude_state)
        return self


def gathered(state: Tensor, group: Any = None) -> list[Tensor]:
    """A state of all processes; that of one which has seen nothing yet is zeros of the others' size.

    Args:
        state: Of this process.
        group: Process group. ``None``: all.
    """
    parts = gather_all_tensors(state, group)
    largest = max(parts, key=Tensor.numel)
    return [part.expand_as(largest) if part.numel() == 1 else part for part in parts]


def share(most: int) -> int:
    """How many of the first ``most`` samples are this process's, where samples are dealt out in turn."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return most
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return most // processes + (rank < most % processes)
