"""What runs inside each training process: says how far it is, and ends with its parent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_efficient.ablation.files import EXPORT, PROGRESS, START, read_json, write_json
from lightning_efficient.ablation.resume import ResumePoint
from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.names import RUN_VARIABLE
from lightning_efficient.deploy.measure import log_exported

_EVERY = 0.5  # seconds between two reports
_POLL = 0.5  # seconds between two looks at the parent


def callbacks_of_the_run() -> tuple[Callback, list[Callback]]:
    """The callbacks that ``LIGHTNING_EFFICIENT_RUN`` describes, as JSON set by ``ablate``: before the methods, after.

    Raises:
        RuntimeError: ``ablate`` asked for the configuration only, and the script builds a Trainer nevertheless.
    """
    run = json.loads(os.environ[RUN_VARIABLE])
    if run.get("probe"):
        raise RuntimeError(
            "this script builds its Trainer without reading `--print_config`: `ablate` runs LightningCLI scripts."
        )
    _end_with_parent(run["parent"])
    after: list[Callback] = [ResumePoint(run["folder"], run["checkpoint_every"])]
    if run["export"]:
        from lightning_efficient.ablation.reporter import ExportedCost

        after.insert(0, ExportedCost(run["folder"], run["latency"]))
    return Reporter(run["folder"]), after


class Reporter(Callback):
    """Reports progress to a file. Draws no random numbers and logs nothing.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._started = time.monotonic()
        self._reported = -math.inf
        self._first_step = 0
        self._total = math.inf

    # -- once, at the start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the user's checkpoints inside the run's folder; digest the initial weights, before any method."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            outside = isinstance(callback, ModelCheckpoint) and callback.dirpath is not None
            if outside and self.folder not in Path(callback.dirpath).resolve().parents:
                callback.dirpath = str(self.folder / "checkpoints" / Path(callback.dirpath).name)
        if stage == "fit" and trainer.is_global_zero and not (self.folder / START).exists():
            weights = {name: _digest(tensor) for name, tensor in pl_module.named_parameters()}
            write_json(self.folder / START, {"weights": weights, "batches": {}})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._total = trainer.estimated_stepping_batches
        self._report(trainer)

    # -- at every epoch and step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Digest the first batch of every epoch."""
        if batch_idx == 0 and trainer.is_global_zero:
            start = read_json(self.folder / START) or {"weights": {}}
            start["batches"] = {**start.get("batches", {}), str(trainer.current_epoch): _digest(batch)}
            write_json(self.folder / START, start)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, twice a second at most."""
        if time.monotonic() - self._reported >= _EVERY:
            self._report(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what was validated."""
        if not trainer.sanity_checking:
            self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the end, and what a test needs to know."""
        paths = [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
        best = next(filter(None, paths), "")
        self._report(trainer, fitted=True, best=best, has_test=_has_test(trainer, pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the test metrics to what was reported."""
        if trainer.is_global_zero:
            report = read_json(self.folder / PROGRESS)
            report["metrics"] = {**report.get("metrics", {}), **_scalars(trainer.callback_metrics)}
            write_json(self.folder / PROGRESS, report)

    # -- how

    def _report(self, trainer: Trainer, **more: Any) -> None:
        self._reported = time.monotonic()
        if not trainer.is_global_zero:
            return
        total = self._total
        done = trainer.global_step - self._first_step
        left = None
        if done and math.isfinite(total):
            left = (self._reported - self._started) / done * max(0, total - trainer.global_step)
        report = {
            "epoch": trainer.current_epoch,
            "epochs": trainer.max_epochs,
            "step": trainer.global_step,
            "steps": int(total) if math.isfinite(total) else None,
            "seconds_left": left,
            "metrics": _scalars(trainer.callback_metrics),
            **more,
        }
        write_json(self.folder / PROGRESS, report)


def _scalars(metrics: Mapping[str, Tensor]) -> dict[str, float | None]:
    values = {name: float(value) for name, value in metrics.items() if value.numel() == 1}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _has_test(trainer: Trainer, pl_module: LightningModule) -> bool:
    data: LightningDataModule | None = getattr(trainer, "datamodule", None)
    loader = is_overridden("test_dataloader", pl_module) or (
        data is not None and is_overridden("test_dataloader", data, LightningDataModule)
    )
    return loader and is_overridden("test_step", pl_module)


def _digest(data: Any) -> str:
    """Of every tensor in a collection, in order: shape, type and bytes."""
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    apply_to_collection(data, Tensor, add)
    return digest.hexdigest()[:16]


def _end_with_parent(parent: int) -> None:
    """End this process and what it started once the process that started it is gone (killed, so it could not say)."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.getpgrp() != os.getpid():
        return  # DDP: started by the first process, and ended with its group

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os.killpg(os.getpgrp(), signal.SIGKILL)  # its own group: `run_job` starts it as the leader of one

    threading.Thread(target=watch, daemon=True, name="lightning_efficient_parent").start()


class ExportedCost(Callback):
    """Exports the model as training leaves it, measures the copy and logs its figures; keeps no file of it.

    Args:
        folder: The run's.
        latency: Time it too.
    """

    def __init__(self, folder: str, latency: bool) -> None:
        self.folder, self.latency = Path(folder), latency

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is missing before hours of training, not after."""
        if pl_module.example_input_array is None:
            raise ValueError(
                f"`export` measures a forward pass: give {type(pl_module).__name__} an `example_input_array`."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure. What cannot be exported has been trained nevertheless: the reason is kept, and the run goes on."""
        if not trainer.is_global_zero:
            return
        inputs: Any = pl_module.example_input_array
        try:
            log_exported(trainer.loggers, pl_module, inputs, step=trainer.global_step, latency=self.latency)
        except ExportError as error:
            write_json(self.folder / EXPORT, {"error": str(error)})
