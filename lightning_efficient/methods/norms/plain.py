"""Finished norms as modules of torch alone: small ``torch.fx`` graphs that pickle, export and load without us."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Affine(NamedTuple):
    """``y = scale · x + shift`` for each channel: two float64 vectors (channels,)."""

    scale: Tensor
    shift: Tensor


def affine_module(affine: Affine, axis: int, like: Tensor) -> nn.Module:
    """One fused multiply-add, with parameters ``weight`` (the scale) and ``bias`` (the shift).

    Args:
        affine: The map.
        axis: Axis of the channels: -1, or 1 of images (batch, channels, height, width).
        like: Dtype and device of the parameters.
    """
    root = _root(axis, like, weight=affine.scale, bias=affine.shift)
    return _module(root, "FusedAffine", lambda x, p: torch.addcmul(p["bias"], x, p["weight"]))


def tanh_module(scale: Tensor, shift: Tensor | None, alpha: Tensor, axis: int) -> nn.Module:
    """``weight · tanh(alpha · x) + bias``.

    Args:
        scale: Factor per channel.
        shift: Summand per channel; None for none.
        alpha: Factor inside, shape (1,).
        axis: Axis of the channels, -1 or 1.
    """
    root = _root(axis, scale, weight=scale, bias=shift)
    root.alpha = nn.Parameter(alpha.detach().clone())

    def forward(x: fx.Proxy, p: dict[str, fx.Proxy]) -> fx.Proxy:
        y = torch.tanh(torch.mul(x, p["alpha"]))
        return _scaled(y, p)

    return _module(root, "DynamicTanh", forward)


def rms_module(scale: Tensor, shift: Tensor | None, eps: float | None, axis: int) -> nn.Module:
    """``weight · x / rms(x) + bias``: ``nn.RMSNorm`` where that says it all.

    Args:
        scale: Factor per channel.
        shift: Summand per channel; None for none.
        eps: Added to the mean square; None: machine epsilon of the input.
        axis: Axis of the channels, -1 or 1.
    """
    channels = scale.numel()
    if axis == -1 and shift is None:
        norm = nn.RMSNorm(channels, eps=eps, device=scale.device, dtype=scale.dtype)
        norm.weight = nn.Parameter(scale.detach().clone())
        return norm
    root = _root(axis, scale, weight=scale, bias=shift)

    def forward(x: fx.Proxy, p: dict[str, fx.Proxy]) -> fx.Proxy:
        rows = x if axis == -1 else torch.movedim(x, axis, -1)
        y = F.rms_norm(rows, [channels], None, eps)
        return _scaled(y if axis == -1 else torch.movedim(y, -1, axis), p)

    return _module(root, "RMSNorm", forward)


def _scaled(y: fx.Proxy, p: dict[str, fx.Proxy]) -> fx.Proxy:
    return torch.addcmul(p["bias"], y, p["weight"]) if "bias" in p else torch.mul(y, p["weight"])


def _root(axis: int, like: Tensor, **vectors: Tensor | None) -> nn.Module:
    root = nn.Module()
    for name, vector in vectors.items():
        if vector is not None:
            value = vector.detach().to(like.device, like.dtype, copy=True)
            root.register_parameter(name, nn.Parameter(value if axis == -1 else value[:, None, None]))
    return root


def _module(root: nn.Module, name: str, forward: Callable[[fx.Proxy, dict[str, fx.Proxy]], fx.Proxy]) -> nn.Module:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    parameters = {key: fx.Proxy(graph.get_attr(key), tracer) for key, _ in root.named_parameters()}
    graph.output(forward(x, parameters).node)
    return fx.GraphModule(root, graph, class_name=name)
