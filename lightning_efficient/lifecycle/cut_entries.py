"""Cuts in a checkpoint's recipe: written, read, and checked against its weights and the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.schema import (
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    Part,
    Record,
    Schema,
    Such,
    TensorOf,
    Text,
    check,
)
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.recipe import Entry, RecipeError
from lightning_efficient.structured.cuts import Cuts, number_at, tensors_by_name
from lightning_efficient.structured.pretrained import put_configs
from lightning_efficient.structured.slim import (
    ATTRIBUTES,
    HEAD_ATTRIBUTES,
    INNER_ATTRIBUTES,
    is_cut,
    layer_attributes,
    replay_slim,
)

# Keys of the entries of method "slim": what has been cut out of the weights in the file, and what lies in them as
# zeros, to be cut out by `export`.
CUT, ZEROED = "cut", "promised"

_MASK = Such(TensorOf(torch.bool, ndim=1), lambda mask: bool(mask.any()), "True where an entry stays, so somewhere")
_TENSORS = MapOf(Text(), MapOf(OneOf(tuple("01234567")), _MASK))
_WIDTHS: dict[str, Schema] = {name: Int(low=1) for name in sorted(ATTRIBUTES)}
_WIDTHS["normalized_shape"] = Such(ListOf(Int(low=1)), lambda shape: len(shape) > 0, "not empty")
# Modules count heads and channels under names of their own; `_check_cuts` looks at what they make of the number.
_NAME = Such(
    Text(),
    lambda path: bool(re.fullmatch(r"(?!_)\w+(\.(?!_)\w+)?", path)) and not path[0].isdecimal(),
    "the name of a public attribute, or of what one holds",
)


class _Attributes(Part):
    """Those that say how wide torch's layers are, and numbers by public names."""

    def _parts(self, value: Any) -> Iterator[tuple[Schema, str, Any]]:
        yield from super()._parts(value)
        for name in value:
            if name not in self.optional:
                yield _NAME, "[a key]", name
                yield Int(low=1), f"[{str(name)[:40]!r}]", value[name]


_CONFIG = Record(
    {"attributes": MapOf(Text(), _Attributes({}, optional=_WIDTHS)), "units": MapOf(Text(), ListOf(Int(low=0)))},
    optional={"configs": MapOf(Text(), MapOf(Text(), Number(low=0)))},
)
# Attributes of an attention that count nothing but what its heads hold.
_OF_HEADS = tuple(name for name in INNER_ATTRIBUTES if name not in ("hidden_dim", "embed_dim", "dim"))


def write_cuts(checkpoint: dict[str, Any], key: str, cuts: Cuts | None) -> None:
    """Put cuts into a checkpoint's recipe.

    Args:
        checkpoint: The checkpoint.
        key: :data:`CUT` or :data:`ZEROED`.
        cuts: None: there are none.
    """
    if cuts is not None and cuts.kept:
        tensors = {name: {str(dim): mask for dim, mask in masks.items()} for name, masks in cuts.kept.items()}
        config: dict[str, Any] = {"attributes": cuts.attributes, "units": cuts.units}
        if cuts.configs:
            config["configs"] = cuts.configs
        recipe.write(checkpoint, Entry("slim", key, config, tensors))


def read_cuts(checkpoint: Mapping[str, Any], key: str) -> Cuts | None:
    """The cuts that a checkpoint's recipe holds under a key; None if there are none.

    Raises:
        RecipeError: They are malformed, or do not fit the weights in the file.
    """
    entries = {e.key: e for e in recipe.read(checkpoint) if e.method == "slim"}
    if strangers := [other for other in entries if other not in (CUT, ZEROED)]:
        raise RecipeError(
            f"slim in the checkpoint's recipe, `key`, should be {CUT!r} or {ZEROED!r}; got {strangers[0]!r}."
        )
    entry = entries.get(key)
    if entry is None:
        return None
    _check_entry(entry, checkpoint.get("state_dict", {}), cut=key == CUT)
    kept = {name: {int(dim): mask for dim, mask in masks.items()} for name, masks in entry.tensors.items()}
    config = entry.config
    return Cuts(kept, dict(config["attributes"]), dict(config["units"]), dict(config.get("configs", {})))


def check_cuts(model: nn.Module, cuts: Cuts, state: Mapping[str, Any]) -> None:
    """Refuse cuts that a model cannot take, or that would not make it as wide as the file's weights are.

    Args:
        model: Cut already, or not yet.
        cuts: From :func:`read_cuts`.
        state: The file's weights, under the model's names; those that it lacks are not asked about.

    Raises:
        RecipeError: The model was built with other widths, or attributes or weights do not fit them.
    """
    try:
        done = is_cut(model, cuts)
    except ValueError as error:
        raise RecipeError(f"the checkpoint holds a smaller model: {error}") from error
    if not done:
        _check_attributes(model, cuts)
    sizes = {canonical_name(name): list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    for name, tensor in tensors_by_name(model).items():
        after = list(tensor.shape)
        for dim, mask in cuts.kept.get(name, {}).items():
            after[dim] = int(mask.sum())
        if sizes.get(name, after) != after:
            raise RecipeError(
                f"the checkpoint holds a smaller model: by slim in its recipe {name!r} should be of shape "
                f"{tuple(after)}; in its weights it is of shape {tuple(sizes[name])}."
            )


def make_cuts(model: nn.Module, cuts: Cuts) -> None:
    """Cut a model as a checkpoint says, before its weights load; one that is cut already stays as it is.

    Raises:
        RecipeError: See :func:`check_cuts`. Nothing is changed then.
    """
    check_cuts(model, cuts, {})
    replay_slim(model, cuts)
    put_configs(model, cuts)


def _check_entry(entry: Entry, state: Mapping[str, Any], cut: bool) -> None:
    """Refuse an entry that is malformed, or says other sizes than the weights in the file have.

    Args:
        entry: Of the method ``slim``.
        state: The file's weights.
        cut: Whether they are smaller already; else it says what can be cut out of them.

    Raises:
        RecipeError: Names the field.
    """
    where = f"slim {entry.key!r} in the checkpoint's recipe"
    check(entry.tensors, _TENSORS, f"{where}, `tensors`", RecipeError)
    check(entry.config, _CONFIG, f"{where}, `config`", RecipeError)
    shapes = {canonical_name(name): tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, masks in entry.tensors.items():
        for dim, mask in masks.items():
            size = int(mask.sum()) if cut else mask.numel()
            found = shapes.get(name)  # a user's hook may have left it out of the file
            if found is not None and (int(dim) >= len(found) or found[int(dim)] != size):
                raise RecipeError(
                    f"{where}, `tensors`: {name!r} should have {size} entries along axis {dim} in the file; its shape "
                    f"is {tuple(found)}."
                )


def _check_attributes(model: nn.Module, cuts: Cuts) -> None:
    """Refuse attributes that do not say what the cuts make of a model's widths; nothing is changed.

    Args:
        model: Not cut yet.
        cuts: Whose masks fit it.

    Raises:
        RecipeError: One is missing, or has another value.
    """
    modules, tensors = modules_by_name(model), tensors_by_name(model)
    layers = layer_attributes(model, {name: kept for name, kept in cuts.kept.items() if name in tensors})
    for name, values in layers.items():
        for attribute, value in values.items():
            _same(name, attribute, value, cuts.attributes.get(name, {}).get(attribute))
    for name, given in cuts.attributes.items():
        module = modules.get(name)
        shares = _shares(name, cuts)
        for attribute, value in given.items():
            if attribute in layers.get(name, {}):
                continue
            now = number_at(module, attribute)
            right = type(now) is int and type(value) is int and now > 0
            if not right or not (Fraction(value, now) in shares or value in _left_of_parts(name, now, cuts)):
                _refuse(name, attribute, f"{now}, or as much less as its weights are", value)
    for name in cuts.units:  # an attention's heads are named like it
        shares, widths = _shares(name, cuts) - {Fraction(1)}, {mask.numel() for mask in _masks(name, cuts)}
        for attribute in HEAD_ATTRIBUTES + _OF_HEADS:
            now = getattr(modules.get(name), attribute, None)
            if type(now) is not int or attribute in cuts.attributes.get(name, {}):
                continue
            less = any((share * now).denominator == 1 for share in shares)
            if less and (attribute in HEAD_ATTRIBUTES or now in widths):
                _refuse(name, attribute, f"there: its heads are cut, and it is {now} before", None)


def _masks(module: str, cuts: Cuts) -> list[Tensor]:
    """Those of tensors inside a module, or beside it."""
    around = f"{module.rpartition('.')[0]}." if "." in module else ""
    return [mask for name, kept in cuts.kept.items() if name.startswith(around) for mask in kept.values()]


def _shares(module: str, cuts: Cuts) -> set[Fraction]:
    """How much of its tensors stays, along each axis."""
    return {Fraction(int(mask.sum()), mask.numel()) for mask in _masks(module, cuts)} | {Fraction(1)}


def _left_of_parts(module: str, size: int, cuts: Cuts) -> set[int]:
    """What stays of parts of its tensors' axes, of one size: of a gate, or of queries, in one projection."""
    long = [mask.long() for mask in _masks(module, cuts) if mask.numel() >= size]
    return {int(count) for mask in long for count in set(mask.unfold(0, size, 1).sum(1).tolist())}


def _same(module: str, attribute: str, expected: Any, found: Any) -> None:
    if found != (list(expected) if isinstance(expected, (list, tuple)) else expected):
        _refuse(module, attribute, expected, found)


def _refuse(module: str, attribute: str, expected: Any, found: Any) -> None:
    raise RecipeError(
        f"slim in the checkpoint's recipe, `config`: `{attribute}` of {module!r} should be {expected}; got {found!r}."
    )
