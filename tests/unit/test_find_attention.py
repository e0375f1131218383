"""What is said of each attention: heads, causal, cross, and the blocks of weights that scale its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import MODELS, Split, build, call
from torch import Tensor, nn

from lightning_efficient.attention import AttentionProbe
from lightning_efficient.attention.knobs import Knob
from lightning_efficient.attention.sites import AttentionSite, find_attention
from lightning_efficient.attention.trace import Trace
from lightning_efficient.weightspace import Block

SDPA, MHA = "scaled_dot_product_attention", "multi_head_attention_forward"


def sites(name: str) -> dict[str, AttentionSite]:
    return find_attention(*build(name)).sites


def cut(site: AttentionSite) -> dict[str, list[tuple[int, int, int]]]:
    """Name of a knob's parameter within the module -> (start, length, axis) of its blocks."""
    return {
        knob.parameter.removeprefix(f"{site.name}."): [(b.start, b.length, b.dim) for b in knob.blocks]
        for knob in site.knobs
    }


WHERE: dict[str, tuple[str, str, int, dict[str, list[tuple[int, int, int]]]]] = {
    # fused rows [q; k; v]
    "vit": ("blocks.0.attn", SDPA, 3, {"qkv.weight": [(0, 24, 0)], "qkv.bias": [(0, 24, 0)]}),
    "vit unfused": ("blocks.0.attn", "softmax", 3, {"qkv.weight": [(0, 24, 0)], "qkv.bias": [(0, 24, 0)]}),
    # a norm between the projection and the product undoes any factor on the projection
    "vit, query norm": ("blocks.1.attn", SDPA, 3, {"q_norm.weight": [(0, 8, 0)], "q_norm.bias": [(0, 8, 0)]}),
    "qwen3": ("layers.0.self_attn", SDPA, 4, {"q_norm.weight": [(0, 6, 0)]}),
    # tables of position biases, shared or not
    "beit": (
        "blocks.0.attn", SDPA, 3,
        {"q_bias": [(0, 24, 0)], "qkv.weight": [(0, 24, 0)], "relative_position_bias_table": [(0, 52, 0)]},
    ),
    "swin": (
        "layers.0.blocks.1.attn", SDPA, 3,
        {"qkv.weight": [(0, 12, 0)], "qkv.bias": [(0, 12, 0)], "relative_position_bias_table": [(0, 49, 0)]},
    ),
    "mpnet": (
        "encoder.layer.1.attention.attn", "softmax", 3,
        {"q.weight": [(0, 24, 0)], "q.bias": [(0, 24, 0)], "encoder.relative_attention_bias.weight": [(0, 32, 0)]},
    ),
    "t5": (
        "decoder.block.1.layer.0.SelfAttention", SDPA, 3,
        {
            "q.weight": [(0, 24, 0)],
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [(0, 32, 0)],
        },
    ),
    "deberta": (
        "encoder.layer.0.attention.self", "softmax", 3,
        {
            "query_proj.weight": [(0, 24, 0)], "query_proj.bias": [(0, 24, 0)],
            "pos_query_proj.weight": [(0, 24, 0)], "pos_query_proj.bias": [(0, 24, 0)],
        },
    ),
    # rotary positions come after the projection
    "eva": ("blocks.0.attn", SDPA, 3, {"q_bias": [(0, 24, 0)], "qkv.weight": [(0, 24, 0)]}),
    "llama": ("layers.1.self_attn", SDPA, 4, {"q_proj.weight": [(0, 24, 0)]}),
    # columns; rows of every head
    "gpt2": ("h.0.attn", SDPA, 3, {"c_attn.weight": [(0, 24, 1)], "c_attn.bias": [(0, 24, 0)]}),
    "gpt_neox": (
        "layers.0.attention", SDPA, 3,
        {
            "query_key_value.weight": [(0, 8, 0), (24, 8, 0), (48, 8, 0)],
            "query_key_value.bias": [(0, 8, 0), (24, 8, 0), (48, 8, 0)],
        },
    ),
    "encoder": (
        "layers.layers.1.self_attn", MHA, 2, {"in_proj_weight": [(0, 8, 0)], "in_proj_bias": [(0, 8, 0)]},
    ),
    # projections outside of the module that attends
    "split": ("core", SDPA, 2, {"q.weight": [(0, 8, 0)], "q.bias": [(0, 8, 0)]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHERE)
def test_where_the_temperature_goes(name: str) -> None:
    place, kind, heads, blocks = WHERE[name]
    site = sites(name)[place]
    assert (site.kind, site.heads, site.refused, site.why) == (kind, heads, "", "")
    assert cut(site) == blocks


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("swin v2", "not proportional to any set"),  # the exponential of a clamped parameter
        ("gemma3", "not proportional to any set"),  # 1 + weight
        ("tied", "its queries and keys share their weights: ['q.bias', 'q.weight']"),
    ],
)
def test_why_it_goes_nowhere(name: str, why: str) -> None:
    for site in sites(name).values():
        assert site.knobs == ()
        assert why in site.why


def test_causal_and_cross() -> None:
    found = {name: (site.causal, site.cross) for name, site in sites("t5").items()}
    assert found["encoder.block.0.layer.0.SelfAttention"] == (False, False)
    assert found["decoder.block.0.layer.0.SelfAttention"] == (True, False)
    assert found["decoder.block.1.layer.1.EncDecAttention"] == (False, True)
    assert sites("cross")["attn"].cross
    assert sites("split")["core"].causal


def test_a_module_that_attends_several_times_is_one_site() -> None:
    layer = Split()
    (site,) = find_attention(nn.Sequential(layer, layer), torch.randn(2, 5, 8)).sites.values()
    assert (site.name, site.calls) == ("0.core", 2)
    assert cut(site) == {"0.q.weight": [(0, 8, 0)], "0.q.bias": [(0, 8, 0)]}


class Inline(nn.Module):
    """Two attentions written into one forward, between other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(8, 24)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for projection in (self.first, self.second):
            q, k, v = projection(self.norm(x)).chunk(3, -1)
            x = x + self.mix(F.scaled_dot_product_attention(q, k, v))
        return x


def test_the_model_itself_attends() -> None:
    (site,) = find_attention(Inline(), torch.randn(2, 5, 8)).sites.values()
    assert (site.name, site.calls) == ("(model)", 2)
    rows = [(0, 8, 0)]
    assert cut(site) == {"first.weight": rows, "first.bias": rows, "second.weight": rows, "second.bias": rows}


def test_cut_by_heads() -> None:
    model, example = build("beit")
    site = find_attention(model, example, by_head=["blocks.1.attn"]).sites["blocks.1.attn"]
    rows = tuple(Block(8 * head, 8) for head in range(3))
    assert site.knobs == (
        Knob("blocks.1.attn.q_bias", rows, (0, 1, 2)),
        Knob("blocks.1.attn.qkv.weight", rows, (0, 1, 2)),
        Knob("blocks.1.attn.relative_position_bias_table", tuple(Block(head, 1, 1) for head in range(3)), (0, 1, 2)),
    )
    fused = find_attention(*build("gpt_neox"), by_head=["layers.0.attention"]).sites["layers.0.attention"]
    assert fused.knobs[0].blocks == (Block(0, 8), Block(24, 8), Block(48, 8))
    assert fused.knobs[0].heads == (0, 1, 2)


def test_in_the_keys() -> None:
    model, example = build("vit")
    site = find_attention(model, example, by_keys=["blocks.0.attn"]).sites["blocks.0.attn"]
    assert cut(site) == {"qkv.weight": [(24, 24, 0)], "qkv.bias": [(24, 24, 0)]}


class Gate(nn.Module):
    """A softmax over tokens that is no attention."""

    def forward(self, x: Tensor) -> Any:
        return x * x.softmax(-1)


def test_a_softmax_that_is_no_attention_is_left_out_and_reported() -> None:
    found = find_attention(nn.Sequential(Split(), Gate()), torch.randn(2, 5, 8))
    assert list(found.sites) == ["0.core"]
    assert found.skipped == {"1": "its softmax is not of a product of queries and keys"}


class Half(nn.Module):
    """One of its attentions never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Split(), Split()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_does_not_run_is_not_claimed() -> None:
    assert list(find_attention(Half(), torch.randn(2, 5, 8)).sites) == ["used.core"]


class Elsewhere(nn.Module):
    """Queries from outside, keys and values fused, attention written out (GCViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(8, 16)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return (q @ k.mT).softmax(-1) @ v


def test_queries_without_weights_of_their_own_leave_it_to_the_keys() -> None:
    (site,) = find_attention(Elsewhere(), (torch.randn(2, 5, 8), torch.randn(2, 6, 8))).sites.values()
    assert site.cross is None
    assert cut(site) == {"kv.weight": [(0, 8, 0)], "kv.bias": [(0, 8, 0)]}


@pytest.mark.parametrize("name", MODELS)
def test_the_monitors_probe_sees_the_same_attentions(name: str) -> None:
    """Under the same names, in the same order, with as many heads and the same entropies."""
    model, example = build(name)
    found = find_attention(model, example).sites
    with torch.no_grad():
        with AttentionProbe(model) as probe:
            call(model, example)
        with Trace(model) as trace:
            call(model, example)
    assert [c.site.partition("#")[0] for c in probe.calls] == [c.site for c in trace.calls]
    assert list(dict.fromkeys(c.site for c in trace.calls)) == list(found)
    for one, two in zip(probe.calls, trace.calls, strict=True):
        if two.logits.dim() == 4:
            assert one.rows.entropy.shape[1] == found[two.site].heads
            weights = torch.softmax(two.logits, -1)
            seen = two.logits.amax(-1) > -torch.inf
            entropy = torch.special.entr(weights).sum(-1)[seen]
            torch.testing.assert_close(one.rows.entropy[seen], entropy, rtol=1e-4, atol=1e-4)


class Otherwise(nn.Module):
    """Attention that is written in a way of its own, and does not say how many heads it has."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.qkv, self.how = nn.Linear(8, 24), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.how == "keys first":
            return ((k @ q.mT).softmax(-2).mT @ v).transpose(1, 2).flatten(2)
        if self.how == "sigmoid":
            return (torch.sigmoid(q @ k.mT) @ v).transpose(1, 2).flatten(2)
        weights = (q @ k.mT).exp()
        return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["keys first", "sigmoid", "by hand"])
def test_attention_without_its_softmax_is_reported(how: str) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), Otherwise(how))
    found = find_attention(model, torch.randn(2, 5, 8))
    assert list(found.sites) == ["0.self_attn"]
    assert list(found.skipped) == ["1"]
    assert "products of activations" in found.skipped["1"]
