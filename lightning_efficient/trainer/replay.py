"""Running the user's module outside its loop, as its loop would run it, with nothing left behind.

Everything that needs a batch, a step or a metric between two steps of a run goes through here: example batches, running
statistics, the validation oracle, CRIC's probes, the finished form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.running import as_found, randomness_kept
from lightning_efficient.trainer.stand_in import data_stand_in, stand_in

Stage = Literal["fit", "validate", "test", "predict"]
STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_RUNNING = {
    "fit": RunningStage.TRAINING, "validate": RunningStage.VALIDATING,
    "test": RunningStage.TESTING, "predict": RunningStage.PREDICTING,
}  # fmt: skip


class EmptyLoaderError(ValueError):
    """A data loader that was asked for a batch has none."""


class Replay:
    """One stage of a Trainer, run by hand on a stand-in of the module.

    Batches go through ``on_before_batch_transfer``, the transfer, ``on_after_batch_transfer`` and the precision plugin,
    steps run under its context, all as in Lightning's loop. ``training_step`` runs with gradients enabled, the others
    without. Under manual optimization no optimizer steps. What is logged goes to ``log``. Batches and steps belong
    inside :meth:`quiet`.

    Args:
        trainer: The Trainer, in ``on_fit_start`` (or the start of another loop) or later.
        pl_module: Its module.
        stage: Whose loop.
        log: Called with the arguments of ``self.log``; None: nothing is logged.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, log: Callable[..., None] | None = None
    ) -> None:
        self.trainer, self.pl_module, self.stage = trainer, pl_module, stage
        self.twin = stand_in(pl_module, log)
        data: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        self._data = None if data is None else data_stand_in(data)

    @contextmanager
    def quiet(self, apart: Iterable[nn.Module] = (), parameters: bool = True) -> Iterator[None]:
        """Evaluation mode, and everything as it was found afterwards.

        That is what :func:`~lightning_efficient.common.running.as_found` says of the module, and the Trainer's stage
        and loggers. Compiled modules run as written.

        Args:
            apart: Modules whose buffers are the caller's to write.
            parameters: Also put back the values of parameters, which takes a copy of them.
        """
        with (
            torch.inference_mode(False),  # of a validation around us, whose tensors no backward may ever touch
            torch.no_grad(),
            silent(self.trainer),
            _in_stage(self.trainer, _RUNNING[self.stage]),
            randomness_kept(cuda_devices(self.trainer)),
            as_found(self.pl_module, parameters=parameters, apart=apart),
            uncompiled(),
        ):
            self.pl_module.eval()
            self.twin.eval()  # its networks are those of the module, its own flag is not
            yield

    def batches(self, loader: Any, most: int | None = None, index: int = 0) -> Generator[Any, None, None]:
        """Batches as the step gets them; the loader forgets that it gave them.

        Args:
            loader: What the user gave to the Trainer for this stage.
            most: At most so many; None: all.
            index: Of the loader, where there are several.

        Raises:
            EmptyLoaderError: There is none.
        """
        for batch in self.raw_batches(loader, most, index):
            yield self.given(batch, index)

    def raw_batches(self, loader: Any, most: int | None = None, index: int = 0) -> Iterator[Any]:
        """Batches as the loader gives them; see :meth:`batches`."""
        count = 0
        with undisturbed(loader) as whole:
            for batch in islice(whole, most):
                count += 1
                yield batch
        if count == 0 and most != 0:
            kind = {"fit": "train", "validate": "val"}.get(self.stage, self.stage)
            name = f"`{kind}_dataloader`" + (f" number {index}" if index else "")
            raise EmptyLoaderError(
                f"the {name} of this run ({type(loader).__name__}) gave no batch, and one is needed here. Check the "
                f"length of its dataset, `drop_last`, its sampler and `limit_{kind}_batches`."
            )

    def given(self, batch: Any, index: int = 0) -> Any:
        """A batch from a loader as the step gets it: transferred, through the hooks of Lightning's loop.

        Args:
            batch: From the loader; hooks that work in place get tensors of their own.
            index: Of the loader.
        """
        # In the order of Lightning's loop: dtypes, then the hooks around the transfer.
        batch = self.trainer.precision_plugin.convert_input(own(batch))
        # Hooks of a training loop see a module in training mode: augmentation often asks for it.
        self.twin.training = self.stage == "fit"
        try:
            with torch.set_grad_enabled(self.stage == "fit"):
                batch = self._owner("on_before_batch_transfer").on_before_batch_transfer(batch, index)
                device = self.trainer.strategy.root_device
                batch = self._owner("transfer_batch_to_device").transfer_batch_to_device(batch, device, index)
                return self._owner("on_after_batch_transfer").on_after_batch_transfer(batch, index)
        finally:
            self.twin.training = False

    def step(self, batch: Any, number: int = 0, index: int | None = None) -> Any:
        """What the user's step returns.

        Args:
            batch: As :meth:`given` gives it.
            number: Of the batch.
            index: Of its loader; None: there is one.
        """
        precision = self.trainer.precision_plugin
        contexts = {
            "fit": precision.train_step_context, "validate": precision.val_step_context,
            "test": precision.test_step_context, "predict": precision.predict_step_context,
        }  # fmt: skip
        with contexts[self.stage](), torch.set_grad_enabled(self.stage == "fit"):
            return run_step(self.twin, self.stage, batch, number, index)

    def validate(self, batch: Any, number: int, index: int | None = None) -> Any:
        """A batch of validation: the step, and the module's hooks around it; what the step returns.

        Args:
            batch: As :meth:`given` gives it.
            number: Of the batch.
            index: Of its loader; None: there is one.
        """
        which: Any = (number,) if index is None else (number, index)
        self.twin.on_validation_batch_start(batch, *which)
        output = self.step(batch, number, index)
        self.twin.on_validation_batch_end(output, batch, *which)
        return output

    def _owner(self, hook: str) -> LightningModule | LightningDataModule:
        """Whose batch hook Lightning calls."""
        if self._data is not None and is_overridden(hook, self._data, LightningDataModule):
            return self._data
        return self.twin


def run_step(
    twin: LightningModule, stage: Stage | Literal["forward"], batch: Any, number: int = 0, index: int | None = None
) -> Any:
    """A step of a stand-in; see :meth:`Replay.step`.

    Args:
        twin: The stand-in.
        stage: Whose step; ``"forward"``: ``forward``, on the batch or the first of it.
        batch: As its loop would give it.
        number: Of the batch.
        index: Of its loader; None: there is one.
    """
    if stage == "forward":
        return twin(batch[0] if isinstance(batch, (tuple, list)) else batch)
    step = getattr(twin, STEPS[stage])
    takes_number = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(*(batch, *([number] if takes_number else []), *([] if index is None else [index])))


def own(batch: Any) -> Any:
    """The batch with tensors of its own: a step may work on its input in place.

    Args:
        batch: Any nest.
    """
    return apply_to_collection(batch, Tensor, torch.clone)


def cuda_devices(trainer: Trainer) -> list[int]:
    """Index of the CUDA device that this process of the Trainer uses, if any."""
    root = trainer.strategy.root_device
    return [root.index or 0] if root.type == "cuda" else []


@contextmanager
def silent(trainer: Trainer) -> Iterator[None]:
    """A Trainer whose loggers do nothing.

    Args:
        trainer: The Trainer.
    """
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def _in_stage(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    found, trainer.state.stage = trainer.state.stage, stage
    try:
        yield
    finally:
        trainer.state.stage = found


@contextmanager
def undisturbed(loader: Any) -> Iterator[Any]:
    """The batches of a loader, or of several combined, read without moving what decides its next ones.

    Args:
        loader: What the user gave to the Trainer.
    """
    several = isinstance(loader, (list, tuple, dict))
    names = list(loader) if isinstance(loader, dict) else range(len(loader)) if several else [None]
    parts = [loader if name is None else loader[name] for name in names]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_position_kept(part))
        stack.enter_context(randomness_kept())  # a shuffle draws its seed
        apart = [_apart(part) for part in parts]
        combined = dict(zip(names, apart, strict=True)) if isinstance(loader, dict) else apart
        yield (batch for batch, *_ in CombinedLoader(combined, "max_size_cycle")) if several else apart[0]


def _apart(loader: Any) -> Any:
    """A DataLoader that does not take the workers, which are in the middle of an epoch, from the original."""
    if not (isinstance(loader, DataLoader) and loader.persistent_workers):
        return loader
    twin = copy.copy(loader)
    vars(twin)["persistent_workers"] = False
    return twin


@contextmanager
def _position_kept(loader: Any) -> Iterator[None]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts: tuple[Any, ...] = (loader, batch_sampler)
    stateful = [p for p in parts if hasattr(p, "state_dict") and hasattr(p, "load_state_dict")]
    saved: list[tuple[Any, Any]] = [(part.load_state_dict, part.state_dict()) for part in stateful]
    drawing = [loader, *(getattr(loader, name, None) for name in ("sampler", "dataset")), batch_sampler]
    drawing.append(getattr(batch_sampler, "sampler", None))
    generators = {id(g): g for g in (getattr(part, "generator", None) for part in drawing)}
    saved += [(g.set_state, g.get_state()) for g in generators.values() if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for restore, state in saved:
            restore(state)
