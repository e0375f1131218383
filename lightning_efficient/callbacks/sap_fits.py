"""SAP over several fits: one Trainer an iteration, each with its own logger, checkpoints and early stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_efficient.callbacks.sap_pruning import SAPPruning


def sap_fits(
    module: LightningModule,
    pruning: SAPPruning,
    make_trainer: Callable[[int, SAPPruning], Trainer],
    iterations: int,
    **fit: Any,
) -> list[dict[str, Any]]:
    """Train, prune, go back to initialization, train again: algorithm 1 with a ``fit`` for each iteration.

    Args:
        module: The module, at its initialization; it ends as trained in the last iteration.
        pruning: ``SAPPruning(iterations=0, ...)``: a whole ``fit`` is one iteration.
        make_trainer: Makes the Trainer of an iteration from its number and the callback, which has to be in it.
        iterations: How often to prune at most, so that there are up to ``iterations + 1`` fits.
        fit: Arguments of ``trainer.fit`` besides the module: dataloaders or a datamodule, with validation data.

    Returns:
        The history, one row for each fit.

    Raises:
        ValueError: The callback divides a fit into iterations itself, or a Trainer lacks it.
    """
    if pruning.iterations or pruning.epochs_per_iteration is not None:
        raise ValueError(
            f"sap_fits makes every fit one iteration; got iterations={pruning.iterations}, epochs_per_iteration="
            f"{pruning.epochs_per_iteration}. Use SAPPruning(iterations=0)."
        )
    for iteration in range(iterations + 1):
        trainer = make_trainer(iteration, pruning)
        if not any(callback is pruning for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("the Trainer lacks the callback: return Trainer(callbacks=[pruning, ...]).")
        trainer.fit(module, **fit)
        if pruning.stopped is not None:
            break
    return pruning.history
