"""What a callback works with: strategies, which hold whole parameters or shards of them, and Lightning's callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

_WHOLE = "Trainer(strategy='auto') on one device, or 'ddp' (also 'ddp_spawn', 'ddp_fork', 'ddp_notebook')"
_COPYING = (WeightAveraging, StochasticWeightAveraging)
_TUNING = (LearningRateFinder, BatchSizeFinder)


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy leaves it to the module to cut its parameters (FSDP2, tensor parallel)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def data_group(trainer: Trainer, pl_module: LightningModule) -> ProcessGroup | None:
    """The processes that have other samples than this one, where the model is sharded; None: none, or it is whole."""
    mesh = pl_module.device_mesh
    if not is_sharded(trainer) or mesh is None or mesh["data_parallel"].size() == 1:
        return None
    return mesh["data_parallel"].get_group()


def misplaced_states(pl_module: LightningModule, optimizers: Sequence[Optimizer], file: Mapping[str, Any]) -> bool:
    """Whether states of optimizers, read from one file into a sharded model, are at other parameters than they were.

    Lightning numbers them by ``pl_module.parameters()``; a file of an unsharded run has the optimizer's own order.

    Args:
        pl_module: The model.
        optimizers: Of the fit.
        file: The checkpoint.
    """
    places = {id(parameter): i for i, parameter in enumerate(pl_module.parameters())}
    for optimizer, state in zip(optimizers, file.get("optimizer_states", ()), strict=False):
        saved = [place for group in state["param_groups"] for place in group["params"]]
        here = [places.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
        if state["state"] and saved != here:
            return True
    return False


def check_strategy(trainer: Trainer, who: str, sharded: bool, weights: bool = True) -> None:
    """Refuse what cannot work, before anything has changed.

    Args:
        trainer: Of the fit.
        who: Name of the callback.
        sharded: Whether it works on shards of parameters.
        weights: Whether it changes weights: what that needs of a sharded run is then looked at, too.

    Raises:
        ValueError: The strategy, or with a sharded model the precision or another callback; says what works instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and sharded:
        if weights:
            _check_company(trainer, who)
        return
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)
    if whole:
        return
    more = " ModelParallelStrategy works, too." if sharded else ""
    if isinstance(strategy, ModelParallelStrategy):
        why = "it needs whole parameters on every process"
    elif isinstance(strategy, FSDPStrategy):
        why = "FSDP1 cuts all weights of a layer as one flat vector, in which none can be told"
    elif isinstance(strategy, DeepSpeedStrategy):
        why = "DeepSpeed steps copies of the weights, which no optimizer's hook sees"
    else:
        why = "whether it keeps whole parameters on every process is not known"
    raise ValueError(
        f"{who} does not support {type(strategy).__name__}: {why}. Use {_WHOLE};{more} or switch it off with "
        f"{who}(enabled=False)."
    )


def check_schedules(trainer: Trainer, who: str) -> None:
    """Refuse what has a schedule of its own, for a callback that goes back to earlier training states.

    Args:
        trainer: Of the fit.
        who: Name of the callback.

    Raises:
        ValueError: Says what works instead.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(other, StochasticWeightAveraging) for other in callbacks):
        raise ValueError(
            f"StochasticWeightAveraging puts a schedule of learning rates in the place of the run's, and {who} goes "
            "back to training states of before. Use WeightAveraging or EMAWeightAveraging, or leave one of them out."
        )


def check_finders(trainer: Trainer, who: str, refuse: bool) -> None:
    """Say that Lightning will begin a resumed run at step 0.

    Args:
        trainer: Which reads a file to resume from, not the one that a finder has written.
        who: Name of the callback.
        refuse: Whether it cannot go on then: what it goes back to is of later steps.

    Raises:
        ValueError: ``refuse``; says what to do instead.
    """
    for name in (type(finder).__name__ for finder in finders(trainer)):
        message = (
            f"{name} tries a run before Lightning reads the training state of a resumed one, and Lightning does not "
            f"read it afterwards: the run begins at step 0, with a new optimizer. Leave {name} out when you resume; "
            "what it found is in the file."
        )
        if refuse:
            raise ValueError(f"{who} cannot be resumed so: {message}")
        rank_zero_warn(message)


def finders(trainer: Trainer) -> list[Any]:
    """Lightning's callbacks that try a run where the fit starts; ones that do so later have a hook of theirs.

    Args:
        trainer: Of the fit.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    starts = [finder.on_fit_start for finder in _TUNING]
    return [cb for cb in callbacks if type(cb).on_fit_start in starts]


def _check_company(trainer: Trainer, who: str) -> None:
    """What a sharded model cannot have beside a method that changes its weights."""
    name = type(trainer.strategy).__name__
    if (precision := str(trainer.precision)).endswith("-true") and precision not in ("32-true", "64-true"):
        raise ValueError(
            f"{who} does not support precision={precision!r} with {name}: weights of so few bits need a second copy, "
            "which sharded checkpoints have no place for. Keep them in float32, and compute in half precision by "
            "precision='bf16-mixed' or fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks:
        if isinstance(other, _COPYING):
            raise ValueError(
                f"{type(other).__name__} copies the whole model, and with {name} parts of it are elsewhere: use it "
                f"with {_WHOLE}, or drop it."
            )
        if isinstance(other, _TUNING):
            raise ValueError(
                f"{type(other).__name__} tries a run and goes back to the file it has written before, which {who} "
                f"does not support with {name}: set the learning rate and the batch size from short runs instead."
            )
