"""Put one module in another's place, everywhere, and take it out again: nothing else of the model changes."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.near import near_names

# Where nn.Module keeps what users register on an instance. torch has methods to add to these dicts but none
# to move an entry, so they are named here, once. A RemovableHandle holds a weak reference to the dict it was
# made from: moving the dict object itself, not its entries, keeps every handle.remove() working.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_PARKED = "_own_hooks"  # the new module's own hook dicts, while it works with those of the module it replaced

Swaps = dict[str, tuple[nn.Module, nn.Module]]


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> Swaps:
    """Replace modules by name, under every name and in every list they are known by.

    Registrations in any parent (attributes, ``Sequential``, ``ModuleList``, ``ModuleDict``) and modules held
    in a plain attribute, list, tuple or dict of a module are replaced; deeper nests of plain containers are
    not searched. The new module gets the old one's device and dtype (its own tensors only: what it shares
    with the model keeps its identity), ``training`` flags, ``requires_grad`` of parameters of the same name,
    and hooks, which then fire on it alone; it may hold the old module as a child. ``module.compile()`` is not
    repeated on the new module.

    Args:
        model: Any module; torch's wrappers inside it are looked through.
        new: Module name -> the module to put there.

    Returns:
        Canonical name -> (old module, new module), for ``restore_modules`` and ``Change.swaps``.

    Raises:
        TypeError: A value is not a module.
        ValueError: A name does not exist, is the model itself, lies inside another one, or names a module
            twice; or a new module is already in use, or on the meta device when the model is not (or the
            reverse). Nothing is changed then.
    """
    modules = modules_by_name(model)
    swaps = _checked(model, modules, new)
    likes = {name: _reference(modules, name) for name in swaps}
    shared = set(chain(model.parameters(), model.buffers()))
    for name, (old, module) in swaps.items():
        own = [tensor for tensor in chain(module.parameters(), module.buffers()) if tensor not in shared]
        _check_meta(name, own, likes[name])
        kinds = {old._is_full_backward_hook, module._is_full_backward_hook}
        if kinds == {True, False}:
            raise ValueError(
                f"{name!r}: the old module has backward hooks of one kind, the new one of the other"
                " (register_full_backward_hook and register_backward_hook do not mix)."
            )
    for name, (old, module) in swaps.items():
        own = [tensor for tensor in chain(module.parameters(), module.buffers()) if tensor not in shared]
        _move(own, likes[name], cast=True)
        _copy_training(old, module)
    _exchange(model, list(swaps.values()))
    return swaps


def restore_modules(model: nn.Module, swaps: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    """Undo ``replace_modules``: the same old objects are back in the same places, with their hooks.

    Tensors that the new modules did not share keep the values and the dtype they had before. The old modules
    follow what happened to the model meanwhile: device, ``train()``/``eval()`` and ``requires_grad`` of
    parameters of the same name.

    Args:
        model: The model given to ``replace_modules``.
        swaps: What it returned.

    Raises:
        ValueError: A new module is not in the model (any more); nothing is changed then.
    """
    _swap_back(model, {name: (new, old) for name, (old, new) in swaps.items()})


def reinstate_modules(model: nn.Module, swaps: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    """Undo ``restore_modules``: the same new objects are back.

    Args:
        model: The model given to ``restore_modules``.
        swaps: What ``replace_modules`` returned.

    Raises:
        ValueError: An old module is not in the model (any more); nothing is changed then.
    """
    _swap_back(model, swaps)


def _swap_back(model: nn.Module, swaps: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    modules = modules_by_name(model)
    present = set(model.modules())
    missing = [name for name, (outgoing, _) in swaps.items() if outgoing not in present]
    if missing:
        raise ValueError(
            f"The modules recorded for {', '.join(map(repr, missing))} are not in this model: it was rebuilt or"
            " changed since, or this was done already."
        )
    shared = set(chain(model.parameters(), model.buffers()))
    for name, (_, incoming) in swaps.items():
        like = _reference(modules, name)
        own = [tensor for tensor in chain(incoming.parameters(), incoming.buffers()) if tensor not in shared]
        if like is not None and not like.is_meta and not any(tensor.is_meta for tensor in own):
            _move(own, like, cast=False)
    _exchange(model, list(swaps.values()))


def _checked(model: nn.Module, modules: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> Swaps:
    present = set(model.modules())
    swaps: Swaps = {}
    names: dict[nn.Module, str] = {}
    for given, module in new.items():
        name = canonical_name(given)
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name!r}: expected an nn.Module to put there, got {module!r}.")
        if name == "":
            raise ValueError("The model itself cannot be replaced in place; name a module inside it.")
        if name not in modules:
            near = near_names(name, modules)
            raise ValueError(f"The model has no module {name!r}; close names: {near or list(modules)[1:4]}.")
        if module in present:
            raise ValueError(f"{name!r}: the new {type(module).__name__} is already part of the model.")
        for other, role in ((modules[name], "the same module"), (module, "given the same new module")):
            if other in names:
                raise ValueError(f"{names[other]!r} and {name!r} are {role}; give one entry.")
            names[other] = name
        swaps[name] = (modules[name], module)
    for name, (old, _) in swaps.items():
        for inner in old.modules():
            if inner is not old and inner in names:
                raise ValueError(f"{names[inner]!r} lies inside {name!r}; replace one or the other.")
    return swaps


def _floating(module: nn.Module) -> torch.Tensor | None:
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def _reference(modules: Mapping[str, nn.Module], name: str) -> torch.Tensor | None:
    """A tensor that says where a module lives: its own, or that of the closest parent that has one."""
    while True:
        tensor = _floating(modules[name]) if name in modules else None
        if tensor is not None or not name:
            return tensor
        name = name.rpartition(".")[0]


def _check_meta(name: str, own: list[torch.Tensor], like: torch.Tensor | None) -> None:
    if like is not None and any(tensor.is_meta != like.is_meta for tensor in own):
        empty, other = ("the model", "the new module") if like.is_meta else ("the new module", "the model")
        raise ValueError(
            f"{name!r}: {empty} is on the meta device (it has no data), {other} is not; expected both or neither."
            " Materialise the model first."
        )


def _move(own: list[torch.Tensor], like: torch.Tensor | None, cast: bool) -> None:
    if like is None:
        return
    # 8-bit weights are a storage format: the new module's own tensors could not compute in it.
    cast = cast and torch.finfo(like.dtype).bits >= 16
    for tensor in own:
        dtype = like.dtype if cast and tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(like.device, dtype)  # .data keeps the identity that records rely on


def _copy_training(old: nn.Module, new: nn.Module) -> None:
    kept, twins = set(old.modules()), dict(old.named_modules())
    for name, module in new.named_modules():
        if module not in kept:
            module.training = twins.get(name, old).training


def _places(model: nn.Module, swap: Mapping[nn.Module, nn.Module]) -> Iterator[tuple[nn.Module, Any, Any, object]]:
    """Every (owner, container, key, new value) such that ``container[key] = value`` replaces a module."""
    # What the outgoing modules hold leaves with them; they must come back as they were.
    leaving = {inner for outgoing in swap for inner in outgoing.modules()}
    for owner in model.modules():
        if owner in leaving:
            continue
        for attribute, value in vars(owner).items():  # one of the attributes is `_modules`, a dict like others
            if isinstance(value, nn.Module):
                if value in swap:
                    yield owner, vars(owner), attribute, swap[value]
            elif type(value) is tuple:
                if any(isinstance(item, nn.Module) and item in swap for item in value):
                    swapped = (swap.get(m, m) if isinstance(m, nn.Module) else m for m in value)
                    yield owner, vars(owner), attribute, tuple(swapped)
            elif isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    if isinstance(item, nn.Module) and item in swap:
                        yield owner, value, key, swap[item]


def _exchange(model: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    for owner, container, key, value in list(_places(model, dict(pairs))):
        container[key] = value
        if key == "_orig_mod":
            # torch.compile's wrapper bound the old module's call when it was made; this is how it binds anew.
            owner.__setstate__(vars(owner))  # type: ignore[no-untyped-call]
    for outgoing, incoming in pairs:
        _hand_over_hooks(outgoing, incoming)
        if incoming.training != outgoing.training:
            incoming.train(outgoing.training)
        flags = {name: p.requires_grad for name, p in outgoing.named_parameters()}
        for name, parameter in incoming.named_parameters():
            if name in flags and (parameter.is_floating_point() or parameter.is_complex()):
                parameter.requires_grad_(flags[name])


def _hand_over_hooks(outgoing: nn.Module, incoming: nn.Module) -> None:
    """Move the user's hooks; those that a new module registered itself stay with it."""
    own_of_outgoing = vars(outgoing).pop(_PARKED, {})
    parked: dict[str, OrderedDict[int, Any]] = {}
    for attribute in _HOOKS:
        hooks, own = vars(outgoing)[attribute], vars(incoming)[attribute]
        leave_behind = own_of_outgoing.get(attribute, OrderedDict())
        for key in leave_behind:
            hooks.pop(key, None)
        for key in hooks.keys() & own.keys():  # a module made by deepcopy brings copies of the same hooks
            del own[key]
        for hook in hooks.values():
            # load_state_dict pre-hooks are bound to the module they were registered on.
            if getattr(hook, "with_module", False) and hook.module() is outgoing:
                hook.module = weakref.ref(incoming)
        hooks.update(own)
        if own:
            parked[attribute] = own
        vars(outgoing)[attribute], vars(incoming)[attribute] = leave_behind, hooks
    if parked:
        vars(incoming)[_PARKED] = parked
    kind = outgoing._is_full_backward_hook
    incoming._is_full_backward_hook = incoming._is_full_backward_hook if kind is None else kind
