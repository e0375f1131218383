"""Units cut out of a model for good: smaller tensors, the same modules, the same parameters.

What is cut is planned first, as plain data (:class:`Cuts`): which entries of which tensor stay along which axis, and
the new values of the integer attributes that say how wide a layer is. Replaying that on a model of the original size
needs no tracing. A parameter keeps its identity and only its data become smaller, so optimizers, schedulers, weight
tying and hooks go on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_efficient.common.change import Change
from lightning_efficient.common.match import modules_by_name
from lightning_efficient.common.running import forget
from lightning_efficient.structured.cuts import Cuts, number_at, put_number, tensors_by_name
from lightning_efficient.structured.groups import Groups, check_keep
from lightning_efficient.structured.pretrained import find_configs, put_configs
from lightning_efficient.surgery.cuts import cut_tensor

# Integer attributes that say how wide a module is. What a checkpoint names is looked up here and nowhere else.
LAYER_ATTRIBUTES = (
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
    "normalized_shape", "num_parameters", "embedding_dim", "nx", "nf",
    "kdim", "vdim", "hidden_size", "input_size", "num_groups",
)  # fmt: skip
# The layers whose attributes of these names are set by the sizes of their tensors.
LAYERS = (
    _ConvNd, nn.Linear, nn.Embedding, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RNNBase, nn.MultiheadAttention,
    nn.PReLU,
)  # fmt: skip
HEAD_ATTRIBUTES = (
    "num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads", "num_key_value_heads", "num_kv_heads",
    "n_kv_heads", "n_local_heads", "n_local_kv_heads",
)  # fmt: skip
INNER_ATTRIBUTES = (
    "attn_dim", "all_head_size", "split_size", "inner_dim", "attention_dim", "kv_dim", "d_inner", "hidden_dim",
    "embed_dim", "dim",
)  # fmt: skip
ATTRIBUTES = frozenset(LAYER_ATTRIBUTES + HEAD_ATTRIBUTES + INNER_ATTRIBUTES)


def plan_slim(model: nn.Module, keep: Mapping[str, Iterable[int]], groups: Groups) -> Cuts:
    """What cutting would do; nothing is changed.

    Args:
        model: The model, as wide as when the groups were found.
        keep: Group → indices of the units that stay. Groups that are not named stay whole.
        groups: From ``find_groups``.

    Returns:
        The cuts.

    Raises:
        ValueError: See :func:`~lightning_efficient.structured.groups.check_keep`; or the groups do not belong to the
            model, or nothing would stay of a tensor.
    """
    units = check_keep(groups, keep)
    tensors = tensors_by_name(model)
    kept: dict[str, dict[int, Tensor]] = {}
    for name, stay in units.items():
        group = groups.found[name]
        gone = sorted(set(range(group.units)) - set(stay))
        for part in group.slices:
            if (tensor := tensors.get(part.name)) is None or tensor.shape[part.dim] <= int(part.index.max()):
                raise ValueError(_foreign(name, part.name, tensor))
            mask = kept.setdefault(part.name, {}).setdefault(
                part.dim, torch.ones(tensor.shape[part.dim], dtype=torch.bool)
            )
            mask[part.entries(gone)] = False
            if not mask.any():
                raise ValueError(f"`keep`: nothing of {part.name!r} would stay along axis {part.dim}. Keep more units.")
    attributes, modules = layer_attributes(model, kept), modules_by_name(model)
    for name, stay in units.items():
        group = groups.found[name]
        for module, counts in group.counts.items():
            values = attributes.setdefault(module, {})
            for attribute, step in counts.items():
                now = values.get(attribute, number_at(modules[module], attribute))
                values[attribute] = now - step * (group.units - len(stay))
    return Cuts(kept, attributes, units)


def apply_slim(model: nn.Module, keep: Mapping[str, Iterable[int]], groups: Groups) -> Change:
    """Cut units out of a model, in place. All or nothing: whatever is wrong is found before anything changes.

    Call ``cut_states(optimizers, change.cuts)`` if training goes on. The ``config`` of a model of Hugging Face's
    says what is left, so that ``save_pretrained`` and ``from_pretrained`` go on; where none can, ``save_pretrained``
    refuses.

    Args:
        model: The model.
        keep: Group → indices of the units that stay. Groups that are not named stay whole.
        groups: From ``find_groups``, of this model.

    Returns:
        What was changed; ``Change.cuts`` holds what stays of each parameter.

    Raises:
        ValueError: See :func:`plan_slim`.
    """
    cuts = plan_slim(model, keep, groups)
    change = replay_slim(model, cuts)
    put_configs(model, *find_configs(model, cuts, groups.calls))
    return change


def replay_slim(model: nn.Module, cuts: Cuts) -> Change:
    """Cut a model as planned before; a model that is cut already stays as it is.

    Args:
        model: A model as wide as the one that the cuts were planned for.
        cuts: From :func:`plan_slim`, or read from a checkpoint.

    Returns:
        What was changed.

    Raises:
        ValueError: The model lacks a tensor, module or attribute, or has other sizes. Nothing is changed then.
    """
    change = Change("slim")
    tensors, modules = tensors_by_name(model), modules_by_name(model)
    if not _check(cuts, tensors, modules):
        return change
    widths = {name: list(tensors[name].shape) for name in cuts.kept}
    parameters = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    for name, kept in cuts.kept.items():
        cut_tensor(tensors[name], kept)
        if name in parameters:
            change.cuts[tensors[name]] = kept  # type: ignore[index]
    for name, attributes in cuts.attributes.items():
        for attribute, value in attributes.items():
            put_number(modules[name], attribute, tuple(value) if isinstance(value, list | tuple) else value)
    forget(model)  # what modules have kept in evaluation mode is as wide as before
    for name, before in widths.items():
        change.targets[name] = f"{tuple(before)} -> {tuple(tensors[name].shape)}"
    return change


def is_cut(model: nn.Module, cuts: Cuts) -> bool:
    """Whether a model has been cut so already.

    Raises:
        ValueError: It is neither as wide as before the cuts nor as after.
    """
    return not _check(cuts, tensors_by_name(model), modules_by_name(model))


def _check(cuts: Cuts, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> bool:
    """Whether the cuts are still to be made."""
    states = set()
    for name, kept in cuts.kept.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"the cuts name {name!r}, which the model lacks. Was it built with other arguments?")
        for dim, mask in kept.items():
            size = tensor.shape[dim] if dim < tensor.ndim else 0
            if size not in (mask.numel(), int(mask.sum())):
                raise ValueError(
                    f"the cuts take {name!r} from {mask.numel()} to {int(mask.sum())} along axis {dim}; it has "
                    f"{size}. Was the model built with other arguments?"
                )
            if mask.numel() != int(mask.sum()):
                states.add(size == mask.numel())
    if len(states) > 1:
        raise ValueError("the model is cut in part already, so the cuts cannot be made on it. Build it anew.")
    for name, attributes in cuts.attributes.items():
        for attribute, value in attributes.items():
            if not _settable(modules.get(name), attribute, value):
                raise ValueError(
                    f"the cuts set `{attribute}` of {name!r}, which is no attribute that a cut may set on this model."
                )
    return True in states


def _settable(module: nn.Module | None, attribute: str, value: Any) -> bool:
    """Whether a cut may set an attribute: one that says how wide a layer is, or a public number that only falls."""
    if attribute in ATTRIBUTES:
        return hasattr(module, attribute)
    now = number_at(module, attribute)
    hidden = any(part.startswith("_") for part in attribute.split("."))
    return type(now) is int and type(value) is int and 0 < value <= now and not hidden


def layer_attributes(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[str, Any]]:
    """The attributes of torch's own layers whose tensors become smaller: module → attribute → its value afterwards.

    Args:
        model: As wide as before.
        kept: See :class:`Cuts`.
    """
    attributes: dict[str, dict[str, Any]] = {}
    for name, module in modules_by_name(model).items():
        own = {n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        cut = {n: kept[f"{name}.{n}" if name else n] for n in own if (f"{name}.{n}" if name else n) in kept}
        sizes = {(n, dim): int(mask.sum()) for n, masks in cut.items() for dim, mask in masks.items()}
        if isinstance(module, nn.GroupNorm) and sizes:
            values = _group_norm(module, next(iter(cut.values()))[0])
        else:
            values = _attributes(module, sizes) if sizes else {}
        if values:
            attributes[name] = values
    return attributes


def _attributes(module: nn.Module, sizes: Mapping[tuple[str, int], int]) -> dict[str, Any]:
    first, second = sizes.get(("weight", 0)), sizes.get(("weight", 1))
    values: dict[str, Any] = {}
    if isinstance(module, _ConvNd):
        groups = module.groups
        if module.groups == module.in_channels > 1 and first is not None:  # depthwise: a channel is a group
            groups = first * module.groups // module.out_channels
            values = {"groups": groups, "in_channels": groups, "out_channels": first}
        else:
            made, read = (second, first) if module.transposed else (first, second)
            values = {
                "out_channels": made and made * (groups if module.transposed else 1),
                "in_channels": read and read * (1 if module.transposed else groups),
            }
    elif isinstance(module, nn.Linear):
        values = {"out_features": first, "in_features": second}
    elif isinstance(module, nn.Embedding):
        values = {"embedding_dim": second}
    elif isinstance(module, _NormBase):
        values = {"num_features": next(iter(sizes.values()))}
    elif isinstance(module, nn.RNNBase):
        values = {"input_size": sizes.get(("weight_ih_l0", 1)), "hidden_size": sizes.get(("weight_hh_l0", 1))}
    elif isinstance(module, nn.LayerNorm):
        values = {"normalized_shape": [*module.normalized_shape[:-1], next(iter(sizes.values()))]}
    elif isinstance(module, nn.MultiheadAttention):
        inner = sizes[("in_proj_weight", 1)]
        values = {**dict.fromkeys(("embed_dim", "kdim", "vdim"), inner), "num_heads": inner // module.head_dim}
    elif isinstance(module, nn.PReLU):
        values = {"num_parameters": first}
    elif hasattr(module, "nx") and hasattr(module, "nf"):  # Hugging Face's Conv1D: (inputs, outputs)
        values = {"nx": first, "nf": second}
    return {attribute: value for attribute, value in values.items() if value is not None}


def _group_norm(module: nn.GroupNorm, mask: Tensor) -> dict[str, Any]:
    """Whole groups go, or as many channels of every group."""
    groups = mask.view(module.num_groups, -1)
    whole = bool((groups.all(1) | ~groups.any(1)).all())
    left = int(groups.any(1).sum()) if whole else module.num_groups
    return {"num_channels": int(mask.sum()), "num_groups": left}


def _foreign(group: str, name: str, tensor: Tensor | None) -> str:
    what = "is not in the model" if tensor is None else f"has shape {tuple(tensor.shape)}"
    return f"group {group!r} does not belong to this model: {name!r} {what}. Find the groups of the model as it is now."


def zero_units(groups: Groups, cuts: Cuts | None) -> dict[str, Tensor]:
    """Which units of a model's groups are those that cuts would take out.

    Args:
        groups: Of the model as wide as the cuts were planned on; they need not be the groups of that time.
        cuts: None: there are none.

    Returns:
        Group → bool, ``(units,)``.
    """
    gone = {}
    for name, group in groups.found.items():
        where = torch.full((group.units,), cuts is not None)
        for part in group.produced:
            kept = None if cuts is None else cuts.kept.get(part.name, {}).get(part.dim)
            where &= False if kept is None else ~kept.cpu()[part.index].any(1)
        gone[name] = where
    return gone
