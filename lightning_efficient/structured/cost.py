"""What units cost: parameters or multiply-accumulates of a network as a function of how many units are cut.

A weight's share of either is proportional to the length of each of its axes, so it is enough to know the whole once
and how much of every axis is left: no smaller network has to be built to see what it would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.match import canonical_name
from lightning_efficient.common.running import evaluating
from lightning_efficient.structured.groups import UnitGroup


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
    counter = FlopCounterMode(display=False)
    with evaluating(model), _countable(), torch.enable_grad(), counter:
        run()
    prefix = type(model).__name__
    whole = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    amounts: dict[str, float] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name:
            children = [f"{prefix}.{name}.{child}" for child, _ in module.named_children()]
            own = whole.get(f"{prefix}.{name}", 0.0) - sum(whole.get(child, 0.0) for child in children)
            mine = [(n, p) for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and id(p) not in seen]
            seen |= {id(p) for _, p in mine}
            size = sum(p.numel() for _, p in mine)
            for attribute, param in mine if own > 0 else ():
                amounts[canonical_name(f"{name}.{attribute}")] = own * param.numel() / size
    return amounts, max(whole.get("Global", 0.0) - sum(amounts.values()), 0.0)


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
