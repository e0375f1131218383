"""What validation would log now, asked for in the middle of a fit that does not notice.

A second Trainer, or the Trainer's own validation loop, would move global state: process ranks, deterministic flags,
loop counters, the last metrics that ``ModelCheckpoint`` and ``EarlyStopping`` read. So the loop here is our own: the
user's ``validation_step`` runs on a stand-in of the module (see :mod:`lightning_efficient.trainer.stand_in`), which
keeps what is logged for us and shares nothing that is counted.
"""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.trainer.example import undisturbed
from lightning_efficient.trainer.stand_in import shadow

_LOG = inspect.signature(LightningModule.log)
_SEED = 0


class ValidationOracle:
    """The metrics of the network as it is, by the user's own ``validation_step``.

    Args:
        trainer: Inside ``fit``, from ``on_fit_start`` on.
        pl_module: Its module.
        names: The metrics that are wanted.
        batches: At most this many batches of each loader; None: as many as validation takes.

    Raises:
        ValueError: There is no validation, or it has no batch.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, names: Sequence[str], batches: int | None = None
    ) -> None:
        self.trainer, self.pl_module, self.names = trainer, pl_module, tuple(names)
        self.loaders = validation_loaders(trainer)
        limits = [n if batches is None else min(n, batches) for n in trainer.num_val_batches] if self.loaders else []
        self.limits = [None if limit == float("inf") else int(limit) for limit in limits]
        if not self.loaders or not any(limit is None or limit > 0 for limit in self.limits):
            raise ValueError(
                "a budget is checked on validation data, and there is none: give the Trainer `val_dataloaders` (or "
                "`val_dataloader` in the module) and leave `limit_val_batches` above 0."
            )
        # A sample is the same in every call; all of the data may be too large to keep.
        self._kept: list[list[Any]] | None = None if batches is None else [[] for _ in self.loaders]

    @property
    def size(self) -> int | None:
        """Batches in one call; None: not known."""
        known = [limit for limit in self.limits if limit is not None]
        return sum(known) if len(known) == len(self.limits) else None

    def first(self) -> Any:
        """The first validation batch, on the device."""
        with self.quiet():
            return next(iter(self._batches(0)))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode without gradients, for calls inside; flags, buffers and random states come back."""
        modules = list(self.pl_module.modules())
        flags = [(module, module.training) for module in modules]
        buffers = [(b, b.clone()) for b in self.pl_module.buffers()]
        try:
            with isolate_rng(), torch.no_grad(), uncompiled():
                self.pl_module.eval()
                yield
        finally:
            for module, training in flags:
                module.training = training
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    def __call__(self) -> dict[str, float]:
        """The wanted metrics, the same numbers on every process; inside :meth:`quiet`.

        Raises:
            ValueError: One is not logged.
        """
        random.seed(_SEED)  # validation that draws numbers draws the same ones for every network
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        log = _Log(len(self.loaders) > 1)
        twin = shadow(self.pl_module, log.add)
        for metric in (m for m in twin.modules() if isinstance(m, Metric)):
            metric.reset()
        twin.on_validation_epoch_start()
        takes = len(inspect.signature(twin.validation_step).parameters)
        for index in range(len(self.loaders)):
            for number, batch in enumerate(self._batches(index)):
                log.at(index, batch)
                given = (batch, number, index) if len(self.loaders) > 1 else (batch, number)
                with self.trainer.precision_plugin.forward_context():
                    twin.validation_step(*given[:takes])
        log.at(None, None)
        twin.on_validation_epoch_end()
        if missing := [name for name in self.names if name not in log]:
            raise ValueError(not_logged(missing, sorted(log.known), type(self.pl_module).__name__))
        values = {name: log.value(name, self.trainer) for name in self.names}
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.broadcast(values)
        return values

    def _batches(self, index: int) -> Iterator[Any]:
        kept = None if self._kept is None else self._kept[index]
        if kept:
            for batch in kept:  # a model may work on its input in place
                yield self._moved(apply_to_collection(batch, Tensor, torch.clone), index)
            return
        with undisturbed(self.loaders[index]) as whole:
            for batch in islice(whole, self.limits[index]):
                if kept is not None:
                    kept.append(apply_to_collection(batch, Tensor, torch.clone))
                yield self._moved(batch, index)

    def _moved(self, batch: Any, index: int) -> Any:
        """A batch on the device, through the hooks that Lightning's loop calls."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        name = "on_before_batch_transfer"
        owner = data if data is not None and is_overridden(name, data, LightningDataModule) else self.pl_module
        batch = owner.on_before_batch_transfer(self.trainer.precision_plugin.convert_input(batch), index)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=index)


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The validation loaders of a fit, made now if they are not yet, as the loop would and then does not again.

    Args:
        trainer: In ``on_fit_start`` or later.
    """
    if not trainer.enable_validation:
        return []
    if trainer.val_dataloaders is None:
        stage = trainer.state.stage
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.state.stage = stage
    loaders = trainer.val_dataloaders
    return [] if loaders is None else list(CombinedLoader(loaders, "sequential").flattened)


def not_logged(missing: Sequence[str], logged: Sequence[str], who: str) -> str:
    """The message for budgets on metrics that validation does not log."""
    near = {name: difflib.get_close_matches(name, logged, 2) for name in missing}
    hints = [
        f"{name!r} (did you mean {' or '.join(map(repr, close))}?)" if close else repr(name)
        for name, close in near.items()
    ]
    return (
        f"`budgets` names {', '.join(hints)}, which the validation of {who} does not log; it logs {list(logged)}. Log "
        "it in `validation_step` or `on_validation_epoch_end`."
    )


class _Log:
    """What one validation logs, reduced as Lightning reduces it at the epoch's end."""

    def __init__(self, several: bool) -> None:
        self.several = several
        self.known: dict[str, tuple[str, Metric | Tensor]] = {}  # name → how it is reduced, what there is so far
        self._index: int | None = None
        self._batch: Any = None

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def at(self, index: int | None, batch: Any) -> None:
        """Which loader's batch is being looked at; None: the epoch's end."""
        self._index, self._batch = index, batch

    def add(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of ``self.log``."""
        given = _LOG.bind(None, name, value, *args, **kwargs).arguments
        suffix = ""
        if self.several and self._index is not None and given.get("add_dataloader_idx", True):
            suffix = f"/dataloader_idx_{self._index}"
        names = [name + suffix]
        if given.get("on_step") and given.get("on_epoch"):
            names.append(f"{name}_epoch{suffix}")
        if isinstance(value, Metric):
            self.known |= dict.fromkeys(names, ("metric", value))
            return
        reduce_fx = given.get("reduce_fx", "mean")
        how = str(getattr(reduce_fx, "__name__", reduce_fx))
        weight = 1
        if how == "mean" and self._index is not None:
            weight = given.get("batch_size") or extract_batch_size(self._batch)
        number = torch.as_tensor(value).detach().double().cpu().reshape(())
        new = torch.stack((number * weight, torch.tensor(float(weight), dtype=torch.float64)))
        for key in names:
            so_far = self.known.get(key, (how, None))[1]
            self.known[key] = (how, new if so_far is None else self._joined(how, so_far, new))  # type: ignore[arg-type]

    def _joined(self, how: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b) if how == "min" else torch.maximum(a, b) if how == "max" else a + b

    def value(self, name: str, trainer: Trainer) -> float:
        """The value of one metric over all processes."""
        how, what = self.known[name]
        if isinstance(what, Metric):
            return float(what.compute())
        if how not in ("mean", "sum", "min", "max"):
            raise ValueError(
                f"{name!r} is logged with reduce_fx={how!r}; a budget needs 'mean', 'sum', 'min' or 'max', or a "
                "torchmetrics.Metric."
            )
        if trainer.world_size > 1:
            kind = "sum" if how == "mean" else how
            what = trainer.strategy.reduce(what.to(trainer.strategy.root_device), reduce_op=kind)
        return float(what[0] / what[1]) if how == "mean" else float(what[0])
