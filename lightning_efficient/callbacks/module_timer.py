"""``ModuleTimer``: time and memory of every module, forward and backward, on a few steps of a run."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_efficient.common.escaping import write_whole
from lightning_efficient.companions.timing import ModuleTime, Spans, mean_times, module_times, plot_times, times_table
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.trainer.showing import show_picture, show_text

# Steps before the first one that is measured: caches and allocators warm up.
_WARM_UP = 2


class ModuleTimer(EfficientCallback):
    """Measure what every module takes of a training step, forward and backward, on a few steps; changes nothing.

    A measured step runs under torch's profiler with a span for each module; backward operations are given to the module
    whose forward made them. Other steps carry no hook. After the run: a table in the terminal, an icicle in
    TensorBoard, and ``module_timer.json`` in the log folder (or ``default_root_dir``), means over the measured steps.
    On every measured step ``efficient/module_timer/forward_ms``, ``backward_ms`` and ``step_ms`` (the optimizer
    included) go to the loggers. Times are those of the device; on CPU wall time. A measured step takes longer than
    another, mostly for small modules: the shares count, not the sum.

    Losses, weights and random numbers are those of a run without it, to the bit. A module from ``torch.compile`` is one
    row, one compiled in place (``module.compile()``) is part of the module around it, and forwards repeated by
    activation checkpointing count as forward. Under several processes it is process 0 that is measured. Only one
    profiler of torch's can run: with ``Trainer(profiler="pytorch")``, or on a step on which another one is open,
    nothing is measured, and one warning says so.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        every_n_steps: Measure the third optimizer step, and every so many after it.
        table: Print the table after the run.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    method = "module_timer"
    changes_weights = False

    def __init__(self, enabled: bool = True, every_n_steps: int = 1000, table: bool = True) -> None:
        super().__init__(enabled)
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}; expected at least 1.")
        self.every_n_steps, self.table = every_n_steps, table
        self._profiler: Any = None
        self._spans: Spans | None = None
        self.restart()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return {"enabled": self.enabled, "every_n_steps": self.every_n_steps, "table": self.table}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on having been timed."""
        return {}

    def restart(self) -> None:
        """Forget the last run."""
        self._samples: list[list[ModuleTime]] = []
        self._due = 0
        self._warned = False

    @property
    def rows(self) -> list[ModuleTime]:
        """Means over the steps measured so far, one row a module."""
        return mean_times(self._samples)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step to measure."""
        super().on_train_start(trainer, pl_module)
        self._due = trainer.global_step + _WARM_UP

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the profiler, if the step is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.enabled or not trainer.is_global_zero or trainer.barebones or trainer.global_step < self._due:
            return
        self._due = trainer.global_step + self.every_n_steps
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, PyTorchProfiler) or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            if not self._warned:
                rank_zero_warn(
                    "ModuleTimer: another profiler of torch's is open (Trainer(profiler='pytorch'), or one of your "
                    "own), and only one can be: nothing is measured while it is."
                )
            self._warned = True
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if pl_module.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._spans = Spans(pl_module)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self._profiler.start()
        self._spans.open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the profiler, log the sums."""
        if (profiler := self._close()) is None:
            return
        events = profiler.events()
        rows = module_times(events, pl_module)
        if not rows:
            return
        self._samples.append(rows)
        names = {row.name for row in rows}
        tops = [row for row in rows if not any(row.name.startswith(f"{n}.") or (not n and row.name) for n in names)]
        ends = [e.time_range.end for e in events]
        figures = {
            "forward_ms": sum(row.forward_ms for row in tops),
            "backward_ms": sum(row.backward_ms for row in tops),
            "step_ms": (max(ends) - min(e.time_range.start for e in events)) / 1e3,
        }
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{k}": v for k, v in figures.items()}, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured."""
        super().on_train_end(trainer, pl_module)
        self._close()
        if not self.enabled:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # which all processes have to ask for
        if not self._samples:
            return
        rows = self.rows
        content = {"steps": len(self._samples), "modules": [asdict(row) for row in rows]}
        try:
            write_whole(folder / "module_timer.json", json.dumps(content, indent=1))
        except OSError as error:  # no reason to end a script that has trained for hours
            rank_zero_warn(f"ModuleTimer: {error}")
        from rich.console import Console

        if trainer.is_global_zero and trainer.loggers:
            text = io.StringIO()
            Console(width=120, file=text).print(times_table(rows))
            show_text(trainer.loggers, f"{self.prefix}/table", text.getvalue(), trainer.global_step)
            show_picture(trainer.loggers, f"{self.prefix}/icicle", partial(plot_times, rows), trainer.global_step)
        if self.table:
            Console().print(times_table(rows))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook and no profiler behind."""
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def _close(self) -> Any:
        if self._spans is not None:
            self._spans.close()
        profiler, self._profiler, self._spans = self._profiler, None, None
        if profiler is not None:
            profiler.stop()
        return profiler
