"""The five saliencies against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_efficient.structured.groups import Slice, UnitGroup
from lightning_efficient.structured.saliency import CRITERIA, all_sums, slice_sums, unit_sums
from lightning_efficient.structured.saliency import saliency as saliency_of
from lightning_efficient.weightspace.layout import Layout


def saliency(
    groups: list[UnitGroup],
    params: dict[str, Tensor],
    grads: dict[str, Tensor | None],
    weights: dict[str, float] | None = None,
    competing: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    return saliency_of(groups, all_sums(groups, params, grads), shapes, weights, competing)


def rows(units: int, each: int = 1, start: int = 0) -> Tensor:
    return start + torch.arange(units * each).view(units, each)


def conv_and_heads() -> tuple[list[UnitGroup], dict[str, Tensor], dict[str, Tensor | None]]:
    """A convolution with bias and norm; heads of three rows in a fused projection, and one along another axis."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (5, 3, 2, 2), "conv.bias": (5,), "bn.weight": (5,), "qkv.weight": (12, 4), "pos": (1, 7, 6),
    }  # fmt: skip
    params = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    grads: dict[str, Tensor | None] = {
        n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items() if n != "conv.bias"
    }
    groups = [
        UnitGroup(
            "conv",
            5,
            (
                *(Slice(name, 0, rows(5), "produce") for name in ("conv.weight", "conv.bias", "bn.weight")),
                Slice("bn.running_mean", 0, rows(5), "produce"),
                Slice("pos", 2, rows(5), "consume"),
            ),
        ),
        UnitGroup(
            "heads",
            2,
            (
                Slice("qkv.weight", 0, torch.cat([rows(2, 3), rows(2, 3, 6)], 1), "produce"),
                Slice("pos", 2, rows(2, 3), "produce"),
            ),
        ),
    ]
    return groups, params, grads


def by_hand(
    groups: list[UnitGroup], params: dict[str, Tensor], grads: dict[str, Tensor | None]
) -> dict[str, list[list[float]]]:
    """Criterion → group → unit, one entry after the other."""
    table: dict[str, list[list[float]]] = {name: [] for name in CRITERIA}
    for group in groups:
        scores: dict[str, list[float]] = {name: [] for name in CRITERIA}
        for unit in range(group.units):
            xs, gs = [], []
            for part in group.slices:
                if part.role == "produce" and part.name in params:
                    for entry in part.index[unit].tolist():
                        x = params[part.name].select(part.dim, entry).flatten().tolist()
                        grad = grads.get(part.name)
                        xs += x
                        gs += [0.0] * len(x) if grad is None else grad.select(part.dim, entry).flatten().tolist()
            norm_x, norm_g = math.sqrt(sum(x * x for x in xs)), math.sqrt(sum(g * g for g in gs))
            dot = sum(x * g for x, g in zip(xs, gs, strict=True))
            scores["magnitude"].append(norm_x)
            scores["avg_magnitude"].append(norm_x / len(xs))
            scores["cosine"].append(1 - dot / (norm_x * norm_g))
            scores["taylor1"].append(abs(dot))
            scores["taylor2"].append(0.5 * dot * dot)
        for name in CRITERIA:
            table[name].append(scores[name])
    return table


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_equals_a_loop(criterion: str) -> None:
    groups, params, grads = conv_and_heads()
    found = saliency(groups, params, grads, {criterion: 2.0})
    expected = by_hand(groups, params, grads)[criterion]
    norm = math.sqrt(sum(score**2 for scores in expected for score in scores))
    for group, scores in zip(groups, expected, strict=True):
        torch.testing.assert_close(found[group.name], 2 * torch.tensor(scores, dtype=torch.float64) / norm)


def test_the_default_is_a_fifth_of_each() -> None:
    groups, params, grads = conv_and_heads()
    found = saliency(groups, params, grads)
    for group in groups:
        parts = [saliency(groups, params, grads, {name: 0.2})[group.name] for name in CRITERIA]
        torch.testing.assert_close(found[group.name], torch.stack(parts).sum(0))


def test_half_precision_is_summed_in_float32() -> None:
    groups, params, grads = conv_and_heads()
    half = {n: p.to(torch.bfloat16) for n, p in params.items()}
    half_grads = {n: None if g is None else g.to(torch.bfloat16) for n, g in grads.items()}
    found = saliency(groups, half, half_grads)
    wide = {n: None if g is None else g.double() for n, g in half_grads.items()}
    exact = saliency(groups, {n: p.double() for n, p in half.items()}, wide)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-7)


def test_only_competing_units_count_in_the_norm() -> None:
    groups, params, grads = conv_and_heads()
    competing = {"conv": torch.tensor([True, True, False, True, False]), "heads": torch.tensor([True, True])}
    found = saliency(groups, params, grads, {"magnitude": 1.0}, competing)
    together = torch.cat([found[name][competing[name]] for name in found])
    assert float(together.norm()) == pytest.approx(1.0)


def test_a_unit_that_training_shrinks_is_worth_less_than_one_that_it_grows() -> None:
    """Gradient descent moves along ``-g``: with ``g = x`` towards zero, with ``g = -x`` away from it."""
    group = UnitGroup("w", 2, (Slice("w", 0, rows(2), "produce"),))
    x = torch.ones(2, 3)
    found = saliency([group], {"w": x}, {"w": torch.stack([x[0], -x[1]])}, {"cosine": 1.0})["w"]
    assert found[0] < found[1]


def test_zero_units_come_first_and_missing_gradients_leave_the_magnitudes() -> None:
    groups, params, grads = conv_and_heads()
    groups[0].zero(params, [3])
    found = saliency(groups, params, grads)
    assert int(found["conv"].argmin()) == 3
    assert float(found["conv"][3]) == 0.0
    without = saliency(groups, params, {})
    assert all(bool(torch.isfinite(value).all()) for value in without.values())
    assert without["conv"].argsort().tolist()[0] == 3


# Axis that is cut → where the parts begin and how long they are, one of them empty.
PARTS = {0: [(0, 5), (5, 4), (9, 0)], 1: [(0, 1), (1, 5), (6, 0)]}


@pytest.mark.parametrize("axis", PARTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_sums_of_parts_add_up(axis: int, dim: int) -> None:
    """Of units of three rows, or of two columns, that straddle the parts; whichever axis is cut."""
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 9, 6, 2, dtype=torch.float64, generator=g)
    part = Slice("w", dim, torch.randperm(x.shape[dim], generator=g).view(3, -1), "produce")
    whole = slice_sums(part, x, grad, Layout.find("w", x))
    found = torch.zeros_like(whole)
    for start, length in PARTS[axis]:
        offset = tuple(start if d == axis else 0 for d in range(3))
        local = tuple(length if d == axis else size for d, size in enumerate(x.shape))
        layout = Layout(tuple(x.shape), local, offset, {axis: (None,)})
        found += slice_sums(part, layout.part(x), layout.part(grad), layout)
    assert torch.allclose(found, whole, rtol=1e-13)


def test_a_group_without_parameters_is_refused() -> None:
    group = UnitGroup("bn", 2, (Slice("bn.running_mean", 0, rows(2), "produce"),))
    with pytest.raises(ValueError, match="'bn' has no parameter"):
        unit_sums(group, {}, {})


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"magnitud": 1.0}, "'magnitud' .*'magnitude'.*; the criteria are magnitude, "),
        ({"cosine": -1.0}, "from 0; got -1.0"),
        ({"cosine": True}, "from 0; got True"),
        ({"cosine": 0.0}, "gives no criterion a weight"),
        ({}, "gives no criterion a weight"),
    ],
)
def test_bad_weights(weights: dict[str, float], said: str) -> None:
    groups, params, grads = conv_and_heads()
    with pytest.raises(ValueError, match=said):
        saliency(groups, params, grads, weights)
