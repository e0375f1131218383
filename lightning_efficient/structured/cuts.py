"""Cuts of a model as plain data: what stays of its tensors, and the numbers that say how wide it is then."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn

from lightning_efficient.common.match import canonical_name, modules_by_name

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Cuts:
    """What stays of a model, as plain data.

    Args:
        kept: Tensor → axis → bool, as long as the axis was: True where an entry stays.
        attributes: Module → attribute → its value afterwards; ``normalized_shape`` is a list. ``"config.n_head"`` is
            a number of an object that the module holds, ``"sizes.1"`` one of a list; it gets a copy of its own.
        units: Group → units that stay, for people.
        configs: Model of Hugging Face's → path in its config → the number that it has afterwards.
    """

    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    units: dict[str, list[int]] = field(default_factory=dict)
    configs: dict[str, dict[str, int | float]] = field(default_factory=dict)

    def then(self, later: Cuts) -> Cuts:
        """These cuts and others made on what they left, as one.

        Args:
            later: Planned on the smaller model.
        """
        kept = {name: dict(masks) for name, masks in self.kept.items()}
        for name, masks in later.kept.items():
            for dim, mask in masks.items():
                before = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = mask if before is None else before.clone().masked_scatter_(before, mask)
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in later.attributes.items():
            attributes.setdefault(name, {}).update(values)
        units = dict(self.units)
        for name, stay in later.units.items():
            units[name] = [units[name][unit] for unit in stay] if name in units else stay
        configs = {name: dict(fields) for name, fields in self.configs.items()}
        for name, fields in later.configs.items():
            configs.setdefault(name, {}).update(fields)
        return Cuts(kept, attributes, units, configs)

    def within(self, module: str) -> Cuts:
        """Those of tensors and modules inside a submodule, under the names that they have in it.

        Args:
            module: Its canonical name.
        """
        inside = f"{module}."

        def renamed(held: Mapping[str, _Value]) -> dict[str, _Value]:
            some = {n: value for n, value in held.items() if n == module or n.startswith(inside)}
            return {"" if n == module else n.removeprefix(inside): value for n, value in some.items()}

        return Cuts(renamed(self.kept), renamed(self.attributes), self.units, renamed(self.configs))

    def of(self, model: nn.Module) -> Cuts:
        """Those of tensors and modules that a model has (others were folded into their neighbours)."""
        tensors, modules = tensors_by_name(model), modules_by_name(model)
        kept = {name: masks for name, masks in self.kept.items() if name in tensors}
        attributes = {
            n: {a: v for a, v in values.items() if number_at(modules.get(n), a) is not None}
            for n, values in self.attributes.items()
        }
        return Cuts(kept, attributes, self.units, {n: fields for n, fields in self.configs.items() if n in modules})


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name → parameter or buffer, shared ones under every name."""
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {canonical_name(name): tensor for source in both for name, tensor in source}


def held_blocks(module: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Lists of whole numbers that a module holds, as sizes of parts of an axis, each with its name."""
    for name, value in vars(module).items():
        if name.startswith("_") or not _listed(value) or len(value) < 2:
            continue
        if all(type(part) is int and part for part in value):
            yield name, value


def held_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Whole numbers of objects and dicts that a module holds and others may share, such as a config, with paths."""
    for holder, thing in vars(module).items():
        for name, value in _table(thing).items() if not holder.startswith("_") else ():
            if type(value) is int and isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
                yield f"{holder}.{name}", value


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """What of a module a cut may lower: its whole numbers, lists of such, and objects that hold some, with only those.

    Args:
        module: A module.

    Returns:
        Public name → number, list, or an object with the numbers alone.
    """
    found: dict[str, Any] = {name: v for name, v in vars(module).items() if type(v) is int and not name.startswith("_")}
    found |= dict(held_blocks(module))
    for path, value in held_numbers(module):
        holder, _, name = path.partition(".")
        setattr(found.setdefault(holder, SimpleNamespace()), name, value)
    return found


def put_numbers(module: nn.Module, found: Mapping[str, Any]) -> None:
    """Give a module other numbers.

    Args:
        module: A module.
        found: From :func:`numbers_of` of another one of its kind.
    """
    for name, value in found.items():
        inside = _table(value)
        for path, number in {f"{name}.{n}": v for n, v in inside.items()}.items() if inside else ((name, value),):
            if number_at(module, path) != number:
                put_number(module, path, number)


def number_at(module: nn.Module | None, path: str) -> Any:
    """An attribute of a module, or of an object, a dict or a list that it holds; None: there is none.

    Args:
        module: The module.
        path: ``"num_heads"``, ``"config.num_heads"``, or ``"sizes.1"``.
    """
    holder, dot, name = path.partition(".")
    if not dot:
        return getattr(module, path, None)
    thing = None if module is None else vars(module).get(holder)
    if _listed(thing):
        return thing[int(name)] if name.isdecimal() and int(name) < len(thing) else None
    return _table(thing).get(name)


def put_number(module: nn.Module, path: str, value: Any) -> None:
    """Set it; of an object, a dict or a list the module gets a copy, as others go on with theirs."""
    holder, dot, name = path.partition(".")
    if not dot:
        setattr(module, path, value)
        return
    thing = getattr(module, holder)
    if _listed(thing):
        numbers = [value if i == int(name) else number for i, number in enumerate(thing)]
        thing = tuple(numbers) if isinstance(thing, tuple) else numbers
    else:
        thing = copy.copy(thing)
        _table(thing)[name] = value
    setattr(module, holder, thing)


def _listed(thing: Any) -> TypeGuard[Sequence[Any]]:
    return type(thing) in (list, tuple)


def _table(thing: Any) -> dict[Any, Any]:
    """The names and values of a dict, or of an object with attributes of its own and no more than that; else empty."""
    if isinstance(thing, dict):
        return thing
    plain = hasattr(thing, "__dict__") and not isinstance(thing, (nn.Module, Tensor, type)) and not callable(thing)
    return vars(thing) if plain else {}
