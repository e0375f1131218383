"""What a unit is worth: five scores of its weights and their gradients, for every unit of a network at once.

A unit's weights ``x`` are all entries of the parameters that make it, and ``g`` the gradients of the same entries:

==================  ===========================  =============================================================
``magnitude``       ``‖x‖``                      small weights do little
``avg_magnitude``   ``‖x‖ / n``                  the same, a weight of the unit (it has ``n``)
``cosine``          ``1 - cos(x, g)``            low if shrinking the unit, ``-x``, is a way down the loss, ``-g``
``taylor1``         ``|⟨x, g⟩|``                 how much the loss changes without the unit, to first order
``taylor2``         ``½ ⟨x, g⟩²``                to second order, with the gradient's square for the curvature
==================  ===========================  =============================================================

Each is divided by its norm over all units that compete, and their weighted sum is the saliency.

Source: HESSO, Chen et al. 2024, arXiv 2409.09085. The published code scores ``cos + 1``; a step of gradient descent
moves along ``-g``, so that would keep the units that training is shrinking, and prune those that it grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.pruning.groups import UnitGroup

CRITERIA = ("magnitude", "avg_magnitude", "cosine", "taylor1", "taylor2")


@dataclass(frozen=True, eq=False)
class UnitSums:
    """What the criteria need to know of every unit of a group.

    Args:
        xx: ``‖x‖²``, ``(units,)``.
        gg: ``‖g‖²``, likewise.
        xg: ``⟨x, g⟩``, likewise.
        entries: ``n``, how many weights a unit has.
    """

    xx: Tensor
    gg: Tensor
    xg: Tensor
    entries: int


def check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of every criterion; None: the same for all.

    Raises:
        ValueError: A name is unknown, a weight negative, or all of them zero.
    """
    if weights is None:
        return dict.fromkeys(CRITERIA, 1 / len(CRITERIA))
    for name, weight in weights.items():
        if name not in CRITERIA:
            raise ValueError(f"`saliency` names {name!r}; the criteria are {', '.join(CRITERIA)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"`saliency[{name!r}]` must be a number from 0; got {weight!r}.")
    if not any(weights.values()):
        raise ValueError(f"`saliency`={dict(weights)} gives no criterion a weight, so nothing can be ranked.")
    return {name: float(weights.get(name, 0.0)) for name in CRITERIA}


@torch.no_grad()
def unit_sums(group: UnitGroup, params: Mapping[str, Tensor], grads: Mapping[str, Tensor | None]) -> UnitSums:
    """Sum the entries of every unit, over all parameters that make it.

    Args:
        group: The units.
        params: Name → parameter; slices of names that are not in it (buffers) do not count.
        grads: Name → its gradient; None or missing counts as zero.

    Raises:
        ValueError: No parameter makes the units.
    """
    xx = gg = xg = torch.zeros(())
    entries = 0
    for part in group.produced:
        if part.name not in params:
            continue
        x = _lines(params[part.name], part.dim)
        index = part.index.to(x.device)
        grad = grads.get(part.name)
        entries += index.shape[1] * x.shape[1]
        xx = xx.to(x.device) + x.square().sum(1)[index].sum(1)
        if grad is None:
            gg, xg = gg.to(x.device).expand_as(xx), xg.to(x.device).expand_as(xx)
        else:
            g = _lines(grad, part.dim)
            gg = gg.to(x.device) + g.square().sum(1)[index].sum(1)
            xg = xg.to(x.device) + (x * g).sum(1)[index].sum(1)
    if not entries:
        raise ValueError(f"{group.name!r} has no parameter to score its units by.")
    return UnitSums(xx, gg, xg, entries)


def _lines(tensor: Tensor, dim: int) -> Tensor:
    """One row an entry along ``dim``, in float32 or wider."""
    wide = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return wide.movedim(dim, 0).reshape(wide.shape[dim], -1)


def criteria_of(sums: UnitSums) -> dict[str, Tensor]:
    """The five criteria of every unit, not yet normalised.

    Args:
        sums: Of a group.

    Returns:
        Criterion → ``(units,)``.
    """
    magnitude = sums.xx.sqrt()
    norms = magnitude * sums.gg.sqrt()
    cosine = torch.where(norms > 0, sums.xg / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    return {
        "magnitude": magnitude,
        "avg_magnitude": magnitude / sums.entries,
        "cosine": 1 - cosine.clamp(-1, 1),
        "taylor1": sums.xg.abs(),
        "taylor2": sums.xg.square() / 2,
    }


@torch.no_grad()
def saliency(
    groups: Iterable[UnitGroup],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor | None],
    weights: Mapping[str, float] | None = None,
    competing: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The saliency of every unit; the lowest are redundant.

    Args:
        groups: All units that compete.
        params: Name → parameter, as the network uses it.
        grads: Name → gradient of the loss with respect to it; None where there is none.
        weights: Criterion → its weight in the sum; None: 0.2 each.
        competing: Group → bool, ``(units,)``: those that count in the norms. None: all.

    Returns:
        Group → ``(units,)``, on the CPU in float32 or wider. Units that are zero already have a saliency of 0.

    Raises:
        ValueError: As :func:`check_weights` and :func:`unit_sums`.
    """
    shares = check_weights(weights)
    sums = {group.name: unit_sums(group, params, grads) for group in groups}
    criteria = {name: {key: value.cpu() for key, value in criteria_of(s).items()} for name, s in sums.items()}
    total = {name: torch.zeros_like(values["magnitude"]) for name, values in criteria.items()}
    for criterion, share in shares.items():
        if not share:
            continue
        everyone = [
            values[criterion] if competing is None else values[criterion][competing[name]]
            for name, values in criteria.items()
        ]
        norm = torch.linalg.vector_norm(torch.cat(everyone)) if everyone else torch.zeros(())
        if norm == 0:  # no gradients anywhere
            continue
        for name, values in criteria.items():
            total[name] += share * values[criterion] / norm
    return {name: value.masked_fill(sums[name].xx.cpu() == 0, 0.0) for name, value in total.items()}
