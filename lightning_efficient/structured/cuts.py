"""Cuts of a model as plain data: what stays of its tensors, and the numbers that say how wide it is then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_efficient.common.match import canonical_name, modules_by_name

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Cuts:
    """What stays of a model, as plain data.

    Args:
        kept: Tensor → axis → bool, as long as the axis was: True where an entry stays.
        attributes: Module → attribute → its value afterwards; ``normalized_shape`` is a list.
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
            n: {a: v for a, v in values.items() if hasattr(modules.get(n), a)} for n, values in self.attributes.items()
        }
        return Cuts(kept, attributes, self.units, {n: fields for n, fields in self.configs.items() if n in modules})


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name → parameter or buffer, shared ones under every name."""
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {canonical_name(name): tensor for source in both for name, tensor in source}
