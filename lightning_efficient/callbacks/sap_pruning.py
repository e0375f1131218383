"""``SAPPruning``: the PQ index decides how much to prune, iteration by iteration, from outside the LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.names import direction
from lightning_efficient.common.registry import near
from lightning_efficient.lifecycle.masks import PruningCallback
from lightning_efficient.lifecycle.standing import is_smoke_run
from lightning_efficient.lifecycle.strategies import is_sharded
from lightning_efficient.pruning.sap import SAP_STATE, SapConfig, SapStep, phase, sap_step
from lightning_efficient.trainer.tensorboard import log_curve
from lightning_efficient.weightspace import Boundary
from lightning_efficient.weightspace.mask import set_mask
from lightning_efficient.weightspace.snapshot import Snapshot, restore_snapshot, take


class SAPPruning(PruningCallback):
    """Sparsity-informed adaptive pruning (Diao et al., ICLR 2023, arXiv 2302.05601), inside one ``fit``.

    The run is divided into iterations. At the end of each the PQ index of the trained weights that are left tells how
    many of them to prune; weights, buffers, optimizers and schedulers then go back to initialization, and the
    survivors are trained again. Logs ``efficient/pruning/sparsity``, and per iteration ``left``, ``pqi``, ``pqi_scope``
    and, with a monitor, ``score``; :attr:`history` holds the same and the phase. Make the learning-rate schedule of
    your module as long as an iteration, since it starts again in each.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
        p: The smaller norm of the PQ index.
        q: The larger norm; the paper has (0.5, 1) and (1, 2), which prunes faster.
        eta: Tolerated share of ``Σ|w|^p`` in what is pruned; larger prunes more.
        gamma: Factor on the share to prune; larger prunes more.
        beta: Largest share of what is left that one iteration may prune.
        scope: The weights that share an index and a count: ``"global"``, ``"layer"`` (each tensor's) or ``"neuron"``
            (each output's; needs some hundred inputs, see ``stalled`` in the card).
        iterations: How often to prune: the run is divided into ``iterations + 1`` equal parts. 0: one part a ``fit``,
            and the next ``fit`` goes on, see :func:`lightning_efficient.sap_fits`.
        epochs_per_iteration: Divide the run by epochs instead; ``iterations`` then has no effect.
        monitor: A validation metric the module logs, for ``select`` and ``stop_at``. Never a test metric.
        mode: ``"min"`` or ``"max"`` of it is better. ``None``: as its name tells (``val_acc``: max), else min.
        select: Prune by the weights at the end of the iteration (``"last"``) or at its best validation (``"best"``).
        stop_at: ``"end"`` of the run, or ``"collapse"``: stop when the monitor is worse than that of the dense model by
            more than ``tolerance``, and keep the weights and masks of the iteration before.
        tolerance: As a share of the dense model's score.
        embeddings: Include ``nn.Embedding`` tables.
        keep_zeros: Hold weights that are zero when a new run begins (a model that was pruned elsewhere) at zero.

    Raises:
        ValueError: An argument is out of range, the run is too short for an iteration, or there is no such metric.
    """

    method = "sap_pruning"
    only_with = (("stop_at", ("collapse",), ("tolerance",)), ("epochs_per_iteration", (None,), ("iterations",)))
    sharded = True
    progress_schema = SAP_STATE

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        p: float = 0.5,
        q: float = 1.0,
        eta: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        scope: Literal["global", "layer", "neuron"] = "global",
        iterations: int = 5,
        epochs_per_iteration: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        select: Literal["last", "best"] = "last",
        stop_at: Literal["end", "collapse"] = "end",
        tolerance: float = 0.1,
        embeddings: bool = False,
        keep_zeros: bool = False,
    ) -> None:
        super().__init__(enabled, include, exclude, embeddings, keep_zeros)
        self.options, self.scope = SapConfig(p, q, eta, gamma, beta, scope), scope
        self.iterations, self.epochs_per_iteration = iterations, epochs_per_iteration
        self.monitor, self.mode, self.select = monitor, mode or direction(monitor or "") or "min", select
        self.stop_at, self.tolerance = stop_at, tolerance
        self._check_arguments()
        self.history: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self._total: int | None = None
        self._closed_step = 0
        self._next: dict[str, Tensor] | None = None
        self._score: float | None = None
        self._best: Snapshot | None = None
        self._keep: tuple[Snapshot, dict[str, Tensor]] | None = None

    def _check_arguments(self) -> None:
        for name, least in (("iterations", 0), ("epochs_per_iteration", 1)):
            value = getattr(self, name)
            if value is None and name == "epochs_per_iteration":
                continue
            if value < least:
                raise ValueError(f"`{name}` must be a whole number from {least}; got {value!r}.")
        if not self.tolerance >= 0:
            raise ValueError(f"`tolerance` must not be negative; got {self.tolerance}.")
        if self.monitor is None and (self.select == "best" or self.stop_at == "collapse"):
            asked = f"select={self.select!r} and stop_at={self.stop_at!r}"
            raise ValueError(f"{asked} judge by a validation metric: name it, for example monitor='val_acc'.")

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("iterations", "epochs_per_iteration", "monitor", "mode", "select", "stop_at", "tolerance")
        return super().config() | vars(self.options) | {name: getattr(self, name) for name in names}

    @property
    def goes_back(self) -> bool:
        """Unless each fit is an iteration, with optimizers and schedulers of its own."""
        return self.iterations > 0 or self.epochs_per_iteration is not None

    # -- life cycle ------------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """How far it has got, what to go back to, and what comes next."""
        keep = self._keep and {"snapshot": self._keep[0].as_plain(), "masks": self._keep[1]}
        return {
            "history": [dict(row) for row in self.history], "stopped": self.stopped,
            "closed_step": self._closed_step, "next": self._next, "score": self._score, "keep": keep,
            "snapshot": self._snapshot and self._snapshot.as_plain(), "best": self._best and self._best.as_plain(),
        }  # fmt: skip

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on where the run that is resumed was."""
        self.history, self.stopped = [dict(row) for row in progress["history"]], progress["stopped"]
        self._closed_step, self._next, self._score = progress["closed_step"], progress["next"], progress["score"]
        self._snapshot, self._best = restore_snapshot(progress["snapshot"]), restore_snapshot(progress["best"])
        keep = progress["keep"]
        self._keep = keep and (Snapshot(**keep["snapshot"]), keep["masks"])

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """The history is whole, and there is something to go back to."""
        super().check_progress(state, step)
        rows = state["history"]
        closed = [row["step"] for row in rows]
        if [row["iteration"] for row in rows] != list(range(len(rows))) or closed != sorted(closed):
            self.refuse("['history']", "a row for each iteration, in their order", rows)
        if (self.iterations and state["closed_step"] != (closed[-1] if closed else 0)) or state["closed_step"] > step:
            self.refuse("['closed_step']", "that of the last row of `history`", state["closed_step"])
        if step > 0 and state["stopped"] is None and state["snapshot"] is None:
            self.refuse("['snapshot']", "there after the first step", None)

    def _check_resumed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a file says to go back to, and to do next, is about this run."""
        snapshots = {"snapshot": self._snapshot, "best": self._best, "keep": self._keep and self._keep[0]}
        for field, snapshot in snapshots.items():
            whole = field == "snapshot" and (self.iterations > 0 or self.epochs_per_iteration is not None)
            self._check_snapshot(trainer, pl_module, snapshot, f"['{field}']", whole)
        for field, packed in {"keep": self._keep and self._keep[1], "next": self._next}.items():
            self._check_masks(packed, f"['{field}']")
        if self._next is not None:
            kept = self.masks
            going = sum(self._counts({n: kept[n] & ~mask for n, mask in self._unpacked(self._next).items()}).values())
            if not self.history or going != self.history[-1]["next_pruned"]:
                self.refuse("['next']", "masks that drop `next_pruned` of the last row more", f"{going} more")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, unless this ``fit`` is its next iteration."""
        goes_on = stage == "fit" and self.iterations == 0 and self._trained() is pl_module
        if stage == "fit" and self.enabled and self.monitor is not None and not trainer.enable_validation:
            raise ValueError(
                f"`monitor`={self.monitor!r} needs a validation: a loader, and `limit_val_batches` above 0."
            )
        earlier = (self._snapshot, self.history, self.stopped, self._next, self._keep)
        super().setup(trainer, pl_module, stage)
        if goes_on:
            self._snapshot, self.history, self.stopped, self._next, self._keep = earlier

    def restart(self) -> None:
        """Begin with the first iteration; masks that the model has stay on."""
        super().restart()
        self.history, self.stopped, self._closed_step, self._total = [], None, 0, None
        self._next, self._score, self._best, self._keep = None, None, None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the run has iterations, before anything is pruned."""
        resumed = self.standing.resumed
        super().on_train_start(trainer, pl_module)
        if self.enabled:
            if resumed:
                self._check_resumed(trainer, pl_module)
            total, by_steps = self.standing.length(trainer), self.iterations and self.epochs_per_iteration is None
            self._check_epochs(trainer)
            if by_steps:  # which divide the run that began, whatever its length is now
                (total,) = self.standing.fix(trainer, type(self).__name__, self._resolve, lambda s: s[0])
            self._total = total

    def _check_epochs(self, trainer: Trainer) -> None:
        epochs, each = trainer.max_epochs, self.epochs_per_iteration
        if each is not None and epochs is not None and 0 <= epochs <= each and not is_smoke_run(trainer):
            raise ValueError(
                f"`epochs_per_iteration`={each} leaves no second iteration in a run of {epochs} epochs, so nothing "
                "would be pruned. Lower it, or raise `max_epochs`."
            )

    def _resolve(self, total: int | None) -> tuple[int, ...]:
        if total is None:
            raise ValueError("`iterations` divide the run: set `max_steps` or `max_epochs`, or `epochs_per_iteration`.")
        if 0 < total <= self.iterations:
            raise ValueError(
                f"{self.iterations} `iterations` need more than {self.iterations} steps, but the run has {total}."
            )
        return (total,)

    def _begin(self, pl_module: LightningModule, boundary: Boundary) -> None:
        super()._begin(pl_module, boundary)
        if self.stopped is not None:
            rank_zero_info(f"{type(self).__name__} has stopped already ({self.stopped}); masks stay as they are.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the start; begin the next iteration when it is time."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._boundary is None or self.stopped is not None:
            return
        self._snapshot = self._snapshot or self._take(trainer, pl_module)
        if self._over(trainer, trainer.current_epoch):  # resumed from a file of the validation, before the epoch's end
            self._close(trainer, pl_module)
        if self._next is not None and not self._done():
            self._go_on(trainer, pl_module)

    def _done(self) -> bool:
        """Whether the iterations that the run was divided into are over; what the last one asks for is not done."""
        return bool(self.iterations) and self.epochs_per_iteration is None and len(self.history) > self.iterations

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._next is not None and self._snapshot is not None  # noqa: PT018
        self._set_masks(trainer, pl_module, self._unpacked(self._next), advance=True)
        if not self.goes_back:  # this fit's optimizers are new already
            self._put_back(pl_module, Snapshot(self._snapshot.model, self._snapshot.transforms))
        else:
            self._rewind(trainer, pl_module, self._snapshot)
        self._next, self._best, self._score = None, None, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End an iteration in the middle of an epoch."""
        if not trainer.is_last_batch and self._over(trainer, trainer.current_epoch):
            self._close(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric, and the weights if they are the best of this iteration."""
        if self._boundary is None or self.monitor is None or trainer.sanity_checking or self.stopped is not None:
            return
        known = sorted(trainer.callback_metrics)
        if self.monitor not in known:
            said = f"{self.monitor!r}{near(self.monitor, known)} is not among the logged metrics {known}"
            raise ValueError(f"`monitor`={said}: log it in `validation_step`.")
        score = float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))
        if self.select == "last":
            self._score = score
        elif self._score is None or (score < self._score if self.mode == "min" else score > self._score):
            self._score, self._best = score, take(pl_module, self._sites())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an iteration with an epoch, after its validation."""
        if self._over(trainer, trainer.current_epoch + 1):
            self._close(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last iteration, and show the curve."""
        if self._boundary is not None:
            if self.stopped is None and self.step(trainer) > self._closed_step:
                self._close(trainer, pl_module)
            log_curve(trainer.loggers, self.history, trainer.global_step)
        super().on_train_end(trainer, pl_module)

    # -- iterations ------------------------------------------------------------------------------------------------

    def _over(self, trainer: Trainer, epochs: int) -> bool:
        """Whether the iteration that runs ends here."""
        if self._boundary is None or self.stopped is not None or self._next is not None:
            return False
        if self.epochs_per_iteration is not None:
            return epochs // self.epochs_per_iteration > len(self.history)
        if not self.iterations or not self._total:
            return False
        done = self.step(trainer) * (self.iterations + 1) // self._total
        return min(done, self.iterations) > len(self.history)

    @torch.no_grad()
    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps 4 to 7 of algorithm 1; the masks are put on when the next iteration begins."""
        if self._waits(trainer):
            return None
        present, kept = self._present(), self.masks
        chosen = {name: self._sites()[name].weight for name in present}
        if self._best is not None:
            best = {canonical_name(name): tensor for name, tensor in self._best.model.items()}
            chosen = {name: self._sites()[name].layout.here(best[name]) for name in present}
        step = sap_step(
            {name: target.canonical(chosen[name]) for name, target in present.items()},
            {name: target.canonical(kept[name]) for name, target in present.items()},
            self.options,
            {name: self._layout(name) for name in present} if is_sharded(trainer) else None,
        )
        self._note(trainer, step)
        self._closed_step = self.step(trainer)
        if self.stop_at == "collapse" and self.history[-1]["phase"] == "collapse" and self._keep is not None:
            self._restore(trainer, pl_module)
            return self._stop(trainer, "collapse")
        if self.stop_at == "collapse":
            self._keep = (self._best or take(pl_module, self._sites()), self._packed(kept))
        if not step.pruned:
            return self._stop(trainer, "stalled")
        self._next = self._packed({name: present[name].canonical(mask) for name, mask in step.masks.items()})
        return None

    def _note(self, trainer: Trainer, step: SapStep) -> None:
        row: dict[str, Any] = {
            "iteration": len(self.history), "step": self.step(trainer), "left": step.left / step.total,
            "pqi": step.index, "pqi_scope": step.scoped, "score": self._score, "next_pruned": step.pruned,
        }  # fmt: skip
        rows = [*self.history, row]
        row["phase"] = phase([r["pqi"] for r in rows], [r["score"] for r in rows], self.tolerance, self.mode)
        self.history = rows
        values = {f"{self.prefix}/{k}": row[k] for k in ("left", "pqi", "pqi_scope", "score") if row[k] is not None}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        score = "" if row["score"] is None else f", {self.monitor} {row['score']:.4g}"
        rank_zero_info(
            f"{type(self).__name__} iteration {row['iteration']}: {row['left']:.2%} of the weights left, PQ index "
            f"{row['pqi']:.4f}{score} ({row['phase']}); {step.pruned} more to prune."
        )

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        snapshot, packed = cast(tuple[Snapshot, dict[str, Tensor]], self._keep)
        for name, mask in self._unpacked(packed).items():
            set_mask(self._sites()[name], self._mask_transforms()[name], mask)
        self._put_back(pl_module, snapshot)

    def _stop(self, trainer: Trainer, reason: str) -> None:
        self.stopped, trainer.should_stop, last = reason, True, len(self.history) - 1
        if reason == "collapse":
            rank_zero_info(
                f"{type(self).__name__}: {self.monitor} collapsed in iteration {last}; weights and masks of iteration "
                f"{last - 1} are back, and the run ends."
            )
        else:
            rank_zero_warn(
                f"{type(self).__name__} has stalled after iteration {last} and ends the run: the next one would prune "
                "nothing (small fan-in with scope='neuron', or magnitudes that are almost equal). Use a larger scope, "
                "gamma or eta, or (p, q) = (1, 2)."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit."""
        return super().__getstate__() | {"_best": None, "_keep": None, "_next": None}


def sap_fits(
    module: LightningModule,
    pruning: SAPPruning,
    make_trainer: Callable[[int, SAPPruning], Trainer],
    iterations: int,
    **fit: Any,
) -> list[dict[str, Any]]:
    """Train, prune, go back to initialization, train again: algorithm 1 with a ``fit`` for each iteration.

    Args:
        module: The module, at its initialization; it ends as trained in the last iteration.
        pruning: ``SAPPruning(iterations=0, ...)``: a whole ``fit`` is one iteration.
        make_trainer: Makes the Trainer of an iteration from its number and the callback, which has to be in it.
        iterations: How often to prune at most, so that there are up to ``iterations + 1`` fits.
        fit: Arguments of ``trainer.fit`` besides the module: dataloaders or a datamodule, with validation data.

    Returns:
        The history, one row for each fit.

    Raises:
        ValueError: The callback divides a fit into iterations itself, or a Trainer lacks it.
    """
    if pruning.goes_back:
        raise ValueError(
            f"sap_fits makes every fit one iteration; got iterations={pruning.iterations}, epochs_per_iteration="
            f"{pruning.epochs_per_iteration}. Use SAPPruning(iterations=0)."
        )
    for iteration in range(iterations + 1):
        trainer = make_trainer(iteration, pruning)
        if not any(callback is pruning for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("the Trainer lacks the callback: return Trainer(callbacks=[pruning, ...]).")
        trainer.fit(module, **fit)
        if pruning.stopped is not None:
            break
    return pruning.history
