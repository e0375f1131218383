"""``CollapseMonitor``: attention entropy, spectral norms and effective rank of a run, every so many steps."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_efficient.attention import AttentionProbe, HeadTable
from lightning_efficient.common.match import Choice, find_module
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.metrics.functional import query_indices, rankme, spectral_norms
from lightning_efficient.trainer.showing import show_picture

# Larger is worse: over processes the largest counts.
_LARGEST = ("logit_norm_max", "spectral_norm_max")
_SMALLEST = ("entropy_min", "entropy_normalized_min", "entropy_bound_min")
_MEANS = ("entropy_mean", "collapsed_fraction", "sink_fraction", "rankme")
_RANKME_ROWS = 1024


class CollapseMonitor(EfficientCallback):
    """Watch for attention-entropy collapse and its usual causes; changes nothing in the run.

    On every ``every_n_steps``-th optimizer step, the first included, it reads the attention of the training forward
    itself (``AttentionProbe``) and logs, under ``efficient/collapse_monitor/``:
    ``entropy_mean`` and ``entropy_min`` (nats; over heads), ``entropy_normalized_min`` (divided by log of the visible
    keys), ``collapsed_fraction`` and ``sink_fraction`` of the heads, ``entropy_bound_min`` (what the norms of the
    logits guarantee, theorem 3.1), ``logit_norm_max``, ``spectral_norm_max`` and ``rankme``. ``EarlyStopping`` and
    ``ModelCheckpoint`` can monitor them; between measurements they see the last value. TensorBoard also gets a layer
    x head heatmap and a histogram of the heads, other loggers the figures of every layer. Attention that cannot be
    read is named in a warning, never guessed.

    Losses, weights and random numbers are those of a run without the monitor, to the bit. The exception is compiled
    code: it runs eagerly on measured steps, so these differ by rounding (and by dropout masks under inductor). Under
    DDP every process measures its own samples and the scalars are reduced; heatmap and layers are those of process 0.
    With manual optimization, attention after the first backward of a batch is not seen.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over the names of modules whose attention is read; a glob also covers everything below. ``None``:
            all.
        exclude: Globs over module names, applied after ``include``.
        every_n_steps: Measure on every so many optimizer steps; the first micro-batch of an accumulated step counts.
        max_samples: Samples of the batch that are measured, from the first; all where heads are merged into them.
        max_queries: Queries of a call that are measured; up to this many exactly, beyond evenly spaced ones. ``None``:
            all.
        threshold: A head is collapsed when its mean entropy divided by log of the visible keys is below this. A
            convention: the paper names none.
        spectral_norms: Also estimate the largest spectral norm of all weights, by power iteration that goes on from
            measurement to measurement (from below; a few per cent low at first).
        heatmap: Draw the layer x head picture for TensorBoard.
        rankme: Name of a module whose output ``(batch, features)`` or ``(batch, tokens, features)`` gets its effective
            rank measured, from at most 1024 rows of one batch. ``None``: off.

    Raises:
        ValueError: An argument out of range; two monitors in one Trainer; an unknown module name in ``rankme``.
        NoMatchError: ``include`` and ``exclude`` leave no module.

    Source: Zhai et al., ICML 2023, arXiv 2303.06296 (entropy); Garrido et al., ICML 2023, arXiv 2210.02885 (RankMe).
    """

    method = "collapse_monitor"
    sharded = True
    changes_weights = False

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        every_n_steps: int = 100,
        max_samples: int = 8,
        max_queries: int | None = 256,
        threshold: float = 0.05,
        spectral_norms: bool = True,
        heatmap: bool = True,
        rankme: str | None = None,
    ) -> None:
        super().__init__(enabled, include, exclude)
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("max_samples", max_samples),
            ("max_queries", max_queries),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected at least 1.")
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"`threshold` is {threshold}; expected a normalised entropy between 0 and 1.")
        self.every_n_steps = every_n_steps
        self.max_samples = max_samples
        self.max_queries = max_queries
        self.threshold = threshold
        self.spectral_norms = spectral_norms
        self.heatmap = heatmap
        self.rankme = rankme
        self._choice = Choice({}, None, None, type(self).__name__)
        self._due = 0
        self._step = 0
        self._open: ExitStack | None = None
        self._probe: AttentionProbe | None = None
        self._embeddings: list[Tensor] = []
        self._vectors: dict[str, Tensor] = {}
        self._reported = ""

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("every_n_steps", "max_samples", "max_queries", "threshold", "spectral_norms", "heatmap", "rankme")
        return super().config() | {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on having been watched, and what is due follows from the step."""
        return {}

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor, whose scalars would overwrite the first one's."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self.enabled and sum(isinstance(cb, CollapseMonitor) and cb.enabled for cb in callbacks) > 1:
            raise ValueError("more than one CollapseMonitor is enabled: they would log under the same names. Keep one.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names given, now that the model is complete."""
        super().on_fit_start(trainer, pl_module)
        if self.enabled:
            self.choose(pl_module)
            if self.rankme is not None:
                self._watched(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next multiple of ``every_n_steps``, also after resuming."""
        super().on_train_start(trainer, pl_module)
        self._due = math.ceil(trainer.global_step / self.every_n_steps) * self.every_n_steps
        self._vectors, self._reported = {}, ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to read, if a measurement is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.enabled or trainer.global_step < self._due or trainer.barebones:
            return
        self._close()
        self._step = trainer.global_step
        self._due = (self._step // self.every_n_steps + 1) * self.every_n_steps
        with ExitStack() as stack:
            if self.rankme is not None:
                handle = self._watched(pl_module).register_forward_hook(self._keep_embeddings)
                stack.callback(handle.remove)
            probe = AttentionProbe(
                pl_module, max_samples=self.max_samples, max_queries=self.max_queries, keep=self.covered
            )
            self._probe = stack.enter_context(probe)
            self._open = stack.pop_all()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is over. In manual optimization the user's own context managers may still be open inside ours."""
        if self._open is not None and self._probe is not None:
            if pl_module.automatic_optimization:
                self._close()
            else:
                self._probe.pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reduce and log what was read."""
        self._close()
        if self._probe is not None:
            probe, self._probe = self._probe, None
            self._report(probe)
            self._log(trainer, pl_module, HeadTable.of(probe.calls, self.threshold))
            self._embeddings = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop reading if the batch never ran: a hook may skip the rest of the epoch."""
        self._abort()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook and no mode behind."""
        super().on_exception(trainer, pl_module, exception)
        self._abort()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook and no mode behind."""
        super().teardown(trainer, pl_module, stage)
        self._abort()

    def _close(self) -> None:
        if self._open is not None:
            stack, self._open = self._open, None
            stack.close()

    def _abort(self) -> None:
        self._close()
        self._probe, self._embeddings = None, []

    # -- what ----------------------------------------------------------------------------------------------------

    def choose(self, model: nn.Module) -> None:
        """Read the globs against the names of a model."""
        self._choice = Choice.of(model, self.include, self.exclude, type(self).__name__)

    def covered(self, name: str) -> bool:
        """Whether a module of this name is watched."""
        return not self._choice.why_not(name)

    def _watched(self, model: nn.Module) -> nn.Module:
        return find_module(model, str(self.rankme), "rankme", type(self).__name__)

    def _keep_embeddings(self, module: nn.Module, args: Any, out: Any) -> None:
        if not isinstance(out, Tensor) or out.dim() not in (2, 3):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"CollapseMonitor: `rankme={self.rankme!r}` returns {shape}; expected a tensor (batch, features) or "
                "(batch, tokens, features). Name another module, or None."
            )
        rows = out.detach().flatten(0, -2)
        self._embeddings = [rows[query_indices(len(rows), _RANKME_ROWS).to(rows.device)]]

    def _report(self, probe: AttentionProbe) -> None:
        report = probe.report
        if report and not probe.calls and (self.include or self.exclude):
            report += f" Looked at was what `include`={self.include} and `exclude`={self.exclude} leave."
        if report and report != self._reported:
            self._reported = report
            rank_zero_warn(f"CollapseMonitor: {report}")

    def _log(self, trainer: Trainer, pl_module: LightningModule, table: HeadTable) -> None:
        scalars = table.scalars() if table.sites else {}
        if self.spectral_norms:
            norms = spectral_norms(pl_module, iterations=2 if self._vectors else 8, vectors=self._vectors)
            if norms:
                scalars["spectral_norm_max"] = torch.stack([norm.float() for norm in norms.values()]).max().item()
        if self._embeddings:
            scalars["rankme"] = rankme(self._embeddings[0]).item()
        prefix = self.prefix
        scalars = {f"{prefix}/{name}": value for name, value in _over_processes(trainer, pl_module, scalars).items()}
        for name, value in scalars.items():
            # logger=False: Lightning would drop values of steps that are no multiple of log_every_n_steps.
            pl_module.log(name, value, on_step=True, on_epoch=False, logger=False)
        if trainer.is_global_zero:
            layers = {f"{prefix}/{name}": value for name, value in table.layers().items()}
            for logger in trainer.loggers:
                self._write(logger, scalars, layers, table)
            if self.heatmap and table.sites:
                draw = partial(table.picture, self._step)
                show_picture(trainer.loggers, f"{prefix}/attention_entropy", draw, self._step)

    def _write(self, logger: Logger, scalars: dict[str, float], layers: dict[str, float], table: HeadTable) -> None:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(scalars | layers, self._step)
            return
        logger.log_metrics(scalars, self._step)
        tag = f"{self.prefix}/attention_entropy"
        heads = torch.cat(table.values["entropy"]) if table.sites else torch.empty(0)
        if len(heads := heads[heads.isfinite()]):
            # A tag of its own: TensorBoard's default loader keeps one kind of data a tag, and drops the rest unseen.
            logger.experiment.add_histogram(f"{tag}_heads", heads, self._step)


def _over_processes(trainer: Trainer, pl_module: LightningModule, scalars: dict[str, float]) -> dict[str, float]:
    """Mean, smallest or largest of each scalar over the processes, by three all-reduces of fixed size."""
    if trainer.world_size == 1:
        return scalars

    def reduce(names: tuple[str, ...], how: str, sign: float = 1.0) -> dict[str, float]:
        mine = torch.tensor([sign * scalars.get(name, math.nan) for name in names], device=pl_module.device)
        return dict(zip(names, (sign * trainer.strategy.reduce(mine, reduce_op=how)).tolist(), strict=True))

    merged = reduce(_MEANS, "mean") | reduce(_SMALLEST, "min") | reduce(_LARGEST, "min", sign=-1.0)
    return {name: merged[name] for name in scalars}
