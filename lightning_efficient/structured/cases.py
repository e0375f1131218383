"""A width on trial: the ways in which it may be read, and the subsets of its units that it has to stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from lightning_efficient.structured.groups import UnitGroup
from lightning_efficient.structured.widths import Width

KINDS = ("unbalanced", "all but one", "one alone", "the first", "the last")
DIVISORS = (2, 4, 8, 16, 32)


class Case:
    """A width on trial.

    Args:
        width: The width.
        turn: At a kind of subset it takes the kind so many further on: widths that are tried together differ.

    Attributes:
        group: The way in which it is read now.
        running: Ways in which it runs, though zeros are not gone.
        error: What it first raised; empty: nothing.
    """

    def __init__(self, width: Width, turn: int) -> None:
        self.width, self.turn, self.group = width, turn, width.versions()[0]
        self.running: list[UnitGroup] = []
        self.error = ""
        self._ways = self._others()

    def subset(self, kind: int) -> list[int]:
        """The units that stay."""
        return subset(self.group, kind + self.turn, len(KINDS) * self.turn + kind)

    def next(self, failure: str) -> bool:
        """Read it in another way.

        Args:
            failure: Of this one: what it raised; empty: it runs.
        """
        if failure:
            self.error = self.error or failure
        else:
            self.running.append(self.group)
        way = next(self._ways, None)
        self.group = self.group if way is None else way
        return way is not None

    def _others(self) -> Iterator[UnitGroup]:
        """With other attributes lowered; if it runs in none of these, with a divisor."""
        versions = self.width.versions()
        if self.width.heads:  # keys and values that all heads share do not vanish with one: what reads it has to
            versions += [_read_too(version) for version in versions[:2]]
        yield from versions[1:]
        for group in versions if not self.running else ():
            for divisor in DIVISORS:
                if group.units >= 2 * divisor > group.divisor and group.units % divisor == 0:
                    yield replace(group, divisor=math.lcm(divisor, group.divisor))
                    if self.running:
                        break


def subset(group: UnitGroup, kind: int, seed: int) -> list[int]:
    """Units that stay, of one of the :data:`KINDS` of subsets.

    Args:
        group: Of which.
        kind: Index of the kind; they come round again.
        seed: Gives the same units each time; of two widths that are tried together each has one of its own, as the same
            units of both would hide that one cannot go without the other.
    """
    kind %= len(KINDS)
    units, step = group.units, group.divisor
    blocks = units // step
    count = {1: blocks - 1, 2: 1}.get(kind) or _coprime(blocks)
    count = min(max(count, 1), max(blocks - 1, 1)) * step
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    if kind == 0:  # three of the first half for one of the second
        first, second = order[order < units // 2], order[order >= units // 2]
        many = min(-(-3 * count // 4), len(first))
        order = torch.cat([first[:many], second, first[many:]])
    elif kind in (3, 4):
        order = torch.arange(units) if kind == 3 else torch.arange(units).flip(0)
    return order[:count].sort().values.tolist()


def _read_too(group: UnitGroup) -> UnitGroup:
    """The same units, zeroed where they are read as well as where they are made."""
    return replace(group, slices=tuple(replace(part, role="produce") for part in group.slices))


def _coprime(count: int) -> int:
    """A little under half of a number, odd, without a divisor in common with it where possible."""
    about = max(round(0.45 * count), 1)
    near = sorted(range(1, count), key=lambda c: abs(c - about))
    return next((c for c in near if c % 2 and math.gcd(c, count) == 1), about)


def sifted(
    groups: list[UnitGroup],
    error: Callable[[Sequence[UnitGroup]], str],
    instead: Callable[[UnitGroup, str], UnitGroup | None],
) -> list[UnitGroup]:
    """Groups, those that fail replaced.

    Args:
        groups: All of them.
        error: What goes wrong with some of them; empty: nothing.
        instead: Another group for one that fails, given its error; None: it is left out.
    """
    if not groups or not (why := error(groups)):
        return groups
    if len(groups) == 1:
        other = instead(groups[0], why)
        return [] if other is None else [other]
    middle = len(groups) // 2
    return [*sifted(groups[:middle], error, instead), *sifted(groups[middle:], error, instead)]


def next_running(case: Case, kind: int, failure: str) -> bool:
    """Whether there is another way in which a case runs, though zeros are not gone; it is read so then."""
    case.error = failure
    if case.running:
        case.group = case.running.pop(0)
        return True
    return False


def broken(error: str) -> str:
    """The reason for which a group is refused whose model does not run."""
    return f"the model does not run without some of its units ({error})"
