"""``export``: a copy of a trained model that needs nothing of this package, checked to compute the same.

Methods in weight space leave the model plain at every moment, so for them exporting is copying. Layers of
ours that change the function's form offer ``fuse()``, which returns their plain equivalent, as the layers
that ``timm.utils.reparameterize_model`` knows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_efficient.callbacks.attach import NAME, Attachment, detach
from lightning_efficient.formats import save_exported, to_onnx, to_torch_export
from lightning_efficient.inference import Call, ExportError, Inputs, as_call, difference, evaluating

__all__ = ["ExportError", "export", "save_exported", "to_onnx", "to_torch_export"]

_PACKAGE = __name__.partition(".")[0]


class _Gone:
    """Stands in the copy for a hook of ours, until it is taken out."""


def export(model: nn.Module, example_inputs: Inputs | None = None, *, tolerance: float = 1e-5) -> nn.Module:
    """A plain copy of ``model`` in evaluation mode, verified on ``example_inputs``; ``model`` stays as it is.

    A LightningModule stays one (it needs lightning, not us); ``export(pl_module.net, x)`` gives the bare
    network. The largest difference between the two outputs is logged. Parametrizations, hooks, weight tying
    and ``requires_grad`` of the user's own survive; ``torch.compile`` wrappers are left out.

    Args:
        model: A LightningModule or any other module, in any mode.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``forward``.
            ``None``: the module's ``example_input_array``, else a batch it saw in training (the whole batch,
            or its first element).
        tolerance: Largest accepted difference of the outputs, relative to the output's scale ``max |y|``.

    Returns:
        The copy. It shares no tensor with ``model``.

    Raises:
        ValueError: No example inputs, or ``tolerance`` is not a number ≥ 0.
        TypeError: ``example_inputs`` is of another type.
        ExportError: The model has no ``forward``, fails on the inputs, cannot be copied, holds layers without
            a plain form, or the copy's outputs differ by more than ``tolerance``.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` is {tolerance!r}; expected a number >= 0, relative to the output's scale.")
    while (wrapped := model._modules.get("_orig_mod")) is not None:
        model = wrapped
    candidates = _calls(model, example_inputs)
    with evaluating(model):
        call, expected = _first_that_runs(model, candidates)
    plain = _plain_copy(model).eval()
    _check_foreign(plain)
    with evaluating(plain):
        try:
            found = call.run(plain)
        except Exception as error:
            raise ExportError(f"the exported copy fails where the model does not: {_line(error)}") from error
    apart = difference(expected, found)
    apart.check(tolerance, "the exported copy")
    rank_zero_info(f"export: {type(model).__name__} on [{call}]: {apart}")
    return plain


def _calls(model: nn.Module, example_inputs: Inputs | None) -> list[Call]:
    """The calls to try, in order, on the model."""
    if example_inputs is not None:
        return [as_call(example_inputs)]
    array = getattr(model, "example_input_array", None)
    if array is not None:
        return [as_call(array)]
    batch = getattr(vars(model).get(NAME), "example_batch", None)
    if batch is None:
        raise ValueError(
            f"`export({type(model).__name__}, example_inputs=None)`: the model has no `example_input_array` "
            "and kept no training batch. Pass `example_inputs`: a tensor, a tuple of positional or a dict of "
            "keyword arguments."
        )
    calls = [Call((batch,))]
    if isinstance(batch, Mapping):
        calls.insert(0, Call((), batch))
    elif isinstance(batch, (tuple, list)) and batch:
        calls.append(Call((batch[0],)))
    return calls


def _first_that_runs(model: nn.Module, calls: list[Call]) -> tuple[Call, Any]:
    forward = getattr(model.forward, "__func__", None)
    if forward in (LightningModule.forward, nn.Module.forward):
        children = [name for name, child in model.named_children() if type(child).forward is not nn.Module.forward]
        instead = ", ".join(f"export(module.{name}, x)" for name in children) or "a module that has one"
        raise ExportError(
            f"{type(model).__name__} defines no `forward`, so its copy cannot be verified. Export a "
            f"submodule: {instead}."
        )
    failures = []
    for call in calls:
        try:
            return call, call.run(model)
        except Exception as error:
            failures.append((call, error))
    tried = "; ".join(f"[{call}]: {_line(error)}" for call, error in failures)
    raise ExportError(
        f"{type(model).__name__} fails in evaluation mode on the example inputs {tried}. "
        "Pass `example_inputs` that its `forward` accepts."
    ) from failures[-1][1]


def _line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# -- copying
# -------------------------------------------------------------------------------------------------------


def _plain_copy(model: nn.Module) -> nn.Module:
    """Deep copy with our layers fused and our hooks, attributes and every ``torch.compile`` wrapper left out.

    Replacements enter through deepcopy's memo, so that they also take the place of aliases: a second
    registration, or a module in a Python list, which assignment to one attribute would miss.
    """
    memo = _memo_without_us(model)
    for module in model.modules():
        if id(module) in memo:
            continue
        if (wrapped := module._modules.get("_orig_mod")) is not None:
            memo[id(module)] = _copy(wrapped, memo)
        elif _offers_fuse(module):
            memo[id(module)] = _fused(_copy(module, memo))
    plain = _copy(model, memo)
    for module in plain.modules():
        if isinstance(module, LightningModule):
            detach(module)
        for hooks, key, _ in list(_our_hooks(module)):
            del hooks[key]
    # A layer inside one that was fused just now has been copied with it, as it was.
    nested = any("_orig_mod" in module._modules or _offers_fuse(module) for module in plain.modules())
    return _plain_copy(plain) if nested else plain


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
            f"{type(module).__name__} cannot be copied ({_line(error)}). Attributes in the way: "
            f"{culprits or 'unknown'}. "
            "Remove them, or export the submodule that computes: `export(module.net, x)`."
        ) from error


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


# -- what is ours
# --------------------------------------------------------------------------------------------------


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


def _check_foreign(plain: nn.Module) -> None:
    ours = {}
    for name, module in plain.named_modules():
        if _is_our_layer(module):
            ours[name or "the model itself"] = type(module).__name__
        for key, value in vars(module).items():
            if _is_our_code(value):
                ours[f"{name}.{key}".lstrip(".")] = type(value).__name__
    if ours:
        raise ExportError(
            f"no plain form (no `fuse()`) for {ours}; the exported model would need {_PACKAGE}. Take them "
            "out, or export "
            "the submodule that computes: `export(module.net, x)`."
        )
