"""The one record of hyper-parameters that a run with callbacks of this package leaves in its loggers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_efficient.common.registry import METHODS
from lightning_efficient.trainer.tensorboard import write_hparams, write_layout

HPARAM_PREFIX = "efficient/"


class _Configured(Protocol):
    enabled: bool
    method: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """The arguments as plain data."""


def log_hparams(trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[_Configured]) -> None:
    """Log the user's hyper-parameters together with ours, in place of Lightning's record of the user's alone.

    TensorBoard keeps the first record of a run only. Every run gets a switch for each method, and a column for each
    argument of those that are on that has a value, after the user's own; and ``seed`` where ``seed_everything`` has set
    one. TensorBoard also gets the charts of the enabled methods.
    """
    ours: dict[str, Any] = {}
    for method in METHODS.with_callback:
        active = [cb for cb in callbacks if cb.method == method and cb.enabled]
        ours[f"{HPARAM_PREFIX}{method}"] = bool(active)
        for name in active[0].config() if active else ():
            values = [cb.config()[name] for cb in active]
            if name != "enabled" and values != [None] * len(values):
                ours[f"{HPARAM_PREFIX}{method}/{name}"] = _column(values)
    users: dict[str, Any] = {}
    for source in (pl_module, getattr(trainer, "datamodule", None)):
        # `save_hyperparameters(logger=False)` keeps them out of the logs; Lightning has no public name for that.
        if source is not None and getattr(source, "_log_hyperparams", True):
            # LightningCLI notes `_class_path` and `_instantiator` for itself.
            users |= {k: v for k, v in dict(source.hparams_initial or {}).items() if not str(k).startswith("_")}
    if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
        ours["seed"] = int(seed)
    active_methods = [cb.method for cb in callbacks if cb.enabled]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            # What the script has logged by itself: a Trainer's loggers make one record of it and of this.
            write_hparams(logger, {**logger.hparams, **users, **ours})
            write_layout(logger, active_methods)
        else:
            logger.log_hyperparams({**users, **ours})
        logger.log_graph(pl_module)
        logger.save()


def _column(values: list[Any]) -> bool | int | float | str:
    """One value, which can be sorted and filtered by; texts of several instances side by side."""
    if len(values) == 1 and isinstance(values[0], bool | int | float | str):
        return values[0]
    return "; ".join("" if value is None else str(value) for value in values)
