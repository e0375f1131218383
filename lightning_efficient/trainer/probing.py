"""Questions about a model that are answered by running its training step on a batch and variations of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.norms.causal import causal_norms
from lightning_efficient.norms.padding import Padding, Recording, find_padding
from lightning_efficient.trainer.replay import Replay

_Answer = TypeVar("_Answer")
Probe = Callable[[LightningModule, Callable[[Any], object], Any], _Answer]


def probe_norms(
    trainer: Trainer, pl_module: LightningModule, batch: Any, number: int, causal: bool
) -> tuple[dict[str, str], Padding]:
    """What norms with statistics have to know of a model: which of them are causal, and what is padding.

    Args:
        trainer: As for :func:`probed`.
        pl_module: Likewise.
        batch: Likewise.
        number: Likewise.
        causal: Whether to ask for the first.
    """

    def probe(model: nn.Module, run: Callable[[Any], object], inputs: Any) -> tuple[dict[str, str], Padding]:
        recording = Recording(model, run)
        found = causal_norms(model, recording, inputs) if causal else {}
        return found, find_padding(model, recording, inputs)

    return probed(trainer, pl_module, batch, number, probe)


def probed(trainer: Trainer, pl_module: LightningModule, batch: Any, number: int, probe: Probe[_Answer]) -> _Answer:
    """Ask a probe about a module in training, and leave no trace.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module.
        batch: A training batch as the step gets it; two samples of it are used, or all where the step takes no part.
        number: Of the batch.
        probe: Gets the module, a function that runs its step on inputs, and the inputs.

    Raises:
        Exception: The step does not run on the batch.
    """
    replay = Replay(trainer, pl_module, "fit")

    def run(inputs: Any) -> object:
        return replay.step(inputs, number)

    with replay.quiet(parameters=False):
        replay.twin.training = True  # its networks are not; a step may ask
        try:
            return probe(pl_module, run, apply_to_collection(batch, Tensor, lambda t: t[:2] if t.ndim else t))
        except Exception:  # lengths or weights of a whole batch inside
            return probe(pl_module, run, batch)
