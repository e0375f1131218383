"""Fresh running statistics from the training batches of a Trainer."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_efficient.common.shards import gather_anew
from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.recalibrate import recalibrate
from lightning_efficient.trainer.replay import EmptyLoaderError, Replay


def recalibrate_in(trainer: Trainer, pl_module: LightningModule, batches: int, who: str) -> bool:
    """Average the statistics of the swapped norms over training batches, as ``training_step`` sees them.

    Nothing is logged, no metric of the module counts them, no optimizer steps, everything but the statistics is as
    before afterwards.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module.
        batches: At most this many batches a process.
        who: For the log.

    Returns:
        Whether there was anything to average. If the step fails there is a warning, and the old statistics stay.
    """
    loader: Any = trainer.train_dataloader
    count = int(min(batches, trainer.num_training_batches))
    if loader is None or count < 1:
        return False
    steps = iter(range(count))
    gather_anew(pl_module)
    try:
        replay = Replay(trainer, pl_module, "fit")

        def forward(model: nn.Module, batch: Any) -> object:
            return replay.step(batch, next(steps))

        with (
            replay.quiet(apart=[norm.target for norm in blend_norms(pl_module).values()]),
            closing(replay.batches(loader, count)) as given,  # also where a step fails, whose traceback would hold it
        ):
            done = recalibrate(pl_module, given, forward=forward)
    except EmptyLoaderError as error:
        rank_zero_warn(f"{who}: the running statistics were not recalibrated: {error} They are moving averages now.")
        return False
    except Exception as error:
        rank_zero_warn(
            f"{who}: the running statistics were not recalibrated ({type(error).__name__}: {error}), because "
            f"{type(pl_module).__name__} does not run on a training batch outside its loop. They are moving averages "
            "now; call lightning_efficient.functional.recalibrate(module, batches) with inputs of its forward, or set "
            "recalibrate=0."
        )
        return False
    finally:
        gather_anew(pl_module)
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
