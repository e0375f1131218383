"""``PaddingReport``: how much of every batch is padding, what it costs, and what to do about it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_efficient.common.nests import named_tensors
from lightning_efficient.companions.lengths import sequence_cost
from lightning_efficient.companions.padding import EpochPadding, TokenMask, plot_padding
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.trainer.masks import Look, known_mask, named_mask
from lightning_efficient.trainer.showing import show_picture, show_text

# Batches that are looked at before it is said that there is no mask: the first ones may have no padding.
_TRIES = 10


class PaddingReport(EfficientCallback):
    """Report how much of every training batch is padding and what that costs; changes nothing.

    The mask of a batch (any nest of mappings, sequences and dataclasses) is ``attention_mask``, or what ``mask`` or
    ``pad_id`` say; else the tensor by whose hidden tokens the loss does not move when they are exchanged, while it
    moves with the others: found in the first batches, by a few steps outside the loop. Cost is that of a Transformer,
    l + l² / (6 d) for l tokens.

    Logs, under ``efficient/padding_report/``: on the Trainer's logging steps ``batch_fill``, the share of tokens that
    are no padding; every epoch ``fill``, ``wasted`` (share of the compute that goes into padding), ``wasted_flops``,
    and under several processes ``imbalance`` (largest over mean cost of a process, mean over steps). TensorBoard also
    gets a histogram of the batches and of the lengths. After the first epoch, :attr:`advice` says it in words, and is
    printed. Losses, weights and random numbers are those of a run without the report, to the bit.

    Args:
        enabled: ``False`` leaves the run bit-identical to one without the callback.
        mask: Name of the tensor in the batch, keys and positions joined by dots (``"1.pad"``), or its end: a mask, the
            lengths of the samples (one axis), or with ``pad_id`` the tokens. ``None``: found.
        keeps: What the mask says of tokens that count, ``"nonzero"`` or ``"zero"``. ``None``: found.
        pad_id: The token that is padding.
        d_model: Width of the model. ``None``: that of most outputs (samples, tokens, width) in a step.

    Raises:
        ValueError: An argument out of range, or ``keeps`` without ``mask``; later: a batch has no tensor ``mask``.
    """

    method = "padding_report"
    changes_weights = False

    def __init__(
        self,
        enabled: bool = True,
        mask: str | None = None,
        keeps: Literal["nonzero", "zero"] | None = None,
        pad_id: int | None = None,
        d_model: float | None = None,
    ) -> None:
        super().__init__(enabled)
        if keeps is not None and mask is None:
            raise ValueError(
                f"`keeps` is {keeps!r} and `mask` is None; expected the name of the mask that it is about."
            )
        if d_model is not None and d_model <= 0:
            raise ValueError(f"`d_model` is {d_model}; expected more than 0.")
        self.mask, self.keeps, self.pad_id, self.d_model = mask, keeps, pad_id, d_model
        self.advice = ""
        self.restart()

    def config(self) -> dict[str, Any]:
        """The arguments of this callback as plain data."""
        names = ("enabled", "mask", "keeps", "pad_id", "d_model")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on having been watched."""
        return {}

    def restart(self) -> None:
        """Forget the last fit."""
        self._found: TokenMask | None = None
        self._tries = 0
        self._width = self.d_model
        self._flops: float | None = None
        self._seen: list[tuple[Tensor, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read the mask of the batch, once it is known which."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.enabled or (self._found is None and not self._find(trainer, pl_module, batch, batch_idx)):
            return
        assert self._found is not None
        tensor = dict(named_tensors(batch)).get(self._found.name)
        if tensor is not None:
            self._seen.append(self._found.lengths(tensor.detach()))

    def _find(self, trainer: Trainer, pl_module: LightningModule, batch: Any, number: int) -> bool:
        if self._tries >= _TRIES:
            return False
        self._tries += 1
        look = Look(trainer, pl_module, batch, number)
        if self.mask is None:
            found = known_mask(batch, self.pad_id)
        else:
            found = named_mask(batch, self.mask, self.keeps, self.pad_id)
        # A step may communicate, and processes with other batches would ask a different number of times.
        if found is None and trainer.world_size == 1:
            found = look.mask(self.mask)
        if found is None:
            if self._tries == _TRIES:
                rank_zero_warn(
                    f"PaddingReport: no mask of padding was found in the first {_TRIES} batches, and nothing is "
                    "reported. Name it (mask='...', keeps='nonzero' or 'zero'), or the token (pad_id=...)"
                    f"{': several processes do not try' if trainer.world_size > 1 else ''}."
                )
            return False
        self._found = found
        lengths, padded = found.lengths(dict(named_tensors(batch))[found.name].detach())
        width, flops = look.size((len(lengths), padded))
        self._width = self._width or width
        if flops is not None:
            whole = sequence_cost(torch.tensor(float(padded)), self._width or float("inf")) * len(lengths)
            self._flops = flops / float(whole)
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the fill of the batch, on logging steps."""
        if self.enabled and self._seen and self.logs_now(trainer, pl_module):
            lengths, padded = self._seen[-1]
            fill = float(lengths.sum()) / (len(lengths) * padded)
            for logger in trainer.loggers:
                logger.log_metrics({f"{self.prefix}/batch_fill": fill}, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of the epoch; the first time, say what to do."""
        seen, self._seen = self._seen, []
        if not self.enabled or not seen or trainer.barebones:
            return
        lengths = [some.cpu().double() for some, _ in seen]
        epoch = EpochPadding(lengths, [padded for _, padded in seen], self._width, self._flops)
        for name, value in self._figures(trainer, pl_module, epoch).items():
            pl_module.log(f"{self.prefix}/{name}", value, on_step=False, on_epoch=True)
        if trainer.is_global_zero:
            show_picture(trainer.loggers, f"{self.prefix}/batches", partial(plot_padding, epoch), trainer.global_step)
        if not self.advice:
            self.advice = epoch.advice()
            if trainer.is_global_zero:
                show_text(trainer.loggers, f"{self.prefix}/advice", self.advice, trainer.global_step)
            rank_zero_info(f"PaddingReport: {self.advice}")

    def _figures(self, trainer: Trainer, pl_module: LightningModule, epoch: EpochPadding) -> dict[str, float]:
        sums = torch.tensor([*epoch.tokens, *epoch.costs], device=pl_module.device, dtype=torch.float32)
        real, full, cost, whole = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        figures = {"fill": real / full, "wasted": 1 - cost / whole}
        if epoch.flops is not None:
            figures["wasted_flops"] = epoch.flops * (whole - cost)
        if trainer.world_size > 1:
            each = [len(some) * float(sequence_cost(torch.tensor(float(n)), epoch.width)) for some, n in epoch.pairs]
            mine = torch.tensor(each, device=pl_module.device)
            most = -trainer.strategy.reduce(-mine, reduce_op="min")
            figures["imbalance"] = float((most / trainer.strategy.reduce(mine.clone(), reduce_op="mean")).mean())
        return figures
