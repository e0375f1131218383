"""Units of a LightningModule cut out, or zero and left to ``export``: the optimizers, copies and files with them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_efficient.common.change import Change
from lightning_efficient.common.shards import is_cut
from lightning_efficient.lifecycle.hooks import hook_files
from lightning_efficient.lifecycle.recipe import Entry
from lightning_efficient.lifecycle.state import attachment, set_zeroed
from lightning_efficient.lifecycle.weights import WeightSpaceCallback
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.pretrained import find_configs, put_configs
from lightning_efficient.structured.slim import plan_slim, replay_slim
from lightning_efficient.surgery.cuts import cut_states
from lightning_efficient.trainer.averages import averaged_copies


def mark_zeroed(pl_module: LightningModule, keep: Mapping[str, Iterable[int]], groups: Groups) -> None:
    """Say that units of a module are zero: its files hold that, and ``export`` cuts them out.

    Args:
        pl_module: The module; it keeps its size.
        keep: Group → indices of the units that stay. Groups that are not named stay whole.
        groups: Of this module, with its names.

    Raises:
        ValueError: See :func:`~lightning_efficient.structured.slim.plan_slim`.
    """
    set_zeroed(pl_module, plan_slim(pl_module, keep, groups))
    hook_files(pl_module)


def cut(
    pl_module: LightningModule, keep: Mapping[str, Iterable[int]], groups: Groups, trainer: Trainer | None = None
) -> Change:
    """Cut units out of a module for good, in place: between fits, or in the middle of one on a single device.

    Parameters keep their identity, so optimizers and schedulers go on; what optimizers remember, and averaged copies,
    become smaller with them. From now on the module's files hold the smaller weights and what was cut. A run that
    resumes from one, with any structured pruning callback, cuts its module before the weights load;
    :func:`~lightning_efficient.load_from_checkpoint` returns a small module.

    Args:
        pl_module: The module.
        keep: Group → indices of the units that stay. Groups that are not named stay whole.
        groups: Of this module as it is now, with its names.
        trainer: The Trainer whose optimizers and averaged copies hold its parameters. None: there is none.

    Returns:
        What was changed.

    Raises:
        ValueError: As :func:`~lightning_efficient.functional.apply_slim` does; or a fit is running on several devices
            or with a callback that keeps state of the weights' old size, or the module is sharded. Nothing is changed
            then.
    """
    if trainer is not None and trainer.training:
        _refuse(trainer)
    if any(map(is_cut, pl_module.parameters())):
        raise ValueError(
            f"{type(pl_module).__name__} is sharded over processes. Load its file into one with "
            "`load_from_checkpoint` and cut that."
        )
    planned = plan_slim(pl_module, keep, groups)
    copies = [] if trainer is None else list(averaged_copies(trainer, pl_module))
    change = replay_slim(pl_module, planned)
    cuts, reasons = find_configs(pl_module, planned, groups.calls)
    put_configs(pl_module, cuts, reasons)
    for copy in copies:
        replay_slim(copy, cuts)
        put_configs(copy, cuts, reasons)
    if trainer is not None:
        cut_states(trainer.optimizers, change.cuts)
    mine = attachment(pl_module)
    mine.entries = [_without_sizes(entry, cuts.kept) for entry in mine.entries]
    mine.cut = cuts if mine.cut is None else mine.cut.then(cuts)
    set_zeroed(pl_module, None)
    hook_files(pl_module)
    rank_zero_info(change.report())
    return change


def _without_sizes(entry: Entry, cut: Container[str]) -> Entry:
    """What a method has left in the weights, without what had the old sizes: a further fit finds that anew."""
    tensors = {name: state for name, state in entry.tensors.items() if name not in cut}
    if len(tensors) == len(entry.tensors):
        return entry
    return replace(entry, tensors=tensors, config={**entry.config, "layout": None})


def _refuse(trainer: Trainer) -> None:
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"a model cannot be cut while {type(trainer.strategy).__name__} trains it: its processes exchange "
            "gradients of the old sizes. Cut it between two fits, or leave it to `export`."
        )
    callbacks = [cb for cb in trainer.callbacks if isinstance(cb, WeightSpaceCallback) and cb.enabled]  # type: ignore[attr-defined]
    if callbacks:
        raise ValueError(
            f"a model cannot be cut while {', '.join(type(cb).__name__ for cb in callbacks)} trains it: what it keeps "
            "of the weights has the old sizes. Cut it between two fits, or leave it to `export`."
        )
