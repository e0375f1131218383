"""Gradient norm and loss of each optimizer step, for a guard that looks a step later: nothing waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.guard import JumpGuard


class Watchdog:
    """Collects what a :class:`JumpGuard` judges.

    Args:
        guard: The judge.
    """

    def __init__(self, guard: JumpGuard) -> None:
        self.guard = guard
        self._norms: dict[str, Tensor] = {}
        self._pending: tuple[int, list[str], Tensor] | None = None

    @property
    def stepped(self) -> bool:
        """Whether an optimizer is about to step, or has stepped, in this batch."""
        return bool(self._norms)

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            several = len(trainer.optimizers) > 1
            name = f"gradient norm of optimizer {trainer.optimizers.index(optimizer)}" if several else "gradient norm"
            norm = torch.nn.utils.get_total_norm(grads).detach().float()
            precision = trainer.precision_plugin
            if isinstance(precision, MixedPrecision) and precision.scaler is not None:
                # The scaler tries large scales and skips the steps that overflow: nothing to judge, marked by -1.
                norm = torch.where(norm.isfinite(), norm, -1.0)
            self._norms[name] = norm

    def after_step(self, trainer: Trainer, outputs: Any) -> None:
        """The batch with which a step ended is over."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        values = dict(self._norms)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            values["loss"] = loss.detach().float().reshape(())
        self._norms = {}
        if values:
            packed = torch.stack(list(values.values()))
            if trainer.world_size > 1:  # every process must come to the same conclusion
                packed = trainer.strategy.reduce(packed, reduce_op="mean")
            self._pending = trainer.global_step, list(values), packed

    def settle(self) -> tuple[int, str]:
        """Show the guard the latest numbers it has not seen.

        Returns:
            After which optimizer step something was wrong, and what; the text is empty if nothing is.
        """
        if self._pending is None:
            return 0, ""
        (step, names, packed), self._pending = self._pending, None
        wrong = [
            self.guard.observe(name, value, "shift" if name == "loss" else "scale")
            for name, value in zip(names, packed.tolist(), strict=True)
            if name == "loss" or value != -1.0
        ]
        return step, "; ".join(filter(None, wrong))
