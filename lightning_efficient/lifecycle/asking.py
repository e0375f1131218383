"""Asking what a whole model does, in a run where it may be cut over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_efficient.common.running import device_of, first_line
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.strategies import is_sharded

T = TypeVar("T")


def asked(
    who: str, trainer: Trainer, pl_module: LightningModule, batch: Any, ask: Callable[[LightningModule, Any], T]
) -> T:
    """Ask a module what it does on a batch.

    Where it is cut over processes, the first of them asks the copy that was kept before that (a callback says that it
    ``needs_whole``), and tells the others.

    Args:
        who: Name of the callback, for the errors.
        trainer: Of the run.
        pl_module: Its module.
        batch: A training batch as the step gets it.
        ask: Gets a module and a batch; in a sharded run its answer is pickled.

    Raises:
        Exception: Asking failed; in a sharded run a ``ValueError`` that says why, on all processes.
    """
    if not is_sharded(trainer):
        return ask(pl_module, batch)
    answer: Any = None
    failed = ""
    if trainer.is_global_zero:
        try:
            name = f"{who}: {type(pl_module).__name__}"
            if (whole := attachment(pl_module).unsharded) is None:
                raise ValueError(
                    f"{name} was sharded before it could be run. Build the network in `__init__`, and call "
                    "`fully_shard` or `parallelize_module` in `configure_model`."
                )
            if device_of(whole).type == "meta":
                raise ValueError(
                    f"{name} was on the meta device when it was sharded, where nothing can be run. Build the network "
                    "with its weights, on the CPU."
                )
            answer = ask(whole, apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device_of(whole))))
        except Exception as error:
            failed = str(error) if isinstance(error, ValueError) else first_line(error)
    answer, failed = trainer.strategy.broadcast((answer, failed))
    if failed:
        raise ValueError(failed)
    return answer  # type: ignore[no-any-return]
