"""One line a run on the terminal, instead of one bar an epoch."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_ENTROPY = "efficient/collapse_monitor/entropy_min"


def progress_bars(console: Console) -> Progress:
    """Bars with steps, time, validation accuracy and the entropy of the most collapsed head.

    Args:
        console: Where to draw.
    """
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class ProgressLine(Callback):
    """Moves one bar of a shared display, and keeps the processor time of every step (wall time on an idle machine).

    Args:
        bars: The display.
        task: The bar.
    """

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self.bars, self.task = bars, task
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now the number of steps is known."""
        self.bars.start_task(self.task)
        self.bars.update(self.task, total=int(trainer.estimated_stepping_batches))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further."""
        self.seconds.append(time.process_time() - self._started)
        self.bars.update(self.task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was validated and measured last."""
        names = {"val_acc": "val acc", _ENTROPY: "min entropy"}
        seen = trainer.callback_metrics
        self.bars.update(self.task, note="  ".join(f"{names[n]} {float(seen[n]):.3f}" for n in names if n in seen))


@contextmanager
def one_thread() -> Iterator[None]:
    """At this size threads wait for each other longer than they compute, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notices off the demo's few lines; everything is as before afterwards."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            # 1,797 tiny images lie in memory: worker processes would only slow them down.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            # Lightning 2.6 with torch 2.14, nothing a user can change.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
