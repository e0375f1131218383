"""Where temperatures are in a model, as files say it, and whose optimizer moves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_efficient.attention.knobs import Knob
from lightning_efficient.attention.sites import AttentionSite
from lightning_efficient.attention.temperature import Targets, TempScaleConfig, TempScaleError
from lightning_efficient.weightspace import Block


def layout_of(targets: Targets) -> dict[str, Any]:
    """Which blocks of which parameters scale each attention, as plain data.

    Args:
        targets: What was found in a model.
    """
    return {
        name: {
            "heads": site.heads,
            "knobs": [
                [knob.parameter, [[b.start, b.length, b.dim] for b in knob.blocks], knob.heads and list(knob.heads)]
                for knob in site.knobs
            ],
            "adapter": targets.adapters.get(name),
        }
        for name, site in targets.sites.items()
    }


def targets_of(layout: Mapping[str, Any], options: TempScaleConfig) -> Targets:
    """The inverse.

    Args:
        layout: From :func:`layout_of`.
        options: The temperatures.
    """
    sites = {}
    for name, site in layout.items():
        knobs = tuple(
            Knob(parameter, tuple(Block(*block) for block in blocks), None if heads is None else tuple(heads))
            for parameter, blocks, heads in site["knobs"]
        )
        sites[name] = AttentionSite(name, "resumed", heads=site["heads"], knobs=knobs)
    adapters = {name: site["adapter"] for name, site in layout.items() if site.get("adapter") is not None}
    return Targets(sites, options.laws(list(sites)), adapters=adapters)


def check_optimizers(optimizers: Sequence[Optimizer], targets: Targets, parameters: Mapping[str, nn.Parameter]) -> None:
    """All weights behind one attention's logits share a temperature, which moves with one optimizer.

    Args:
        optimizers: Of the fit.
        targets: What was found in the model.
        parameters: Name → parameter, of the weights that are scaled.

    Raises:
        TempScaleError: Naming those in several.
    """
    owner = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    for group in targets.groups():
        names = list(dict.fromkeys(knob.parameter for site in group for knob in targets.sites[site].knobs))
        if len({owner.get(id(parameters[name])) for name in names}) > 1:
            raise TempScaleError(
                f"{names} scale {group[0]!r} together and are in different optimizers, which step at different times. "
                f"Give them to one, or exclude=[{group[0]!r}]."
            )
