"""Where a teacher comes from: the model as it is when training begins, a file, a name, or a module that was given."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_efficient.common.change import Change
from lightning_efficient.common.registry import near
from lightning_efficient.common.running import eager_copy
from lightning_efficient.lifecycle.files import CheckpointError, read_checkpoint
from lightning_efficient.lifecycle.load import load_from_checkpoint
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.surgery.optimizer import plain_view
from lightning_efficient.trainer.example import ModuleView
from lightning_efficient.trainer.stand_in import stand_in


def separate_copy(pl_module: LightningModule) -> LightningModule:
    """A copy of a LightningModule that runs by itself, shares no tensor with it, and logs nothing.

    Args:
        pl_module: Attached to a Trainer, or not.
    """
    view = eager_copy(ModuleView(pl_module, nullcontext))
    assert isinstance(view, ModuleView)
    return stand_in(pl_module, None, view.swapped(pl_module))


def initial_copy(pl_module: LightningModule, earlier: Collection[Change] = ()) -> LightningModule:
    """Likewise, with the modules that it had before this fit changed them.

    Args:
        pl_module: Of the fit.
        earlier: Changes that were there before this fit; they stay.
    """
    changes = attachment(pl_module).changes
    with plain_view(pl_module, [change for change in changes if not any(change is other for other in earlier)]):
        return separate_copy(pl_module)


def find_teacher(teacher: Any, pl_module: LightningModule, student: nn.Module) -> nn.Module:
    """The teacher that was asked for, on the CPU or where it was given, of its own.

    Args:
        teacher: ``"timm:<name>"``, ``"hf:<name or folder>"``, the path of a checkpoint of the student's class, or a
            module.
        pl_module: The student's.
        student: The network that is taught, whose class a Hugging Face teacher has if it is one of theirs.

    Raises:
        ValueError: It is none of these, or the checkpoint does not fit.
        FileNotFoundError: There is no such file.
    """
    if isinstance(teacher, LightningModule):
        return separate_copy(teacher)
    if isinstance(teacher, nn.Module):
        return deepcopy(teacher)
    kind, _, name = str(teacher).partition(":")
    if kind == "timm" and name:
        import timm

        try:
            return timm.create_model(name, pretrained=True)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if ":" in name or timm.is_model(name):  # a name of a hub's or a folder's; what is wrong is something else
                raise
            hint = near(name, timm.list_models())
            raise ValueError(f"`teacher` is {teacher!r}, and timm has no such model{hint}.") from error
    if kind == "hf" and name:
        return _hugging_face(name, student)
    try:
        return _from_file(str(teacher), pl_module)
    except (FileNotFoundError, CheckpointError) as error:
        kinds = "'initial', the path of a checkpoint, 'timm:<name>', 'hf:<name or folder>' and modules"
        raise type(error)(f"`teacher` is {teacher!r}, and takes {kinds}: {error}") from None


def _hugging_face(name: str, student: nn.Module) -> nn.Module:
    import transformers

    cls: Any = type(student)
    if not isinstance(student, transformers.PreTrainedModel):
        architectures = transformers.AutoConfig.from_pretrained(name).architectures
        if not architectures:
            raise ValueError(f"the configuration of {name!r} names no architecture: give the module as `teacher`.")
        cls = getattr(transformers, architectures[0])
    return cls.from_pretrained(name)  # type: ignore[no-any-return]


def _from_file(path: str, pl_module: LightningModule) -> nn.Module:
    cls = type(pl_module)
    content = read_checkpoint(path)
    try:
        loaded = load_from_checkpoint(cls, path, map_location="cpu")
    except TypeError as error:  # a class whose arguments are not in its files
        loaded = initial_copy(pl_module)
        try:
            loaded.load_state_dict(content["state_dict"])
        except RuntimeError as misfit:
            raise ValueError(
                f"the teacher {path!r} is no {cls.__name__} of the student's size ({misfit}), and {cls.__name__} "
                f"cannot be made from the file alone ({error}): call `save_hyperparameters()`, or give the module."
            ) from misfit
    return loaded


def made_ready(teacher: nn.Module, trainer: Trainer) -> nn.Module:
    """Frozen, in evaluation mode, in the run's precision and on its device; in no optimizer, state dict or wrapper.

    Args:
        teacher: Changed in place.
        trainer: In ``on_fit_start`` or later.
    """
    teacher = trainer.precision_plugin.convert_module(teacher)
    return teacher.requires_grad_(False).eval().to(trainer.strategy.root_device)


@torch.no_grad()
def fingerprint(teacher: nn.Module) -> float:
    """A number that two networks share only if they are the same, bar accidents.

    Args:
        teacher: Before it is moved or converted.
    """
    tensors = [value for value in teacher.state_dict().values() if isinstance(value, torch.Tensor)]
    sums = [float(t.detach().double().cpu().sum()) * (place + 1) for place, t in enumerate(tensors)]
    return sum(sums)
