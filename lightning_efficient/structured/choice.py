"""What a period of HESSO takes: units judged by the weights and gradients of one step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.hesso import PRUNED, SHRINKING, HessoConfig, HessoState, Plan, Pruner
from lightning_efficient.structured.published import published_choice, published_share
from lightning_efficient.structured.saliency import saliency


def scores_of(
    groups: Groups,
    sums: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    options: HessoConfig,
    state: HessoState,
) -> dict[str, Tensor] | None:
    """Saliencies of all units; None in a step that a gradient scaler will skip, where gradients are infinite.

    Args:
        groups: The units.
        sums: Of weights and gradients, from :func:`~lightning_efficient.structured.saliency.over_processes`.
        shapes: Parameter → its shape.
        options: Of the run.
        state: Of the run.

    Returns:
        Group → ``(units,)``.
    """
    competing = None if options.published else {name: ~gone for name, gone in state.marked(PRUNED).items()}
    scores = saliency(list(groups.found.values()), sums, shapes, options.saliency, competing, options.published)
    return scores if all(bool(torch.isfinite(score).all()) for score in scores.values()) else None


def chosen(
    pruner: Pruner, options: HessoConfig, plan: Plan, state: HessoState, scores: Mapping[str, Tensor], period: int
) -> dict[str, Tensor]:
    """The units that a period takes.

    Args:
        pruner: Of the run.
        options: Of the run.
        plan: Of the run.
        state: Of the run.
        scores: Group → ``(units,)``.
        period: Which, from 0.

    Returns:
        Group → bool, ``(units,)``: the units that go beside those that are gone or going.
    """
    gone = state.marked(SHRINKING, PRUNED)
    if options.published:
        count = published_share(pruner.total, options.target, plan.periods, period)
        return published_choice(pruner, scores, gone, count)
    return pruner.choose(scores, gone, options.target * ((period + 1) / plan.periods))
