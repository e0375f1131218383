"""Masks of whole units at the optimizer boundary: zero along entries of an axis, and on the way there.

As masks of single weights (:mod:`~lightning_efficient.weightspace.mask`), but what a mask is, is a vector an axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_efficient.common.schema import Record, Schema, Such
from lightning_efficient.weightspace.mask import ZERO, Mask, changed, pack_mask, packed_mask, unpack_mask
from lightning_efficient.weightspace.site import Site
from lightning_efficient.weightspace.sums import Sums, run, summed, total


class UnitMask(Mask):
    """A mask that is zero along whole entries of some axes.

    Of a parameter that is cut over processes each of them knows what is kept of the whole.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # axis of the whole → bool, what is kept of it
        self._index: dict[int, Tensor] = {}  # axis → long, what is dropped of what is here, for writing

    def drop(self, dim: int, entries: Tensor, weight: Tensor) -> None:
        """Prune entries of an axis, beside those pruned already; the weight itself is written by :meth:`push`.

        Args:
            dim: The axis.
            entries: Long, their positions on the whole.
            weight: The parameter, for its shape and device.
        """
        kept = self.kept(dim, weight).clone()
        kept[entries.to(kept.device)] = False
        self._set(dim, kept, weight.ndim)

    def kept(self, dim: int, weight: Tensor) -> Tensor:
        """What is kept of an axis of the whole: bool, as long as the axis.

        Args:
            dim: The axis.
            weight: The parameter, or what is here of it, for its shape and device.
        """
        size = self._shape(weight)[dim]
        return self._kept.get(dim, torch.ones(size, dtype=torch.bool, device=weight.device))

    def _shape(self, weight: Tensor) -> tuple[int, ...]:
        return self.layout.shape or tuple(weight.shape)

    def _set(self, dim: int, kept: Tensor, ndim: int) -> None:
        self._kept[dim] = kept
        self._index[dim] = (~self.layout.along(dim, kept)).nonzero().flatten()
        if len(self._index[dim]) and 0 not in self.layout.local:
            self.first = tuple(int(self._index[dim][0]) if axis == dim else 0 for axis in range(ndim))

    def dropped(self, weight: Tensor) -> Tensor:
        """True where the weight is pruned, of the shape of what is here of it (a view that may be read only)."""
        gone = torch.zeros((), dtype=torch.bool, device=weight.device)
        for dim, kept in self._kept.items():
            here = self.layout.along(dim, kept).to(weight.device)
            gone = gone | ~here.view([-1 if axis == dim else 1 for axis in range(weight.ndim)])
        return gone.expand(weight.shape)

    def gone(self, tensor: Tensor) -> Tensor:
        """True where the weight is pruned, of the shape of a tensor like it."""
        return self.dropped(tensor)

    def write(self, tensor: Tensor) -> None:
        """Zeros where the weight is pruned, in place."""
        for dim, index in self._index.items():
            if len(index):
                tensor.index_fill_(dim, index, 0)

    def start(self, weight: Tensor) -> None:
        """Keep everything, zeros included."""
        self._kept, self._index, self.first = {}, {}, None

    @summed
    def fits(self, weight: Tensor, tolerance: float) -> Sums[bool]:
        """Whether everything pruned is zero."""
        if not self._index:
            return True
        counts = [torch.count_nonzero(weight.index_select(dim, index)) for dim, index in self._index.items()]
        strangers = yield from total(self.layout, torch.stack(counts).sum())
        return not strangers

    @classmethod
    def state_schema(cls, weight: Tensor) -> Schema:
        """A mask of each axis that has lost something; the weight is zero there."""

        def zero(state: Mapping[str, Tensor]) -> bool:
            found = cls()
            found.load_state_dict(state, weight)
            return bool(found.fits(weight, 0.0))

        axes = {f"axis{dim}": packed_mask((size,)) for dim, size in enumerate(weight.shape)}
        return Such(Record({}, optional=axes), zero, ZERO)

    def state_dict(self) -> dict[str, Tensor]:
        """``axis0`` and so on: what is kept of each axis, eight entries a byte."""
        return {f"axis{dim}": pack_mask(kept) for dim, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over a mask."""
        names = {f"axis{dim}": dim for dim in range(weight.ndim)}
        if not state.keys() <= names.keys():
            raise ValueError(f"the state of a mask of units holds {sorted(names)}; got {sorted(state)}.")
        shape = self._shape(weight)
        kept = {names[n]: unpack_mask(bits.to(weight.device), (shape[names[n]],)) for n, bits in state.items()}
        self._kept, self._index, self.first = {}, {}, None
        for dim, mask in kept.items():
            self._set(dim, mask, weight.ndim)


@torch.no_grad()
def drop_entries(site: Site, transform: UnitMask, entries: Mapping[int, Tensor], *, advance: bool = False) -> None:
    """Prune entries of a weight now: ``W``, ``Ŵ`` and the gradient become zero there.

    Args:
        site: The weight.
        transform: Its mask.
        entries: Axis → positions on it; of a weight that is cut, on the whole, and all processes come here.
        advance: Let the other transforms of the weight follow (a power iteration on what is left). For changes outside
            the optimizer's step; inside, the step itself does.
    """
    with changed(site, transform, advance):
        for dim, where in entries.items():
            transform.drop(dim, where, site.param)


@torch.no_grad()
def scale_entries(weights: Iterable[tuple[Site, Mapping[int, Tensor]]], factor: float) -> None:
    """Multiply entries of weights, in ``W`` and so in ``Ŵ``, after a step; other transforms of the weights follow.

    Args:
        weights: Each weight, and axis → positions on it, each once. Of one that is cut: on what is here, and all
            processes come here with the same weights.
        factor: 0 writes zeros.
    """
    weights = list(weights)
    # Inside the window is a hook of the optimizer that comes before the boundary's, which then pushes.
    outside = [site for site, _ in weights if not site.pulled]
    run([site.pull(None) for site in outside])
    for site, entries in weights:
        for dim, where in entries.items():
            if factor == 0.0:
                site.weight.index_fill_(dim, where, 0)
            else:
                site.weight.index_copy_(dim, where, site.weight.index_select(dim, where).mul_(factor))
    run([site.push(advance=False, follow=True) for site in outside])
