"""Groups of units as plain indices: reading, shrinking, checking."""

from __future__ import annotations

import pytest
import torch

from lightning_efficient.structured.groups import Groups, Slice, UnitGroup, check_keep

HEADS = torch.tensor([[0, 1], [2, 3], [4, 5]])


def _group(divisor: int = 1) -> UnitGroup:
    slices = (
        Slice("qkv.weight", 0, HEADS, "produce"),
        Slice("qkv.bias", 0, HEADS, "produce"),
        Slice("norm.running_mean", 0, HEADS, "produce"),
        Slice("proj.weight", 1, HEADS, "consume"),
    )
    return UnitGroup("heads", 3, slices, divisor=divisor)


def _parameters() -> dict[str, torch.Tensor]:
    return {"qkv.weight": torch.randn(6, 4), "qkv.bias": torch.randn(6), "proj.weight": torch.randn(4, 6)}


def test_rows_are_the_entries_of_each_unit() -> None:
    parameters = _parameters()
    group = _group()
    rows = group.slices[3].rows(parameters["proj.weight"])
    for unit in range(3):
        expected = parameters["proj.weight"][:, 2 * unit : 2 * unit + 2].t().flatten()
        assert torch.equal(rows[unit], expected)
    assert group.slices[0].entries([2, 0]).tolist() == [0, 1, 4, 5]


def test_zeroed_units_are_found_again_and_readers_stay() -> None:
    parameters = _parameters()
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    parameters["qkv.weight"][2, 0] = float("inf")
    group = _group()
    assert not group.zeros(parameters).any()
    group.zero(parameters, [1])
    assert group.zeros(parameters).tolist() == [False, True, False]
    assert torch.equal(parameters["proj.weight"], before["proj.weight"])
    for name in ("qkv.weight", "qkv.bias"):
        assert torch.equal(parameters[name][[0, 1, 4, 5]], before[name][[0, 1, 4, 5]])
    assert not group.zeros({}).any()  # nothing to look at is not zero


def test_factors_shrink_units() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    expected = weight.clone()
    expected[:, 2:4] *= 0.25
    Slice("w", 1, HEADS, "produce").multiply_(weight, torch.tensor([1.0, 0.25, 1.0]))
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_what_is_kept_is_checked() -> None:
    groups = Groups({"heads": _group()}, {"fc": "an output of the model"})
    assert check_keep(groups, {"heads": [2, 0]}) == {"heads": [0, 2]}
    assert check_keep(groups, {"heads": range(3)}) == {}
    for keep, words in (
        ({"head": [0]}, "no group.*'heads'"),
        ({"fc": [0]}, "cannot be cut: an output of the model"),
        ({"heads": [0, 3]}, "from 0 to 2; got"),
        ({"heads": [1, 1]}, "different units"),
        ({"heads": []}, "all 3 units would go"),
    ):
        with pytest.raises(ValueError, match=words):
            check_keep(groups, keep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a multiple of 2, such as 2"):
        check_keep(Groups({"heads": _group(2)}), {"heads": [1]})


def test_report_names_everything() -> None:
    inexact = UnitGroup("norm", 3, _group().slices, exact=False, note="LayerNorm over the width")
    text = Groups({"heads": _group(), "norm": inexact}, {"fc": "an output of the model"}).report()
    assert "heads: 3 units in 4 tensors" in text
    assert "zeroing is not removing: LayerNorm over the width" in text
    assert "not fc: an output of the model" in text


def test_an_index_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"should be long, \(2, k\)"):
        UnitGroup("x", 2, (Slice("w", 0, HEADS, "produce"),))
