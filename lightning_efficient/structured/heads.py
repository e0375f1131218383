"""Attention heads as units, found from what each head's output depends on, not from the names of classes.

A layer that reads the heads side by side has one run of input columns a head. The gradient of one run with respect to
the attention's parameters is exactly zero for every row that belongs to other heads: the rows where it is not zero are
the head's, whatever the layout (fused or separate projections, queries that share keys and values, tables of position
biases by head).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_efficient.common.match import modules_by_name
from lightning_efficient.structured.groups import Slice, UnitGroup
from lightning_efficient.structured.slim import HEAD_ATTRIBUTES, INNER_ATTRIBUTES
from lightning_efficient.structured.widths import Role, is_conv1d

# An attribute of these may count the heads' channels or those of the residual stream; the trial decides which.
AMBIGUOUS = ("hidden_dim", "embed_dim", "dim")
_SIZES = ("head_dim", "attention_head_size", "dim_head", "d_head")
_MOST_HEADS = 256


@dataclass(frozen=True)
class Reader:
    """A layer that may read the heads of an attention side by side.

    Args:
        attention: Name of the module that counts the heads.
        layer: Name of the layer.
        heads: Their number.
    """

    attention: str
    layer: str
    heads: int


def readers(model: nn.Module) -> list[Reader]:
    """Candidates: linear layers in every module that knows its heads, or beside it (BERT).

    Args:
        model: Any module.
    """
    modules = modules_by_name(model)
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m)]
    found = []
    for name, module in modules.items():
        if not name or isinstance(module, nn.MultiheadAttention):
            continue
        parent = name.rpartition(".")[0]
        inside = [n for n in linear if n.startswith(f"{name}.")]
        beside = [n for n in linear if n.startswith(f"{parent}." if parent else "") and n not in inside]
        for layer in [*inside, *beside]:
            heads = _heads_of(module, _width(modules[layer]))
            if 1 < heads <= _MOST_HEADS:
                found.append(Reader(name, layer, heads))
    return found


def _heads_of(module: nn.Module, width: int) -> int:
    """How many heads a module says that so many channels hold; 0: it says nothing, or they do not divide."""
    count = next((h for a in HEAD_ATTRIBUTES if type(h := getattr(module, a, None)) is int and h > 0), 0)
    size = next((s for a in _SIZES if type(s := getattr(module, a, None)) is int and s > 0), 0)
    if count:
        return 0 if width % count else count
    return width // size if size and not width % size else 0


def _width(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if is_conv1d(layer) else 1]


def find_heads(model: nn.Module, run: Callable[[], Any]) -> Iterator[tuple[UnitGroup, UnitGroup]]:
    """Every attention whose heads can be told apart.

    Args:
        model: A float64 copy in evaluation mode, none of whose parameters is zero, all requiring gradients.
        run: Runs it.

    Yields:
        Its heads as a group, named like the module, in two versions: attributes that may count the residual channels
        left alone, and lowered, too.
    """
    modules = modules_by_name(model)
    candidates = readers(model)
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].requires_grad:
                inputs[name] = args[0]

        return hook

    handles = [modules[n].register_forward_pre_hook(keep(n)) for n in {c.layer for c in candidates}]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    done: set[str] = set()
    for candidate in candidates:
        if candidate.attention in done or candidate.layer not in inputs:
            continue
        rows = _rows(modules[candidate.attention], inputs[candidate.layer], candidate)
        if rows:
            done.add(candidate.attention)
            group = _group(modules, candidate, rows)
            counts = _counts(modules[candidate.attention], group.units, _width(modules[candidate.layer]))
            sure = {a: step for a, step in counts.items() if a not in AMBIGUOUS}
            yield (
                _with(group, {candidate.attention: sure}),
                _with(group, {candidate.attention: counts}),
            )


Rows = dict[tuple[str, int], list[frozenset[int]]]


def _rows(attention: nn.Module, value: Tensor, reader: Reader) -> Rows:
    """(parameter, axis) → the entries of each head, where heads have their own."""
    own = {n: p for n, p in attention.named_parameters() if p.requires_grad and p.ndim > 0}
    size = value.shape[-1] // reader.heads
    if size * reader.heads != value.shape[-1] or not own:
        return {}
    generator = torch.Generator().manual_seed(0)
    touched: list[Mapping[str, Tensor]] = []
    for head in range(reader.heads):
        cotangent = torch.zeros(value.shape, dtype=value.dtype)
        part = cotangent[..., head * size : (head + 1) * size]
        part.copy_(torch.randn(part.shape, generator=generator, dtype=value.dtype))
        found = torch.autograd.grad(
            value, list(own.values()), cotangent.to(value), retain_graph=True, allow_unused=True
        )
        touched.append({n: g for n, g in zip(own, found, strict=True) if g is not None})
    rows: Rows = {}
    for name, parameter in own.items():
        for dim in range(parameter.ndim):
            sets = [_indices(t[name], dim) if name in t else frozenset[int]() for t in touched]
            if all(sets) and _apart(sets):
                rows[name, dim] = sets
                break
    return {key: sets for key, sets in rows.items() if not key[0].endswith("bias") or own[key[0]].ndim > 1}


def _indices(gradient: Tensor, dim: int) -> frozenset[int]:
    flat = gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)
    return frozenset(flat.ne(0).any(1).nonzero().flatten().tolist())


def _apart(sets: list[frozenset[int]]) -> bool:
    """Pairwise the same or disjoint, and not all the same."""
    distinct = set(sets)
    return len(distinct) > 1 and sum(map(len, distinct)) == len(frozenset().union(*distinct))


def _group(modules: Mapping[str, nn.Module], reader: Reader, rows: Rows) -> UnitGroup:
    """Heads that share entries are one unit."""
    units: list[list[int]] = []
    for head in range(reader.heads):
        mine = next((unit for unit in units if any(sets[unit[0]] == sets[head] for sets in rows.values())), None)
        if mine is None:
            units.append([head])
        else:
            mine.append(head)
    slices: list[Slice] = []
    for (local, dim), sets in rows.items():
        index = [sorted(frozenset().union(*(sets[head] for head in unit))) for unit in units]
        slices += _slices(modules[reader.attention], reader.attention, local, dim, index)
    width = _width(modules[reader.layer]) // reader.heads
    columns = [[head * width + i for head in unit for i in range(width)] for unit in units]
    axis = 0 if is_conv1d(modules[reader.layer]) else 1
    slices.append(Slice(f"{reader.layer}.weight", axis, torch.tensor(columns), "consume"))
    return UnitGroup(reader.attention, len(units), tuple(slices))


def _slices(attention: nn.Module, name: str, local: str, dim: int, index: list[list[int]]) -> Iterator[Slice]:
    """A parameter's slice, and those of its layer's bias and statistics, which gradients may not show."""
    inner, _, attribute = local.rpartition(".")
    layer = attention.get_submodule(inner)
    known = isinstance(layer, (nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm)) or is_conv1d(layer)
    role: Role = "produce" if known else "consume"
    entries = torch.tensor(index)
    yield Slice(f"{name}.{local}", dim, entries, role)
    if known and attribute == "weight":
        size = attention.get_parameter(local).shape[dim]
        prefix = f"{name}.{inner}" if inner else name
        for other, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if other != "weight" and tensor.shape == (size,):
                yield Slice(f"{prefix}.{other}", 0, entries, role)


def _counts(attention: nn.Module, units: int, width: int) -> dict[str, int]:
    """Attributes that count heads or their channels → by how much a unit less lowers them."""
    counts = {}
    for attribute in HEAD_ATTRIBUTES + INNER_ATTRIBUTES:
        value = getattr(attention, attribute, None)
        if type(value) is int and value % units == 0 and (attribute in HEAD_ATTRIBUTES or value == width):
            counts[attribute] = value // units
    return counts


def _with(group: UnitGroup, counts: Mapping[str, Mapping[str, int]]) -> UnitGroup:
    return UnitGroup(group.name, group.units, group.slices, counts=counts)
