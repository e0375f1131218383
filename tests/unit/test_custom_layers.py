"""Linear maps and convolutions of classes of one's own: found, cut and counted by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.structured.cost import Cost
from lightning_efficient.structured.graph import find_groups
from tests.slim_models import lively
from tests.unit.test_structured_layers import check


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.t(), x.flatten(0, -2).t() @ grads[0].flatten(0, -2)


class OwnFunction(nn.Module):
    """A product written as an autograd function, its weight the other way round, beside a table that it only adds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel, self.table = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(4, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.kernel) + self.table  # type: ignore[no-any-return, no-untyped-call]


class LowRank(nn.Module):
    """``einsum`` of a weight that is made of two."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(outputs, 2)), nn.Parameter(torch.randn(inputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,oi->bto", x, torch.einsum("or,ir->oi", self.a, self.b))


class AtTheRoot(nn.Module):
    """Weights directly on the model, and one that only its parent uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Parameter(torch.randn(8, 5)), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first).relu()
        return self.last(F.linear(x, self.inner.weight).relu())  # type: ignore[no-any-return]


class OwnConv(nn.Module):
    """A convolution by ``unfold``, its kernel (outputs, window, inputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, 3, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bitk,oki->bot", x.unfold(2, 3, 1), self.kernel)


def _seq(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    return nn.Sequential(layer(5, 8), nn.ReLU(), layer(8, 6), nn.ReLU(), layer(6, 2))


# Batch 2: multiply-accumulates by hand, of the whole and with half of the widths of 8 and 6.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int], float, float]] = {
    "an autograd function": (
        lambda: _seq(OwnFunction), (2, 4, 5), [8, 6], 8 * (5 * 8 + 8 * 6 + 6 * 2), 8 * (5 * 4 + 4 * 3 + 3 * 2)
    ),
    "at the root": (AtTheRoot, (2, 4, 5), [8, 6], 8 * (5 * 8 + 8 * 6 + 6 * 2), 8 * (5 * 4 + 4 * 3 + 3 * 2)),
    "an own convolution": (
        lambda: _seq(OwnConv), (2, 5, 9), [8, 6],
        6 * (7 * 5 * 8 + 5 * 8 * 6 + 3 * 6 * 2), 6 * (7 * 5 * 4 + 5 * 4 * 3 + 3 * 3 * 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_class_of_ones_own(case: str) -> None:
    build, shape, units, whole, half = CASES[case]
    model, x = lively(build()).double().eval(), torch.randn(shape).double()
    groups = find_groups(model, x)
    assert [group.units for group in groups.found.values()] == units, groups.report()
    check(model, x, groups)
    cost = Cost.macs(model, groups.found, lambda: model(x))
    assert cost() == whole
    assert cost.fixed == 0
    assert cost({name: group.units // 2 for name, group in groups.found.items()}) == pytest.approx(half)


def test_a_weight_made_of_two() -> None:
    """Its product with an activation counts for both; making it counts as well, and the rank is a width of its own."""
    model, x = lively(nn.Sequential(LowRank(5, 8), nn.ReLU(), LowRank(8, 3))).double().eval(), torch.randn(2, 4, 5)
    groups = find_groups(model, x.double())
    check(model, x.double(), groups)
    assert "0" in groups.found
    cost = Cost.macs(model, groups.found, lambda: model(x.double()))
    assert (cost(), cost.fixed) == (8 * (5 * 8 + 8 * 3) + 2 * (5 * 8 + 8 * 3), 0)
