"""What validation would say if the transition ended now, logged beside the user's own metrics."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

from lightning_efficient.norms.blend import BlendNorm, finished
from lightning_efficient.trainer.stand_in import shadow

_LOG = inspect.signature(LightningModule.log)
_KEPT = ("logger", "reduce_fx", "sync_dist", "add_dataloader_idx", "batch_size", "rank_zero_only")


class FinishedForm:
    """Runs each validation batch once more with the finished norms, on a stand-in of the module.

    What ``validation_step`` and ``on_validation_epoch_end`` log, numbers and metrics alike, appears under
    ``prefix + name``. The random state is left as it was. If a second run fails there is one warning, and no other try.

    Args:
        prefix: Put before every name.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._twin: LightningModule | None = None
        self._metrics: dict[str, Metric] = {}
        self._logged: list[tuple[str, Any, dict[str, Any]]] = []
        self._failed = False
        self._loader = ""

    def start(self, pl_module: LightningModule) -> None:
        """Begin a validation epoch."""
        self._metrics = {}
        self._twin = None if self._failed else shadow(pl_module, self._log)

    def stop(self) -> None:
        """Drop the stand-in."""
        self._twin, self._metrics = None, {}

    def batch(
        self, trainer: Trainer, pl_module: LightningModule, norms: Sequence[BlendNorm], batch: Any, *indices: int
    ) -> None:
        """Evaluate a batch that the user's ``validation_step`` has seen; ``indices`` of the batch and its loader."""
        twin = self._twin
        if twin is not None:
            several = len(trainer.num_val_batches) > 1
            self._loader = f"/dataloader_idx_{indices[1]}" if several else ""
            given = (batch, *indices) if several else (batch, indices[0])
            takes = len(inspect.signature(twin.validation_step).parameters)
            self._run(trainer, pl_module, norms, lambda: twin.validation_step(*given[:takes]))

    def end(self, trainer: Trainer, pl_module: LightningModule, norms: Sequence[BlendNorm]) -> None:
        """Log what the epoch comes to."""
        if self._twin is not None:
            self._loader = ""
            self._run(trainer, pl_module, norms, self._twin.on_validation_epoch_end)
            for name, metric in self._metrics.items():
                pl_module.log(name, metric.compute(), add_dataloader_idx=False)
        self.stop()

    def _run(self, trainer: Trainer, pl_module: LightningModule, norms: Sequence[BlendNorm], step: Any) -> None:
        self._logged = []
        cuda = sorted({norm.lam.device.index for norm in norms if norm.lam.is_cuda})
        try:
            with torch.random.fork_rng(cuda), finished(norms), trainer.precision_plugin.forward_context():
                step()
        except Exception as error:
            self._failed = True
            self.stop()
            rank_zero_warn(
                f"no metrics of the finished form: running validation a second time failed ({type(error).__name__}: "
                f"{error}). Training and your own metrics are not affected."
            )
            return
        for name, value, options in self._logged:
            pl_module.log(name, value, **options)

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        given = _LOG.bind(None, name, value, *args, **kwargs).arguments
        name = self.prefix + name
        if isinstance(value, Metric):
            self._metrics[name + (self._loader if given.get("add_dataloader_idx", True) else "")] = value
        else:
            options = {key: given[key] for key in _KEPT if key in given}
            self._logged.append((name, value, {**options, "on_step": False, "on_epoch": True}))
