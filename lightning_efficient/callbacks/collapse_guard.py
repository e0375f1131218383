"""``CollapseGuard``: a canary every so many steps, and the way back when it falls silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_efficient.common.names import direction
from lightning_efficient.common.schema import Flag, Int, ListOf, Number, OrNone, Record
from lightning_efficient.companions.predictions import SCORES
from lightning_efficient.lifecycle.base import EfficientCallback, peers
from lightning_efficient.lifecycle.hooks import hook_files
from lightning_efficient.lifecycle.rollback import TRAINING_STATE, TrainingState, check_state, put_back, take_state
from lightning_efficient.lifecycle.state import attachment
from lightning_efficient.surgery.schedulers import scale_rates
from lightning_efficient.trainer.canary import Canary

_TRIP = Record(
    {
        "step": Int(low=0), "value": Number(finite=False), "limit": Number(), "back_to": OrNone(Int(low=0)),
        "stopped": Flag(),
    }
)  # fmt: skip


class CollapseGuard(EfficientCallback):
    """Score the network on a canary every ``every_n_steps`` optimizer steps; when it has collapsed, go back, or stop.

    A check is healthy if the score is at most ``max_ratio`` times the best one so far (at least the best divided by
    ``max_ratio``, where larger is better); NaN and infinite never are. After each healthy check the training state is
    copied: weights, buffers, optimizers, schedulers, gradient scaler, averaged models, and the state of every callback
    of this package (masks, gains, blends, shrinking units). On collapse it is put back, and training goes on with the
    data that comes next. Steps are counted on, so every schedule, learning rates included, ends later by as many steps
    as were undone. What a schedule did wrong it will do again: after ``max_rollbacks`` the run stops, in the last
    healthy state.

    The canary runs in evaluation mode through the module's own ``validation_step``; nothing is logged or counted by it,
    and random numbers, training flags and metrics are as found: a run in which it never trips is that without it, to
    the bit. Under several processes the worst score counts and all act alike. Logs, under
    ``efficient/collapse_guard/``: ``canary``, ``trips``, ``rollbacks``. :attr:`history` has a row for each trip.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        canary: A batch of the kind that a validation loader gives, a ``DataLoader`` (read once and kept), or a function
            of the module that returns a number. ``None``: the first validation batches.
        score: ``"perplexity"``, ``exp`` of the mean negative log-likelihood of a token or sample;
            ``"sequence_perplexity"``, its mean over sequences (arXiv 2402.09656); ``"accuracy"``; ``"entropy"``, that
            of the mean prediction in nats, 0 when everything is predicted alike; ``"rank"``, RankMe of at most 1024
            rows of logits; ``"loss"``, what ``validation_step`` returns or logs; or the name of what it logs. The first
            five read the logits and targets of the ``cross_entropy`` in it.
        mode: Whether ``"min"`` or ``"max"`` is better, of a logged name or a function; the other scores know. ``None``:
            what the name tells (``val_acc``: max), else min.
        every_n_steps: Optimizer steps between two checks; also checked before the first step, and after the last.
        max_ratio: How much worse than the best is collapse.
        patience: So many checks in a row have to fail.
        action: ``"rollback"``, ``"stop"`` (the weights stay as they are) or ``"warn"``.
        lr_factor: On every learning rate after a rollback, for good; from 0 (excluded) to 1.
        skip_batches: So many batches after a rollback are run without leaving a trace (whole steps of them).
        max_rollbacks: In a fit; at the next collapse the state is put back and the run stops.
        batches: How many validation batches are the canary, where it is ``None``.
        snapshot_device: Where the copies are. ``None``: where the tensors are, faster and at the cost of its memory.
        save_snapshot: Write the copy to checkpoints, so that a resumed run goes back to where the other one would have.
            ``False``: files stay small, and a resumed run first goes back to where it was resumed.

    Raises:
        ValueError: An argument is out of range, or there is nothing to score. Later, if the network has collapsed
            before the first step, or units were cut out since the last healthy check, which nothing puts back.
    """

    method = "collapse_guard"
    only_with = (
        ("action", ("rollback",), ("lr_factor", "skip_batches", "max_rollbacks", "snapshot_device", "save_snapshot")),
    )
    guards = True
    # Whatever scores the canary makes its best score what it is.
    resume_may_change = frozenset({
        "enabled", "every_n_steps", "max_ratio", "patience", "action", "lr_factor", "skip_batches", "max_rollbacks",
        "snapshot_device", "save_snapshot",
    })  # fmt: skip
    progress_schema = Record(
        {
            "best": OrNone(Number()), "failed": Int(low=0), "skipping": Int(low=0), "history": ListOf(_TRIP),
            "rewound": Flag(), "kept": OrNone(TRAINING_STATE),
        }
    )  # fmt: skip

    def __init__(
        self,
        enabled: bool = True,
        canary: Any = None,
        score: str = "perplexity",
        mode: Literal["min", "max"] | None = None,
        every_n_steps: int = 100,
        max_ratio: float = 2.0,
        patience: int = 1,
        action: Literal["rollback", "stop", "warn"] = "rollback",
        lr_factor: float = 1.0,
        skip_batches: int = 0,
        max_rollbacks: int = 3,
        batches: int = 1,
        snapshot_device: str | None = "cpu",
        save_snapshot: bool = True,
    ) -> None:
        super().__init__(enabled)
        self.canary, self.score, self.batches = canary, score, batches
        self.mode = mode or direction(score) or "min"
        self.every_n_steps, self.max_ratio, self.patience, self.action = every_n_steps, max_ratio, patience, action
        self.lr_factor, self.skip_batches, self.max_rollbacks = lr_factor, skip_batches, max_rollbacks
        self.snapshot_device, self.save_snapshot = snapshot_device, save_snapshot
        self._check_arguments()
        self.restart()

    def _check_arguments(self) -> None:
        if isinstance(self.canary, str | bytes | int | float):
            raise ValueError(
                "`canary` must be a batch as a validation loader gives it, a DataLoader, a function of the module, or "
                f"None; got {self.canary!r}."
            )
        least = {"every_n_steps": 1, "patience": 1, "skip_batches": 0, "max_rollbacks": 0, "batches": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"`{name}` must be a whole number from {low}; got {value!r}.")
        if not self.max_ratio > 1:
            raise ValueError(f"`max_ratio` must be a finite number above 1; got {self.max_ratio!r}.")
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"`lr_factor` must be above 0 and at most 1; got {self.lr_factor!r}.")
        try:
            torch.device("cpu" if self.snapshot_device is None else self.snapshot_device)
        except RuntimeError:
            raise ValueError(
                f"`snapshot_device` must be a device of torch, such as 'cpu' or 'cuda', or None; got "
                f"{self.snapshot_device!r}."
            ) from None

    @property
    def goes_back(self) -> bool:
        """If it collapses."""
        return self.action == "rollback"

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data; a canary that is none is named by its type."""
        names = (
            "score", "mode", "every_n_steps", "max_ratio", "patience", "action", "lr_factor", "skip_batches",
            "max_rollbacks", "batches", "snapshot_device", "save_snapshot",
        )  # fmt: skip
        canary = None if self.canary is None else type(self.canary).__name__
        return {"enabled": self.enabled, "canary": canary} | {name: getattr(self, name) for name in names}

    # -- life cycle ----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Nothing has been seen yet."""
        self.history: list[dict[str, Any]] = []
        self._best: float | None = None
        self._failed = self._skipping = self._seen = self._checked = 0
        self._spoilt = self._rewound = False
        self._rewinds: int | None = None
        self._canary: Canary | None = None
        self._kept: TrainingState | None = None
        self._plain: Mapping[str, Any] | None = None

    def progress(self) -> dict[str, Any]:
        """What was seen, and the way back."""
        kept = self._plain if self._kept is None else self._kept.as_plain() if self.save_snapshot else None
        return {
            "best": self._best, "failed": self._failed, "skipping": self._skipping,
            "history": [dict(row) for row in self.history], "rewound": self._rewound, "kept": kept,
        }  # fmt: skip

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on from there, as far as the arguments of this run have a use for it."""
        self._best, self._rewound = progress["best"], progress["rewound"]
        self._failed = min(progress["failed"], self.patience - 1)
        self._skipping = min(progress["skipping"], self.skip_batches)
        self.history = [dict(row) for row in progress["history"]]
        self._plain = progress["kept"] if self.action == "rollback" else None

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """The numbers are within their arguments, the trips in their order, and there is a way back if there should."""
        super().check_progress(state, step)
        steps = [row["step"] for row in state["history"]]
        if steps != sorted(steps) or any((row["back_to"] or 0) > row["step"] for row in state["history"]):
            self.refuse("['history']", "a row for each trip, in their order, back to earlier steps", state["history"])
        then = {**self.config(), **state.get("config", {})}
        for field, most in (("failed", then["patience"] - 1), ("skipping", then["skip_batches"])):
            if state[field] > most:
                self.refuse(f"['{field}']", f"at most {most}", state[field])
        expected = state["best"] is not None and then["action"] == "rollback" and then["save_snapshot"]
        if (state["kept"] is not None) != expected:
            self.refuse("['kept']", "there" if expected else "null", state["kept"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have files checked before anything is loaded."""
        super().setup(trainer, pl_module, stage)
        if self.enabled and stage == "fit":
            hook_files(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The way back that a file holds is one of this run."""
        super().on_train_start(trainer, pl_module)
        if self.enabled and self._plain is not None:
            self._kept = TrainingState.from_plain(self._plain, attachment(pl_module).cut)
            check_state(self._kept, trainer, pl_module, f"the checkpoint's state of {self.state_key}, field ['kept']")
            self._plain = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After every callback's start of training, and before any has done something to a first batch."""
        if self.enabled and self._canary is None:
            self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Where a run is resumed in the middle of an epoch, which then does not start."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.enabled and self._canary is None:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the canary, score it, and keep a way back."""
        self._canary = Canary(trainer, pl_module, self.canary, self.score, self.batches, self._larger)
        self._seen = self._checked = self.step(trainer)
        self._look_for_rewinds(trainer)
        if self._best is None or (self.action == "rollback" and self._kept is None):
            self._first(trainer, pl_module, self._canary())

    @property
    def _larger(self) -> bool:
        """Whether larger is better."""
        if self.score in SCORES and not callable(self.canary):
            return not SCORES[self.score][1]
        return self.mode == "max" and (callable(self.canary) or self.score != "loss")

    def _first(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        if not math.isfinite(value) or not self._healthy(value):
            raise ValueError(
                f"CollapseGuard: {self._name} of the canary is {value:.6g} before the first step of this run: the "
                f"network {'has collapsed already' if self._best is None else 'in the checkpoint has collapsed'}, or "
                "the canary is not a fair one. Begin with other weights, or give another `canary` or `score`."
            )
        self._note(trainer, pl_module, value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check, if a step has ended here and it is time."""
        if not self.enabled or self._canary is None:
            return
        self._look_for_rewinds(trainer)
        self._spoilt |= self._skipping > 0
        self._skipping = max(self._skipping - 1, 0)
        before, self._seen = self._seen, self.step(trainer)
        if self._seen == before:  # gradients are being accumulated
            return
        if self._spoilt and self._kept is not None:
            self._spoilt = False
            self._go_back(trainer, pl_module)
        elif self._seen // self.every_n_steps > before // self.every_n_steps:
            value = self._check(trainer, pl_module)
            self._log(trainer, pl_module, value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the last steps have done is checked, too."""
        if self.enabled and self._canary is not None and self.step(trainer) > self._checked:
            self._check(trainer, pl_module)
        self._canary = None
        super().on_train_end(trainer, pl_module)

    # -- checks --------------------------------------------------------------------------------------------------

    @property
    def trips(self) -> int:
        """How often it has acted in this fit."""
        return len(self.history)

    @property
    def rollbacks(self) -> int:
        """How often it has gone back in this fit."""
        return sum(row["back_to"] is not None and not row["stopped"] for row in self.history)

    @property
    def _name(self) -> str:
        return "the score" if callable(self.canary) else self.score

    @property
    def limit(self) -> float:
        """Beyond this a score is collapse; infinite before the first check."""
        assert self._canary is not None
        if self._best is None:
            return -math.inf if self._canary.larger else math.inf
        if self._canary.larger:
            return self._best - (1 - 1 / self.max_ratio) * abs(self._best)
        return self._best + (self.max_ratio - 1) * abs(self._best)

    def _healthy(self, value: float) -> bool:
        assert self._canary is not None
        return value >= self.limit if self._canary.larger else value <= self.limit

    def _note(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        """A healthy check: the best so far, and the way back."""
        assert self._canary is not None
        best = value if self._best is None else self._best
        self._best, self._failed = max(best, value) if self._canary.larger else min(best, value), 0
        if self.action == "rollback":
            device = None if self.snapshot_device is None else torch.device(self.snapshot_device)
            self._kept = None  # not two of them at a time
            self._kept = take_state(trainer, pl_module, device)

    def _look_for_rewinds(self, trainer: Trainer) -> None:
        """A lottery ticket goes back to untrained weights on purpose, which are no worse for that."""
        rewinds = sum(cb.rewinds for cb in peers(trainer))
        self._rewound |= self._rewinds is not None and rewinds != self._rewinds
        self._rewinds = rewinds

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> float:
        assert self._canary is not None
        value, self._checked = self._canary(), self.step(trainer)
        if self._rewound and math.isfinite(value):
            self._best, self._rewound = None, False
        if self._healthy(value):
            self._note(trainer, pl_module, value)
        else:
            self._failed += 1
            if self._failed >= self.patience:
                self._failed = 0
                self._act(trainer, pl_module, value)
        return value

    def _act(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        row = {
            "step": trainer.global_step, "value": value, "limit": self.limit, "back_to": None,
            "stopped": self.action == "stop",
        }  # fmt: skip
        self.history.append(row)
        said = (
            f"CollapseGuard: {self._name} of the canary is {value:.6g} after step {trainer.global_step}; the limit is "
            f"{self.limit:.6g} (best {self._best:.6g}, max_ratio {self.max_ratio:g})."
        )
        if self.action == "rollback" and self._kept is not None:
            row["stopped"], row["back_to"] = self.rollbacks >= self.max_rollbacks, self._kept.step
            self._go_back(trainer, pl_module)
            said += f" The training state of step {self._kept.step} is back"
            if row["stopped"]:
                trainer.should_stop = True
                said += self._last_word(trainer)
            else:
                self._skipping = self.skip_batches
                said += "."
        elif self.action == "stop":
            trainer.should_stop = True
            said += " The run stops (action='stop'); its weights are those of the collapse."
        rank_zero_warn(said)

    @property
    def _times(self) -> int:
        """How often the run has gone back to the state that is kept now."""
        return sum(self._kept is not None and row["back_to"] == self._kept.step for row in self.history)

    def _last_word(self, trainer: Trainer) -> str:
        others = [type(cb).__name__ for cb in peers(trainer) if not cb.guards]
        cause = (
            f" It collapsed {self._times} times from there without a healthy check in between, so it is hardly a "
            f"single batch: a learning rate, or what {', '.join(others)} does at this point of its schedule, which is "
            "done again after each rollback (prune less or more slowly, take a longer transition)."
            if self._times > 1 and others
            else " A lower learning rate or `lr_factor` below 1 may help."
        )
        return f", and the run stops after {self.rollbacks} rollbacks (`max_rollbacks`).{cause}"

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._kept is not None
        try:
            put_back(self._kept, trainer, pl_module)
        except ValueError as error:
            raise ValueError(
                f"CollapseGuard cannot go back to step {self._kept.step} from the collapse found at step "
                f"{trainer.global_step}: {error} Check more often (`every_n_steps`), or use action='stop'."
            ) from error
        if self.lr_factor != 1:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scale_rates(trainer.optimizers, schedulers, self.lr_factor**self._times)

    def _log(self, trainer: Trainer, pl_module: LightningModule, value: float) -> None:
        if trainer.barebones:
            return
        figures = {"canary": value, "trips": float(self.trips), "rollbacks": float(self.rollbacks)}
        named = {f"{self.prefix}/{name}": figure for name, figure in figures.items()}
        for name, figure in named.items():  # for EarlyStopping and ModelCheckpoint; every logger has every check
            pl_module.log(name, figure, on_step=True, on_epoch=False, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(named, trainer.global_step)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a running fit, so that ``ddp_spawn`` can send the callback to its processes."""
        return self.__dict__ | {"_canary": None, "_kept": None, "_plain": None}
