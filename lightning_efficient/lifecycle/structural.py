"""When a method that changes modules acts inside a Trainer."""

from __future__ import annotations

from abc import abstractmethod
from multiprocessing import parent_process
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import references
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.hooks import fold_modules, install, unfoldable
from lightning_efficient.lifecycle.state import Request, attachment
from lightning_efficient.surgery.optimizer import rebind


class StructuralCallback(EfficientCallback):
    """Base of the callbacks whose method replaces modules.

    The replacement happens in ``setup`` and again after ``configure_model``, so before weights are loaded, the model is
    wrapped or optimizers are made; the user's ``configure_optimizers`` runs on a plain view of the model, and whatever
    optimizers come out of it (or were there before) are rebound when ``fit`` starts.
    """

    resume_may_change = frozenset({"enabled"})

    def request(self) -> Request:
        """What to do to a model."""
        return Request(self.method, self.state_key, self.config(), self.apply)

    @abstractmethod
    def apply(self, pl_module: LightningModule) -> Change:
        """Replace what is not replaced yet; raises ``NoMatchError`` if there is nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the modules that exist already, and hook the instance for those that come later."""
        super().setup(trainer, pl_module, stage)
        if self.enabled:
            request = self.request()
            install_before_averaging(self, trainer, pl_module, request)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rebind the optimizers to the new parameters, before their state is restored."""
        super().on_fit_start(trainer, pl_module)
        if self.enabled:
            rebind_optimizers(trainer, pl_module, self.method, self.state_key)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand plain weights to the parent of spawned processes."""
        super().teardown(trainer, pl_module, stage)
        if self.enabled and stage == "fit":
            fold_for_parent(trainer, pl_module)


def install_before_averaging(
    callback: EfficientCallback, trainer: Trainer, pl_module: LightningModule, request: Request
) -> None:
    """Install a structural request, unless a callback that copies the model has done so already.

    Raises:
        ValueError: ``WeightAveraging`` or ``StochasticWeightAveraging`` is listed before ``callback``.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(
                f"{type(other).__name__} copies the model before {type(callback).__name__} changes it, and would "
                f"average the wrong parameters. List {type(callback).__name__} before {type(other).__name__}."
            )
    # The same request of an earlier run (fit, then test) keeps its changes.
    for known in attachment(pl_module).requests:
        if (known.method, known.key) == (request.method, request.key):
            request.changes = known.changes
    install(pl_module, request)


def fold_for_parent(trainer: Trainer, pl_module: LightningModule) -> None:
    """In a process spawned by the Trainer, make the module plain again: the parent only takes over plain weights."""
    if spawned(trainer):
        fold_modules(pl_module)


def spawned(trainer: Trainer) -> bool:
    """Whether this process was spawned or forked by a Trainer, whose own process then only gets its weights."""
    return isinstance(trainer.strategy, DDPStrategy) and parent_process() is not None


def rebind_optimizers(trainer: Trainer, pl_module: LightningModule, method: str, key: str) -> None:
    """Point the Trainer's optimizers at the parameters of a request's new modules."""
    if spawned(trainer) and (names := unfoldable(pl_module)):
        raise ValueError(
            f"{method} does not fold ({names[:3]} ...), and the parent of spawned processes only takes over plain "
            "weights. Use Trainer(strategy='ddp')."
        )
    changes = [c for r in attachment(pl_module).requests if (r.method, r.key) == (method, key) for c in r.changes]
    if idle := sorted(references(pl_module) & {name for c in changes for name in c.swaps}):
        raise ValueError(
            f"{method}: {len(idle)} modules that it has changed ({', '.join(idle[:3])}{', ...' if idle[3:] else ''}) "
            "were frozen and put into evaluation mode afterwards, as a reference network is: its outputs would change. "
            f"Freeze them where they are made, or exclude={sorted({name.partition('.')[0] for name in idle})}."
        )
    rebind_all(trainer, pl_module)
    for change in changes:
        rank_zero_info(change.report())


def rebind_all(trainer: Trainer, pl_module: LightningModule) -> None:
    """Point the Trainer's optimizers at the parameters of every replaced module; doing it again changes nothing."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    # All changes at once: a later one may have replaced what an earlier one made.
    rebind(trainer.optimizers, attachment(pl_module).changes, schedulers, pl_module)
