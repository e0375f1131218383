"""Take every normalization layer out: the from-scratch recipe of sigmaReparam's ViT (arXiv 2303.06296, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm.layers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import NoMatchError, select_modules
from lightning_efficient.surgery.replace import replace_modules

METHOD = "remove_norms"

NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    _BatchNorm,
    timm.layers.RmsNorm,
    timm.layers.RmsNorm2d,
)


def apply_remove_norms(
    model: nn.Module, config: Mapping[str, Any] | None = None, names: Sequence[str] | None = None
) -> Change:
    """Replace norms by ``nn.Identity``.

    Args:
        model: The model.
        config: ``include`` and ``exclude``: globs over module names.
        names: Exactly these modules instead (replaying a recipe).

    Returns:
        What was replaced.

    Raises:
        NoMatchError: There is no norm.
        ValueError: A norm of ``nn.TransformerEncoderLayer``/``DecoderLayer`` is among them: their evaluation fast path
            reads the norm's attributes.
    """
    config = config or {}
    if names is None:
        selection = select_modules(
            model, types=NORMS, include=config.get("include"), exclude=config.get("exclude"), method=METHOD
        )
        names, skipped = list(selection.matched), dict(selection.skipped)
    else:
        skipped = {}
    if not names:
        raise NoMatchError(f"{METHOD}: no norms")
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            raise ValueError(
                f"`remove_norms` cannot take {name!r} out of {type(parent).__name__}, whose evaluation fast path "
                f"reads it. Leave it: `exclude=[{name!r}]`."
            )
    modules = {name: model.get_submodule(name) for name in names}
    change = Change(method=METHOD, skipped=skipped)
    change.swaps = replace_modules(model, {name: nn.Identity() for name in names})
    change.targets = {name: f"{type(module).__name__} removed" for name, module in modules.items()}
    change.removed = [p for module in modules.values() for p in module.parameters()]
    return change
