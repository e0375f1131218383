"""``RepresentationMonitor``: how many directions the embeddings of a module use, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_efficient.common.nests import tensors_behind
from lightning_efficient.common.registry import near
from lightning_efficient.lifecycle.monitor import MonitoredStage, SeenCall, StageMonitor
from lightning_efficient.metrics import (
    Alignment,
    AlphaReQ,
    EffectiveRank,
    LiDAR,
    ParticipationRatio,
    RankMe,
    StableRank,
    Uniformity,
    plot_spectrum,
)
from lightning_efficient.metrics.functional.pooling import POOLS, Pool, hidden_tokens, pooled, tensor_of
from lightning_efficient.metrics.spectrum import Gram, SpectrumMetric
from lightning_efficient.metrics.streaming import gathered
from lightning_efficient.trainer.showing import Picture

_SPECTRUM: dict[str, type[SpectrumMetric]] = {
    "rankme": RankMe,
    "effective_rank": EffectiveRank,
    "stable_rank": StableRank,
    "participation_ratio": ParticipationRatio,
    "alpha_req": AlphaReQ,
}
_OTHERS: dict[str, type[Metric]] = {"lidar": LiDAR, "alignment": Alignment, "uniformity": Uniformity}
_VIEWS = ("lidar", "alignment")  # need several views of each sample
_NAMES = {cls.__name__: name for name, cls in (_SPECTRUM | _OTHERS).items()}


class RepresentationMonitor(StageMonitor):
    """Watch the embeddings that a module returns for collapse; changes nothing in the run.

    At the end of each epoch of the stage, under ``efficient/representation_monitor/``: one scalar a metric and
    ``samples``, the number of embeddings behind it. All of these metrics depend on that number: compare equal ones
    only. ``EarlyStopping`` and ``ModelCheckpoint`` can monitor them. TensorBoard also gets the spectrum, a picture.
    What the module returned is read in the step itself, every call of it; the sanity check does not count. Under DDP
    the samples of all processes count (Lightning repeats some to make their numbers equal), and all log the same.

    Losses, weights and random numbers are those of a run without the monitor, to the bit; a step that calls the module
    inside compiled code runs eagerly. Embeddings that are NaN or infinite make the epoch's values NaN, and one warning.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        module: Name of the module whose output is read. ``""``: the LightningModule's own ``forward``.
        metrics: ``"rankme"``, ``"effective_rank"``, ``"stable_rank"``, ``"participation_ratio"``, ``"alpha_req"``,
            ``"uniformity"`` (n² time), and where a step calls the module once for each view of a sample ``"lidar"`` and
            ``"alignment"`` (of the first two). ``None``: the first five, which share one state.
        pool: How ``(batch, tokens, features)`` and feature maps become one embedding a sample: ``"mean"`` over tokens
            (those that an ``attention_mask`` or key padding mask of the call hides left out) or positions, ``"cls"``:
            the first token, ``"flatten"``. ``None``: every token or position is a sample of its own.
        output: Which tensor, where the module returns several: ``"last_hidden_state"``, ``"0"``. ``None``: the first.
        channels_last: Feature maps are ``(batch, height, width, channels)``, as Swin's.
        center: Take the mean embedding out first. ``None``: as each metric's paper does (only
            ``participation_ratio`` does).
        stage: Whose batches are read: ``"train"``, ``"val"`` or ``"test"``.
        max_samples: Embeddings of an epoch that are read, from the first, over all processes.
        name: Set between the method and the quantity in logged names; needed where two of these monitors run.
        picture: Draw the spectrum for TensorBoard.

    Raises:
        ValueError: An argument out of range; two monitors of one name in one Trainer; an output that has no embeddings.
        NoMatchError: There is no such module.

    Source: of each metric, see :mod:`lightning_efficient.metrics`.
    """

    method = "representation_monitor"
    quantities = "the spectrum"

    def __init__(
        self,
        enabled: bool = True,
        module: str = "",
        metrics: list[str] | None = None,
        pool: Pool | None = "mean",
        output: str | None = None,
        channels_last: bool = False,
        center: bool | None = None,
        stage: MonitoredStage = "val",
        max_samples: int = 25_600,
        name: str | None = None,
        picture: bool = True,
    ) -> None:
        super().__init__(enabled, stage, max_samples, name, picture)
        known = list(_SPECTRUM | _OTHERS)
        chosen = list(_SPECTRUM) if metrics is None else [_NAMES.get(metric, metric) for metric in metrics]
        for metric in chosen:
            if metric not in known:
                raise ValueError(
                    f"`metrics` holds {metric!r}{near(metric, known)}; expected some of {', '.join(known)}."
                )
        if not chosen:
            raise ValueError(f"`metrics` is empty; expected some of {', '.join(known)}.")
        if pool is not None and pool not in POOLS:
            raise ValueError(f"`pool` is {pool!r}; expected one of {', '.join(get_args(Pool))} or None.")
        self.module = module
        self.metrics = chosen
        self.pool = pool
        self.output = output
        self.channels_last = channels_last
        self.center = center
        self._tokens_first = False
        self.forget()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("module", "metrics", "pool", "output", "channels_last", "center")
        return super().config() | {name: getattr(self, name) for name in names}

    @property
    def state_key(self) -> str:
        """Tells two monitors of one Trainer apart."""
        return self._generate_state_key(module=self.module, stage=self.stage, name=self.name)

    def watched(self) -> dict[str, str]:
        """One module."""
        return {"module": self.module}

    def forget(self) -> None:
        """Empty metrics; those of the spectrum are only asked, their state is the one of the first."""
        how = {} if self.center is None else {"center": self.center}
        self._spectrum = {name: _SPECTRUM[name](**how) for name in self.metrics if name in _SPECTRUM}
        self._others = {name: _OTHERS[name]() for name in self.metrics if name in _OTHERS}
        self._width = 0
        self._drawn: Gram | None = None

    def take(self, calls: Mapping[str, list[SeenCall]], batch: Any, room: int) -> Tensor:
        """Pool, cut to what may still be read, and add up."""
        sizes = {tensor.shape[0] for tensor in tensors_behind(batch) if tensor.dim()}
        views = [self._rows(call, sizes) for call in calls["module"]]
        if len(views) < 2 and (asked := [name for name in _VIEWS if name in self._others]):
            raise ValueError(
                f"RepresentationMonitor: {asked} compare views of a sample, and module={self.module!r} was called once "
                "in a step: call it once for each view, or leave them out of `metrics`."
            )
        views = [rows[: max(1, room // len(views))] for rows in views][:room]
        if len(widths := {view.shape[1] for view in views}) > 1:
            raise ValueError(
                f"RepresentationMonitor: in one step module={self.module!r} returned embeddings of widths "
                f"{sorted(widths)}, which have no common spectrum: choose another `pool` or module."
            )
        rows = torch.cat(views)
        self._width = rows.shape[1]
        if not bool(rows.isfinite().all()):
            return rows
        for metric in (*list(self._spectrum.values())[:1], *self._others.values()):
            metric.to(rows.device)
            if isinstance(metric, Alignment):
                metric.update(views[0], views[1])
            else:
                metric.update(torch.stack(views, 1) if isinstance(metric, LiDAR) else rows)
        return rows

    def _rows(self, call: SeenCall, sizes: set[int]) -> Tensor:
        try:
            tensor = tensor_of(call.output, self.output).detach()
            if tensor.dim() == 3 and len({n in sizes for n in tensor.shape[:2]}) > 1:
                # As torch's encoders return them by default; a batch of as many samples as tokens leaves it open.
                self._tokens_first = tensor.shape[1] in sizes
            if tensor.dim() == 3 and self._tokens_first:
                tensor = tensor.transpose(0, 1)
            mask = hidden_tokens(call.kwargs, tensor) if tensor.dim() == 3 else None
            return pooled(tensor, self.pool, mask, self.channels_last)
        except ValueError as error:
            raise ValueError(f"RepresentationMonitor: module={self.module!r} cannot be read: {error}") from None

    def names(self) -> list[str]:
        """The metrics."""
        return self.metrics

    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Every metric over all samples of all processes."""
        width = int(self.over_processes(trainer, pl_module, self._width, "max"))
        if not self._width and "uniformity" in self._others:  # which is gathered, and has to know its width
            self._others["uniformity"].to(pl_module.device).update(torch.zeros(0, width, device=pl_module.device))
        values = {name: float(metric.compute()) for name, metric in self._others.items()}
        if self._spectrum:
            leader = next(iter(self._spectrum.values()))
            with leader.sync_context(dist_sync_fn=gathered):
                grams = {center: leader.seen(center) for center in (False, True)}
            self._drawn = grams[bool(self.center)]
            values |= {name: float(metric.measure(grams[metric.center])) for name, metric in self._spectrum.items()}
        return {name: values[name] for name in self.metrics}

    def draw(self, step: int) -> Mapping[str, Callable[[], Picture]]:
        """The spectrum of the epoch, eigenvalues of the Gram matrix."""
        if (drawn := self._drawn) is None:
            return {}
        title = f"{self.module or 'forward'}, {drawn.samples} samples"
        return {"spectrum": lambda: plot_spectrum({"eigenvalues": drawn.singular_values.square()}, title)}
