"""Classifier heads that are not learned: simplex equiangular tight frames, exact or sparse (SSE-C of FedLoGe)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Of the sparse frame, as in the method's own code.
_STEPS = 10_000
_RATE = 1e-4
_NORM = 0.1
_EDGE = 0.99999


def simplex_etf(features: int, classes: int, sparsity: float = 0.0, *, steps: int = _STEPS, seed: int = 0) -> Tensor:
    """Vectors of classes that are as far apart as can be: all at the angle arccos(-1 / (classes - 1)).

    Args:
        features: Length of a vector, at least ``classes``.
        classes: At least 2.
        sparsity: Share of the entries that are zero, at random places. The other entries are then optimized (Adam) for
            equal lengths of 0.1 and largest angles. 0: the exact frame, of unit vectors.
        steps: Of that optimization.
        seed: Of a random generator of its own.

    Returns:
        ``(classes, features)`` float64, one vector a class: the weight of a linear layer.

    Raises:
        ValueError: An argument out of range, or zeros that leave a class without an entry.

    Source: Xiao et al., FedLoGe, ICLR 2024, arXiv 2401.08977 (SSE-C).
    """
    if not 2 <= classes <= features:
        raise ValueError(f"a simplex of {classes} classes in {features} features: expected 2 <= classes <= features.")
    if not 0 <= sparsity < 1 or steps < 1:
        raise ValueError(f"`sparsity` is {sparsity} and `steps` {steps}; expected 0 <= sparsity < 1 and steps from 1.")
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.rand(features, classes, generator=generator, dtype=torch.float64)).Q
    centring = torch.eye(classes, dtype=torch.float64) - 1 / classes
    frame: Tensor = math.sqrt(classes / (classes - 1)) * basis @ centring
    if sparsity == 0:
        return frame.t().contiguous()
    zero = torch.randperm(frame.numel(), generator=generator)[: int(sparsity * frame.numel())]
    mask = torch.ones(frame.numel(), dtype=torch.float64).index_fill_(0, zero, 0).view_as(frame)
    if not mask.any(0).all():
        raise ValueError(f"`sparsity` is {sparsity}, which leaves a class of {features} features without an entry.")
    return _spread(frame * mask, mask, steps).t().contiguous()


def _spread(start: Tensor, mask: Tensor, steps: int) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        frame = start.clone().requires_grad_()
        adam = torch.optim.Adam([frame], _RATE)
        own = torch.eye(frame.shape[1], dtype=torch.bool)
        for _ in range(steps):
            norms = frame.norm(dim=0)
            cosines = (frame.t() @ frame) / (norms[:, None] * norms).clamp_min(1e-12)
            nearest = cosines.masked_fill(own, -2).amax(1).clamp(-_EDGE, _EDGE)
            loss = (norms - _NORM).square().sum() - nearest.arccos().mean()
            (gradient,) = torch.autograd.grad(loss, frame)
            frame.grad = gradient * mask
            adam.step()
        return frame.detach()


def fix_head(head: nn.Linear, sparsity: float = 0.0, *, bias: str = "zero", steps: int = _STEPS, seed: int = 0) -> None:
    """Give a linear layer the vectors of a simplex, in place, and freeze it.

    Args:
        head: The layer.
        sparsity: See :func:`simplex_etf`.
        bias: ``"zero"``, or ``"keep"`` what it is; frozen either way.
        steps: See :func:`simplex_etf`.
        seed: See :func:`simplex_etf`.

    Raises:
        ValueError: As :func:`simplex_etf`, or an unknown ``bias``.
    """
    if bias not in ("zero", "keep"):
        raise ValueError(f"`bias` is {bias!r}; expected 'zero' or 'keep'.")
    weight = simplex_etf(head.in_features, head.out_features, sparsity, steps=steps, seed=seed)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None and bias == "zero":
            head.bias.zero_()
    for parameter in head.parameters():
        parameter.requires_grad_(False)
