"""Units and the weights that make them: which entries are a unit's, what trains them, what masks say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.match import NoMatchError, parameters_by_name
from lightning_efficient.common.weights import trained_by
from lightning_efficient.structured.groups import Groups, UnitGroup
from lightning_efficient.structured.twin import METHOD
from lightning_efficient.weightspace.unit_mask import UnitMask


def without_idle(groups: Groups, model: nn.Module, optimizers: Iterable[Optimizer]) -> Groups:
    """Groups that optimizers move altogether; a part that nothing trains could not be shrunk beside the rest.

    Args:
        groups: Of the model.
        model: The model.
        optimizers: Its optimizers.

    Raises:
        NoMatchError: None is left.
    """
    trained = trained_by(*optimizers)
    params = parameters_by_name(model)
    idle: dict[str, str] = {}
    for name, group in groups.found.items():
        still = [p.name for p in group.produced if p.name in params and id(params[p.name]) not in trained]
        if still:
            idle[name] = f"{still[0]} is in no optimizer"
    found = {name: group for name, group in groups.found.items() if name not in idle}
    refused = groups.refused | idle
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise NoMatchError(f"{METHOD}: nothing that is trained can be cut. {reasons}")
    return replace(groups, found=found, refused=refused)


def parameters_of(groups: Groups, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter that makes units, in the order of the model.

    Args:
        groups: Of the model.
        model: The model.
    """
    made = {part.name for group in groups.found.values() for part in group.produced}
    return {name: param for name, param in parameters_by_name(model).items() if name in made}


def entries_of(
    groups: Groups, units: Mapping[str, Tensor], params: Mapping[str, nn.Parameter]
) -> dict[str, dict[int, Tensor]]:
    """Parameter → axis → entries of the marked units.

    Args:
        groups: The groups.
        units: Group → bool, ``(units,)``.
        params: Name → parameter; slices of names that are not in it (buffers) do not count.
    """
    found: dict[str, dict[int, list[Tensor]]] = {}
    for name, marked in units.items():
        chosen = marked.nonzero().flatten().tolist()
        for part in groups.found[name].produced if chosen else ():
            if part.name in params:
                found.setdefault(part.name, {}).setdefault(part.dim, []).append(part.entries(chosen))
    return {
        name: {dim: torch.cat(parts).to(params[name].device) for dim, parts in axes.items()}
        for name, axes in found.items()
    }


def dropped_units(group: UnitGroup, masks: Mapping[str, Mapping[str, Tensor]], params: Mapping[str, Tensor]) -> Tensor:
    """Which units of a group are dropped by masks.

    Args:
        group: The group.
        masks: Parameter → state of its :class:`~lightning_efficient.weightspace.unit_mask.UnitMask`.
        params: Parameter → what it masks.

    Returns:
        ``(units,)`` bool: all that makes the unit is dropped.
    """
    dropped = torch.full((group.units,), any(part.name in masks for part in group.produced))
    for part in group.produced:
        if part.name in masks:
            mask = UnitMask()
            kept = {name: bits for name, bits in masks[part.name].items() if name != "raw"}  # W of narrow weights
            mask.load_state_dict(kept, params[part.name])
            dropped &= ~mask.kept(part.dim, params[part.name]).cpu()[part.index].any(1)
    return dropped
