"""What validation would log now, asked for in the middle of a fit that does not notice.

A second Trainer, or the Trainer's own validation loop, would move global state: process ranks, deterministic flags,
loop counters, the last metrics that ``ModelCheckpoint`` and ``EarlyStopping`` read. So the loop here is our own (see
:mod:`lightning_efficient.trainer.replay`), and what is logged in it is kept for us.
"""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.trainer.replay import Replay

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

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode without gradients, for calls inside; everything comes back as it was."""
        with Replay(self.trainer, self.pl_module, "validate").quiet():
            yield

    def __call__(self) -> dict[str, float]:
        """The wanted metrics, the same numbers on every process; inside :meth:`quiet`.

        Raises:
            ValueError: One is not logged.
        """
        random.seed(_SEED)  # validation that draws numbers draws the same ones for every network
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        several = len(self.loaders) > 1
        log = ValidationLog(several)
        replay = Replay(self.trainer, self.pl_module, "validate", log.add)
        twin = replay.twin.eval()
        for metric in (m for m in twin.modules() if isinstance(m, Metric)):
            metric.reset()
        twin.on_validation_epoch_start()
        for index in range(len(self.loaders)):
            for number, batch in enumerate(self._batches(replay, index)):
                log.at(index, batch)
                replay.validate(batch, number, index if several else None)
        log.at(None, None)
        twin.on_validation_epoch_end()
        if missing := [name for name in self.names if name not in log]:
            raise ValueError(not_logged(missing, sorted(log.known), type(self.pl_module).__name__))
        values = {name: log.value(name, self.trainer) for name in self.names}
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.broadcast(values)
        return values

    def _batches(self, replay: Replay, index: int) -> Iterator[Any]:
        kept = None if self._kept is None else self._kept[index]
        if kept:
            yield from (replay.given(batch, index) for batch in kept)
            return
        for batch in replay.raw_batches(self.loaders[index], self.limits[index], index):
            if kept is not None:
                kept.append(batch)
            yield replay.given(batch, index)


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


class ValidationLog:
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
