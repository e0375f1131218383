"""What validation would say if the transition ended now, logged beside the user's own metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

from lightning_efficient.norms.blend import BlendNorm, finished
from lightning_efficient.trainer.replay import Replay, own

_LOG = inspect.signature(LightningModule.log)
_KEPT = ("logger", "reduce_fx", "sync_dist", "add_dataloader_idx", "batch_size", "rank_zero_only")


class FinishedForm:
    """Runs each validation batch with the finished norms, too, on a stand-in of the module.

    What ``validation_step`` and ``on_validation_epoch_end`` log, numbers and metrics alike, appears under
    ``prefix + name``. Everything else is left as it was. If a second run fails there is one warning, and no other try.

    Args:
        prefix: Put before every name.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.known = False  # whether a validation of this fit has logged them
        self._replay: Replay | None = None
        self._metrics: dict[str, Metric] = {}
        self._logged: list[tuple[str, Any, dict[str, Any]]] = []
        self._failed = False
        self._loader = ""

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation epoch."""
        self._metrics = {}
        self._replay = None if self._failed else Replay(trainer, pl_module, "validate", self._log)

    def stop(self) -> None:
        """Drop the stand-in."""
        self._replay, self._metrics = None, {}

    def batch(self, norms: Sequence[BlendNorm], batch: Any, number: int, index: int) -> None:
        """Evaluate a batch that the user's ``validation_step`` is about to see.

        Args:
            norms: The norms.
            batch: As the step gets it.
            number: Of the batch.
            index: Of its loader.
        """
        if (replay := self._replay) is not None:
            several = len(replay.trainer.num_val_batches) > 1
            self._loader = f"/dataloader_idx_{index}" if several else ""
            self._run(replay, norms, lambda: replay.validate(own(batch), number, index if several else None))

    def end(self, norms: Sequence[BlendNorm]) -> None:
        """Log what the epoch comes to."""
        if (replay := self._replay) is not None:
            self._loader = ""
            self._run(replay, norms, replay.twin.on_validation_epoch_end)
            for name, metric in self._metrics.items():
                replay.pl_module.log(name, metric.compute(), add_dataloader_idx=False)
            self.known = True
        self.stop()

    def follow(self, trainer: Trainer) -> None:
        """After a validation in which nothing is blended any more: the network's own metrics are the finished form's.

        Without that the last values of the transition would stay behind as the run's final ones.

        Args:
            trainer: At the end of a validation.
        """
        metrics = trainer.callback_metrics
        before = [name for name in metrics if name.startswith(self.prefix)]
        same = {name: metrics[own] for name in before if (own := name.removeprefix(self.prefix)) in metrics}
        if same:
            metrics.update(same)
            for logger in trainer.loggers:
                logger.log_metrics({name: float(value) for name, value in same.items()}, trainer.global_step)

    def _run(self, replay: Replay, norms: Sequence[BlendNorm], what: Callable[[], object]) -> None:
        self._logged = []
        try:
            # In every batch of validation a copy of the weights would be felt, and evaluation writes none.
            with replay.quiet(parameters=False), finished(norms):
                what()
        except Exception as error:
            self._failed = True
            self.stop()
            rank_zero_warn(
                f"no metrics of the finished form: running validation a second time failed ({type(error).__name__}: "
                f"{error}). Training and your own metrics are not affected."
            )
            return
        for name, value, options in self._logged:
            replay.pl_module.log(name, value, **options)

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        given = _LOG.bind(None, name, value, *args, **kwargs).arguments
        name = self.prefix + name
        if isinstance(value, Metric):
            self._metrics[name + (self._loader if given.get("add_dataloader_idx", True) else "")] = value
        else:
            options = {key: given[key] for key in _KEPT if key in given}
            self._logged.append((name, value, {**options, "on_step": False, "on_epoch": True}))
