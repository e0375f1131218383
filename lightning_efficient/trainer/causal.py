"""Is the model that a Trainer trains causal?"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_efficient.norms.causal import causal_norms
from lightning_efficient.trainer.replay import Replay


def causal_in(trainer: Trainer, pl_module: LightningModule, batch: Any, number: int = 0) -> dict[str, str]:
    """The swapped norms that a causal part of the model works with; see ``causal_norms``.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module.
        batch: A training batch as the step gets it; two samples of it are used, or all where the step takes no part.
        number: Of the batch.

    Raises:
        Exception: The step does not run on the batch.
    """
    replay = Replay(trainer, pl_module, "fit")

    def run(inputs: Any) -> object:
        return replay.step(inputs, number)

    with replay.quiet(parameters=False):
        replay.twin.training = True  # its networks are not; a step may ask
        try:
            return causal_norms(pl_module, run, apply_to_collection(batch, Tensor, lambda t: t[:2] if t.ndim else t))
        except Exception:  # lengths or weights of a whole batch inside
            return causal_norms(pl_module, run, batch)
