"""Finished norms as modules of torch alone: small ``torch.fx`` graphs that pickle, export and load without us.

Their parameters are ``scale`` and ``shift``, never ``weight`` and ``bias``: a loader that builds the network as it was
would take those for a layer norm's, and the network would compute something else without a word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Affine(NamedTuple):
    """``y = scale · x + shift`` for each channel: two float64 vectors (channels,)."""

    scale: Tensor
    shift: Tensor


def affine_module(affine: Affine, axis: int, like: Tensor) -> nn.Module:
    """One fused multiply-add, with parameters ``scale`` and ``shift``.

    Args:
        affine: The map.
        axis: Axis of the channels: -1, or 1 of images (batch, channels, height, width).
        like: Dtype and device of the parameters.
    """
    scale, shift = (vector.to(like.device, like.dtype) for vector in affine)
    return _traced(FusedAffine(scale, shift, axis))


def tanh_module(scale: Tensor, shift: Tensor | None, alpha: Tensor, axis: int) -> nn.Module:
    """``scale · tanh(alpha · x) + shift``.

    Args:
        scale: Factor per channel.
        shift: Summand per channel; None for none.
        alpha: Factor inside, shape (1,).
        axis: Axis of the channels, -1 or 1.
    """
    return _traced(PlainTanh(scale, shift, alpha, axis))


def rms_module(scale: Tensor, shift: Tensor | None, eps: float | None, axis: int) -> nn.Module:
    """``scale · x / rms(x) + shift``.

    Args:
        scale: Factor per channel.
        shift: Summand per channel; None for none.
        eps: Added to the mean square; None: machine epsilon of the input.
        axis: Axis of the channels, -1 or 1.
    """
    return _traced(PlainRMS(scale, shift, eps, axis))


def _traced(module: FusedAffine) -> fx.GraphModule:
    """The module's graph, with a ``weight`` that is in no file: code around a norm asks for its dtype (Mamba)."""
    module.register_buffer("weight", module.scale.detach(), persistent=False)
    graph = fx.Tracer().trace(module)
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.get_attr("weight")  # or a copy of the graph would not have it
    return fx.GraphModule(module, graph)


def _parameter(vector: Tensor, axis: int) -> nn.Parameter:
    vector = vector.detach().clone()
    return nn.Parameter(vector if axis == -1 else vector[:, None, None])


# What follows is only ever traced: the graphs hold calls of torch functions and do not refer to these classes.


class FusedAffine(nn.Module):
    """``scale · x + shift``."""

    shift: nn.Parameter | None

    def __init__(self, scale: Tensor, shift: Tensor | None, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.scale = _parameter(scale, axis)
        self.shift = None if shift is None else _parameter(shift, axis)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x * self.scale if self.shift is None else torch.addcmul(self.shift, x, self.scale)


class PlainTanh(FusedAffine):
    """``scale · tanh(alpha · x) + shift``."""

    def __init__(self, scale: Tensor, shift: Tensor | None, alpha: Tensor, axis: int) -> None:
        super().__init__(scale, shift, axis)
        self.alpha = nn.Parameter(alpha.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Squash, scale and shift."""
        return super().forward(torch.tanh(x * self.alpha))


class PlainRMS(FusedAffine):
    """``scale · x / rms(x) + shift``."""

    def __init__(self, scale: Tensor, shift: Tensor | None, eps: float | None, axis: int) -> None:
        super().__init__(scale, shift, axis)
        self.channels, self.eps = scale.numel(), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, scale and shift."""
        rows = x if self.axis == -1 else x.movedim(self.axis, -1)
        y = F.rms_norm(rows, [self.channels], None, self.eps)
        return super().forward(y if self.axis == -1 else y.movedim(-1, self.axis))
