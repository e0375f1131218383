"""What the monitor counts as a visible key: masks of any number, fused and written out, and heads in any axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_efficient.attention import AttentionProbe, HeadTable
from lightning_efficient.attention.biases import Biases
from lightning_efficient.metrics.functional import visible_keys

NUMBERS = (-1e9, -1e4, -100.0, torch.finfo(torch.float32).min, torch.finfo(torch.float32).min / 2, -math.inf)


def table(run: Callable[[], Any], model: nn.Module | None = None) -> HeadTable:
    with AttentionProbe(model or nn.Identity()) as probe:
        run()
    assert probe.report == ""
    return HeadTable.of(probe.calls)


def qkv(batch: int = 2, heads: int = 4, length: int = 12, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, dim, generator=generator) for _ in range(3)]


def mask_of(length: int = 12) -> Tensor:
    """Causal, and the last five of the second text are padding."""
    real = torch.ones(2, 1, 1, length, dtype=torch.bool)
    real[1, ..., -5:] = False
    return torch.ones(length, length, dtype=torch.bool).tril() & real


def same(a: HeadTable, b: HeadTable) -> None:
    for name, values in a.values.items():
        torch.testing.assert_close(values, b.values[name], rtol=1e-5, atol=1e-5, msg=name)


def add(logits: Tensor, hidden: Tensor, number: float) -> Tensor:
    return logits + torch.zeros(hidden.shape).masked_fill(hidden, number)


def add_in_place(logits: Tensor, hidden: Tensor, number: float) -> Tensor:
    logits += torch.zeros(hidden.shape).masked_fill(hidden, number)
    return logits


def set_items(logits: Tensor, hidden: Tensor, number: float) -> Tensor:
    logits[hidden.expand(logits.shape)] = number
    return logits


WRITTEN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "added": add,
    "added in place": add_in_place,
    "filled": lambda logits, hidden, number: logits.masked_fill(hidden, number),
    "filled in place": lambda logits, hidden, number: logits.masked_fill_(hidden, number),
    "chosen": lambda logits, hidden, number: torch.where(hidden, torch.tensor(number), logits),
    "items": set_items,
    "lerp": lambda logits, hidden, number: logits * (~hidden) + hidden * max(number, -1e30),
    "capped": lambda logits, hidden, number: add((logits / 20).tanh() * 20, hidden, number),
    "merged": lambda logits, hidden, number: add(logits.flatten(0, 1).view(2, 4, 12, 12), hidden, number),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("how", WRITTEN)
def test_a_mask_is_a_mask_whatever_its_number_and_however_it_is_written(how: str, number: float) -> None:
    q, k, v = qkv()
    mask = mask_of()
    logits = q @ k.mT / 8**0.5
    logits = (logits / 20).tanh() * 20 if how == "capped" else logits
    expected = table(
        lambda: F.scaled_dot_product_attention(logits, torch.eye(12).expand(2, 4, 12, 12), v, mask, scale=1.0)
    )
    assert expected.scalars()["entropy_normalized_min"] > 0.7

    def written() -> Tensor:
        made = WRITTEN[how](q @ k.mT / 8**0.5, ~mask, number)
        return made.softmax(-1) @ v

    same(table(written), expected)


@pytest.mark.parametrize("number", [-1e9, -100.0, torch.finfo(torch.float32).min / 2])
def test_fused_and_written_out_give_the_same_numbers_of_one_additive_mask(number: float) -> None:
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~mask_of(), number)
    fused = table(lambda: F.scaled_dot_product_attention(q, k, v, mask))
    same(table(lambda: (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v), fused)
    same(table(lambda: F.scaled_dot_product_attention(q, k, v, mask_of())), fused)


@pytest.mark.parametrize("slope", [0.5, 4.0, 40.0])
@pytest.mark.parametrize("masked", [-1e4, -math.inf])
def test_linear_biases_are_no_masks(slope: float, masked: float) -> None:
    """ALiBi: large, and legitimate. What it leaves near is seen."""
    q, k, v = qkv()
    distance = torch.arange(12.0) - torch.arange(12.0)[:, None]
    alibi = (slope * distance).tril().masked_fill(distance > 0, masked)
    written = table(
        lambda: (
            torch.baddbmm(alibi.expand(8, 12, 12), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.35)
            .view(2, 4, 12, 12)
            .softmax(-1)
            @ v
        )
    )
    fused = table(lambda: F.scaled_dot_product_attention(q, k, v, alibi, scale=0.35))
    same(written, fused)
    seen = (slope * torch.arange(12.0) < 87).sum()
    assert fused.values["ceiling"][0].max() <= math.log(seen)
    if slope == 0.5:
        assert fused.values["ceiling"][0][0] == pytest.approx(sum(math.log(n) for n in range(2, 13)) / 11, rel=1e-5)
        assert fused.scalars()["collapsed_fraction"] == 0.0


def test_a_collapsed_head_still_sees_the_keys_that_it_gives_no_weight() -> None:
    q, k, v = qkv()
    q[:, 1] *= 1e4
    for number in (-1e4, -math.inf):
        # Content that outweighs the mask: such keys carry weight.
        mask = torch.zeros(12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), number)
        found = table(lambda mask=mask: (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v)
        assert found.collapsed()[0].tolist() == [False, True, False, False]
        same(found, table(lambda mask=mask: F.scaled_dot_product_attention(q, k, v, mask)))


def test_a_key_with_weight_is_visible() -> None:
    bias = torch.tensor([[0.0, -100.0, -100.0, -1e9]])
    content = torch.tensor([[0.0, 0.0, 95.0, 0.0]])
    assert visible_keys(bias + content, bias).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("layout", ["samples first", "heads first", "fused"])
def test_heads_merged_into_the_batch_axis_do_not_hide_a_collapsed_one(layout: str) -> None:
    q, k, v = qkv(batch=12)
    q[:, 2] *= 1e4

    def run() -> Tensor:
        order = (1, 0) if layout == "heads first" else (0, 1)
        parts = [t.permute(*order, 2, 3).reshape(-1, 12, 8) for t in (q, k, v)]
        if layout == "fused":
            return F.scaled_dot_product_attention(*parts)
        return torch.bmm(torch.bmm(parts[0], parts[1].mT).div(8**0.5).softmax(-1), parts[2])

    with AttentionProbe(nn.Identity(), max_samples=4) as probe:
        run()
    scalars = HeadTable.of(probe.calls).scalars()
    assert scalars["collapsed_fraction"] == pytest.approx(0.25)
    assert scalars["entropy_normalized_min"] < 0.05


@pytest.mark.parametrize("fused", [True, False])
def test_windows_beside_heads(fused: bool) -> None:
    q, k, v = (t.unflatten(0, (2, 3)) for t in qkv(batch=6))  # (batch, windows, heads, length, dim)
    q[:, :, 1] *= 1e4
    mask = torch.zeros(3, 1, 12, 12)
    mask[1, ..., 6:] = -100.0
    logits = q @ k.mT / 8**0.5

    def run() -> Tensor:
        if fused:
            return F.scaled_dot_product_attention(q, k, v, mask)
        return (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v

    found = table(run)
    assert found.scalars()["collapsed_fraction"] == pytest.approx(0.25)
    expected = torch.special.entr((logits + mask).softmax(-1)).sum(-1).mean((0, -1)).flatten()
    torch.testing.assert_close(found.values["entropy"][0].float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "bert"])
def test_hugging_face_eager_equals_sdpa_with_masks_of_minus_ten_thousand(name: str) -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    config = (hf.GPTNeoXConfig if name == "gpt_neox" else hf.BertConfig)(**sizes)
    make = hf.GPTNeoXModel if name == "gpt_neox" else hf.BertModel
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~mask_of(), -1e4)
    tokens = torch.randint(0, 40, (2, 12))
    found = []
    for kind in ("eager", "sdpa"):
        torch.manual_seed(1)
        model = make._from_config(config, attn_implementation=kind).eval()
        found.append(table(lambda model=model: model(input_ids=tokens, attention_mask=mask), model))
    same(*found)
    assert found[0].scalars()["entropy_normalized_min"] > 0.9


def test_nothing_is_drawn_or_written_and_what_is_dead_is_forgotten() -> None:
    q, k, v = qkv()
    shared = torch.zeros(2, 4, 12, 12)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        logits = q @ k.mT
        shared.zero_().add_(logits)  # somebody else's tensor
        logits = F.dropout(logits, 0.5)
        logits = logits + torch.bernoulli(torch.full_like(logits, 0.1)) * -1e9
        return [logits.softmax(-1) @ v, shared.clone(), torch.get_rng_state()]

    plain = run()
    with AttentionProbe(nn.Identity()) as probe:
        watched = run()
    assert len(probe.calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    biases = Biases()
    out = q @ k.mT
    biases.see(torch.matmul, (q, k.mT), {}, out)
    assert biases.of(out) is not None
    assert biases.of(out.clone()) is None


def test_a_whole_network_is_read_to_the_end() -> None:
    model = timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, depth=1, depth_token_only=1).eval()
    with AttentionProbe(model) as probe:
        model(torch.randn(2, 3, 32, 32))
    assert {c.site for c in probe.calls} | set(probe.report.split(": ")[:1]) >= {"blocks_token_only.0.attn"}
