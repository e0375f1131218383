"""Unified Normalization (Yang et al., ACM MM 2022, arXiv 2208.01313), from its equations and its published code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.norms.base import Scaled, pooled, widened
from lightning_efficient.norms.plain import Affine

# The published code leaves gradients uncompensated for this many iterations, however short the warm-up.
UNCOMPENSATED = 1000


class Decision(NamedTuple):
    """What one training forward decided: all tensors, so that no value is ever waited for.

    Args:
        var: Mean square used to normalize, (channels,).
        ratio: Gradient compensation, (channels,).
        plain: Whether the statistics of this batch alone count, 0-dim bool.
        skip: Whether the batch was an outlier, 0-dim bool.
        row: Which row of the windows belongs to this iteration, (window, 1) bool.
    """

    var: Tensor
    ratio: Tensor
    plain: Tensor
    skip: Tensor
    row: Tensor


class UnifiedNorm(Scaled):
    """``weight · x / sqrt(v + eps) + bias``, ``v`` a smoothed mean square per channel over all tokens; no centering.

    Training, iteration ``t`` from 1, ``x2 = mean(x²)`` over tokens, windows of the last ``window`` iterations:

    - fluctuation smoothing: ``v`` is the geometric mean of the window of ``x2`` (``x2`` itself in warm-up);
    - outlier filtration: if arithmetic - geometric mean > window · Var(sqrt(window before this batch)) for any channel,
      the batch is skipped: ``v = x2``, and the running value takes its place in the window;
    - gradient smoothing: the backward pass takes out ``z`` times a moving average of windowed means of ``g · z``
      instead of this batch's mean, with ``g`` compensated by ``sqrt(v / running_var)`` within [1/5, 5].

    Deviations from the published code: with a mask, padded rows also stay out of the backward means; nothing waits for
    the device; with a ``group`` both means are over the rows of all its processes, whose losses are averaged. In a
    recomputed forward (activation checkpointing) the last decision is used again: do not combine that with one module
    called several times in a step. One row alone has no statistics worth the name and uses the running ones.

    Args:
        channels: Size of the channel axis.
        window: Iterations in either window.
        warmup: Iterations before smoothing.
        filtration: Skip outliers (published setting for vision; off for language).
        per_channel: Take the variance of the filter for each channel, as the paper's equation reads, not over the whole
            window, as its code does.
        momentum: Share of the old value in the running averages.
        eps: Added to the mean square.

    Raises:
        ValueError: The window is shorter than 2, or longer than the warm-up (it must be full before it is used).
    """

    batch_statistics = True
    running_var: Tensor
    ema: Tensor
    squares: Tensor
    products: Tensor
    iterations: Tensor
    skipped: Tensor

    def __init__(
        self,
        channels: int,
        window: int = 4,
        warmup: int = 4000,
        filtration: bool = True,
        per_channel: bool = False,
        momentum: float = 0.9,
        eps: float = 1e-5,
    ) -> None:
        if not 2 <= window <= warmup:
            raise ValueError(f"UnifiedNorm needs 2 <= window <= warmup; got window={window}, warmup={warmup}.")
        super().__init__(channels)
        self.window, self.warmup, self.filtration, self.per_channel = window, warmup, filtration, per_channel
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema", torch.zeros(channels))
        self.register_buffer("squares", torch.zeros(window, channels))
        self.register_buffer("products", torch.zeros(window, channels))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self._last: Decision | None = None
        self._suspended: list[Tensor] | None = None
        self._averaged = 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize rows (tokens, channels), with the statistics of those in ``mask`` (tokens,); None: of all."""
        if self._suspended is not None:
            return self._average(x, mask)
        if not self.training or self.frozen or (x.shape[0] < 2 and self.group is None):
            return self.scaled(x, self._scale(self.running_var))
        if self.collecting() or self._last is None:
            self._last = self._decide(self._mean_square(x, mask))
        state = (self.products, self.ema, self.momentum, self.eps, mask, self.group)
        y: Tensor = _Smoothed.apply(x, self.weight, self.bias, *self._last, *state)
        return y

    def affine(self) -> Affine:
        """Evaluation, as a float64 map of each channel."""
        assert self.bias is not None
        return Affine(self._scale(self.running_var.double()).detach(), self.bias.detach().double())

    def _scale(self, var: Tensor) -> Tensor:
        return self.weight.to(var.dtype) * torch.rsqrt(var + self.eps)

    @torch.no_grad()
    def _decide(self, x2: Tensor) -> Decision:
        t = self.iterations.add_(1)
        roots = self.squares.sqrt()
        scatter = roots.var(0) if self.per_channel else roots.var()
        row = (torch.arange(self.window, device=x2.device) == t % self.window)[:, None]
        squares = torch.where(row, x2, self.squares)
        mean, geometric = squares.mean(0), squares.log().mean(0).exp()
        skip = (mean - geometric > self.window * scatter).any() & (t >= self.warmup) & self.filtration
        plain = (t < self.warmup) | (t <= self.window) | skip
        var = torch.where(plain, x2, geometric)
        ratio = ((var + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / 5, 5)
        ratio = torch.where((t <= max(UNCOMPENSATED, self.warmup)) | skip, 1.0, ratio)
        self.squares.copy_(torch.where(row & skip, self.running_var, squares))
        self.running_var.mul_(self.momentum).add_(var, alpha=1 - self.momentum)
        self.skipped.add_(skip)
        return Decision(var, ratio, plain, skip, row)

    def begin_recalibration(self) -> None:
        """Average ``mean(x²)`` over batches, and normalize each with its own, whatever mode the module is in."""
        self._suspended, self._averaged = [self.running_var.clone()], 0

    def end_recalibration(self, keep: bool = True) -> bool:
        """Undo ``begin_recalibration``; keep the average if asked and if there is one."""
        fresh = keep and self._averaged > 0
        if not fresh and self._suspended is not None:
            self.running_var.copy_(self._suspended[0])
        self._suspended = None
        return fresh

    def has_statistics(self) -> bool:
        """Whether the running mean square is any but 1."""
        return bool((self.running_var != 1).any())

    def _average(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x2 = self._mean_square(x, mask)
        self._averaged += 1
        self.running_var.lerp_(x2, 1 / self._averaged)
        return self.scaled(x, self._scale(x2))

    def _mean_square(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return _mean(x.detach().to(self.running_var.dtype).square(), mask, self.running_var, self.group)


def _mean(rows: Tensor, mask: Tensor | None, otherwise: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean of the rows that count, of all processes; ``otherwise`` where there are none."""
    if mask is None and group is None:
        return rows.mean(0)
    count = rows.new_tensor(len(rows)) if mask is None else mask.sum().to(rows.dtype)
    total, count = pooled(group, (rows if mask is None else torch.where(mask[:, None], rows, 0)).sum(0), count)
    return torch.where(count > 0, total / count.clamp(min=1), otherwise)


class _Smoothed(torch.autograd.Function):
    """The normalization with the published gradient, which is not the derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        decision, (products, ema, momentum, eps, mask, group) = Decision(*rest[:5]), rest[5:]
        inv = torch.rsqrt(decision.var + eps)
        ctx.save_for_backward(x, weight, inv, mask)
        ctx.decision, ctx.state, ctx.momentum, ctx.group = decision, (products, ema), momentum, group
        return torch.addcmul(widened(bias), x, widened(weight) * inv).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inv, mask = ctx.saved_tensors
        _, ratio, plain, skip, row = ctx.decision
        products, ema = ctx.state
        out, z = grads[0].to(inv.dtype), x.to(inv.dtype) * inv
        gain = widened(weight) * ratio
        rows = out * z
        # Of a loss that is averaged over processes each has the gradients of its part times their number.
        parts = 1 if ctx.group is None else dist.get_world_size(ctx.group)
        gz = _mean(rows, mask, torch.zeros_like(gain), ctx.group) * gain / parts
        products.copy_(torch.where(row, torch.where(skip, ema, gz), products))
        psi = torch.where(plain, gz, products.mean(0))
        ema.mul_(ctx.momentum).add_(psi, alpha=1 - ctx.momentum)
        gx = (out * gain - parts * torch.where(skip, psi, ema) * z) * inv
        return gx.to(x.dtype), (ratio * rows.sum(0)).to(weight.dtype), out.sum(0).to(weight.dtype), *[None] * 11
