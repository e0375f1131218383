"""``PRepBN``: progressive norm swap, from outside the LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.callbacks.attach import Request
from lightning_efficient.callbacks.structural import StructuralCallback
from lightning_efficient.callbacks.weightspace import Plan
from lightning_efficient.methods.norms.blend import BlendNorm, blend_norms
from lightning_efficient.methods.norms.causal import CausalAttentionError, CausalWatch
from lightning_efficient.methods.norms.swap import METHOD, NormSwapConfig, apply_norm_swap, find_norms
from lightning_efficient.schedule import transition, transition_steps
from lightning_efficient.surgery.change import Change


class PRepBN(StructuralCallback):
    """Trade layer norms and RMS norms for ones that can be folded away, progressively (SLAB, arXiv 2405.11582).

    Every matched norm computes ``lam · old(x) + (1 - lam) · new(x)``; ``lam`` is a pure function of
    ``trainer.global_step``: 1 during ``hold``, down to 0 over ``transition``, 0 from there on. Validation during the
    transition evaluates this blend, the network being trained. Logs ``efficient/norm_swap/lam``. The files of such a
    run load with :func:`lightning_efficient.load_from_checkpoint`.

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
        allow_causal: Swap to batch statistics in a causal model all the same: in training they leak the future.

    Raises:
        ValueError: The transition does not end within the run, or the run's length is unknown and it is a fraction.
    """

    method = METHOD

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
        allow_causal: bool = False,
    ) -> None:
        super().__init__(enabled, include, exclude)
        self.options = NormSwapConfig(target=target, init=init, momentum=momentum, frozen=frozen)
        self.transition, self.shape, self.hold = transition, shape, hold
        self.allow_causal = allow_causal
        self._total: int | None = None
        self._start = 1.0
        self._resumed = False
        self._norms: list[BlendNorm] = []
        self._handles: list[RemovableHandle] = []
        self._watch: CausalWatch | None = None

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("transition", "shape", "hold", "allow_causal")
        return super().config() | vars(self.options) | {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Where the transition of this run began: 1, unless an earlier ``fit`` had got further."""
        return super().state_dict() | ({"start": self._start} if self.enabled else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the transition of the run that is resumed."""
        self._start, self._resumed = float(state_dict["start"]), True

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule, before anything trains."""
        super().on_fit_start(trainer, pl_module)
        if not self.enabled:
            return
        estimate = trainer.estimated_stepping_batches
        if estimate == 0:
            return
        self._total = int(estimate) if estimate != float("inf") else None
        first, length = transition_steps(self._total, hold=self.hold, length=self.transition)
        self._norms = list(blend_norms(pl_module).values())
        if not self._resumed:  # a further fit goes on from where the last one ended
            self._start = max(float(norm.lam) for norm in self._norms)
        self._resumed = False
        self._write(trainer.global_step)
        self._handles = _capture_padding(pl_module)
        rank_zero_info(
            f"{type(self).__name__}: {len(self._norms)} norms become {self.options.target} over steps {first} to "
            f"{first + length} of {self._total if self._total is not None else 'an open run'}."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the blend for this step; watch the first forward for causal attention."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.enabled:
            return
        self._write(trainer.global_step)
        uses_batch = any(norm.target.batch_statistics for norm in self._norms)
        if self._watch is None and uses_batch and not self.allow_causal and not self.options.frozen:
            self._watch = CausalWatch()
            self._watch.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forwards from here are recomputations; after the very first, nothing was learned from the future yet."""
        self._end_watch()
        self._collect(False)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forwards count again."""
        self._collect(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the blend."""
        self._end_watch()
        if self.enabled and not trainer.barebones:
            pl_module.log(f"efficient/{self.method}/lam", self._lam(trainer.global_step), on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on running statistics over processes, and on the blend, which an averaged copy would average."""
        if self.enabled and trainer.state.fn == "fit":
            self._write(trainer.global_step)
            if trainer.world_size > 1:
                for norm in self._norms:
                    for buffer in norm.target.buffers():
                        if buffer.is_floating_point():
                            buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Once more, after an averaged model has been swapped in."""
        if self.enabled and batch_idx == 0 and trainer.state.fn == "fit":
            self._write(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The blend that the last step leads to."""
        if self._norms:
            self._write(trainer.global_step)
            if (lam := self._lam(trainer.global_step)) > 0:
                rank_zero_warn(
                    f"{type(self).__name__}: training ended at step {trainer.global_step} with lam = {lam:.3f}, in the "
                    "middle of the transition: the old norms are still needed. Shorten `transition` to finish."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook and no mode behind."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook and no mode behind."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def _lam(self, step: int) -> float:
        lam = transition(step, self._total, hold=self.hold, length=self.transition, shape=self.shape)
        return self._start * lam

    def _write(self, step: int) -> None:
        lam = self._lam(step)
        first, _ = transition_steps(self._total, hold=self.hold, length=self.transition)
        for norm in self._norms:
            if self.options.init == "copy" and step == first > 0 and self._start == 1.0:
                norm.recopy()
            if norm.target.calibrates:
                norm.target.calibrating = lam == 1.0 or (first == 0 and lam > 0.0)
            if lam > 0:
                norm.resume(lam)
            elif norm.phase != "target":
                norm.finish()

    def _collect(self, collect: bool) -> None:
        for norm in self._norms:
            norm.target.collect = collect

    def _end_watch(self) -> None:
        if self._watch is not None and self._watch.active:
            self._watch.__exit__(None, None, None)
            if self._watch.seen:
                raise CausalAttentionError(self._watch.seen, self.options.target)

    def _release(self) -> None:
        self._collect(True)
        for handle in self._handles:
            handle.remove()
        if self._watch is not None and self._watch.active:
            self._watch.__exit__(None, None, None)
        self._handles, self._norms, self._watch = [], [], None


def _capture_padding(model: nn.Module) -> list[RemovableHandle]:
    """Hooks that hand padding masks, given to any module by keyword, to the swapped norms inside it."""

    def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if (mask := _valid_rows(kwargs)) is not None:
            for norm in blend_norms(module).values():
                norm.mask = mask

    def after(module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        if _valid_rows(kwargs) is not None:
            for norm in blend_norms(module).values():
                norm.mask = None

    handles = []
    for module in model.modules():
        if not isinstance(module, BlendNorm) and blend_norms(module):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    return handles


def _valid_rows(kwargs: Mapping[str, Any]) -> Tensor | None:
    """True where a token counts: Hugging Face masks keep what is 1, ``nn.Transformer`` masks drop what is True."""
    keep = kwargs.get("attention_mask")
    if isinstance(keep, Tensor) and keep.dim() == 2 and not keep.is_floating_point():
        return keep != 0
    drop = kwargs.get("src_key_padding_mask")
    if isinstance(drop, Tensor) and drop.dim() == 2 and drop.dtype == torch.bool:
        return ~drop
    return None
