"""What a trace writes down: the labels of every tensor, and what parameters do with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_efficient.common.nests import tensors_in
from lightning_efficient.structured.labels import Grid, Labels, support


class Label:
    """What is known of a tensor.

    Args:
        grids: Of which no two vary along the same axis.
        pure: It is made of parameters, buffers and constants only.
        raw: It is a parameter or buffer, of which elements were at most moved, scaled or added to others.
    """

    __slots__ = ("grids", "pure", "raw")

    def __init__(self, grids: list[Grid], pure: bool = True, raw: bool = False) -> None:
        self.grids, self.pure, self.raw = grids, pure, raw


class Book:
    """Labels of tensors.

    Args:
        labels: Shared between traces of one model (evaluation and training mode).
        tensors: Name → parameter or buffer, each once.

    Attributes:
        keys: (tensor, axis), by number.
        own: (tensor, axis) → the labels that its entries were given.
        produced: Numbers of the keys that make channels.
        consumed: Those that read them.
        touched: Tensors that some operation took.
        attended: Labels of heads: what was left of products of activations.
        read: Labels over which products of activations were summed altogether.
        mixed: Labels over all of which a norm or another reduction went, and its name.
        splits: Labels on axes that were split into several.
        folded: Labels of weights on axes into which several were made.
        parts: Labels along the parts of an axis that was split in several.
        looked: Module → labels that it handled, for the modules that are asked for.
    """

    def __init__(self, labels: Labels, tensors: dict[str, Tensor]) -> None:
        self.labels = labels
        self.keys: list[tuple[str, int]] = []
        self.own: dict[tuple[str, int], Tensor] = {}
        self.produced: set[int] = set()
        self.consumed: set[int] = set()
        self.touched: set[str] = set()
        self.attended: list[Tensor] = []
        self.read: list[Tensor] = []
        self.mixed: list[tuple[Tensor, str]] = []
        self.splits: list[Grid] = []
        self.folded: list[Grid] = []
        self.parts: list[list[Tensor]] = []
        self.looked: dict[str, list[Tensor]] = {}
        self.known: Any = WeakTensorKeyDictionary()
        self.names: Any = WeakTensorKeyDictionary()
        self._places: dict[tuple[int, torch.Size], Tensor] = {}
        starts = []
        for name, tensor in sorted(tensors.items(), key=lambda item: not isinstance(item[1], nn.Parameter)):
            if not (labels.constants or isinstance(tensor, nn.Parameter)):
                labels.constants = labels.size
            grids = []
            for axis, size in enumerate(tensor.shape):
                ids = labels.fresh(size)
                starts.append(int(ids[0]) if size else 0)
                self.keys.append((name, axis))
                self.own[name, axis] = ids
                grids.append(ids.view([size if a == axis else 1 for a in range(tensor.ndim)]))
            self.known[tensor] = Label([g for g in grids if support(g)], raw=True)
            self.names[tensor] = name
            if tensor.numel():
                self._places[tensor.data_ptr(), tensor.shape] = tensor
        self._starts = np.array(starts, dtype=np.int64)
        self._end = labels.size

    def feed(self, inputs: Any) -> None:
        """The axes of what a model is given are fixed.

        Args:
            inputs: Tensors in any nest.
        """
        for tensor in tensors_in(inputs):
            if tensor not in self.names:
                axes = [a for a, size in enumerate(tensor.shape) if size > 1]
                why = "it meets an axis of the model's input"
                grids = [self.labels.fixed_axis(tensor.ndim, a, tensor.shape[a], why) for a in axes]
                self.known[tensor] = Label(grids, pure=False)

    def close(self, outputs: Iterable[Tensor]) -> None:
        """What a model gives out keeps its shape; and axes that were split into several get one that can shrink."""
        for tensor in outputs:
            for grid in self.of(tensor).grids:
                self.labels.fix(grid, "an output of the model: its shape would change")
        for _ in range(3):
            for grid in self.splits:
                self._settle(grid)

    def _settle(self, grid: Grid) -> None:
        classes = torch.from_numpy(self.labels.roots(grid))
        varying = [
            a for a in range(grid.ndim) if grid.shape[a] > 1 and not bool((classes == classes.narrow(a, 0, 1)).all())
        ]
        if len(varying) > 1 and not self.labels.fixed(grid):
            keep = (max if self.labels.inner else min)(varying)
            self.labels.tie(grid, [a for a in varying if a != keep])

    def written(self, part: Tensor, whole: Tensor) -> None:
        """A tensor has the labels of what was written into a part of it, such as a step of a loop.

        Args:
            part: A view.
            whole: Of which.
        """
        before, new = self.of(whole), self.of(part)
        grids = []
        for grid in new.grids:
            line = self._line(grid, part, whole) if len(support(grid)) == 1 else None
            if line is None:
                self.labels.fix(grid, "it is written into a part of a tensor in a way that cannot be followed")
            else:
                grids.append(line)
        pure = before.pure and new.pure
        self.known[whole] = Label(self.labels.meet([*before.grids, *grids]), pure, before.raw and new.raw)

    def _line(self, grid: Grid, part: Tensor, whole: Tensor) -> Grid | None:
        """Labels along an axis of a view as labels along the same axis of its whole."""
        (axis,) = support(grid)
        step = part.stride(axis)
        places = [a for a in range(whole.ndim) if whole.shape[a] > 1 and whole.stride(a) == step]
        if len(places) != 1:
            return None
        line = torch.full((whole.shape[places[0]],), 0)
        start = (part.storage_offset() - whole.storage_offset()) // step % len(line)
        line[start : start + part.shape[axis]] = grid.flatten()
        return line.view([-1 if a == places[0] else 1 for a in range(whole.ndim)])

    def of(self, tensor: Tensor) -> Label:
        """What is known of a tensor; a constant's axes take any size."""
        label: Label | None = self.known.get(tensor)
        if label is None:
            # `parameter.data` is a new tensor in the same place.
            same = self._places.get((tensor.data_ptr(), tensor.shape)) if tensor.numel() else None
            if same is None:  # what came from outside of torch may depend on anything
                return Label([], pure=tensor.numel() == 1)
            self.touched.add(self.names[same])
            found: Label = self.known[same]
            return found
        return label

    def owners(self, grid: Tensor) -> set[int]:
        """Numbers of the (tensor, axis) that some labels were given to first."""
        ids = np.unique(np.asarray(grid))
        ids = ids[(ids > 0) & (ids < self._end) & (ids >= (self._starts[0] if len(self._starts) else 0))]
        return set((np.searchsorted(self._starts, ids, side="right") - 1).tolist())
