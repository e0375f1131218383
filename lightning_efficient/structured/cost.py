"""What units cost: parameters or multiply-accumulates of a network as a function of how many units are cut.

A weight's share of either is proportional to the length of each of its axes, so it is enough to know the whole once
and how much of every axis is left: no smaller network has to be built to see what it would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.nests import tensors_in
from lightning_efficient.common.running import evaluating
from lightning_efficient.common.schema import MapOf, Number, Record, Text
from lightning_efficient.structured.groups import UnitGroup

COST = Record({"amounts": MapOf(Text(), Number(low=0)), "fixed": Number(low=0)})  # in files


class Cost:
    """Cost of a network some of whose units are cut.

    Exact for linear layers and convolutions. What belongs to no weight (attention's own products) counts as constant.

    Args:
        amounts: Name of a parameter → what it costs whole.
        shapes: Name of a parameter → its shape.
        groups: Name → group; all units of one take as many entries of a tensor.
        fixed: Cost that no cut changes.
    """

    def __init__(
        self,
        amounts: Mapping[str, float],
        shapes: Mapping[str, tuple[int, ...]],
        groups: Mapping[str, UnitGroup],
        fixed: float = 0.0,
    ) -> None:
        self.amounts, self.fixed = dict(amounts), fixed
        # Parameter → axis → group → share of the axis that one of its units takes.
        self._shares: dict[str, dict[int, dict[str, float]]] = {}
        for name, group in groups.items():
            for part in group.slices:
                if part.name in amounts:
                    axis = self._shares.setdefault(part.name, {}).setdefault(part.dim, {})
                    axis[name] = part.index.shape[1] / shapes[part.name][part.dim]

    @classmethod
    def parameters(cls, model: nn.Module, groups: Mapping[str, UnitGroup]) -> Cost:
        """Cost in parameters.

        Args:
            model: Counted whole; a parameter with several names once.
            groups: Name → group.
        """
        sizes = {canonical_name(name): tuple(param.shape) for name, param in model.named_parameters()}
        return cls({name: float(torch.Size(shape).numel()) for name, shape in sizes.items()}, sizes, groups)

    @classmethod
    def macs(cls, model: nn.Module, groups: Mapping[str, UnitGroup], run: Callable[[], object]) -> Cost:
        """Cost in multiply-accumulates of one run.

        Args:
            model: Counted in evaluation mode, and left in the modes it was in.
            groups: Name → group.
            run: Calls the model; the example decides the size of images and the length of sequences.
        """
        sizes = {canonical_name(name): tuple(param.shape) for name, param in model.named_parameters()}
        amounts, fixed = _macs(model, run)
        return cls(amounts, sizes, groups, fixed)

    def __call__(self, dropped: Mapping[str, int] | None = None) -> float:
        """The cost with some units cut.

        Args:
            dropped: Name of a group → how many of its units; the rest stay.
        """
        dropped = dropped or {}
        total = self.fixed
        for name, amount in self.amounts.items():
            for axis in self._shares.get(name, {}).values():
                amount *= 1.0 - sum(share * dropped.get(group, 0) for group, share in axis.items())
            total += amount
        return total


def _macs(model: nn.Module, run: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Parameter → multiply-accumulates, and those of no parameter."""
    counter = _Counter(model)
    with evaluating(model), _countable(), torch.enable_grad(), counter:
        run()
    return counter.amounts, counter.fixed


class _Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of a run for the parameters that they are done with, whatever class they are in.

    A product of an activation with a parameter, or with something made of parameters alone, counts for these
    parameters; a product of activations for none.

    Args:
        model: Whose parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.amounts: dict[str, float] = {}
        self.fixed = 0.0
        self._sizes = {canonical_name(name): p.numel() for name, p in model.named_parameters() if p.ndim > 1}
        # Views of a parameter, `.data` too, lie in its storage; what is computed from parameters alone is noted.
        self._stored: dict[int, frozenset[str]] = {}
        for tensor in model.buffers():
            self._stored[tensor.untyped_storage().data_ptr()] = frozenset()
        for name, param in model.named_parameters():
            self._stored[param.untyped_storage().data_ptr()] = frozenset({canonical_name(name)} & self._sizes.keys())
        self._made: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        counts = flop_registry.get(func.overloadpacket)
        if counts is None and func.namespace == "aten":
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        whose = [self._of(tensor) for tensor in tensors_in((args, kwargs))]
        out = func(*args, **kwargs)
        owners = frozenset[str]().union(*(names for names in whose if names is not None))
        if counts is not None:
            self._count(counts(*args, **kwargs, out_val=out) / 2, owners)
        if all(names is not None for names in whose):
            for tensor in tensors_in(out):
                self._made[tensor] = owners
        return out

    def _of(self, tensor: Tensor) -> frozenset[str] | None:
        """The parameters that a tensor is made of, and of nothing else; None: an activation."""
        made: frozenset[str] | None = self._made.get(tensor)
        return self._stored.get(tensor.untyped_storage().data_ptr()) if made is None else made

    def _count(self, macs: float, owners: frozenset[str]) -> None:
        size = sum(self._sizes[name] for name in owners)
        for name in owners:
            self.amounts[name] = self.amounts.get(name, 0.0) + macs * self._sizes[name] / size
        if not owners:
            self.fixed += macs


@contextmanager
def _countable() -> Iterator[None]:
    """Keep fused kernels and compiled code out: torch counts nothing in them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
