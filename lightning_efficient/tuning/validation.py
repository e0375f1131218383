"""``tune_temperature`` by a metric that a LightningModule logs in its validation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.attention.temperature import METHOD, Targets, TempScaleConfig, find_targets
from lightning_efficient.callbacks.temp_scale import TempScale
from lightning_efficient.common.names import direction
from lightning_efficient.common.running import device_of
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.trainer.example import Example, example_of
from lightning_efficient.trainer.replay import undisturbed
from lightning_efficient.tuning.sweep import TAUS, TemperatureSweep, checked_taus, sweep

# Of the metric of all batches and the mean over batches: beyond float32 rounding they are different things.
_SAME = 1e-4
_LEAVES = (Tensor, np.ndarray, str, bytes, int, float, type(None))
_PARTS = 50  # at least so many are resampled, if there are so many samples


def tune_on_validation(
    trainer: Trainer,
    module: LightningModule,
    metric: str,
    taus: Sequence[float] = TAUS,
    *,
    dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    maximize: bool | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TemperatureSweep:
    """Run ``trainer.validate`` at several temperatures, batch by batch, so that intervals can be given.

    A mean over samples (a loss, an accuracy) is the weighted mean over batches, or over parts of them where there are
    few; that is checked, and any other metric is taken from whole passes, one number per τ without intervals. The
    module is left as it was, to the bit.

    Args:
        trainer: On one device; its callbacks run and its logger logs at every batch, so make one without logger.
        module: The module.
        metric: A name that the module logs in its validation.
        taus: Temperatures; 1 is added where it is missing.
        dataloaders: As for ``trainer.validate``: one loader.
        datamodule: As for ``trainer.validate``.
        ckpt_path: As for ``trainer.validate``: loaded first.
        weights_only: As for ``trainer.validate``: how.
        maximize: Whether a higher metric is better; ``None``: by its name.
        include: Globs over the names of attention modules; ``None``: all.
        exclude: Globs over names left alone.
        resamples: Bootstrap samples.
        confidence: Of all intervals together.
        seed: Of the bootstrap, and of torch before each pass.

    Raises:
        ValueError: The module does not log the metric, its name does not tell the better direction, there are several
            validation loaders or processes, the trainer has a TempScale, or the weights hold a temperature; and what
            :func:`tune_temperature` refuses.
    """
    chosen = checked_taus(taus)
    better = direction(metric)
    if maximize is None and better is None:
        raise ValueError(f"whether a higher {metric!r} is better cannot be told from its name: give `maximize`.")
    maximize = better == "max" if maximize is None else maximize
    _check(trainer)
    passes = _Passes(trainer, module, metric)
    whole, example = passes.first(dataloaders, datamodule, ckpt_path, weights_only)
    if attachment(module).entry(METHOD) is not None:
        raise ValueError(
            "the weights were trained with a TempScale and hold its temperature: the τ of a sweep would multiply it. "
            "Use `tune_temperature` if that is what you want."
        )
    values = passes.by_part(module)
    mean = sum(v * n for v, n in zip(values, passes.sizes, strict=True)) / sum(passes.sizes)
    is_mean = math.isclose(mean, whole, rel_tol=_SAME, abs_tol=_SAME)
    note = (
        f"({metric!r} of the whole validation set, {whole:.4g}, is not the mean over its parts, {mean:.4g}, so that "
        "there are no intervals.)"
    )

    def find(tau: float) -> Targets:
        args = apply_to_collection(example.args, Tensor, lambda t: t.to(device_of(module)))
        return find_targets(example.model, args, TempScaleConfig(tau), include, exclude)

    return sweep(
        module, passes.by_part if is_mean else passes.whole, find, chosen,
        maximize=maximize, metric=metric, unit=passes.unit, weights=(lambda: passes.sizes) if is_mean else None,
        note="" if is_mean else note, resamples=resamples, confidence=confidence, seed=seed,
    )  # fmt: skip


class _Passes:
    """Validation of one module: all batches at once, or in parts, each a batch or less."""

    def __init__(self, trainer: Trainer, module: LightningModule, metric: str) -> None:
        self.trainer, self.module, self.metric = trainer, module, metric
        self.loader: Any = None
        self.count: int | None = None
        self.sizes: list[int] = []

    def first(
        self, dataloaders: Any, datamodule: Any, ckpt_path: str | None, weights_only: bool | None
    ) -> tuple[float, Example]:
        """The metric of all batches, and how the module calls its networks."""
        look = _Look()
        self.trainer.callbacks.append(look)  # type: ignore[attr-defined]
        try:
            how: Any = {} if weights_only is None else {"weights_only": weights_only}  # since Lightning 2.6
            results = self.trainer.validate(
                self.module, dataloaders=dataloaders, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, **how
            )
        finally:
            self.trainer.callbacks.remove(look)  # type: ignore[attr-defined]
        if len(results) > 1:
            raise ValueError(f"there are {len(results)} validation loaders; give the one to tune on as `dataloaders`.")
        if look.example is None:
            raise ValueError("there are no validation batches to tune on.")
        value = self._value(results)
        loader, count = self.trainer.val_dataloaders, self.trainer.num_val_batches[0]
        self.loader = loader[0] if isinstance(loader, list | tuple) else loader
        self.count = None if math.isinf(count) else int(count)
        return value, look.example

    def whole(self, _: nn.Module) -> float:
        """The metric of all batches."""
        with undisturbed(self.loader) as batches:
            return self._value(self.trainer.validate(self.module, dataloaders=batches, verbose=False))

    def by_part(self, _: nn.Module) -> list[float]:
        """The metric of each part."""
        values, sizes = [], []
        with undisturbed(self.loader) as batches:
            for part in (part for batch in islice(batches, self.count) for part in _parts(batch, self.split)):
                values.append(self._value(self.trainer.validate(self.module, dataloaders=_One(part), verbose=False)))
                sizes.append(extract_batch_size(part))
        self.sizes = sizes
        return values

    @property
    def split(self) -> int:
        """Into how many parts a batch is cut, so that there are enough to resample."""
        return math.ceil(_PARTS / self.count) if self.count else 1

    @property
    def unit(self) -> str:
        """What the parts are called."""
        return "batches" if self.split == 1 else "groups of samples"

    def _value(self, results: Sequence[Any]) -> float:
        logged = results[0] if results else {}
        if self.metric not in logged:
            near = difflib.get_close_matches(self.metric, list(logged), 3, 0.5)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"{type(self.module).__name__} does not log {self.metric!r} in its validation.{hint} It logs "
                f"{sorted(logged)}."
            )
        return float(logged[self.metric])


class _Look(Callback):
    """Looks at the first batch."""

    example: Example | None = None

    @torch.inference_mode(False)
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.example is None:
            self.example = example_of(trainer, pl_module, "validate", batch)


def _parts(batch: Any, count: int) -> list[Any]:
    """A batch cut along its first axis, or whole if it holds anything but tensors of one length."""
    kinds: list[int | None] = []
    apply_to_collection(batch, _LEAVES, lambda x: kinds.append(len(x) if isinstance(x, Tensor) and x.ndim else None))
    size = kinds[0] if kinds else None
    if size is None or set(kinds) != {size}:
        return [batch]
    edges = torch.linspace(0, size, min(count, size) + 1).round().long().tolist()
    return [apply_to_collection(batch, Tensor, lambda x, a=a, b=b: x[a:b]) for a, b in pairwise(edges)]


class _One:
    """A loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])

    def __len__(self) -> int:
        return 1


def _check(trainer: Trainer) -> None:
    if trainer.world_size > 1:
        raise ValueError(f"the trainer has {trainer.world_size} processes; tune on one device.")
    share = trainer.limit_val_batches
    if isinstance(share, float) and share < 1:
        raise ValueError(f"the trainer has `limit_val_batches={share}`; give a number of batches (int), or all (1.0).")
    if any(isinstance(callback, TempScale) and callback.enabled for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("the trainer has a TempScale callback, which sets the temperature itself: take it out.")
