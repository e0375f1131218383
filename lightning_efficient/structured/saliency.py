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

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.common.registry import near
from lightning_efficient.common.shards import local
from lightning_efficient.structured.groups import Slice, UnitGroup
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.sums import run, total

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
            known = ", ".join(CRITERIA)
            raise ValueError(f"`saliency` names {name!r}{near(name, CRITERIA)}; the criteria are {known}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"`saliency[{name!r}]` must be a number from 0; got {weight!r}.")
    if not any(weights.values()):
        raise ValueError(f"`saliency`={dict(weights)} gives no criterion a weight, so nothing can be ranked.")
    return {name: float(weights.get(name, 0.0)) for name in CRITERIA}


@torch.no_grad()
def slice_sums(part: Slice, x: Tensor, grad: Tensor | None, layout: Layout) -> Tensor:
    """``‖x‖²``, ``‖g‖²`` and ``⟨x, g⟩`` of every unit's entries in one parameter, or in what is here of it.

    Args:
        part: Which entries belong to which unit.
        x: What is here of the parameter.
        grad: And of its gradient; None counts as zero.
        layout: How the parameter is cut.

    Returns:
        ``(3, units)``, in float32 or wider.
    """
    wide = _lines(x, part.dim)
    sums = wide.new_zeros(3, layout.shape[part.dim])
    here = layout.along(part.dim, sums.t()).t()
    here[0] = wide.square().sum(1)
    if grad is not None:
        g = _lines(grad, part.dim)
        here[1], here[2] = g.square().sum(1), (wide * g).sum(1)
    return sums[:, part.index.to(x.device)].sum(2)


@torch.no_grad()
def all_sums(
    groups: Iterable[UnitGroup], params: Mapping[str, Tensor], grads: Mapping[str, Tensor | None]
) -> dict[str, dict[str, Tensor]]:
    """The sums of every parameter that makes units; of those that are cut over processes, of what is here.

    Args:
        groups: The units.
        params: Name → parameter; slices of names that are not in it (buffers) do not count.
        grads: Name → what is here of its gradient; None or missing counts as zero.

    Returns:
        Parameter → ``"group:axis"`` → ``(3, units)``, in float32 or wider.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    layouts = {name: Layout.find(name, param) for name, param in params.items()}
    for group in groups:
        for part in group.produced:
            if (name := part.name) in params:
                found = slice_sums(part, local(params[name]), grads.get(name), layouts[name])
                sums.setdefault(name, {})[f"{group.name}:{part.dim}"] = found
    return sums


def over_processes(
    sums: Mapping[str, Mapping[str, Tensor]], params: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The sums of whole parameters from those of what is here: one all-reduce for all of them.

    Args:
        sums: From :func:`all_sums`; all processes have those of the same parameters.
        params: Name → parameter.

    Returns:
        The same, on the CPU.
    """
    layouts = {name: Layout.find(name, params[name]) for name in sums}
    found = iter(run(total(layouts[name], value) for name, of in sums.items() for value in of.values()))
    return {name: {key: next(found).cpu() for key in of} for name, of in sums.items()}


def unit_sums(
    group: UnitGroup, sums: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]]
) -> UnitSums:
    """Add up the sums of all parameters that make the units of a group.

    Args:
        group: The units.
        sums: From :func:`all_sums`, of whole parameters.
        shapes: Parameter → its shape.

    Raises:
        ValueError: No parameter makes the units.
    """
    parts = [part for part in group.produced if f"{group.name}:{part.dim}" in sums.get(part.name, {})]
    if not parts:
        raise ValueError(f"{group.name!r} has no parameter to score its units by.")
    total = torch.stack([sums[part.name][f"{group.name}:{part.dim}"] for part in parts]).sum(0)
    entries = sum(p.index.shape[1] * math.prod(shapes[p.name]) // shapes[p.name][p.dim] for p in parts)
    return UnitSums(total[0], total[1], total[2], entries)


def _lines(tensor: Tensor, dim: int) -> Tensor:
    """One row an entry along ``dim``, in float32 or wider."""
    wide = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return wide.movedim(dim, 0).reshape(wide.shape[dim], -1 if wide.numel() else 0)  # a part may have no entries


def criteria_of(sums: UnitSums, published: bool = False) -> dict[str, Tensor]:
    """The five criteria of every unit, not yet normalised.

    Args:
        sums: Of a group.
        published: ``cos + 1`` for the cosine.

    Returns:
        Criterion → ``(units,)``.
    """
    magnitude = sums.xx.sqrt()
    norms = magnitude * sums.gg.sqrt()
    cosine = torch.where(norms > 0, sums.xg / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    return {
        "magnitude": magnitude,
        "avg_magnitude": magnitude / sums.entries,
        "cosine": 1 + (1 if published else -1) * cosine.clamp(-1, 1),
        "taylor1": sums.xg.abs(),
        "taylor2": sums.xg.square() / 2,
    }


def saliency(
    groups: Sequence[UnitGroup],
    sums: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    weights: Mapping[str, float] | None = None,
    competing: Mapping[str, Tensor] | None = None,
    published: bool = False,
) -> dict[str, Tensor]:
    """The saliency of every unit; the lowest are redundant.

    Args:
        groups: All units that compete.
        sums: From :func:`all_sums`: of the parameters as the network uses them, and the loss's gradients.
        shapes: Parameter → its shape.
        weights: Criterion → its weight in the sum; None: 0.2 each.
        competing: Group → bool, ``(units,)``: those that count in the norms. None: all.
        published: As the published code: the cosine by the other sign, and units that are zero compete by it.

    Returns:
        Group → ``(units,)``, on the CPU in float32 or wider. Units that are zero already have a saliency of 0, unless
        ``published``.

    Raises:
        ValueError: As :func:`check_weights` and :func:`unit_sums`.
    """
    shares = check_weights(weights)
    added = {group.name: unit_sums(group, sums, shapes) for group in groups}
    criteria = {name: criteria_of(of_group, published) for name, of_group in added.items()}
    total = {name: torch.zeros_like(values["magnitude"]) for name, values in criteria.items()}
    for criterion, share in shares.items():
        everyone = [
            values[criterion] if competing is None else values[criterion][competing[name]]
            for name, values in criteria.items()
        ]
        norm = torch.linalg.vector_norm(torch.cat(everyone)) if everyone else torch.zeros(())
        if share and norm != 0:  # zero where there are no gradients anywhere
            for name, values in criteria.items():
                total[name] += share * values[criterion] / norm
    if published:
        return total
    return {name: value.masked_fill(added[name].xx == 0, 0.0) for name, value in total.items()}
