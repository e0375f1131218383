"""A whole training state inside a Trainer, to go back to: everything but the data and the Trainer's own counters.

The Trainer's step counter cannot go back, since loggers and checkpoints are numbered by it. So the schedules do: each
callback's :class:`~lightning_efficient.lifecycle.standing.Standing` begins later by as many steps as were undone, and
all that follows from it (masks, blends, shrinking units) stands where it stood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_efficient.common.schema import Anything, Int, ListOf, MapOf, Record, TensorOf, Text
from lightning_efficient.lifecycle.base import EfficientCallback, peers
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.lifecycle.weights import sites_of
from lightning_efficient.structured.cuts import Cuts
from lightning_efficient.trainer.averages import averages
from lightning_efficient.weightspace.snapshot import SNAPSHOT, Snapshot, check_snapshot, copied, rewind, take

_TENSORS = MapOf(Text(), TensorOf())
TRAINING_STATE = Record(
    {
        "step": Int(low=0),
        "snapshot": SNAPSHOT,
        "buffers": _TENSORS,
        "extra": MapOf(Text(), Anything()),
        "precision": MapOf(Text(), Anything()),
        "averages": ListOf(_TENSORS),
        "methods": MapOf(Text(), MapOf(Text(), Anything())),
    }
)


@dataclass
class TrainingState:
    """A training state at one step.

    Args:
        step: ``trainer.global_step`` then.
        snapshot: Parameters, saved buffers, transforms with their masks, optimizers, schedulers.
        buffers: Those that a state dict leaves out.
        extra: What modules save as extra state.
        precision: Of the precision plugin: a ``GradScaler``'s scale.
        averages: Averaged models that callbacks keep.
        methods: ``state_key`` → state of the callbacks of this package.
        cut: What had been cut out of the module by then; not saved, since a file has it anyway.
    """

    step: int
    snapshot: Snapshot
    buffers: dict[str, Tensor]
    extra: dict[str, Any]
    precision: dict[str, Any]
    averages: list[dict[str, Tensor]]
    methods: dict[str, dict[str, Any]]
    cut: Cuts | None = field(default=None, compare=False)

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        plain = {name: value for name, value in vars(self).items() if name != "cut"}
        return plain | {"snapshot": self.snapshot.as_plain()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], cut: Cuts | None = None) -> TrainingState:
        """The inverse of :meth:`as_plain`.

        Args:
            plain: Fits :data:`TRAINING_STATE`.
            cut: What has been cut out of the module that it is for.
        """
        return cls(**{**plain, "snapshot": Snapshot(**plain["snapshot"])}, cut=cut)


@torch.no_grad()
def take_state(trainer: Trainer, pl_module: LightningModule, device: torch.device | None = None) -> TrainingState:
    """Copy the training state, between two steps.

    Args:
        trainer: Inside a fit whose training has begun.
        pl_module: Its module.
        device: Where the copies are; None: where the tensors are.
    """
    precision = trainer.precision_plugin.state_dict()
    rest = (
        _unsaved(pl_module),
        {name: module.get_extra_state() for name, module in _with_extra_state(pl_module)},
        precision,
        [dict(average.state_dict()) for average in averages(trainer)],
        {cb.state_key: _moving(cb, state) for cb in _with_state(trainer) if (state := cb.state_dict())},
    )
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    snapshot = take(pl_module, sites_of(trainer), trainer.optimizers, schedulers, masks=True, device=device)
    return TrainingState(trainer.global_step, snapshot, *copied(rest, device), cut=attachment(pl_module).cut)


@torch.no_grad()
def put_back(state: TrainingState, trainer: Trainer, pl_module: LightningModule) -> None:
    """Go on from a training state; steps are counted on, and every schedule of this package stands where it stood.

    Args:
        state: From :func:`take_state`, in this fit; it can be used again.
        trainer: Between two steps.
        pl_module: Its module.

    Raises:
        ValueError: Units were cut out, or the model was changed in another way since; nothing is changed then.
    """
    if attachment(pl_module).cut is not state.cut:
        raise ValueError(
            f"units were cut out of {type(pl_module).__name__} (`lightning_efficient.cut`) after step {state.step}, "
            "and what is cut out cannot be put back."
        )
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    rewind(state.snapshot, pl_module, sites_of(trainer), trainer.optimizers, schedulers)
    for name, buffer in _unsaved(pl_module).items():
        if name in state.buffers and state.buffers[name].shape == buffer.shape:  # caches grow
            buffer.copy_(state.buffers[name])
    for name, module in _with_extra_state(pl_module):
        module.set_extra_state(copied(state.extra[name]))
    if state.precision:
        trainer.precision_plugin.load_state_dict(copied(state.precision))
    for average, saved in zip(averages(trainer), state.averages, strict=False):
        average.load_state_dict(saved)
    callbacks = [cb for cb in _with_state(trainer) if cb.state_key in state.methods]
    for callback in callbacks:
        plain = copied(state.methods[callback.state_key])
        callback.standing.start = plain.pop("standing")["start"] + trainer.global_step - state.step
        plain |= _constant(callback)
        callback.resume({name: value for name, value in plain.items() if name != "method"})
    for callback in callbacks:
        callback.rewound(trainer, pl_module)


def check_state(state: TrainingState, trainer: Trainer, pl_module: LightningModule, where: str) -> None:
    """Refuse a training state from a file that is not of this run; nothing is changed.

    Args:
        state: Fits :data:`TRAINING_STATE`.
        trainer: In ``on_train_start`` or later.
        pl_module: Its module.
        where: Whose it is, for the error.

    Raises:
        RecipeError: Says what is wrong.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    at = f"{where}['snapshot']"
    check_snapshot(state.snapshot, pl_module, sites_of(trainer), trainer.optimizers, schedulers, at, RecipeError)
    known = {cb.state_key: cb for cb in _with_state(trainer)}
    if state.step > trainer.global_step or state.methods.keys() - known.keys():
        raise RecipeError(
            f"{where} should be of a step up to {trainer.global_step} and of {sorted(known)}; it is of step "
            f"{state.step} and of {sorted(state.methods)}."
        )
    for key, saved in state.methods.items():
        known[key].check_state({**saved, **_constant(known[key])}, state.step)


def _with_state(trainer: Trainer) -> list[EfficientCallback]:
    """Callbacks of this package whose state is part of the training's; one that guards it is not."""
    return [cb for cb in peers(trainer) if not cb.guards]


def _moving(callback: EfficientCallback, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in callback.constants}


def _constant(callback: EfficientCallback) -> dict[str, Any]:
    return {name: value for name, value in callback.progress().items() if name in callback.constants}


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    saved = {id(value) for value in model.state_dict(keep_vars=True).values()}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in saved}


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module
