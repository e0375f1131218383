"""Ways of writing attention that used to go unread: read, or named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import lightning_efficient.functional as LF
from lightning_efficient.attention import AttentionProbe
from lightning_efficient.attention.temperature import TempScaleError

Style = Callable[["Written", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Written(nn.Module):
    """One attention, by a function that returns its weights and its result."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style, self.num_heads = style, 4
        self.qkv, self.out, self.mix = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(4, 4)
        self.sink = nn.Parameter(torch.randn(4, 1, 1))
        self.weights = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights, out = self.style(self, q, k, v)
        self.weights = weights.detach()
        return x + self.out(out.transpose(1, 2).flatten(2))


def dots(m: Written, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
    return weights, torch.einsum("...ij,...jd->...id", weights, v)


def sink(m: Written, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.cat([q @ k.mT, m.sink.expand(*q.shape[:-1], 1)], -1)
    weights = (logits - logits.max()).softmax(-1)  # a maximum without axes, which is followed as well
    return weights, weights[..., :-1] @ v


def named_arguments(m: Written, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.matmul(input=q, other=k.mT).softmax(dim=3)
    return weights, torch.matmul(input=weights, other=v)


def blocks(m: Written, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Local attention in blocks, five axes."""
    q, k, v = (t.unflatten(2, (-1, 3)).permute(0, 2, 3, 1, 4) for t in (q, k, v))
    weights = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
    return weights, torch.einsum("...hqk,...khd->...qhd", weights, v).permute(0, 3, 1, 2, 4).flatten(2, 3)


def talking(m: Written, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = m.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    return weights, m.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


def channels(m: Written, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1)
    return weights, (weights @ v.mT).mT


@pytest.mark.parametrize("style", [dots, sink, named_arguments, blocks])
def test_read(style: Style) -> None:
    model, x = Written(style), torch.randn(2, 12, 16)
    with AttentionProbe(model) as probe:
        model(x)
    assert probe.report == ""
    expected = torch.special.entr(model.weights).sum(-1).flatten(1, -2)
    torch.testing.assert_close(probe.calls[0].rows.entropy, expected.view(2, -1, expected.shape[-1]))
    assert "tau" in LF.apply_temp_scale(model, 0.5, example=x).targets["(model)"]


@pytest.mark.parametrize(
    ("style", "words"),
    [(talking, "softmax of shape (2, 4, 12, 12) is not a product's"), (channels, "attends over channels")],
)
def test_named(style: Style, words: str) -> None:
    model, x = Written(style), torch.randn(2, 12, 16)
    with AttentionProbe(model) as probe:
        model(x)
    assert not probe.calls
    assert words in probe.report
    assert "''" not in probe.report
    if style is channels:
        with pytest.raises(TempScaleError, match="over channels"):
            LF.apply_temp_scale(model, 0.5, example=x)


def test_a_head_as_wide_as_its_tokens_is_not_taken_for_channels() -> None:
    model = Written(dots)
    with AttentionProbe(model) as probe:
        model(torch.randn(2, 4, 16))
    assert len(probe.calls) == 1


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40}


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (
            lambda: hf.GptOssModel(
                hf.GptOssConfig(**SIZES, intermediate_size=16, num_key_value_heads=2, head_dim=4, num_local_experts=4)
            ),
            1,
        ),
        (
            lambda: hf.LongT5EncoderModel(
                hf.LongT5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, local_radius=3)
            ),
            1,
        ),
        (
            # A norm that feeds values and biases, and no queries.
            lambda: hf.LongT5EncoderModel(
                hf.LongT5Config(
                    vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, local_radius=3,
                    encoder_attention_type="transient-global", global_block_size=4,
                )
            ),
            1,
        ),
        (
            # Products that are modules of their own.
            lambda: hf.SqueezeBertModel(hf.SqueezeBertConfig(**SIZES, intermediate_size=32, embedding_size=16)),
            1,
        ),
    ],
    ids=["sinks", "local", "transient global", "products apart"],
)  # fmt: skip
def test_hugging_face(make: Callable[[], nn.Module], calls: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with AttentionProbe(model) as probe:
        model(input_ids=torch.arange(3, 27).view(2, 12))
    assert len(probe.calls) == calls
    assert probe.report == ""
    assert len(LF.apply_temp_scale(model, 0.5, example={"input_ids": torch.arange(3, 27).view(2, 12)}).targets) == 1


def test_channels_are_named_whatever_the_way_the_input_is_given() -> None:
    model = Written(channels)
    with AttentionProbe(model) as probe:
        model(x=torch.randn(2, 12, 16))
    assert "over channels" in probe.report


def test_cross_covariance_of_timm_is_named_by_the_monitor() -> None:
    model = timm.create_model("edgenext_xx_small").eval()
    with AttentionProbe(model) as probe:
        model(torch.randn(1, 3, 64, 64))
    assert not probe.calls
    assert "attends over channels" in probe.report
