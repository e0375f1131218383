"""Labels of channels: which entries of a tensor's axes belong together, whatever was done to them in between.

Every entry along every axis of every parameter has a number of its own, its label. A tensor of the forward carries
*grids*: integer tensors of its own number of axes, of size 1 along the axes on which they do not vary, that hold at
each place the label of what has to go for that place to go. Where two labels meet (a sum, a product with a weight's
columns), they belong to one unit from then on. Two grids of one tensor vary along different axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

Grid = Tensor
# The label of what has none: constants, which take the size of what they meet.
WILD = 0
# Of an axis with two factors one keeps its size; with ``inner`` it is the other one.
INSIDE = "it lies inside of heads or blocks that go as a whole"


class Labels:
    """Union-find over labels; some classes are fixed, with a reason: nothing of them can go.

    Args:
        inner: Where an axis was split into several, as channels into heads, and only one of them can become smaller:
            the innermost. False: the outermost.
    """

    def __init__(self, inner: bool = False) -> None:
        self.inner = inner
        self._parent = np.zeros(1, dtype=np.int64)
        self._fixed = np.zeros(1, dtype=np.int64)
        self.size = 1
        self.reasons = ["it is an axis of fixed size"]
        self.blocks: list[Tensor] = []  # labels of heads and other parts of which only all can go
        self.constants = 0  # the first label that belongs to no parameter; 0: not known

    def fresh(self, size: int, reason: str | None = None) -> Tensor:
        """New labels.

        Args:
            size: How many.
            reason: Why they are fixed; None: they are not.

        Returns:
            ``(size,)``, long.
        """
        start = self.size
        self.size += size
        if self.size > len(self._parent):  # twice as long each time, or many small ones would copy all over and over
            more = np.zeros(2 * self.size - len(self._parent), dtype=np.int64)
            self._parent, self._fixed = (np.concatenate([part, more]) for part in (self._parent, self._fixed))
        self._parent[start : self.size] = np.arange(start, self.size)
        self._fixed[start : self.size] = 0 if reason is None else self._code(reason)
        return torch.arange(start, self.size)

    def _code(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason) + 1

    def roots(self, labels: Tensor | np.ndarray) -> np.ndarray:
        """The class of each label."""
        found = np.asarray(labels)
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                return found
            found = self._parent[above]

    def unify(self, one: Tensor, two: Tensor) -> Tensor:
        """Labels of which each belongs to one unit with the other at its place.

        Args:
            one: Labels.
            two: Others; shapes broadcast.

        Returns:
            Those of ``one``, and those of ``two`` where ``one`` has none.
        """
        if bool((one == WILD).any()):
            one, two = one + torch.zeros_like(two), two + torch.zeros_like(one)
            merged = torch.where(one == WILD, two, one)
        else:
            merged = one
        left, right = np.broadcast_arrays(self.roots(one), self.roots(two))
        differ = (left != right) & (left != WILD) & (right != WILD)
        if differ.any():
            pairs = np.unique(np.stack([left[differ], right[differ]], 1), axis=0)
            if len(np.unique(pairs)) == pairs.size:  # no class is in two pairs
                first, second = pairs.min(1), pairs.max(1)
                self._parent[second] = first
                self._fixed[first] = np.where(self._fixed[first], self._fixed[first], self._fixed[second])
            else:
                for a, b in pairs.tolist():
                    self._join(a, b)
        return merged

    def _join(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            a, b = min(a, b), max(a, b)
            self._parent[b] = a
            self._fixed[a] = self._fixed[a] or self._fixed[b]

    def _find(self, label: int) -> int:
        while (above := int(self._parent[label])) != label:
            self._parent[label] = label = int(self._parent[above])
        return label

    def fix(self, labels: Tensor, reason: str) -> None:
        """Nothing of these can go.

        Args:
            labels: Any.
            reason: Why, for people; an earlier one stays.
        """
        code = self._code(reason)
        for root in np.unique(self.roots(labels)).tolist():
            if root != WILD and not self._fixed[root]:
                self._fixed[root] = code

    def why_fixed(self, label: int) -> str:
        """The reason for which a label is fixed; empty: it is not."""
        code = int(self._fixed[self._find(label)])
        return self.reasons[code - 1] if code else ""

    def fixed(self, grid: Grid) -> bool:
        """Whether all labels of a grid are."""
        return bool(((self._fixed[self.roots(grid)] != 0) | (np.asarray(grid) == WILD)).all())

    # -- grids -----------------------------------------------------------------------------------------------------

    def tie(self, grid: Grid, axes: Iterable[int]) -> Grid:
        """What shares a place on the other axes goes together.

        Args:
            grid: A grid.
            axes: Along which everything becomes one.

        Returns:
            The grid, of size 1 along them.
        """
        for axis in axes:
            if grid.shape[axis] > 1:
                some = grid.amax(axis, keepdim=True)  # a label wherever there is one: the first may be that of padding
                self.unify(some, grid)
                grid = some
        return grid

    def fixed_axis(self, ndim: int, axis: int, size: int, reason: str = "it is an axis of fixed size") -> Grid:
        """A grid that says that one axis cannot become smaller."""
        shape = [1] * ndim
        shape[axis] = size
        return self.fresh(size, reason).view(shape)

    def meet(self, grids: Iterable[Grid]) -> list[Grid]:
        """Grids of operands that are combined place by place: what varies along the same axes is one.

        Args:
            grids: All of one number of axes.

        Returns:
            Grids of which no two vary along the same axis.
        """
        have: list[Grid] = []
        waiting = list(grids)
        while waiting:
            grid = waiting.pop(0)
            mine = support(grid)
            if not mine:
                continue
            hit = next((i for i, other in enumerate(have) if mine & support(other)), None)
            if hit is None:
                have.append(grid)
            else:
                waiting = [*self._pair(have.pop(hit), grid), *waiting]
        return have

    def _pair(self, one: Grid, two: Grid) -> list[Grid]:
        """Two grids that vary along a common axis, as grids that do not."""
        first, second = support(one), support(two)
        common = first & second
        rigid = self.fixed(one), self.fixed(two)
        if any(rigid) and not all(rigid):
            if rigid[1]:
                one, two, first, second = two, one, second, first
            if self._apart(one, two, common):
                return [two]
        if first == second:
            return [self.unify(one, two)]
        if any(rigid):
            if all(rigid) and second > first:
                one, two, first, second = two, one, second, first
            if second <= first:
                self.fix(two, self._reason(one))
                return [one]
            # A factor of the axis keeps its size, so what is left to become smaller are the others.
            return [self.tie(two, common), one]
        keep = (max if self.inner else min)(first | second)
        others = [
            self.fixed_axis(one.ndim, a, max(one.shape[a], two.shape[a])) for a in sorted(first | second) if a != keep
        ]
        if keep in common:
            both = self.unify(self.tie(one, first - {keep}), self.tie(two, second - {keep}))
        else:
            if keep in second:
                one, two, first = two, one, second
            self.fix(two, INSIDE)
            both = self.tie(one, first - {keep})
        self.blocks.append(both)
        return [both, *others]

    def _apart(self, one: Grid, two: Grid, common: frozenset[int]) -> bool:
        """Whether two grids vary along different factors of their common axis, as samples and heads in one axis."""
        if len(common) != 1:
            return False
        (axis,) = common
        lines = [self.roots(g.movedim(axis, 0).reshape(g.shape[axis], -1)[:, 0]) for g in (one, two)]
        pairs = len(np.unique(np.stack(lines, 1), axis=0))
        return pairs == len(np.unique(lines[0])) * len(np.unique(lines[1]))

    def _constant(self, grid: Grid) -> bool:
        """Whether no entry of a parameter has these labels: roots are the first of their class."""
        return 0 < self.constants <= int(self.roots(grid).max())

    def apart_axes(self, grid: Grid) -> list[Grid]:
        """What is fixed is so along each of its axes."""
        if len(support(grid)) < 2 or not self.fixed(grid):
            return [grid]
        return [self.fixed_axis(grid.ndim, a, grid.shape[a], self._reason(grid)) for a in sorted(support(grid))]

    def _reason(self, grid: Grid) -> str:
        return next((why for label in grid.flatten()[:1].tolist() if (why := self.why_fixed(label))), self.reasons[0])

    def merged(self, grids: Sequence[Grid]) -> list[Grid]:
        """Grids some of which have come to lie along one axis, as factors of it (channels and pixels, flattened).

        Args:
            grids: The outer factors first.

        Returns:
            Grids of which no two vary along the same axis: what is fixed does not count beside what is not; of two that
            are not, the outer one (the inner one with ``inner``).
        """
        have: list[Grid] = []
        for grid in grids:
            if not (mine := support(grid)):
                continue
            hit = next((i for i, other in enumerate(have) if mine & support(other)), None)
            if hit is None:
                have.append(grid)
                continue
            other = have[hit]
            if self._constant(grid) is not self._constant(other):
                self.fix(grid if self._constant(grid) else other, "it is an axis of a constant")
            if self.fixed(other) and self.fixed(grid):
                axes = sorted(mine | support(other))
                have[hit : hit + 1] = [self.fixed_axis(grid.ndim, a, max(grid.shape[a], other.shape[a])) for a in axes]
            elif self.fixed(other):
                have[hit] = grid
            elif not self.fixed(grid):
                if self.inner:
                    have[hit], grid = grid, other
                self.fix(grid, INSIDE)
        return have


def support(grid: Grid) -> frozenset[int]:
    """The axes along which a grid varies."""
    return _varying(grid.shape)


@cache
def _varying(shape: torch.Size) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(shape) if size > 1)


def compressed(full: Tensor) -> Grid:
    """A grid of size 1 along the axes on which labels do not vary.

    Args:
        full: Labels at every place.
    """
    for axis, size in enumerate(full.shape):
        if size > 1 and full.stride(axis) == 0:
            full = full.narrow(axis, 0, 1)
    for axis, size in enumerate(full.shape):
        if size > 1:
            first = full.narrow(axis, 0, 1)
            # Where labels differ, mostly two neighbours do: only where they do not, all have to be looked at.
            if torch.equal(first, full.narrow(axis, 1, 1)) and bool((full == first).all()):
                full = first
    return full


def lifted(grid: Grid, ndim: int) -> Grid:
    """A grid with as many axes, the new ones in front, as broadcasting adds them."""
    return grid.view([1] * (ndim - grid.ndim) + list(grid.shape))
