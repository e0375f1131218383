"""RepBN: BatchNorm with a learned identity branch (SLAB, ICML 2024, arXiv 2405.11582)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from lightning_efficient.norms.base import Target, widened
from lightning_efficient.norms.plain import Affine


class RepBN(Target):
    """``BatchNorm(x) + eta · x`` (section 3.1 of the paper; ``classification/models/prepbn.py``, where eta is alpha).

    With ``s = sqrt(running_var + eps)`` evaluation is ``(gamma / s + eta) x + (beta - gamma · running_mean / s)``.
    Differences from the published module: rows instead of (batch, tokens, channels); rows can be masked; a batch of one
    row uses the running statistics instead of failing.

    Args:
        channels: Size of the channel axis.
        eta: Start of the learned scalar (1 in the paper).
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
    """

    batch_statistics = True

    def __init__(self, channels: int, eta: float = 1.0, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels)
        # A real BatchNorm, so that convert_sync_batchnorm finds it.
        self.bn = nn.BatchNorm1d(channels, eps=eps, momentum=momentum)
        self.eta = nn.Parameter(torch.full((1,), float(eta)))
        self._suspended: dict[str, Any] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize rows (tokens, channels), with the statistics of those in ``mask`` (tokens,); None: of all."""
        if not self.bn.training or self.frozen or (x.shape[0] < 2 and self._group() is None):
            scale, shift = self._coefficients()
            return torch.addcmul(shift, x, scale).to(x.dtype)
        if mask is None and self.group is not None:
            mask = x.new_ones(len(x), dtype=torch.bool)
        y = self._normalize(x) if mask is None else self._normalize_masked(x, mask)
        return torch.addcmul(y, x, self.eta.to(x.dtype))

    @property
    def pools(self) -> bool:
        """Also as a SyncBatchNorm."""
        return self._group() is not None

    def affine(self) -> Affine:
        """Evaluation, as a float64 map of each channel."""
        scale, shift = self._coefficients(torch.float64)
        return Affine(scale.detach(), shift.detach())

    @torch.no_grad()
    def copy_affine(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Take over a trained norm's scale and shift as gamma and beta; eta stays."""
        self.bn.weight.copy_(torch.ones_like(self.bn.weight) if scale is None else scale)
        self.bn.bias.copy_(torch.zeros_like(self.bn.bias) if shift is None else shift)

    def begin_recalibration(self) -> None:
        """Reset the statistics and average over batches (``momentum=None``); BatchNorm goes to training mode."""
        bn = self.bn
        self._suspended = {
            "statistics": [b.clone() for b in bn.buffers()],
            "state": (bn.momentum, bn.training, self.frozen, self.collect),
        }
        bn.reset_running_stats()
        bn.momentum = None
        bn.train()
        self.frozen, self.collect = False, True

    def end_recalibration(self, keep: bool = True) -> bool:
        """Undo ``begin_recalibration``; keep the averages if asked and if there are any."""
        bn, before = self.bn, self._suspended
        bn.momentum, training, self.frozen, self.collect = before["state"]
        bn.train(training)
        fresh = keep and int(cast(Tensor, bn.num_batches_tracked)) > 0
        if not fresh:
            for buffer, old in zip(bn.buffers(), before["statistics"], strict=True):
                buffer.copy_(old)
        self._suspended = {}
        return fresh

    def has_statistics(self) -> bool:
        """Whether mean and variance are any but (0, 1), or the user keeps the BatchNorm in evaluation mode."""
        mean, var, _ = self._running()
        return not self.bn.training or bool((mean != 0).any() or (var != 1).any())

    def _running(self) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, count = self.bn.running_mean, self.bn.running_var, self.bn.num_batches_tracked
        return cast(Tensor, mean), cast(Tensor, var), cast(Tensor, count)

    def _coefficients(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        mean, var, _ = self._running()
        values = (self.bn.weight, self.bn.bias, self.eta, mean, var)
        gamma, beta, eta, mean, var = (widened(v) if dtype is None else v.to(dtype) for v in values)
        scale = gamma * torch.rsqrt(var + self.bn.eps)
        return scale + eta, beta - scale * mean

    def _normalize(self, x: Tensor) -> Tensor:
        # The module itself is called, because it may have become a SyncBatchNorm.
        instead = {n: p.float() for n, p in self.bn.named_parameters() if widened(p) is not p}
        if not self.collecting():
            instead |= {name: buffer.clone() for name, buffer in self.bn.named_buffers()}
        y: Tensor = functional_call(self.bn, instead, (x,)) if instead else self.bn(x)
        return y

    def _normalize_masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """BatchNorm with the statistics of some rows; without dynamic shapes or a look at the mask's values."""
        wide, valid = widened(x), mask[:, None]
        # Padded rows may hold anything, NaN included, so they are taken out rather than multiplied by zero.
        total, n = self._sum(torch.where(valid, wide, 0).sum(0), valid.sum().to(wide.dtype))
        center = total / n.clamp(min=1)
        (squares,) = self._sum(torch.where(valid, wide - center, 0).square().sum(0))
        if self.collecting():
            self._update(center.detach(), (squares / (n - 1).clamp(min=1)).detach(), n > 1)
        mean, var, _ = self._running()
        center = torch.where(n > 1, center, mean.to(wide.dtype))
        spread = torch.where(n > 1, squares / n.clamp(min=1), var.to(wide.dtype))
        scale = widened(self.bn.weight) * torch.rsqrt(spread + self.bn.eps)
        return torch.addcmul(widened(self.bn.bias) - scale * center, wide, scale).to(x.dtype)

    def _update(self, mean: Tensor, var: Tensor, enough: Tensor) -> None:
        """What BatchNorm does to its buffers, unless there were not ``enough`` rows."""
        running_mean, running_var, batches = self._running()
        batches += enough
        share: Any = self.bn.momentum
        if share is None:
            share = batches.clamp(min=1).to(running_mean.dtype).reciprocal()
        for running, new in ((running_mean, mean), (running_var, var)):
            running.copy_(torch.where(enough, torch.lerp(running, new.to(running.dtype), share), running))

    def _group(self) -> dist.ProcessGroup | None:
        """The processes whose statistics are pooled; None: this one's alone."""
        if self.group is not None:
            return self.group
        if not isinstance(self.bn, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.bn.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        group = self._group()
        return values if group is None else tuple(_SumOverProcesses.apply(v, group) for v in values)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce: every process's loss depends on every process's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
