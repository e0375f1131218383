"""Which rows count, from the masks that models pass by keyword."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.padding import capture_padding, valid_rows
from lightning_efficient.norms.swap import apply_norm_swap

DROP = torch.tensor([[False, False, True, True], [False, False, False, True], [False, True, True, True]])


def test_hugging_face_masks_keep_ones() -> None:
    keep = valid_rows(nn.Identity(), {"attention_mask": (~DROP).long()})
    assert keep is not None
    assert torch.equal(keep, ~DROP)
    for other in (DROP.float(), DROP[:, None, None], None):
        assert valid_rows(nn.Identity(), {"attention_mask": other}) is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_torch_follow_the_layout_of_the_tokens(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    added = torch.zeros(DROP.shape).masked_fill(DROP, -torch.inf)
    for mask in (DROP, added):
        keep = valid_rows(layer, {"src_key_padding_mask": mask})
        assert keep is not None
        assert torch.equal(keep, ~DROP if batch_first else ~DROP.t())
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first)
    assert valid_rows(decoder, {"src_key_padding_mask": DROP}) is None
    assert valid_rows(decoder, {"tgt_key_padding_mask": DROP}) is not None
    assert valid_rows(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), {"src_key_padding_mask": DROP}) is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_padded_tokens_of_an_encoder_change_no_statistics(batch_first: bool) -> None:
    found = []
    for garbage in (0.0, 1e3):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        apply_norm_swap(model)
        capture_padding(model)
        x = torch.randn(3, 4, 8).masked_fill(DROP[:, :, None], garbage)
        model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=DROP)
        found.append([b for norm in blend_norms(model).values() for b in norm.target.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
