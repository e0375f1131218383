"""Widths that cannot go alone, tried together: unit by unit they may be one.

Heads that a constant of the model's joins, heads of several attentions that one attribute counts, halves of an axis
that are taken by its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_efficient.structured.cases import KINDS, Case
from lightning_efficient.structured.groups import Slice, UnitGroup
from lightning_efficient.structured.widths import Role, Width, counts_above


def together(
    cases: Sequence[Case],
    modules: Mapping[str, nn.Module],
    fails: Callable[[Case, int], bool],
    refused: dict[str, str],
) -> list[UnitGroup]:
    """Groups of which none stands the trial alone, but several together do.

    Args:
        cases: Those that failed.
        modules: Of the model, by name.
        fails: Whether a case stands a kind of subset in no way that is left.
        refused: Name → reason; those that go together are taken out.
    """
    found = []
    for members in _candidates([case for case in cases if case.width.group.name in refused]):
        if any(case.width.group.name not in refused for case in members):  # found among fewer
            continue
        groups = [case.width.versions()[0] for case in members]
        counts = _united(groups)
        above = counts_above(modules, groups) if members[0].width.heads else {}
        ways = [counts, counts | above]
        ways += [_united(each) for each in zip(*(case.width.versions() for case in members), strict=False)]
        ways = [way for i, way in enumerate(ways) if way not in ways[:i]]
        divisor = math.lcm(*(group.divisor for group in groups))
        one = Case(Width(replace(groups[0], slices=_merged(groups), divisor=divisor), counts=tuple(ways)), 0)
        if not any(fails(one, kind) for kind in range(len(KINDS))):
            found.append(one.group)
            for group in groups:
                refused.pop(group.name, None)
        elif any(way.counts == counts | above != counts for way in one.running):
            refused |= {group.name: _counted(above, group, groups) for group in groups}
    return found


def _candidates(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases of as many units that may be one: those that share the axis of a tensor, all heads or others, all."""
    alike: dict[tuple[int, bool], list[Case]] = {}
    for case in cases:
        alike.setdefault((case.width.group.units, case.width.heads), []).append(case)
    tried: list[list[Case]] = []
    for members in alike.values():
        sets: list[tuple[set[tuple[str, int]], list[Case]]] = []
        for case in members:
            axes = {(part.name, part.dim) for part in case.width.group.slices}
            hit = [one for one in sets if one[0] & axes]
            sets = [one for one in sets if not one[0] & axes]
            sets.append((axes.union(*(a for a, _ in hit)), [*itertools.chain(*(c for _, c in hit)), case]))
        tried += [some for _, some in sets]
    tried += alike.values()
    tried += [
        [case for case in cases if case.width.group.units == units] for units in dict.fromkeys(u for u, _ in alike)
    ]
    yield from (some for i, some in enumerate(tried) if len(some) > 1 and some not in tried[:i])


def _united(groups: Sequence[UnitGroup]) -> dict[str, dict[str, int]]:
    """What any of these count."""
    counts: dict[str, dict[str, int]] = {}
    for group in groups:
        for name, steps in group.counts.items():
            counts.setdefault(name, {}).update(steps)
    return counts


def _merged(groups: Sequence[UnitGroup]) -> tuple[Slice, ...]:
    """Their slices, one a tensor and axis."""
    parts: dict[tuple[str, int], Slice] = {}
    for part in (part for group in groups for part in group.slices):
        if (same := parts.get(key := (part.name, part.dim))) is not None:
            role: Role = "produce" if "produce" in (same.role, part.role) else "consume"
            part = replace(same, index=torch.cat([same.index, part.index], 1), role=role)
        parts[key] = part
    return tuple(parts.values())


def _counted(counts: Mapping[str, Mapping[str, int]], group: UnitGroup, groups: Sequence[UnitGroup]) -> str:
    """Why heads cannot go that something further out counts, and makes something of their number."""
    others = ", ".join(repr(other.name) for other in groups if other is not group)
    where = " and ".join(f"`{a}` of {repr(n) if n else 'the model'}" for n, steps in counts.items() for a in steps)
    return (
        f"its heads run without some only if those of {others} go along and {where} counts them, and the others then "
        "compute something else: what is made of that number changes"
    )
