"""The simpler norms that a layer norm or RMS norm can be traded for; ``RepBN`` and ``UnifiedNorm`` have their files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.norms.base import Scaled, pooled, widened
from lightning_efficient.norms.plain import Affine, rms_module, tanh_module


class FixedAffine(Scaled):
    """``c · weight · x + bias``: without statistics, so that neither batch nor future leaks in (TaperNorm, 2602.10408).

    ``c`` is one number, the least-squares fit of ``c · weight · x`` to what the source makes of ``x``, less its bias:
    ``c = EMA[Σ (w x) · (y - b)] / EMA[Σ (w x)²]``. For an RMS norm that is ``EMA[Σ (w x)² / rms] / EMA[Σ (w x)²]``. The
    averages grow in ``calibrate``; while ``calibrating``, each training forward uses what the ones before it found, so
    that a recomputed forward repeats the first. ``c`` is not trained. Before any calibration it is 1.

    Args:
        channels: Size of the channel axis.
        bias: Whether there is a bias (the source has one).
        decay: Share of the old value in the moving averages; both start at 0, which cancels in their ratio.
    """

    calibrates = True
    c: Tensor
    product: Tensor
    power: Tensor

    def __init__(self, channels: int, bias: bool = True, decay: float = 0.99) -> None:
        super().__init__(channels, bias)
        self.decay = decay
        self.register_buffer("c", torch.ones(()))
        self.register_buffer("product", torch.zeros(()))
        self.register_buffer("power", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale and shift rows (tokens, channels); ``mask`` does not matter."""
        if self.calibrating and self.training and self.collecting():
            self._settle()
        return self.scaled(x, self.c * self.weight)

    def affine(self) -> Affine:
        """Evaluation, as a float64 map of each channel."""
        weight = self.weight.detach().double()
        shift = torch.zeros_like(weight) if self.bias is None else self.bias.detach().double()
        return Affine(self.c.double() * weight, shift)

    @torch.no_grad()
    def copy_affine(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Take over a trained norm's scale and shift, and what calibration has found out since."""
        super().copy_affine(scale, shift)
        self._settle()

    @torch.no_grad()
    def calibrate(self, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None) -> None:
        """Add a batch to the moving averages of ``Σ (w x) · (y - b)`` and ``Σ (w x)²``."""
        if not self.collecting():
            return
        x, y = widened(x.detach()), widened(y.detach())
        wx = x if scale is None else x * scale
        centered = y if shift is None else y - shift
        rows = (wx * centered).sum(1), wx.square().sum(1)
        sums = [(terms if mask is None else torch.where(mask, terms, 0)).sum() for terms in rows]
        for average, found in zip((self.product, self.power), pooled(self.group, *sums), strict=True):
            average.lerp_(found.to(average.dtype), 1 - self.decay)

    @torch.no_grad()
    def _settle(self) -> None:
        self.c.copy_(torch.where(self.power > 0, self.product / self.power, self.c))


class DynamicTanh(Scaled):
    """``weight · tanh(alpha · x) + bias`` (DyT, arXiv 2503.10622): elementwise, not foldable.

    Args:
        channels: Size of the channel axis.
        bias: Whether there is a bias (the source has one).
        alpha: Start of the learned scalar (0.5 in the paper; much less for wide language models).
    """

    def __init__(self, channels: int, bias: bool = True, alpha: float = 0.5) -> None:
        super().__init__(channels, bias)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Squash rows (tokens, channels); ``mask`` does not matter."""
        return self.scaled(torch.tanh(x * self.alpha.to(x.dtype)), self.weight)

    def plain(self, axis: int) -> nn.Module:
        """The same function as a graph of torch functions."""
        return tanh_module(self.weight, self.bias, self.alpha, axis)


class RMS(Scaled):
    """``weight · x / sqrt(mean(x²) + eps) + bias``: a layer norm without its centering (RMSNorm, arXiv 1910.07467).

    Args:
        channels: Size of the channel axis.
        bias: Whether there is a bias (the source has one).
        eps: Added to the mean square; None: machine epsilon of the input.
    """

    def __init__(self, channels: int, bias: bool = True, eps: float | None = 1e-5) -> None:
        super().__init__(channels, bias)
        self.eps = eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize each row (tokens, channels); ``mask`` does not matter."""
        return self.scaled(F.rms_norm(x, [self.channels], None, self.eps).to(x.dtype), self.weight)

    def plain(self, axis: int) -> nn.Module:
        """The same function as a graph of torch's own."""
        return rms_module(self.weight, self.bias, self.eps, axis)
