"""Layers of equal width that are to stay equal, as one layer of a search: each loses as many units, its own lowest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from lightning_efficient.structured.pagcp import Layer


def bundled(layers: Sequence[Layer], kinds: Sequence[Hashable]) -> dict[str, list[Layer]]:
    """Layers that go together: of one kind, with as many units left and one divisor.

    Args:
        layers: The layers.
        kinds: Of each of them, such as its number of units and whether they are heads.

    Returns:
        Name, for people → layers. A layer that none is like has its own name.
    """
    alike: dict[Hashable, list[Layer]] = {}
    for layer, kind in zip(layers, kinds, strict=True):
        alike.setdefault((kind, layer.left, layer.divisor), []).append(layer)
    return {
        members[0].name + (f" and {len(members) - 1} alike" if len(members) > 1 else ""): members
        for members in alike.values()
    }


def as_one(name: str, members: Sequence[Layer]) -> Layer:
    """A layer whose unit ``i`` is the ``i``-th lowest of each member.

    Args:
        name: Its name.
        members: From :func:`bundled`.
    """
    left = members[0].left
    return Layer(name, torch.arange(float(left)), torch.ones(left, dtype=torch.bool), members[0].divisor)


def opened(dropped: Mapping[str, Sequence[int]], bundles: Mapping[str, Sequence[Layer]]) -> dict[str, tuple[int, ...]]:
    """Units of the members, from those of the layers that they were made into.

    Args:
        dropped: Name → units of :func:`as_one`.
        bundles: From :func:`bundled`.
    """
    return {member.name: member.lowest(len(units)) for name, units in dropped.items() for member in bundles[name]}
