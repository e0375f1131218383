"""How a LightningModule calls its networks: found by running one of its steps on a real batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name
from lightning_efficient.trainer.stand_in import shadow

Stage = Literal["fit", "validate", "test", "predict"]
_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class Shell(nn.Module):
    """The networks of a LightningModule under their own names, and a forward that repeats the calls it made of them.

    Deep copies of it leave the LightningModule, with its Trainer and whatever else it holds, out.

    Args:
        pl_module: Its children are shared.
        names: The module of each call.
    """

    def __init__(self, pl_module: LightningModule, names: Sequence[str]) -> None:
        super().__init__()
        self._modules.update(pl_module._modules)
        self.names = tuple(names)
        self.training = pl_module.training  # not `train()`, which would reach the children

    def forward(self, *calls: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[Any]:
        """Repeat the calls: (positional arguments, keyword arguments) of each."""
        modules = {canonical_name(name): module for name, module in self.named_modules()}
        return [modules[name](*args, **kwargs) for name, (args, kwargs) in zip(self.names, calls, strict=True)]


@dataclass
class Example:
    """A model and arguments that it runs on.

    Args:
        model: Shares its modules, and their names, with the LightningModule.
        args: Positional arguments of its forward.
    """

    model: Shell
    args: tuple[Any, ...]


def first_batch(trainer: Trainer) -> Any:
    """The first training batch, on the device, of a ``fit`` that is about to start; the loader forgets that it gave it.

    Args:
        trainer: In ``on_fit_start`` or later. Making the train loader before loops are restored loses a position that
            a checkpoint would restore: not for resumed runs.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # what the loop will do, and then not again
    with undisturbed(trainer.train_dataloader) as batches:
        batch = next(iter(batches))
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@torch.no_grad()
def example_of(trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any, samples: int = 2) -> Example:
    """Run the step of a stage on the first samples of a batch, and keep how it called the module's networks.

    Nothing is logged, no metric counts it, the random state is as before afterwards.

    Args:
        trainer: A Trainer inside that stage, or about to start it.
        pl_module: Its module.
        stage: The stage.
        batch: On the device.
        samples: Of the batch; where the step does not take a part of it, the whole batch is used.

    Raises:
        ValueError: The step fails, or calls no submodule.
    """
    part = apply_to_collection(batch, Tensor, lambda tensor: tensor[:samples] if tensor.ndim else tensor)
    try:
        calls = _calls(trainer, pl_module, stage, part)
    except Exception:
        try:
            calls = _calls(trainer, pl_module, stage, batch)
        except Exception as error:
            raise ValueError(
                f"{type(pl_module).__name__}.{_STEPS[stage]} does not run on a batch outside its loop "
                f"({type(error).__name__}: {error}), so its networks cannot be looked at."
            ) from error
    if not calls:
        raise ValueError(f"{type(pl_module).__name__}.{_STEPS[stage]} calls no submodule of the module.")
    return Example(Shell(pl_module, [name for name, *_ in calls]), tuple((a, k) for _, a, k in calls))


def _calls(
    trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any
) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The outermost submodule calls of one step, in evaluation mode."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    depth, handles = [0], []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if depth[0] == 0:
                fresh = apply_to_collection((args, dict(kwargs)), Tensor, lambda t: t.detach().clone())
                calls.append((name, *fresh))
            depth[0] += 1

        return hook

    def leave(*_: Any) -> None:
        depth[0] -= 1

    modes = [(module, module.training) for module in pl_module.modules()]
    cuda = [trainer.strategy.root_device.index] if trainer.strategy.root_device.type == "cuda" else []
    try:
        pl_module.eval()
        for name, module in pl_module.named_modules():
            if module is not pl_module and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(enter(canonical_name(name)), with_kwargs=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
        with torch.random.fork_rng(cuda), trainer.precision_plugin.forward_context(), uncompiled():
            run_step(pl_module, shadow(pl_module), stage, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return calls


def run_step(pl_module: LightningModule, twin: LightningModule, stage: Stage, batch: Any, index: int = 0) -> Any:
    """A step of a stand-in on a batch. Where ``training_step`` would step optimizers, ``forward`` gets the batch.

    Args:
        pl_module: The module.
        twin: Its stand-in.
        stage: Whose step.
        batch: Already on the device.
        index: Of the batch.
    """
    if stage == "fit" and not pl_module.automatic_optimization:
        return twin(batch[0] if isinstance(batch, (tuple, list)) else batch)
    step = getattr(twin, _STEPS[stage])
    takes = len(inspect.signature(step).parameters)
    return step(*(batch, index)[:takes])


@contextmanager
def undisturbed(loader: Any) -> Iterator[Any]:
    """The batches of a loader, or of several combined, read without moving what decides its next ones.

    Args:
        loader: What the user gave to the Trainer.
    """
    several = isinstance(loader, (list, tuple, dict))
    parts = [loader] if not several else list(loader.values() if isinstance(loader, dict) else loader)
    saved: list[tuple[Any, Any]] = []
    for part in parts:
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            saved.append((part.load_state_dict, part.state_dict()))
        generators = {id(g): g for g in (getattr(o, "generator", None) for o in (part, getattr(part, "sampler", None)))}
        saved += [(g.set_state, g.get_state()) for g in generators.values() if g is not None]
    try:
        with torch.random.fork_rng([]):  # a shuffle draws its seed
            yield (batch for batch, *_ in CombinedLoader(loader, "max_size_cycle")) if several else loader
    finally:
        for restore, state in saved:
            restore(state)
