"""``RunCost``: what a run costs, logged where its metrics are."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_efficient.common.memory import peak_resident
from lightning_efficient.lifecycle.base import EfficientCallback


class RunCost(EfficientCallback):
    """Log time a step, peak memory and parameters, so that runs compare by what they cost; changes nothing.

    Under ``efficient/run_cost/``, on every logger, once a window of ``every_n_steps`` optimizer steps:

    - ``step_ms``: wall time of the window over its optimizer steps, the device waited for at both ends only. Data
      loading and other callbacks are in it; validation is not, and neither are checkpoints of an epoch. The first
      window, which warms up, is left out unless it is the only one.
    - ``peak_memory_mib``: on an accelerator the most that tensors took since training began (the device's counter is
      reset then); on CPU the largest resident size of the process since it started, everything in it included.
    - ``parameters``: elements of the module's parameters as trained. What masks zero counts; what an export removes is
      in the figures of the exported model (:func:`lightning_efficient.log_exported`).

    Under DDP these are the figures of process 0.

    Args:
        enabled: ``False`` leaves the run without it.
        every_n_steps: Optimizer steps of a window; an epoch or a validation ends one early.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    method = "run_cost"
    sharded = True
    changes_weights = False

    def __init__(self, enabled: bool = True, every_n_steps: int = 20) -> None:
        super().__init__(enabled)
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}; expected at least 1.")
        self.every_n_steps = every_n_steps
        self._began: tuple[float, int] | None = None
        self._first: float | None = None
        self._windows = 0

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return {"enabled": self.enabled, "every_n_steps": self.every_n_steps}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on having been timed."""
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._began, self._first, self._windows = None, None, 0
        if self.enabled and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open a window, if none is."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.enabled and self._began is None:
            self._began = (_now(pl_module), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close a window that is full."""
        if self._began is not None and trainer.global_step - self._began[1] >= self.every_n_steps:
            self._close(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not part of a step."""
        self._close(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Neither is what happens between epochs."""
        self._close(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run of one window has that one."""
        super().on_train_end(trainer, pl_module)
        if self._windows == 1 and self._first is not None:
            self._log(trainer, pl_module, self._first)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An open window is lost."""
        super().on_exception(trainer, pl_module, exception)
        self._began = None

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._began is None:
            return
        moment, step = self._began
        self._began = None
        if (steps := trainer.global_step - step) < 1:  # within an accumulated step
            return
        milliseconds = 1e3 * (_now(pl_module) - moment) / steps
        self._windows += 1
        if self._windows == 1:
            self._first = milliseconds
        else:
            self._log(trainer, pl_module, milliseconds)

    def _log(self, trainer: Trainer, pl_module: LightningModule, milliseconds: float) -> None:
        figures = {"step_ms": milliseconds, "parameters": float(sum(p.numel() for p in pl_module.parameters()))}
        if (peak := _peak_memory(pl_module.device)) is not None:
            figures["peak_memory_mib"] = peak / 2**20
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{k}": v for k, v in figures.items()}, trainer.global_step)


def _now(pl_module: LightningModule) -> float:
    if pl_module.device.type != "cpu":
        torch.get_device_module(pl_module.device).synchronize()
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    """Bytes; ``None`` where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() if device.type == "cpu" else None
