"""``PRepBN``: progressive norm swap, from outside the LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.common.change import Change
from lightning_efficient.common.shards import gather_anew
from lightning_efficient.lifecycle.asking import asked
from lightning_efficient.lifecycle.standing import is_smoke_run
from lightning_efficient.lifecycle.state import Request, attachment
from lightning_efficient.lifecycle.strategies import data_group, is_sharded
from lightning_efficient.lifecycle.structural import StructuralCallback
from lightning_efficient.lifecycle.weights import Plan
from lightning_efficient.norms.blend import BlendNorm, blend_norms, set_blend
from lightning_efficient.norms.causal import CausalModelError
from lightning_efficient.norms.checks import check_statistics, check_training, not_seen, own_statistics
from lightning_efficient.norms.padding import hand_over
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.swap import METHOD, ONLY_WITH, NormSwapConfig, apply_norm_swap, find_norms
from lightning_efficient.trainer.example import first_batch
from lightning_efficient.trainer.finished import FinishedForm
from lightning_efficient.trainer.probing import probe_norms
from lightning_efficient.trainer.statistics import average_over_processes, recalibrate_in
from lightning_efficient.trainer.transition import TRANSITION, GuardedTransition


class PRepBN(StructuralCallback):
    """Trade layer norms and RMS norms for ones that can be folded away, progressively (SLAB, arXiv 2405.11582).

    Every matched norm computes ``lam · old(x) + (1 - lam) · new(x)``; ``lam`` is a pure function of
    ``self.step(trainer)``: 1 during ``hold``, down to 0 over ``transition``, 0 from there on. Validation during the
    transition evaluates this blend, the network being trained; what it would say of the finished form is logged beside
    it, as ``efficient/norm_swap/finished/<name of your metric>``. Logs ``efficient/norm_swap/lam``. At the end of the
    run the running statistics are averaged anew. The files of such a run load with
    :func:`lightning_efficient.load_from_checkpoint`.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        include: Globs over module names; a glob also matches every module below a matching one. ``None``: all.
        exclude: Globs over module names, applied after ``include``.
        target: ``"repbn"`` (BatchNorm plus eta times identity), ``"affine"`` (fixed affine map without batch
            statistics, as TaperNorm), ``"un"`` (Unified Normalization), ``"dyt"`` (Dynamic Tanh) or ``"rms"``.
        init: ``"copy"``: scale and shift of the old norm, eta 0. ``"slab"``: as published, for training from scratch.
        transition: Length of the way down: a fraction of the run (float) or optimizer steps (int).
        shape: ``"linear"`` (as published) or ``"cosine"``.
        hold: How long ``lam`` stays 1 first, in which running statistics warm up without influence: fraction or steps.
        momentum: Weight of a batch in RepBN's running statistics.
        frozen: Normalize with running statistics in training too (batches too small to have statistics).
        eps: Added to variances (``"repbn"``, ``"un"``).
        decay: Share of the old value in the moving averages that calibrate ``"affine"``.
        alpha: Start of Dynamic Tanh's scalar (much less than 0.5 for wide language models).
        window: Training forwards that Unified Normalization smooths over.
        warmup: Training forwards before it does; a run that ends sooner gets a warning.
        filtration: Whether it leaves outlier batches out (published: yes for vision, no for language).
        learn_eta: Train RepBN's eta. ``False`` keeps it at its start (``init``) or at what a file has: the authors'
            advice for fine-tuning downstream.
        eval_mode: What to do with swapped norms that train in evaluation mode, as everything does that comes from
            ``from_pretrained``: they would collect no statistics. ``"error"``, or ``"train"``: put them, and nothing
            else, into training mode (dropout stays as you have it).
        allow_causal: Swap to batch statistics in a causal model all the same: in training they leak the future.
        recalibrate: At the end, average the running statistics over this many training batches ("precise BatchNorm"),
            before the last validation and the files written there; 0: keep the moving averages.
        finished_metrics: Validate each batch a second time with the finished norms, during the transition.
        guard: What to do when gradient norm or loss leave the range of the last 100 steps: ``"pause"`` the transition,
            ``"rollback"``: go back first, ``"off"``. With a warning; ``efficient/norm_swap/jumps`` counts.
        guard_factor: How far out of range: times the median for the gradient norm, times the span between the 10th and
            the 90th percentile above the median for the loss.
        guard_length: How long a pause is and how far back a rollback goes: a share of the transition, or steps.

    Raises:
        ValueError: The transition does not end within the run, or the run's length is unknown and it is a fraction.
    """

    method = METHOD
    only_with = (*ONLY_WITH, ("guard", ("pause", "rollback"), ("guard_factor", "guard_length")))
    resume_may_change = frozenset({
        "enabled", "init", "momentum", "frozen", "decay", "alpha", "learn_eta", "eval_mode", "allow_causal",
        "recalibrate", "finished_metrics", "guard", "guard_factor", "guard_length",
    })  # fmt: skip
    sharded = True
    progress_schema = TRANSITION

    def __init__(
        self,
        enabled: bool = True,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        target: Literal["repbn", "affine", "un", "dyt", "rms"] = "repbn",
        init: Literal["copy", "slab"] = "copy",
        transition: int | float = 0.8,
        shape: Literal["linear", "cosine"] = "linear",
        hold: int | float = 0.05,
        momentum: float = 0.1,
        frozen: bool = False,
        eps: float = 1e-5,
        decay: float = 0.99,
        alpha: float = 0.5,
        window: int = 4,
        warmup: int = 4000,
        filtration: bool = True,
        learn_eta: bool = True,
        eval_mode: Literal["error", "train"] = "error",
        allow_causal: bool = False,
        recalibrate: int = 100,
        finished_metrics: bool = True,
        guard: Literal["pause", "rollback", "off"] = "pause",
        guard_factor: float = 5.0,
        guard_length: int | float = 0.05,
    ) -> None:
        super().__init__(enabled, include, exclude)
        if recalibrate < 0:
            raise ValueError(f"`recalibrate` must be a number of batches from 0; got {recalibrate!r}.")
        self.options = NormSwapConfig(
            target, init, eps, momentum, frozen, decay, alpha, window, warmup, filtration, learn_eta
        )
        self.transition = GuardedTransition(transition, shape, hold, guard, guard_factor, guard_length)
        self.eval_mode, self.allow_causal = eval_mode, allow_causal
        self.recalibrate, self.finished_metrics = recalibrate, finished_metrics
        self._finished = FinishedForm(f"efficient/{METHOD}/finished/")
        self._recalibrated_at = -1
        self._total: int | None = None
        self._norms: list[BlendNorm] = []
        self._handles: list[RemovableHandle] = []
        self._looked = self._fed = False

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        own = {name: getattr(self, name) for name in ("eval_mode", "allow_causal", "recalibrate", "finished_metrics")}
        return super().config() | vars(self.options) | self.transition.config() | own

    def progress(self) -> dict[str, Any]:
        """Where the transition of this fit began and how far it is, and what the guard has seen."""
        self._settle()
        return self.transition.state_dict()

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Go on with the transition of the fit that is resumed."""
        self.transition.load_state_dict(progress)

    def restart(self) -> None:
        """Begin the transition anew, from where the norms of the model are."""
        super().restart()
        self.transition.restart(1.0)
        self._recalibrated_at, self._total, self._finished.known = -1, None, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap; norms that were swapped before, in a model from a file, are held still as well."""
        super().setup(trainer, pl_module, stage)
        for norm in blend_norms(pl_module).values() if self.enabled else ():
            norm.target.frozen |= self.options.frozen
            if isinstance(norm.target, RepBN) and not self.options.learn_eta:
                norm.target.eta.requires_grad_(False)

    @property
    def needs_whole(self) -> bool:
        """To find padding, and whether the model is causal, where the target has statistics."""
        return self.options.target not in ("dyt", "rms")

    def request(self) -> Request:
        """What to do to a model: plain data and a function, so that copies of the model can carry it."""
        config = self.config()
        return Request(METHOD, self.state_key, config, partial(apply_norm_swap, config=config))

    def plan(self, model: nn.Module) -> Plan:
        """What would be swapped, without changing anything."""
        norms = find_norms(model, self.options, self.include, self.exclude)
        targets = {n: f"{type(m).__name__} becomes {self.options.target}" for n, (m, _) in norms.matched.items()}
        return Plan(change=Change(METHOD, targets=targets, skipped=dict(norms.skipped)))

    def apply(self, pl_module: LightningModule) -> Change:
        """Swap the norms that are not swapped yet."""
        return apply_norm_swap(pl_module, self.config())

    # -- life cycle ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule, before anything trains."""
        fresh = not self.standing.resumed
        super().on_train_start(trainer, pl_module)
        if not self.enabled:
            return
        self._total = self.standing.length(trainer)
        if self._total == 0:
            return
        gather_anew(pl_module)
        way, name = self.transition, type(self).__name__
        way.fix(*self.standing.fix(trainer, name, self._resolve, sum))
        self._norms = list(blend_norms(pl_module).values())
        for norm in self._norms:
            norm.target.group = data_group(trainer, pl_module)
        if fresh:  # a further fit, or one of a model from a file, goes on from where the norms are
            way.restart(max(float(norm.lam) for norm in self._norms))
        self._write(self.step(trainer))
        rank_zero_info(
            f"{name}: {len(self._norms)} norms become {self.options.target} over steps {way.first} to "
            f"{way.first + way.length} of {'an open run' if self._total is None else self._total}."
        )
        if trainer.world_size > 1 and not is_sharded(trainer) and (what := own_statistics(pl_module)):
            rank_zero_warn(f"{name}: {what}")
        if what := self.options.too_short(self._total):
            rank_zero_warn(f"{name}: {what}")
        if self.recalibrate and fresh and way.start == 1.0 and (self.options.frozen or way.first == 0):
            # They evaluate, or train, with running statistics from the first step on.
            self._look(trainer, pl_module, first_batch(trainer), 0)
            recalibrate_in(trainer, pl_module, self.recalibrate, name)

    def _resolve(self, total: int | None) -> tuple[int, int]:
        return self.transition.resolve(total)

    def check_progress(self, state: Mapping[str, Any], step: int) -> None:
        """The schedule is two numbers, and a pause of the guard is not longer than it makes them."""
        schedule = state["standing"]["schedule"]
        if schedule is not None and len(schedule) != 2:
            self.refuse("['standing']['schedule']", "two numbers of steps", schedule)
        held = step + self.transition.pause(sum(schedule or (0,)))
        if not state["clock"]["time"] <= state["clock"]["step"] <= held:
            self.refuse("['clock']", f"a time up to its step, and that up to {held}", state["clock"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the blend for this step; before the first, look at what the model does with such a batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.enabled:
            return
        self._settle()
        if self.transition.begins(self.step(trainer)):
            gather_anew(pl_module)
        self._write(self.step(trainer))
        check_training(pl_module, wake=self.eval_mode == "train")
        if not self._looked:
            self._look(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forwards from here are recomputations."""
        if self._norms:
            attachment(pl_module).unsharded = None  # whoever needs it has looked at it
        self._collect(False)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forwards count again."""
        self._collect(True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients as the step will see them, before clipping."""
        if self._norms:
            self.transition.before_step(trainer, optimizer, self.step(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the blend; before it begins to move, see that there are statistics."""
        if not self.enabled:
            return
        self.transition.after_batch(trainer, outputs, self.step(trainer))
        if not self._fed and self.transition.at(self.step(trainer)) < 1:
            self._fed = True
            check_statistics(pl_module, recalibrated=self.recalibrate > 0)
        if self.logs_now(trainer, pl_module, every_step=True):
            scalars = {"lam": self.transition.at(self.step(trainer))}
            if self.transition.guard != "off":
                scalars["jumps"] = float(self.transition.jumps)
            for name, value in scalars.items():
                pl_module.log(f"{self.prefix}/{name}", value, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on running statistics over processes, and on the blend, which an averaged copy would average."""
        if self._norms and trainer.state.fn == "fit":
            self._write(self.step(trainer))
            average_over_processes(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before the first batch, when an averaged model has been swapped in; and every batch in its finished form."""
        if not self._norms or trainer.state.fn != "fit":
            return
        if not (batch_idx or dataloader_idx):
            self._write(step := self.step(trainer))  # this is the network that is validated
            if self._over(trainer):
                self._recalibrate(trainer, pl_module)
            copies = not is_sharded(trainer) and not trainer.sanity_checking
            # And once after the transition, where a run begins there, for callbacks that monitor these metrics.
            if self.finished_metrics and copies and not (self._finished.known and self.transition.at(step) == 0):
                self._finished.start(trainer, pl_module)
        self._finished.batch(self._norms, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the finished form's epoch comes to."""
        self._finished.end(self._norms)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From the end of the transition on, the finished form is the network."""
        fits = self._norms and trainer.state.fn == "fit" and not trainer.sanity_checking
        if fits and self.transition.at(self.step(trainer)) == 0:
            self._finished.follow(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a file of the last epoch is written, where there is no validation."""
        if self._norms and self._over(trainer):
            self._write(self.step(trainer))
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The blend that the last step leads to."""
        if self._norms:
            step = self.step(trainer)
            self._write(step)
            if (lam := self.transition.at(step)) > 0 and step and not is_smoke_run(trainer):
                jumps = self.transition.jumps
                rank_zero_warn(
                    f"{type(self).__name__}: training ended at step {step} with lam = {lam:.3f}, in the "
                    "middle of the transition: the old norms are still needed. "
                    + (f"The guard held it up {jumps} times (`guard`). " if jumps else "")
                    + "Shorten `transition` to finish."
                )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Statistics of the weights that are left in the module, which may be an average by now."""
        if self._norms:
            self._write(self.step(trainer))
            if any(isinstance(cb, WeightAveraging) for cb in trainer.callbacks):  # type: ignore[attr-defined]
                self._recalibrated_at = -1
            self._recalibrate(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook and no mode behind."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook and no mode behind."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def _write(self, step: int) -> None:
        lam, way = self.transition.at(step), self.transition
        set_blend(
            self._norms,
            lam,
            recopy=self.options.init == "copy" and way.begins(step),
            calibrate=lam == 1.0 or (way.first == 0 and lam > 0.0),
        )

    def _over(self, trainer: Trainer) -> bool:
        """Whether the run has had all its steps (False where that is unknown)."""
        return self._total is not None and self.step(trainer) >= self._total

    def _settle(self) -> None:
        if what := self.transition.settle():
            rank_zero_warn(f"{type(self).__name__}: {what}")

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recalibrate and self._recalibrated_at != self.step(trainer):
            self._recalibrated_at = self.step(trainer)
            recalibrate_in(trainer, pl_module, self.recalibrate, type(self).__name__)

    def _collect(self, collect: bool) -> None:
        for norm in self._norms:
            norm.target.collect = collect

    def _look(self, trainer: Trainer, pl_module: LightningModule, batch: Any, number: int) -> None:
        """Find the padding masks; refuse a causal model, which norms with batch statistics would show the future."""
        self._looked = True
        leaks = any(norm.target.batch_statistics for norm in self._norms)
        if not (leaks or any(norm.target.calibrates for norm in self._norms)):
            return
        name, free = type(self).__name__, self.allow_causal or self.options.frozen
        ask = partial(probe_norms, trainer, number=number, causal=leaks and not free)
        try:
            leaking, padding = asked(name, trainer, pl_module, batch, ask)
        except Exception as error:
            rank_zero_warn(f"{name}: {not_seen(type(pl_module).__name__, error)}")
            return
        if leaking:
            raise CausalModelError(leaking, list(blend_norms(pl_module)), self.options.target)
        self._handles = hand_over(pl_module, padding.masks)
        if padding.unknown:
            rank_zero_warn(
                f"{name}: {padding.unknown}: padded tokens count in the statistics of these norms. Give the network "
                "its mask as an argument, or use batches without padding."
            )

    def _release(self) -> None:
        self._collect(True)
        for handle in self._handles:
            handle.remove()
        for norm in self._norms:
            norm.target.group = None
        self._finished.stop()
        self._handles, self._norms = [], []
        self._looked = self._fed = False
