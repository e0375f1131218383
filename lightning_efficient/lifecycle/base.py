"""What every callback of the suite shares: the switch, the target globs, the key of its state, one hparams record."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_efficient.common.registry import ORDER, check_methods
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.trainer.tensorboard import write_hparams, write_layout

HPARAM_PREFIX = "efficient/"
# Every run logs a switch for each of these, on or off, so that runs compare column by column.
SUITE = (
    "sigma_reparam", "norm_swap", "linear_attention", "temp_scale", "magnitude_pruning", "sap_pruning",
    "hesso_pruning", "pagcp_pruning", "collapse_monitor", "run_cost",
)  # fmt: skip


class EfficientCallback(Callback):
    """Base class of every callback in this package.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
    """

    method: ClassVar[str]
    _autolog_paused = False

    def __init__(
        self, enabled: bool = True, include: list[str] | None = None, exclude: list[str] | None = None
    ) -> None:
        super().__init__()
        for name, globs in (("include", include), ("exclude", exclude)):
            if isinstance(globs, str):
                raise TypeError(f"`{name}` takes a list of globs; got the string {globs!r}. Write [{globs!r}].")
        self.enabled = enabled
        self.include = include
        self.exclude = exclude

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; differs between two differently targeted instances."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        """A marker, so that Lightning itself warns when a checkpoint is resumed without this callback."""
        return {"method": self.method} if self.enabled else {}

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        return {"enabled": self.enabled, "include": self.include, "exclude": self.exclude}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything has changed."""
        if self.enabled and stage == "fit":
            check_strategy(trainer, type(self).__name__)
            check_methods([cb.method for cb in peers(trainer) if cb.method in ORDER])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log one record of hyper-parameters for the whole suite."""
        everyone = [cb for cb in trainer.callbacks if isinstance(cb, EfficientCallback)]  # type: ignore[attr-defined]
        if everyone[0] is self and trainer.enable_autolog_hparams:
            log_hparams(trainer, pl_module, everyone)
            # Lightning's own record, which comes next, would be a second one of half the keys.
            trainer.enable_autolog_hparams, self._autolog_paused = False, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep two samples of the first batch, for an :func:`~lightning_efficient.export` without example inputs."""
        if self._autolog_paused:
            trainer.enable_autolog_hparams, self._autolog_paused = True, False
        if self.enabled and attachment(pl_module).example_batch is None:
            attachment(pl_module).example_batch = apply_to_collection(batch, Tensor, _two_samples)


def _two_samples(tensor: Tensor) -> Tensor:
    return tensor[:2].detach().cpu().clone() if tensor.ndim else tensor.detach().cpu()


def peers(trainer: Trainer) -> list[EfficientCallback]:
    """The enabled callbacks of this package in a Trainer, in their listed order."""
    return [cb for cb in trainer.callbacks if isinstance(cb, EfficientCallback) and cb.enabled]  # type: ignore[attr-defined]


def check_strategy(trainer: Trainer, who: str) -> None:
    """Raise unless the strategy keeps whole parameters on every process.

    Raises:
        ValueError: A sharded or unknown strategy.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy):
        return
    raise ValueError(
        f"{who} does not support {type(strategy).__name__}: it needs whole parameters on every process. Use "
        "Trainer(strategy='auto') on one device, or 'ddp' (also 'ddp_spawn', 'ddp_fork', 'ddp_notebook'); or switch "
        f"it off with {who}(enabled=False)."
    )


def log_hparams(trainer: Trainer, pl_module: LightningModule, callbacks: list[EfficientCallback]) -> None:
    """Log the user's hyper-parameters together with ours, in place of Lightning's record of the user's alone.

    TensorBoard keeps the first record of a run only. Every run gets the same keys: one switch and one text a method,
    and ``seed`` where ``seed_everything`` has set one. TensorBoard also gets the charts of the enabled methods.
    """
    ours: dict[str, Any] = {}
    for method in dict.fromkeys((*SUITE, *(cb.method for cb in callbacks))):
        active = [cb for cb in callbacks if cb.method == method and cb.enabled]
        ours[f"{HPARAM_PREFIX}{method}"] = bool(active)
        ours[f"{HPARAM_PREFIX}{method}_config"] = "; ".join(_summary(cb) for cb in active)
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
            write_hparams(logger, {**ours, **users})
            write_layout(logger, active_methods)
        else:
            logger.log_hyperparams({**ours, **users})
        logger.log_graph(pl_module)
        logger.save()


def _summary(callback: EfficientCallback) -> str:
    return ", ".join(f"{k}={v}" for k, v in callback.config().items() if k != "enabled" and v is not None)
