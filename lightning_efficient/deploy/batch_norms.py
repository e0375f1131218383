"""Batch norms of an exported copy as what they are in evaluation mode: ``a * x + b`` for every channel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_efficient.common.match import modules_by_name
from lightning_efficient.folding.affine import Affine
from lightning_efficient.surgery.replace import replace_modules


def batch_norms(model: nn.Module) -> dict[str, Affine]:
    """Name → scale, shift and channel axis of every batch norm with running statistics.

    Those that bring an activation along (timm's ``BatchNormAct2d``) are taken apart first, into the norm and the
    modules inside it, in their order.

    Args:
        model: In evaluation mode; changed.
    """
    joined = {name: norm for name, norm in _norms(model).items() if any(True for _ in norm.children())}
    replace_modules(model, {name: nn.Sequential(_alone(norm), *norm.children()) for name, norm in joined.items()})
    return {name: _affine(norm) for name, norm in _norms(model).items()}


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    modules = modules_by_name(model)
    return {name: m for name, m in modules.items() if name and isinstance(m, _BatchNorm) and m.running_var is not None}


def _alone(norm: _BatchNorm) -> nn.Module:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kind = next((kind for kind in kinds if isinstance(norm, kind)), nn.SyncBatchNorm)
    plain = kind(norm.num_features, norm.eps, affine=norm.affine).to(norm.running_var)
    plain.load_state_dict({name: value for name, value in norm.state_dict().items() if "." not in name})
    return plain.eval()


def _affine(norm: _BatchNorm) -> Affine:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else norm.weight.detach().double())
    return scale, -scale * mean + (0.0 if norm.bias is None else norm.bias.detach().double()), 1
