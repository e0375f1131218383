"""What becomes of labels in one operation: sums of products, convolutions, norms, reductions, and all the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_efficient.common.nests import mapped, tensors_in
from lightning_efficient.structured.book import Label
from lightning_efficient.structured.labels import Grid, lifted, support
from lightning_efficient.structured.moves import MOVES, Moves

_REDUCES = frozenset((
    "sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "max", "min", "prod", "any", "all",
    "logsumexp", "linalg_vector_norm", "norm", "nansum", "median", "aminmax",
))  # fmt: skip
# What they give out are positions.
_PICKS = frozenset(
    [
        "argmax",
        "argmin",
        "topk",
        "sort",
        "kthvalue",
        "gather",
        "scatter",
        "index_put",
        "multinomial",
        "nll_loss_forward",
    ]
)
_PICKS_ALL = frozenset(["nll_loss_forward", "nll_loss2d_forward", "multi_margin_loss", "_ctc_loss"])
_NORMS = frozenset(["native_layer_norm", "_fused_rms_norm", "_softmax", "_log_softmax", "cumsum", "cumprod"])
# Where a parameter that is added or multiplied makes what comes out, so that zeroing it belongs to the unit.
_MAKERS = frozenset((
    "add", "sub", "mul", "addcmul", "cat", "stack", "copy", "lerp", "where", "native_layer_norm", "_fused_rms_norm",
))  # fmt: skip


class Rules(Moves):
    """One operation of any kind."""

    def made(self) -> list[Label]:
        """One for each result."""
        if self.name.startswith("new_") or not any(label.grids for label in self.before):
            return [Label([]) for _ in self.results]
        self._mark_makers()
        special: Callable[[], list[Grid]] | None = getattr(self, f"_op_{self.name}", None)
        if self.name in MOVES:
            return self._move()
        if special is not None:
            return [Label(special()), *(Label([]) for _ in self.results[1:])]
        if "batch_norm" in self.name:  # of a weight it may go over what the weight reads
            self.book.mixed += [(g, "batch_norm") for g in self.before[0].grids if 1 not in support(g)]
            return [Label(self._channels(self.before)), *(Label([]) for _ in self.results[1:])]
        if "deform_conv2d" in self.name:
            for label in map(self.labels_at, (2, 3)):
                self._fix(label, "it places the samples of a deformable convolution")
            weight = self.args[1]
            groups = self.args[0].shape[1] // weight.shape[1]
            return [Label(self._convolve(self.labels_at(4), False, groups))]
        if self.name in _REDUCES:
            grids = self._reduce(self._dims(), bool(self._argument(2, "keepdim", False)))
            return [Label(list(grids)) for _ in self.results]
        if self.name in _PICKS_ALL or self.name in _PICKS:
            self._pick()
        return [Label(self._each(self.results[0])), *(Label([]) for _ in self.results[1:])]

    def _mark_makers(self) -> None:
        if all(label.pure for label in self.before):  # a weight in the making
            return
        if self.name in _MAKERS or "batch_norm" in self.name or "group_norm" in self.name:
            for label in self.before:
                if label.raw:
                    self._mark(label, self.book.produced)

    # -- sums of products ------------------------------------------------------------------------------------------

    def _contract(self, one: Label, two: Label, first: Sequence[int], second: Sequence[int], axis: int) -> list[Grid]:
        """Labels of a product summed along one axis.

        Args:
            one: Labels of the first factor.
            two: Of the second.
            first: Where the first factor's axes lie in the product.
            second: Where the second's do.
            axis: That is summed.
        """
        ndim = max(*first, *second) + 1
        grids = [self._placed(g, first, ndim) for g in one.grids] + [self._placed(g, second, ndim) for g in two.grids]
        for label, places in ((one, first), (two, second)):
            if label.pure:
                mine = Label([self._placed(g, places, ndim) for g in label.grids])
                self._mark(mine, self.book.produced, but=axis)
                if not (label is two and one.pure and one.grids):
                    self._mark(mine, self.book.consumed, axis=axis)
                else:
                    self._mark(mine, self.book.produced)
        between = not (one.pure or two.pure)
        made = []
        for grid in self.labels.meet(grids):
            if support(grid) == {axis}:
                if between:
                    self.book.read.append(grid)
                continue
            if axis in support(grid):
                grid = self.labels.tie(grid, [axis])
                if between:
                    self.book.attended.append(grid)
            made.append(grid.squeeze(axis))
        return made

    def _placed(self, grid: Grid, places: Sequence[int], ndim: int) -> Grid:
        shape = [1] * ndim
        for size, place in zip(grid.shape, places, strict=True):
            shape[place] = size
        return grid.permute([i for _, i in sorted((p, i) for i, p in enumerate(places))]).reshape(shape)

    def _op_mm(self) -> list[Grid]:
        return self._contract(self.labels_at(0), self.labels_at(1), (0, 1), (1, 2), 1)

    def _op_bmm(self) -> list[Grid]:
        return self._contract(self.labels_at(0), self.labels_at(1), (0, 1, 2), (0, 2, 3), 2)

    def _op__cdist_forward(self) -> list[Grid]:
        one, two = self.labels_at(0), self.labels_at(1)
        if self.results[0].ndim == 2:
            return self._contract(one, two, (0, 1), (2, 1), 1)
        return self._contract(one, two, (0, 1, 2), (0, 3, 2), 2)

    def _op_mv(self) -> list[Grid]:
        return self._contract(self.labels_at(0), self.labels_at(1), (0, 1), (1,), 1)

    def _op_dot(self) -> list[Grid]:
        return self._contract(self.labels_at(0), self.labels_at(1), (0,), (0,), 0)

    def _op_addmm(self) -> list[Grid]:
        made = self._contract(self.labels_at(1), self.labels_at(2), (0, 1), (1, 2), 1)
        return self._plus(self.labels_at(0), made)

    def _op_baddbmm(self) -> list[Grid]:
        made = self._contract(self.labels_at(1), self.labels_at(2), (0, 1, 2), (0, 2, 3), 2)
        return self._plus(self.labels_at(0), made)

    def _plus(self, bias: Label, made: list[Grid]) -> list[Grid]:
        if bias.pure:
            self._mark(bias, self.book.produced)
        return self.labels.meet([*made, *(lifted(g, self.results[0].ndim) for g in bias.grids)])

    def _op__trilinear(self) -> list[Grid]:
        expands, dims = self.args[3:6], self.args[6]
        grids = []
        for position, added in enumerate(expands):
            label = self.labels_at(position)
            if label.pure:
                self._mark(label, self.book.produced, axis=0)
                self._mark(label, self.book.consumed, but=0)
            for grid in label.grids:
                for axis in sorted(added):
                    grid = grid.unsqueeze(axis)
                grids.append(grid)
        return self._without(self.labels.meet(grids), set(dims), False)

    def _op_convolution(self) -> list[Grid]:
        return self._convolve(self.labels_at(2), bool(self.args[6]), int(self.args[8]))

    def _convolve(self, bias: Label, transposed: bool, groups: int) -> list[Grid]:
        x, weight, out = self.labels_at(0), self.labels_at(1), self.results[0]
        channels, (rows, columns) = self.args[0].shape[1], self.args[1].shape[:2]
        inputs = self._along(x, 1, channels)
        first, second = self._along(weight, 0, rows), self._along(weight, 1, columns)
        if weight.pure:
            self._mark(weight, self.book.produced, axis=1 if transposed else 0)
            if self.args[1].shape[0 if transposed else 1] > 1:
                self._mark(weight, self.book.consumed, axis=0 if transposed else 1)
        if groups > 1 and channels == groups and not transposed:  # depthwise: every channel is its own input
            self.labels.unify(inputs.view(groups, 1), first.view(groups, -1))
            made = first
        elif transposed:
            self.labels.unify(inputs, first)
            self.labels.tie(first.view(groups, -1), [0])  # as many channels in every group
            made = second.repeat(groups)
        else:
            self.labels.unify(inputs.view(groups, -1), second.view(1, -1))
            self.labels.tie(first.view(groups, -1), [0])
            made = first
        if bias.pure:
            self._mark(bias, self.book.produced)
        for grid in bias.grids:
            made = self.labels.unify(made, grid)
        grids = [made.view([-1 if a == 1 else 1 for a in range(out.ndim)])]
        grids += [self.labels.fixed_axis(out.ndim, a, s) for a, s in enumerate(out.shape) if a > 1 and s > 1]
        return grids + [g for g in x.grids if support(g) == {0}]

    # -- norms, reductions, the rest -------------------------------------------------------------------------------

    def _channels(self, known: list[Label]) -> list[Grid]:
        """Vectors lie along the second axis."""
        ndim = self.results[0].ndim
        grids = list(known[0].grids)
        for label in known[1:]:
            grids += [g.view([1, -1] + [1] * (ndim - 2)) for g in label.grids if g.ndim == 1]
        return self.labels.meet(grids)

    def _op_native_group_norm(self) -> list[Grid]:
        known = [self.labels_at(0), self.labels_at(1), self.labels_at(2)]
        made = self._channels(known)
        groups, channels = int(self.args[6]), self.args[0].shape[1]
        for grid in made:
            if 1 in support(grid) and groups > 1 and channels > groups and not self.labels.fixed(grid):
                line = self.labels.tie(grid, support(grid) - {1}).view(groups, -1)
                # A whole group is gone when it is zero; one channel of every group changes the statistics.
                self.labels.tie(line, [0] if self.labels.inner else [1])
            if 1 in support(grid) and channels > groups and (self.labels.inner or groups == 1):
                self.book.mixed.append((grid, "GroupNorm"))
        return made

    def _dims(self) -> set[int]:
        ndim = self.operands[0].ndim
        position = 2 if self.name in ("linalg_vector_norm", "norm") else 1
        dims = self._argument(position, "dim")
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            return set(range(ndim))
        return {int(d) % max(ndim, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}

    def _reduce(self, dims: set[int], keepdim: bool) -> list[Grid]:
        if self.name in ("linalg_vector_norm", "norm"):
            keepdim = bool(self._argument(3, "keepdim", False))
        elif self.name in ("var", "std", "var_mean", "std_mean"):
            keepdim = bool(self.kwargs.get("keepdim", False))
        if self.results[0].ndim == self.operands[0].ndim:
            keepdim = True
        return self._without(self.before[0].grids, dims, keepdim)

    def _without(self, grids: list[Grid], dims: set[int], keepdim: bool) -> list[Grid]:
        made = []
        for grid in grids:
            mine = support(grid)
            if mine <= dims:
                self.book.mixed.append((grid, self.name))
                self.book.read.append(grid)  # a sum of products may be written so
                continue
            grid = self.labels.tie(grid, mine & dims)
            made.append(grid if keepdim else grid.squeeze(tuple(dims)))
        return made

    def _pick(self) -> None:
        first = self.operands[0]
        dim = None if self.name in _PICKS_ALL else self._argument(1, "dim", -1)
        for grid in self.before[0].grids:
            if not isinstance(dim, int) or self._dim(first, dim) in support(grid):
                self.labels.fix(grid, f"{self.name!r} picks from it by position")

    def _each(self, out: Tensor) -> list[Grid]:
        """Element by element, where shapes say so; an axis that changes its size cannot be followed."""
        if self.name in _NORMS:
            ndim = len(self.shapes[0])
            shape = self.args[1]
            dims = {shape % ndim} if isinstance(shape, int) else set(range(ndim - len(shape), ndim))
            self.book.mixed += [(g, self.name) for g in self.before[0].grids if support(g) <= dims]
        if not out.ndim:  # such as a loss
            every = [grid for label in self.before for grid in label.grids]
            alike = len({tensor.shape for tensor in self.operands if tensor.ndim}) == 1
            self.book.mixed += [(grid, self.name) for grid in (self.labels.meet(every) if alike else every)]
            return []
        grids: list[Grid] = []
        changed: set[int] = set()
        for tensor, label in zip(self.operands, self.before, strict=True):
            if _broadcasts(tensor.shape, out.shape):
                grids += [lifted(g, out.ndim) for g in label.grids]
                continue
            if tensor.ndim != out.ndim or (len(self.operands) > 1 and not self.run._schema.is_mutable):
                grids += self._across(tensor, label, out)
                changed |= {a for a in range(out.ndim) if out.shape[a] > 1}
                continue
            differ = {a for a in range(out.ndim) if tensor.shape[a] != out.shape[a]}
            changed |= {a for a in differ if out.shape[a] > 1}
            for grid in label.grids:
                if support(grid) <= differ:
                    self.labels.fix(grid, f"{self.name!r} changes its size")
                else:
                    grids.append(self.labels.tie(grid, support(grid) & differ))
        changed -= {a for grid in grids for a in support(grid)}  # another operand has that axis
        return self.labels.meet([*grids, *(self.labels.fixed_axis(out.ndim, a, out.shape[a]) for a in changed)])

    def _across(self, tensor: Tensor, label: Label, out: Tensor) -> list[Grid]:
        """Where the axes of an operand of another shape lie in the result: where does it change with an entry?"""
        found = []
        for grid in label.grids:
            axes = sorted(support(grid))
            ask = len(axes) == 1 and not self.run._schema.is_mutable  # which would work on the model's own
            target = self._target(tensor, axes[0], out) if ask else None
            if target is None:
                self.labels.fix(grid, f"{self.name!r} reads it, which cannot be followed")
            else:
                found.append(grid.reshape([-1 if a == target else 1 for a in range(out.ndim)]))
        return found

    def _target(self, tensor: Tensor, axis: int, out: Tensor) -> int | None:
        """The axis of the result of which each entry hangs on the same entry of an operand along one of its axes."""
        if not tensor.is_floating_point():  # another position may lie outside: as a float of its shape
            alike = [t for t in self.operands if t.shape == tensor.shape and t.is_floating_point()]
            return self._target(alike[0], axis, out) if alike else None
        size = tensor.shape[axis]
        able = {a for a in range(out.ndim) if out.shape[a] == size}
        for i in (0, size - 1) if able else ():
            other = tensor.clone()
            other.select(axis, i).mul_(1.5).add_(0.1)
            args, kwargs = (self._replaced(given, tensor, other) for given in (self.args, self.kwargs))
            moved = next(tensors_in(self.run(*args, **kwargs))) != out
            where = {a: moved.movedim(a, 0).flatten(1).any(1).nonzero().flatten().tolist() for a in able}
            able = {a for a, hit in where.items() if hit == [i]}
        return able.pop() if len(able) == 1 else None

    def _replaced(self, given: Any, tensor: Tensor, other: Tensor) -> Any:
        return mapped(given, lambda leaf: other if leaf is tensor else leaf)


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    if len(shape) > len(target):
        return False
    return all(s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False))
