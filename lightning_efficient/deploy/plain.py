"""Copying a model without anything of this package in the copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_efficient.common.comparing import ExportError
from lightning_efficient.common.eager import inside_compiled
from lightning_efficient.common.running import first_line
from lightning_efficient.common.saving import RefusedSave, allow_saving
from lightning_efficient.lifecycle.hooks import detach
from lightning_efficient.lifecycle.state import NAME, ZEROED_ATTRIBUTE, Attachment
from lightning_efficient.structured.pretrained import REFUSED

_PACKAGE = __name__.partition(".")[0]


class _Gone:
    """Stands in the copy for a hook of ours, until it is taken out."""


def plain_copy(model: nn.Module) -> nn.Module:
    """Deep copy with our layers fused and our hooks, attributes and every ``torch.compile`` wrapper left out.

    Replacements enter through deepcopy's memo, so that they also take the place of aliases: a second
    registration, or a module in a Python list, which assignment to one attribute would miss.

    Args:
        model: The model; it is not touched.

    Raises:
        ExportError: Something in it cannot be copied, or a ``fuse()`` gives no plain form.
    """
    memo = _memo_without_us(model)
    for module in model.modules():
        if id(module) in memo:
            continue
        if (wrapped := inside_compiled(module)) is not None:
            memo[id(module)] = _copy(wrapped, memo)
        elif isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = _scripted(module, memo)
        elif _offers_fuse(module):
            memo[id(module)] = _fused(_copy(module, memo))
    plain = _without_hooks(_copy(model, memo))
    # A layer inside one that was fused just now has been copied with it, as it was.
    nested = any(inside_compiled(module) is not None or _offers_fuse(module) for module in plain.modules())
    return plain_copy(plain) if nested else plain


def detached_copy(model: nn.Module) -> nn.Module:
    """Deep copy with our layers as they are, but away from our callbacks.

    Args:
        model: The model; it is not touched.

    Raises:
        ExportError: Something in it cannot be copied.
    """
    return _without_hooks(_copy(model, _memo_without_us(model)))


def _without_hooks(copied: nn.Module) -> nn.Module:
    allow_saving(copied, REFUSED)
    for module in copied.modules():
        vars(module).pop(ZEROED_ATTRIBUTE, None)
        if isinstance(module, LightningModule):
            detach(module)
        for hooks, key, _ in list(_our_hooks(module)):
            del hooks[key]
    return copied


def _memo_without_us(model: nn.Module) -> dict[int, Any]:
    """Memo for deepcopy (id → what to put there instead) that keeps it away from our callbacks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(mine := vars(module).get(NAME), Attachment):
            memo |= {id(mine.requests): [], id(mine.example_batch): None}
        memo |= {id(hook): _Gone() for _, _, hook in _our_hooks(module)}
        for value in vars(module).values():
            # Non-leaf tensors, such as the weight that torch's old weight_norm caches, refuse deepcopy.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        culprits = [
            f"{name or type(module).__name__}.{key}"
            for name, part in module.named_modules()
            for key, value in vars(part).items()
            if not key.startswith("_") and not _copies(value)
        ]
        raise ExportError(
            f"{type(module).__name__} cannot be copied ({first_line(error)}). In the way: {culprits or 'unknown'}. "
            "Remove it, or export the submodule that computes: `export(module.net, x)`."
        ) from error


def _scripted(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    with torch.no_grad():  # or the copy's parameters have a history
        copied = _copy(module, memo)
    for mine, theirs in zip(copied.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return copied


def _copies(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _fused(layer: nn.Module) -> nn.Module:
    fused = cast(Callable[[], Any], layer.eval().fuse)()
    if not isinstance(fused, nn.Module) or type(fused) is type(layer):
        raise ExportError(f"{type(layer).__name__}.fuse() returned {type(fused).__name__}; expected its plain form.")
    return fused


# -- what is ours ------------------------------------------------------------------------------------------------------


def _is_ours(module_name: str | None) -> bool:
    # The demo's model is written as a user's and is one.
    name = module_name or ""
    return f"{name}.".startswith(f"{_PACKAGE}.") and not name.startswith(f"{_PACKAGE}.demo")


def _is_our_layer(module: nn.Module) -> bool:
    return any(_is_ours(cls.__module__) for cls in type(module).__mro__)


def _offers_fuse(module: nn.Module) -> bool:
    return _is_our_layer(module) and callable(getattr(module, "fuse", None))


def _our_hooks(module: nn.Module) -> Iterator[tuple[dict[Any, Any], Any, Any]]:
    """(registry, key, hook) of every hook of ours on a module; torch offers no public way to list hooks."""
    for name, registry in vars(module).items():
        if name.endswith("_hooks") and isinstance(registry, dict):
            yield from ((registry, key, hook) for key, hook in registry.items() if _is_our_code(hook))


def _is_our_code(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    return _is_ours(getattr(function, "__module__", None)) or _is_ours(type(owner).__module__)


def check_foreign(plain: nn.Module) -> None:
    """Raise if a module, an attribute or a method in ``plain`` comes from this package.

    Args:
        plain: What :func:`plain_copy` returned.

    Raises:
        ExportError: Naming all of them.
    """
    ours = {}
    for name, module in plain.named_modules():
        if _is_our_layer(module):
            ours[name or "the model itself"] = type(module).__name__
        for key, value in vars(module).items():
            if _is_our_code(value) and not isinstance(value, RefusedSave):  # which is there because of another one
                ours[f"{name}.{key}".lstrip(".")] = type(value).__name__
    if ours:
        raise ExportError(
            f"no plain form (no `fuse()`) for {ours}; the exported model would need {_PACKAGE}. "
            "Write a program of the model as it is, which needs nothing: `save_exported(model, x, 'model.pt2')`; or "
            "take them out, or export the submodule that computes: `export(module.net, x)`."
        )
