"""Units held at zero: a mask over whole entries of an axis, as a transform at the optimizer boundary.

The parameters that make a pruned unit are zero in the network and in ``W``; :mod:`lightning_efficient.pruning.masks`
says why a step of any torch optimizer then leaves them at zero. A mask of single weights takes as much memory as the
weight; here it is a flag an entry of an axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_efficient.pruning.masks import pack_mask, unpack_mask
from lightning_efficient.weightspace import Site, Transform


class UnitMask(Transform):
    """``Ŵ = M ∘ W`` where ``M`` is zero along whole entries of some axes.

    Of the same kind as :class:`~lightning_efficient.pruning.masks.MaskTransform`: a parameter takes one of them.
    Starts with everything kept.
    """

    kind = "mask"
    order = 10

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # axis → bool, what is kept of it
        self._index: dict[int, Tensor] = {}  # axis → long, what is dropped, for writing

    def drop(self, dim: int, entries: Tensor, weight: Tensor) -> None:
        """Prune entries of an axis, beside those pruned already; the weight itself is written by :meth:`push`.

        Args:
            dim: The axis.
            entries: Long, their positions.
            weight: The parameter, for its shape and device.
        """
        kept = self._kept.get(dim, torch.ones(weight.shape[dim], dtype=torch.bool, device=weight.device)).clone()
        kept[entries.to(kept.device)] = False
        self._set(dim, kept)

    def _set(self, dim: int, kept: Tensor) -> None:
        self._kept[dim] = kept
        self._index[dim] = (~kept).nonzero().flatten()

    def dropped(self, weight: Tensor) -> Tensor:
        """True where the weight is pruned, of its shape (a view that may be read only)."""
        gone = torch.zeros((), dtype=torch.bool, device=weight.device)
        for dim, kept in self._kept.items():
            gone = gone | ~kept.to(weight.device).view([-1 if axis == dim else 1 for axis in range(weight.ndim)])
        return gone.expand(weight.shape)

    def _zero(self, tensor: Tensor) -> None:
        for dim, index in self._index.items():
            if len(index):
                tensor.index_fill_(dim, index, 0)

    def start(self, weight: Tensor) -> None:
        """Keep everything, zeros included."""
        self._kept, self._index = {}, {}

    def pull(self, weight: Tensor, grad: Tensor | None) -> None:
        """Mask the gradient; what is pruned in ``Ŵ`` is zero in ``W``."""
        if grad is not None:
            self._zero(grad)

    def advance(self, weight: Tensor) -> None:
        """Masks change between steps only."""

    def push(self, weight: Tensor) -> None:
        """Write the zeros."""
        self._zero(weight)

    def fits(self, weight: Tensor, tolerance: float) -> bool:
        """Whether everything pruned is zero."""
        return not any(bool(weight.index_select(dim, index).any()) for dim, index in self._index.items())

    def state_dict(self) -> dict[str, Tensor]:
        """``axis0`` and so on: what is kept of each axis, eight entries a byte."""
        return {f"axis{dim}": pack_mask(kept) for dim, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over a mask."""
        names = {f"axis{dim}": dim for dim in range(weight.ndim)}
        if not state.keys() <= names.keys():
            raise ValueError(f"the state of a mask of units holds {sorted(names)}; got {sorted(state)}.")
        kept = {names[n]: unpack_mask(bits.to(weight.device), (weight.shape[names[n]],)) for n, bits in state.items()}
        self._kept, self._index = {}, {}
        for dim, mask in kept.items():
            self._set(dim, mask)


@torch.no_grad()
def drop_entries(site: Site, transform: UnitMask, entries: Mapping[int, Tensor], *, advance: bool = False) -> None:
    """Prune entries of a weight now: ``W``, ``Ŵ`` and the gradient become zero there.

    Args:
        site: The weight.
        transform: Its mask.
        entries: Axis → positions on it.
        advance: Let the other transforms of the weight follow (a power iteration on what is left). For changes outside
            the optimizer's step; inside, the step itself does.
    """
    window = site.pulled  # the parameter holds W already, and will be pushed after the step
    if not window:
        site.pull(None)
    for dim, where in entries.items():
        transform.drop(dim, where, site.param)
    transform.push(site.param.data)
    if site.param.grad is not None:
        transform.push(site.param.grad)
    if not window:
        site.push(advance=False, follow=advance)


@torch.no_grad()
def scale_entries(site: Site, entries: Mapping[int, Tensor], factor: float) -> None:
    """Multiply entries of a weight, in ``W`` and so in ``Ŵ``, between two steps; other transforms of the weight follow.

    Args:
        site: The weight.
        entries: Axis → positions on it, each once.
        factor: 0 writes zeros.
    """
    site.pull(None)
    weight = site.param.data
    for dim, where in entries.items():
        if factor == 0.0:
            weight.index_fill_(dim, where, 0)
        else:
            weight.index_copy_(dim, where, weight.index_select(dim, where).mul_(factor))
    site.push(advance=False, follow=True)
