"""What TempScale used to refuse for the wrong reason: left padding, mixtures of experts, scripted modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import lightning_efficient.functional as LF
from lightning_efficient.attention import AttentionProbe
from lightning_efficient.attention.temper import Law, Temper
from lightning_efficient.attention.temperature import TempScaleConfig, TempScaleError, check_gradients, find_targets
from lightning_efficient.common.running import Float64

_SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
_ROTARY = _SIZES | {"intermediate_size": 32, "num_key_value_heads": 2}


def text(left: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(3, 39, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 1 - left
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.FalconForCausalLM._from_config(hf.FalconConfig(**_SIZES, alibi=True), attn_implementation="sdpa"),
        lambda: hf.CohereForCausalLM._from_config(hf.CohereConfig(**_ROTARY), attn_implementation="eager"),
        lambda: hf.MptForCausalLM(hf.MptConfig(d_model=16, n_layers=2, n_heads=4, vocab_size=40, max_seq_len=16)),
        lambda: hf.Gemma3ForCausalLM._from_config(
            hf.Gemma3TextConfig(**_ROTARY, head_dim=4, sliding_window=4), attn_implementation="eager"
        ),
    ],
    ids=["falcon alibi", "cohere", "mpt", "gemma3"],
)
def test_adapters_train_on_left_padding(make: Any) -> None:
    torch.manual_seed(0)
    model = make().train()
    # log n needs adapters everywhere.
    targets = find_targets(model, text(left=True), TempScaleConfig(0.8, "log_n"))
    assert len(targets.adapters) == 2
    check_gradients(model, text(left=True), targets)


class Written(nn.Module):
    """Causal attention with padding, by hand."""

    def __init__(self, add: bool) -> None:
        super().__init__()
        self.add, self.qkv, self.out = add, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = ~(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & real[:, None, None, :])
        logits = q @ k.mT / 2
        if self.add:
            logits = logits + torch.zeros_like(logits).masked_fill(hidden, -math.inf)
        else:
            logits = logits.masked_fill(hidden, -math.inf)
        return x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Two(nn.Module):
    def __init__(self, add: bool = False) -> None:
        super().__init__()
        self.first, self.second = Written(add), Written(add)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return self.second(self.first(x, real), real)


def padded() -> tuple[Tensor, Tensor]:
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)), real


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("mode", ["constant", "ssmax"])
def test_queries_that_see_no_key_say_nothing_about_the_others(add: bool, mode: Any) -> None:
    torch.manual_seed(0)
    model = Two(add).double().eval()
    x, real = padded()
    x = x.double()
    before = model(x, real)
    assert before.isnan().any()  # the model's own
    change = LF.apply_temp_scale(model, 0.5, example=(x, real), mode=mode)
    assert all("queries that see no key" in text for text in change.targets.values())
    expected = model.second(model.first(x[:1], real[:1]), real[:1])
    after = model(x, real)
    assert torch.equal(after.isnan(), before.isnan())
    torch.testing.assert_close(after[:1], expected)
    assert (after[:1] - before[:1]).abs().max() > 1e-3


def test_weights_that_are_wrong_for_the_other_queries_are_still_found() -> None:
    class Twice(Two):
        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            if float(self.first.qkv.weight.detach().norm()) > self.limit:
                x = x + 1.0  # depends on the weight by a threshold
            return super().forward(x, real)

    torch.manual_seed(0)
    model = Twice().double()
    model.limit = 1.2 * float(model.first.qkv.weight.detach().norm())
    example = tuple(t.double() if t.is_floating_point() else t for t in padded())
    change = LF.apply_temp_scale(model, 0.2, example=example)
    assert "adapter" in change.targets["first"]
    assert "adapter" not in change.targets["second"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_ROTARY, num_experts=4, num_experts_per_tok=2)),
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_ROTARY, head_dim=4, num_local_experts=4)),
    ],
    ids=["olmoe", "gpt-oss"],
)
def test_mixtures_of_experts_run_in_float64(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    assert model.config._experts_implementation == "grouped_mm"
    change = LF.apply_temp_scale(model, 0.8, example=text())
    assert len(change.targets) == 2


@pytest.mark.parametrize("ends", [[2, 2, 5], [1, 3, 6]])
def test_grouped_products_in_float64_are_those_of_the_kernel(ends: list[int]) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(6, 16), torch.randn(3, 16, 8)
    offs = torch.tensor(ends, dtype=torch.int32)
    kernel = F.grouped_mm(rows, weights, offs=offs)[: ends[-1]]
    with Float64():
        mine = F.grouped_mm(rows.double(), weights.double(), offs=offs)
    assert mine.dtype == torch.float64
    assert mine.shape == (6, 8)
    torch.testing.assert_close(mine[: ends[-1]].float(), kernel, rtol=1e-5, atol=1e-5)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return torch.softmax(q @ k.transpose(1, 2) / 2.0, -1) @ k


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
def test_scripted_modules_are_named() -> None:
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    other = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.GELU()))
    change = LF.apply_temp_scale(nn.Sequential(plain, other).eval(), 0.8, example=x)
    assert list(change.targets) == ["0.self_attn"]
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.jit.script(Attends())).eval()
    with pytest.raises(TempScaleError, match=r"'1' \(attends in TorchScript.*exclude=\['1'\]"):
        LF.apply_temp_scale(model, 0.8, example=x)
    with AttentionProbe(model) as probe:
        model(x)
    assert "1: attends in TorchScript" in probe.report


@pytest.mark.parametrize("mode", ["log_n", "ssmax"])
def test_the_number_of_keys_does_not_depend_on_the_number_that_masks(mode: Any) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = ~(torch.ones(6, 6, dtype=torch.bool).tril())

    def outputs(number: float, fused: bool) -> Tensor:
        mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(hidden, number)
        with Temper(Law(0.8, mode)):
            if fused:
                return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
            return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    expected = outputs(-math.inf, True)
    for number in (-1e9, -1e4, torch.finfo(torch.float32).min / 2):
        for fused in (True, False):
            torch.testing.assert_close(outputs(number, fused), expected)
