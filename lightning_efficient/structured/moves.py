"""Operations that only move elements: done to the labels, too, so that any layout is followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.structured.book import Book, Label
from lightning_efficient.structured.labels import Grid, compressed, lifted, support

# Data movement: the same call on labels gives the labels of the result.
MOVES = frozenset((
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "unbind", "split",
    "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "squeeze", "clone", "contiguous",
    "alias", "detach", "flip", "roll", "repeat", "unfold", "as_strided", "constant_pad_nd", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "lift_fresh", "_reshape_alias",
    "_to_copy", "im2col", "movedim", "index_select", "view_as_real",
    "view_as_complex",
))  # fmt: skip
# Of these the result is its operand, as far as labels go.
_SAME = frozenset(("_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh"))
_SPLITS = frozenset(["split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "unbind"])


class Moves:
    """One operation that moves elements: from the labels of its operands to those of its results.

    Args:
        book: Where labels are looked up.
        name: Of the operation.
        args: Its positional arguments.
        kwargs: Its named arguments.
        operands: The tensors among them.
        shapes: Their shapes before it ran.
        before: What was known of them.
        results: The tensors it gave out.
        run: The operation itself.
    """

    def __init__(
        self,
        book: Book,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: list[Tensor],
        shapes: list[torch.Size],
        before: list[Label],
        results: list[Tensor],
        run: Any,
    ) -> None:
        self.run = run
        self.book, self.labels, self.name, self.args, self.kwargs = book, book.labels, name, args, kwargs
        self.operands, self.shapes, self.before, self.results = operands, shapes, before, results

    def labels_of(self, value: Any) -> Label:
        """What is known of an argument."""
        return self.book.of(value) if isinstance(value, Tensor) else Label([])

    def labels_at(self, position: int) -> Label:
        """What is known of the argument at a position; nothing if it was left out."""
        return self.labels_of(self.args[position]) if position < len(self.args) else Label([])

    def _argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def _mark(self, label: Label, role: set[int], axis: int | None = None, but: int | None = None) -> None:
        if torch._C._current_graph_task_id() >= 0:  # in a backward a weight reads what it has made
            return
        for grid in label.grids:
            if (axis is None or axis in support(grid)) and (but is None or but not in support(grid)):
                role |= self.book.owners(grid)

    def _fix(self, label: Label, reason: str) -> None:
        for grid in label.grids:
            self.labels.fix(grid, reason)

    def _along(self, label: Label, axis: int, size: int) -> Tensor:
        """Labels along one axis; what shares it elsewhere goes together."""
        for grid in label.grids:
            if axis in support(grid):
                return self.labels.tie(grid, support(grid) - {axis}).flatten()
        return torch.zeros(size, dtype=torch.long)

    # -- data movement ---------------------------------------------------------------------------------------------

    def _move(self) -> list[Label]:
        shape, label = self.shapes[0], self.before[0]
        raw = label.raw
        if self.name in _SAME:
            return [Label(label.grids, raw=raw)]
        if self.name == "index_select":
            return [Label(self._lookup(int(self.args[1]) % len(shape)), raw=raw)]
        if self.name in ("select", "unbind"):
            dim = self._argument(1, "dim", 0) % len(shape)
            for grid in label.grids:
                if support(grid) == {dim}:
                    self.labels.fix(grid, "one of its channels is picked by its position")
        if self.name.endswith("channel_shuffle"):
            line = self._along(label, 1, shape[1])
            self.book.splits.append(line.view(int(self.args[1]), -1))
        grids = label.grids
        if self.name == "view_as_complex":  # two real numbers are one
            grids = [self.labels.tie(grid, support(grid) & {len(shape) - 1}) for grid in grids]
        made: list[list[Grid]] = [[] for _ in self.results]
        for grid in sorted((grid for grid in grids if support(grid)), key=lambda g: min(support(g))):
            moved = _as_list(self._moved(grid.expand(shape)))
            if self.name in _SPLITS:
                self._tie_parts(moved)
                lines = [compressed(part) for part in moved]
                if self.name != "unbind" and not any(len(support(line)) > 1 for line in lines):
                    self.book.parts.append([line.flatten() for line in lines])
            for mine, part in zip(made, moved, strict=True):
                new = compressed(part)
                if len(support(new)) > len(support(grid)) and not label.pure and not self.labels.fixed(new):
                    self.book.splits.append(new)
                mine += self.labels.apart_axes(new)
        return [Label(self._merged(mine, label.pure), raw=raw) for mine in made]

    def _merged(self, grids: list[Grid], pure: bool) -> list[Grid]:
        """See :meth:`Labels.merged`; of a weight, what lies along an axis with another factor may be read otherwise."""
        free = [grid for grid in grids if not self.labels.fixed(grid)]
        merged = self.labels.merged(grids)
        if pure and any(self.labels.fixed(grid) for grid in free):
            self.book.folded += merged
        return merged

    def _moved(self, full: Tensor) -> Any:
        func = getattr(torch.ops.aten, "reshape" if "view" in self.name or self.name == "_reshape_alias" else self.name)
        args = list(self.args)
        args[0] = full
        kwargs = {k: v for k, v in self.kwargs.items() if not isinstance(v, (torch.dtype, torch.layout, torch.device))}
        if self.name == "view_as_complex":
            return full.select(-1, 0)
        if self.name == "view_as_real":
            return full.unsqueeze(-1).expand(*full.shape, 2)
        if self.name == "as_strided":
            return full.contiguous().as_strided(*args[1:])
        if self.name == "constant_pad_nd":
            return torch.ops.aten.constant_pad_nd(full, args[1], 0)
        if self.name == "im2col":
            return torch.ops.aten.im2col(full.double(), *args[1:], **kwargs).long()
        if self.name in ("unsafe_split", "unsafe_split_with_sizes"):
            func = getattr(torch.ops.aten, self.name.removeprefix("unsafe_"))
        return func(*args, **kwargs)

    def _tie_parts(self, parts: Sequence[Tensor]) -> None:
        """Equal parts of an axis lose the same channels, or the next split would go wrong."""
        if len({part.shape for part in parts}) == 1 and len(parts) > 1 and not self.labels.fixed(parts[0]):
            for part in parts[1:]:
                if not torch.equal(part, parts[0]):
                    self.labels.unify(compressed(parts[0]), compressed(part))

    def _dim(self, tensor: Tensor, dim: Any) -> int:
        return int(dim) % max(tensor.ndim, 1)

    def _lookup(self, dim: int) -> list[Grid]:
        """Rows taken by a table of positions: they stay, whatever lies along the other axes goes along."""
        source, label = self.operands[0], self.before[0]
        grids = []
        for grid in label.grids:
            if dim in support(grid):
                self.labels.fix(grid, "its entries are picked by their position")
            else:
                full = grid.expand(source.shape)
                grids.append(compressed(full.narrow(dim, 0, 1).expand(self.results[0].shape)))
        return [*grids, self.labels.fixed_axis(self.results[0].ndim, dim, self.results[0].shape[dim])]

    def _op_index(self) -> list[Grid]:
        source, label = self.args[0], self.labels_at(0)
        indices = list(self.args[1])
        used = {a for a, index in enumerate(indices) if index is not None}
        inputs = any(not self.labels_of(index).pure for index in indices if index is not None)
        for grid in label.grids:
            if support(grid) & used and (inputs or support(grid) <= used):
                self.labels.fix(grid, "its entries are picked by their position")
        rest = [g for g in label.grids if not self.labels.fixed(g)]
        if label.raw:
            self._mark(Label(rest), self.book.produced)
        moved = [compressed(torch.ops.aten.index(g.expand(source.shape), indices)) for g in rest]
        return self.labels.merged(moved)

    def _op_embedding(self) -> list[Grid]:
        table, out = self.labels_at(0), self.results[0]
        self._fix(Label([g for g in table.grids if 0 in support(g)]), "rows of a table that is looked up")
        columns = Label([g for g in table.grids if 0 not in support(g)])
        if table.pure:
            self._mark(columns, self.book.produced)
        where = [lifted(g, out.ndim) for g in columns.grids]
        index = self.labels_at(1)
        return self.labels.meet([*where, *(g.unsqueeze(-1) for g in index.grids)])

    def _op_cat(self) -> list[Grid]:
        parts = [t for t in self.args[0] if t.numel() or t.ndim > 1]
        return self._joined([self.labels_of(t) for t in parts], parts, self._argument(1, "dim", 0))

    def _op_stack(self) -> list[Grid]:
        parts = list(self.args[0])
        dim = self._argument(1, "dim", 0) % (parts[0].ndim + 1)
        grids = [[g.unsqueeze(dim) for g in self.labels_of(t).grids] for t in parts]
        return self.labels.meet([g for found in grids for g in found])

    def _joined(self, known: list[Label], parts: list[Tensor], dim: int) -> list[Grid]:
        ndim = parts[0].ndim
        dim %= ndim
        along = [next((g for g in label.grids if dim in support(g)), None) for label in known]
        rest = [g for label, mine in zip(known, along, strict=True) for g in label.grids if g is not mine]
        if any(g is not None and self.labels.fixed(g) for g in along):
            # Beside a part of fixed size, as of a head that is rotated in part, only whole heads can go.
            for i, grid in enumerate(along):
                if grid is not None and len(support(grid)) > 1 and not self.labels.fixed(grid):
                    rest.append(self.labels.tie(grid, [dim]))
                    along[i] = self.labels.fixed_axis(ndim, dim, grid.shape[dim])
        axes = sorted({a for g in along if g is not None for a in support(g)} | {dim})
        full = [
            (torch.zeros([1] * ndim, dtype=torch.long) if grid is None else grid).expand(
                [tensor.shape[a] if a in axes else 1 for a in range(ndim)]
            )
            for grid, tensor in zip(along, parts, strict=True)
        ]
        return self.labels.meet([compressed(torch.cat(full, dim)), *rest])


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
