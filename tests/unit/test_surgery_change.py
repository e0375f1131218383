"""The record of one method's changes."""

import torch
from torch import nn

from lightning_efficient.common.change import Change


def test_defaults_are_empty_and_not_shared():
    first, second = Change("masks"), Change("masks")
    first.targets["a"] = "x"
    first.removed.append(nn.Parameter(torch.zeros(1)))
    assert second.targets == {}
    assert second.removed == []


def test_report_counts_groups_and_shortens():
    change = Change(
        method="norm_swap",
        targets={f"blocks.{i}.norm": "LayerNorm -> RepBN" for i in range(5)} | {"norm": "LayerNorm -> Affine"},
        skipped={"head.norm": "frozen"},
        replaced=[(nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)))],
        added=[(nn.Parameter(torch.zeros(1)), None)] * 2,
    )
    assert change.report().splitlines() == [
        "norm_swap: 6 modules changed, 1 skipped",
        "  LayerNorm -> RepBN: 5 (blocks.0.norm, blocks.1.norm, blocks.2.norm, ... 2 more)",
        "  LayerNorm -> Affine: 1 (norm)",
        "  skipped, frozen: 1 (head.norm)",
        "  parameters: 1 replaced, 2 added",
    ]


def test_report_of_an_empty_change():
    assert Change("masks").report() == "masks: 0 modules changed, 0 skipped"


def test_records_compare_by_identity_not_by_tensors():
    old, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert Change("masks", replaced=[(old, new)]) != Change("masks", replaced=[(old, new)])
