"""Fresh running statistics from the training batches of a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import nn

from lightning_efficient.callbacks.shadow import shadow
from lightning_efficient.methods.norms.blend import BlendNorm
from lightning_efficient.methods.norms.recalibrate import recalibrate


def recalibrate_in(trainer: Trainer, pl_module: LightningModule, batches: int, who: str) -> bool:
    """Average the statistics of the swapped norms over training batches, as ``training_step`` sees them.

    Nothing is logged, no metric of the module counts them, the random state is as before afterwards. Under manual
    optimization, where ``training_step`` would take optimizer steps, ``forward`` gets the batch, or the first of it.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module.
        batches: At most this many batches a process.
        who: For the log.

    Returns:
        Whether there was anything to average. If the step fails there is a warning, and the old statistics stay.
    """
    loader: Any = trainer.train_dataloader
    count = min(batches, trainer.num_training_batches)
    if loader is None or count < 1:
        return False
    twin = shadow(pl_module)
    steps = iter(range(int(count)))

    def forward(model: nn.Module, batch: Any) -> object:
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with trainer.precision_plugin.forward_context():
            if not pl_module.automatic_optimization:
                return twin(batch[0] if isinstance(batch, (tuple, list)) else batch)
            takes = inspect.signature(twin.training_step).parameters
            return twin.training_step(batch, next(steps)) if len(takes) > 1 else twin.training_step(batch)

    try:
        with _undisturbed(loader) as whole:
            done = recalibrate(pl_module, islice(whole, int(count)), forward=forward)
    except Exception as error:
        rank_zero_warn(
            f"{who}: the running statistics were not recalibrated ({type(error).__name__}: {error}), because "
            f"{type(pl_module).__name__} does not run on a training batch outside its loop. They are moving averages "
            "now; call lightning_efficient.functional.recalibrate(module, batches) with inputs of its forward, or set "
            "recalibrate=0."
        )
        return False
    if done.norms:
        average_over_processes(trainer, pl_module)
        rank_zero_info(f"{who}: statistics of {done.norms} norms averaged over {done.batches} training batches.")
    return bool(done.norms)


def average_over_processes(trainer: Trainer, pl_module: LightningModule) -> None:
    """Agree on the running statistics: the mean over processes."""
    if trainer.world_size > 1:
        for norm in (m for m in pl_module.modules() if isinstance(m, BlendNorm)):
            for buffer in norm.target.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


@contextmanager
def _undisturbed(loader: Any) -> Iterator[Any]:
    """The loader's batches, read without moving what decides its next ones."""
    several = isinstance(loader, (list, tuple, dict))
    parts = [loader] if not several else list(loader.values() if isinstance(loader, dict) else loader)
    saved: list[tuple[Any, Any]] = []
    for part in parts:
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            saved.append((part.load_state_dict, part.state_dict()))
        generators = {id(g): g for g in (getattr(o, "generator", None) for o in (part, getattr(part, "sampler", None)))}
        saved += [(g.set_state, g.get_state()) for g in generators.values() if g is not None]
    try:
        yield (batch for batch, *_ in CombinedLoader(loader, "max_size_cycle")) if several else loader
    finally:
        for restore, state in saved:
            restore(state)
