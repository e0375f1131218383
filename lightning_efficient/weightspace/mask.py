"""``Ŵ = M ∘ W``: masks as a transform at the optimizer boundary.

A pruned weight is gone: it is zero in the network *and* in ``W``. That makes the transform invertible (no second copy
of the weights), and its way back plain: gradients are masked, weights are zero already. What could still move a pruned
weight is the optimizer's memory, so :func:`forget` empties it: with a zero weight, gradient, momentum and second moment
every torch optimizer's update, weight decay included, is exactly zero. :meth:`MaskTransform.push` writes the zeros all
the same, for optimizers that keep their memory elsewhere.

Second moments of pruned weights are not left at zero on a CPU, where the square root of zero takes up to thirty times
as long as that of another number: :meth:`Mask.tend` keeps them at one that an update, zero over it, does not see.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.common.schema import Record, Schema, Such, TensorOf
from lightning_efficient.common.shards import local
from lightning_efficient.weightspace import Site, Transform
from lightning_efficient.weightspace.layout import Layout
from lightning_efficient.weightspace.sums import Sums, run, summed, total


def pack_mask(mask: Tensor) -> Tensor:
    """A bool tensor as bits, eight a byte, the first entry in the lowest bit.

    Args:
        mask: Any shape.

    Returns:
        uint8, ``(ceil(numel / 8),)``.
    """
    flat = mask.reshape(-1).to(torch.uint8)
    bytes_ = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The inverse of :func:`pack_mask`.

    Args:
        packed: uint8, as packed.
        shape: Shape of the mask.

    Returns:
        Bool of that shape.

    Raises:
        ValueError: ``packed`` is not of the right type or length.
    """
    size = torch.Size(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-size.numel() // 8),):
        raise ValueError(
            f"a mask of shape {tuple(size)} is {-(-size.numel() // 8)} bytes; got {packed.dtype} of shape "
            f"{tuple(packed.shape)}. Was the model changed since it was saved?"
        )
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(-1)[: size.numel()].bool().view(size)


def pack_parts(layout: Layout, mask: Tensor) -> Sums[Tensor]:
    """A mask of a whole weight as bits, on every process.

    Args:
        layout: How the weight is cut.
        mask: Of what is here.
    """
    if layout.groups:  # every process puts its part into zeros, and these are added up
        whole = torch.zeros(layout.shape, dtype=torch.uint8, device=mask.device)
        layout.part(whole).copy_(mask)
        (whole,) = yield layout.everyone, [whole]
        mask = whole.bool()
    return pack_mask(mask)


def packed_mask(shape: Iterable[int]) -> Schema:
    """What :func:`pack_mask` makes of a mask.

    Args:
        shape: Of the mask.
    """
    return TensorOf(torch.uint8, shape=(-(-torch.Size(shape).numel() // 8),))


# What optimizers take the square root of, under the names that torch's have it.
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
# Lost beside any epsilon, and far from denormals: a decay of 0.999 takes 5,000 steps to half way there, where it is put
# back.
_REST = 2.0**-112
_LEAST = 2.0**-119

ZERO = "where it drops something, the weight is zero"


class Mask(Transform):
    """``Ŵ = M ∘ W`` for one parameter: what masks of single weights and of whole units share.

    First in the chain, so that what follows (a spectral norm) sees the pruned weight. A parameter takes one of them, of
    either sort; it starts with everything kept.
    """

    kind = "mask"
    order = 10
    first: tuple[int, ...] | None = None
    """Where some pruned weight is; None: nothing is pruned."""

    @abstractmethod
    def write(self, tensor: Tensor) -> None:
        """Zeros where the weight is pruned, in place."""

    @abstractmethod
    def gone(self, tensor: Tensor) -> Tensor:
        """True where the weight is pruned, of the shape of a tensor like it."""

    def tend(self, memory: Mapping[str, Any]) -> None:
        """Keep second moments of pruned weights off zero and denormals, where a CPU's square root crawls."""
        if self.first is None:
            return
        for value in (memory.get(name) for name in _SECOND_MOMENTS):
            if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype == torch.float16:
                continue
            # They all decay alike from one number, or are all new: one of them says whether it is time.
            value = local(value)
            if value.ndim == len(self.first) and value[self.first] < _LEAST:
                value.masked_fill_(self.gone(value), _REST)

    def pull(self, weight: Tensor, grad: Tensor | None) -> None:
        """Mask the gradient; what is pruned in ``Ŵ`` is zero in ``W``."""
        if grad is not None:
            self.write(grad)

    def advance(self, weight: Tensor) -> None:
        """Masks change between steps only, see :func:`set_mask` and :func:`drop_entries`."""

    def push(self, weight: Tensor) -> None:
        """Write the zeros."""
        self.write(weight)


class MaskTransform(Mask):
    """A mask of single weights.

    Args:
        shape: Of the parameter.
    """

    def __init__(self, shape: Iterable[int]) -> None:
        # All bits set where a weight is kept: `and` with the bits of a float is ten times faster than `masked_fill_`,
        # and unlike a product it turns an infinite gradient into a zero, not into NaN.
        self._bits = torch.tensor(-1, dtype=torch.int32).expand(torch.Size(shape))

    def place(self, layout: Layout) -> None:
        """Mask what is here."""
        super().place(layout)
        self._bits = self._bits.new_tensor(-1).expand(layout.local)

    @property
    def mask(self) -> Tensor:
        """True where the weight is kept; of what is here."""
        return self._bits != 0

    @mask.setter
    def mask(self, kept: Tensor) -> None:
        self._bits = -kept.to(self._bits.dtype)
        # Coordinates, as memory may be laid out in another order of axes.
        at = None if bool(kept.all()) else int(kept.reshape(-1).byte().argmin())
        self.first = None if at is None else tuple(int(i) for i in torch.unravel_index(torch.tensor(at), kept.shape))

    @property
    def dropped(self) -> Tensor:
        """True where the weight is pruned."""
        return self._bits == 0

    def gone(self, tensor: Tensor) -> Tensor:
        """True where the weight is pruned; of what is here."""
        return self.dropped

    def write(self, tensor: Tensor) -> None:
        """Zeros where the weight is pruned, in place."""
        if self.first is None:
            return
        if tensor.element_size() < 4:  # of a narrow parameter, between two steps
            tensor.masked_fill_(self.dropped, 0)
            return
        bits = torch.int64 if tensor.dtype == torch.float64 else torch.int32
        if self._bits.dtype != bits:
            self._bits = self._bits.to(bits)
        tensor.view(bits).bitwise_and_(self._bits)

    def start(self, weight: Tensor) -> None:
        """Keep everything, zeros included."""
        self.mask = torch.ones_like(weight, dtype=torch.bool)

    @summed
    def fits(self, weight: Tensor, tolerance: float) -> Sums[bool]:
        """Whether everything pruned is zero."""
        if self.first is None and not self.layout.groups:
            return True
        strangers = yield from total(self.layout, torch.count_nonzero(weight[self.dropped]))
        return not strangers

    @classmethod
    def state_schema(cls, weight: Tensor) -> Schema:
        """A mask of the weight, which is zero where that drops it."""

        def zero(state: Mapping[str, Tensor]) -> bool:
            return not bool(weight[~unpack_mask(state["mask"].to(weight.device), weight.shape)].any())

        return Such(Record({"mask": packed_mask(weight.shape)}), zero, ZERO)

    @summed
    def state_dict(self) -> Sums[dict[str, Tensor]]:
        """``mask``, packed eight entries a byte."""
        return {"mask": (yield from pack_parts(self.layout, self.mask))}

    def load_state_dict(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take over a mask."""
        if set(state) != {"mask"}:
            raise ValueError(f"the state of a mask holds 'mask'; got {sorted(state)}.")
        shape = self.layout.shape or weight.shape
        self.mask = self.layout.part(unpack_mask(state["mask"].to(weight.device), shape))


@contextmanager
def changed(site: Site, transform: Mask, advance: bool) -> Iterator[None]:
    """A mask that changes inside; then ``W``, ``Ŵ`` and the gradient have its zeros."""
    window = site.pulled  # the parameter holds W already, and will be pushed after the step
    if not window:
        run([site.pull(None)])
    yield
    transform.write(site.weight)
    if site.param.grad is not None:
        transform.write(local(site.param.grad))
    if not window:
        run([site.push(advance=False, follow=advance)])


@torch.no_grad()
def set_mask(site: Site, transform: MaskTransform, mask: Tensor, *, advance: bool = False) -> None:
    """Put a new mask on a weight, now: ``W`` and ``Ŵ`` become zero where it is False.

    Args:
        site: The weight; if it is cut, all processes that hold a part have to come here.
        transform: Its mask.
        mask: True where the weight is kept, of what is here; may also bring weights back, as zeros.
        advance: Let the other transforms of the weight follow (a power iteration on what is left). For changes outside
            the optimizer's step; inside, the step itself does.
    """
    with changed(site, transform, advance):
        transform.mask = mask


def forget(optimizers: Iterable[Optimizer], dropped: Mapping[nn.Parameter, Tensor]) -> None:
    """Empty the optimizers' memory of pruned weights: momentum, second moments, whatever has the weight's shape.

    Args:
        optimizers: They hold the parameters.
        dropped: Parameter → True where it is pruned, or comes back, of what is here.
    """
    for optimizer in optimizers:
        for param, where in dropped.items():
            for value in optimizer.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    local(value).masked_fill_(where, 0)
