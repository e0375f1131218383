"""The probe on every way of writing attention, against the weights that each library itself computed."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_efficient.attention import AttentionProbe


def entropy_of(weights: Tensor) -> Tensor:
    return torch.special.entr(weights.double()).sum(-1)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same_with_and_without(model: nn.Module, *inputs, call=None, **kwargs):
    """Run the model with and without the probe from one seed: output, gradients and random state must be equal."""
    call = call or (lambda m, *a, **k: m(*a, **k))
    outcomes, hooks = [], hooks_on(model)
    for probing in (False, True):
        torch.manual_seed(7)
        model.zero_grad()
        probe = AttentionProbe(model)
        with probe if probing else nullcontext():
            out = call(model, *inputs, **kwargs)
        if out.requires_grad:
            out.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        outcomes.append((out.detach(), grads, torch.get_rng_state()))
    (a, grads_a, rng_a), (b, grads_b, rng_b) = outcomes
    assert torch.equal(a, b)
    assert len(grads_a) == len(grads_b)
    assert all(torch.equal(x, y) for x, y in zip(grads_a, grads_b, strict=True))
    assert torch.equal(rng_a, rng_b)
    assert hooks_on(model) == hooks
    assert not _get_current_function_mode_stack()
    return probe


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3, proj_drop_rate=0.1,
        attn_drop_rate=0.1,
    )  # fmt: skip


def set_fused(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def test_timm_fused_and_unfused_against_the_softmax_that_timm_computes(vit):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    weights = []
    set_fused(vit, False)
    handles = [b.attn.attn_drop.register_forward_pre_hook(lambda m, a: weights.append(a[0])) for b in vit.blocks]
    vit(images)
    for handle in handles:
        handle.remove()
    unfused = same_with_and_without(vit, images)
    set_fused(vit, True)
    fused = same_with_and_without(vit, images)
    assert [c.kind for c in unfused.calls] == ["softmax"] * 2
    assert [c.kind for c in fused.calls] == ["scaled_dot_product_attention"] * 2
    for probe in (fused, unfused):
        assert [c.site for c in probe.calls] == ["blocks.0.attn", "blocks.1.attn"]
        assert probe.report == ""
        first = probe.calls[0]
        assert first.rows.entropy.shape == (3, 3, 17)
        torch.testing.assert_close(first.rows.entropy.double(), entropy_of(weights[0]), rtol=0, atol=2e-5)
        assert (first.rows.keys == 17).all()


def test_timm_eval_fused_equals_unfused(vit):
    vit.eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (True, False):
        set_fused(vit, fused)
        found.append(same_with_and_without(vit, images).calls)
    for a, b in zip(*found, strict=True):
        for x, y in zip(a.rows, b.rows, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("fused", [True, False])
def test_relative_position_biases_are_part_of_the_logits(name, fused):
    torch.manual_seed(0)
    options = (
        {"embed_dim": 12, "depths": (2,), "num_heads": (3,), "window_size": 4}
        if "swin" in name
        else {"embed_dim": 24, "depth": 2, "num_heads": 3}
    )
    model = timm.create_model(name, img_size=32, num_classes=2, **options).eval()
    for parameter_name, p in model.named_parameters():
        if "relative_position_bias_table" in parameter_name:
            nn.init.normal_(p, std=2.0)
    set_fused(model, False)
    weights = []
    handles = [
        m.attn_drop.register_forward_pre_hook(lambda m, a: weights.append(a[0]))
        for m in model.modules()
        if hasattr(m, "attn_drop")
    ]
    images = torch.randn(2, 3, 32, 32)
    model(images)
    for handle in handles:
        handle.remove()
    set_fused(model, fused)
    probe = same_with_and_without(model, images)
    assert len(probe.calls) == len(weights) == 2
    assert probe.report == ""
    for call, p in zip(probe.calls, weights, strict=True):
        torch.testing.assert_close(call.rows.entropy.double(), entropy_of(p), rtol=0, atol=2e-5)
        assert (call.rows.entropy < 0.95 * call.rows.keys.log()).any()  # the biases are felt


MHA = {
    "plain": ({}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "no_bias": ({"bias": False}, {}),
    "separate": ({"kdim": 6, "vdim": 5}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "padding": ({"add_zero_attn": True}, {"key_padding_mask": "bool"}),
    "float_padding": ({}, {"key_padding_mask": "float"}),
    "mask": ({"add_bias_kv": True}, {"attn_mask": "bool"}),
    "both": ({}, {"attn_mask": "bool", "key_padding_mask": "bool"}),
    "float_mask": ({}, {"attn_mask": "float"}),
    "mixed": ({}, {"attn_mask": "heads", "key_padding_mask": "float"}),
}


def mha_masks(kinds: dict[str, str], batch: int, heads: int, length: int, keys: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    out = {}
    for name, kind in kinds.items():
        shape = (batch, keys) if name == "key_padding_mask" else (length, keys)
        shape = (batch * heads, length, keys) if kind == "heads" else shape
        blocked = torch.rand(shape, generator=g) > 0.7
        blocked[..., 0] = False
        out[name] = blocked if kind == "bool" else torch.randn(shape, generator=g).masked_fill(blocked, -math.inf)
    return out


@pytest.mark.parametrize("name", MHA)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(name, need_weights):
    options, masks = MHA[name]
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, dropout=0.3, **options)
    nn.init.normal_(mha.in_proj_bias) if mha.in_proj_bias is not None else None
    query, key = torch.randn(5, 3, 8), torch.randn(7, 3, options.get("kdim", 8))
    value = torch.randn(7, 3, options.get("vdim", 8))
    arguments = mha_masks(masks, batch=3, heads=2, length=5, keys=7)
    if options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))

    def call(model, *inputs):
        return model(*inputs, need_weights=need_weights, **arguments)[0]

    probe = same_with_and_without(mha, query, key, value, call=call)
    mha.eval()
    weights = mha(query, key, value, need_weights=True, average_attn_weights=False, **arguments)[1]
    (found,) = probe.calls
    assert found.site == "(model)"
    torch.testing.assert_close(found.rows.entropy.double(), entropy_of(weights), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.rows.first_key, weights[..., 0])
    finite = masks.values() if masks else []
    if "bool" in finite or "heads" in finite or not masks:
        assert torch.equal(found.rows.keys, (weights > 0).sum(-1))


@pytest.mark.parametrize("names", [("key_padding_mask",), ("attn_mask",), ("key_padding_mask", "attn_mask")])
def test_boolean_masks_given_to_the_function_itself(names):
    """nn.MultiheadAttention turns boolean masks into additive ones before it calls the function."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 3, 8), torch.randn(24, 8)
    masks = mha_masks(dict.fromkeys(names, "bool"), batch=3, heads=2, length=5, keys=5)
    with AttentionProbe(nn.Identity()) as probe:
        weights = F.multi_head_attention_forward(
            x, x, x, 8, 2, w, None, None, None, False, 0.0, torch.eye(8), None, average_attn_weights=False, **masks
        )[1]
    rows = probe.calls[0].rows
    torch.testing.assert_close(rows.entropy.double(), entropy_of(weights), rtol=0, atol=2e-5)
    assert rows.keys.unique().numel() > 1


def test_multihead_attention_unbatched_and_causal():
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2)
    x, causal = torch.randn(5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.tensor([False, False, False, True, True])

    def call(model, x):
        return model(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]

    (found,) = same_with_and_without(mha, x, call=call).calls
    assert found.rows.keys[0, 0].tolist() == [1, 2, 3, 4, 5]
    with AttentionProbe(mha) as probe:
        weights = mha(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    torch.testing.assert_close(probe.calls[0].rows.entropy[0].double(), entropy_of(weights), rtol=0, atol=2e-6)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_in_train_eval_and_fast_path(encoder):
    x = torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    train = same_with_and_without(encoder, x, src_key_padding_mask=padding)
    encoder.eval()
    graph = same_with_and_without(encoder, x, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
        with AttentionProbe(encoder) as probe:
            slow = encoder(x, src_key_padding_mask=padding)
    # torch's fast path is another kernel, which writes zeros at padded positions.
    torch.testing.assert_close(slow[~padding], fast[~padding], rtol=1e-5, atol=1e-5)
    for found in (train, graph, probe):
        assert [c.site for c in found.calls] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert found.calls[0].rows.keys[0].unique().tolist() == [4]
        torch.testing.assert_close(found.calls[0].rows.entropy, graph.calls[0].rows.entropy)
    torch.testing.assert_close(probe.calls[1].rows.entropy, graph.calls[1].rows.entropy)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hugging_face_bert_with_padding(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    model = transformers.BertModel(config)
    nn.init.normal_(model.encoder.layer[0].attention.self.query.weight)
    tokens, mask = torch.randint(0, 50, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = 0
    model.eval()
    model.set_attn_implementation("eager")
    weights = model(tokens, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation(implementation)

    def call(model, tokens):
        return model(tokens, attention_mask=mask).last_hidden_state

    found = same_with_and_without(model, tokens, call=call)
    names = [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert [c.site for c in found.calls] == names
    assert found.report == ""
    for rows, p in zip((c.rows for c in found.calls), weights, strict=True):
        torch.testing.assert_close(rows.entropy.double(), entropy_of(p), rtol=0, atol=2e-5)
        assert rows.keys[0].unique().tolist() == [5]
        assert rows.keys[1].unique().tolist() == [8]
    model.train()  # dropout 0.1 on the weights
    train = same_with_and_without(model, tokens, call=call)
    assert [c.site for c in train.calls] == names


class Plain(nn.Module):
    """Attention as users write it; ``how`` picks the way."""

    def __init__(self, how: str, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.how = heads, how
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / q.shape[-1] ** 0.5
        match self.how:
            case "sdpa":
                out = F.scaled_dot_product_attention(q, k, v)
            case "softmax @":
                out = torch.softmax(logits, -1) @ v
            case "method and cast":
                out = torch.matmul(logits.softmax(dim=3, dtype=torch.float64).to(v.dtype), v)
            case "dropout":
                out = F.dropout(F.softmax(logits, dim=-1), 0.2, self.training) @ v
            case "bmm":
                p = nn.Softmax(-1)(logits)
                out = torch.bmm(p.flatten(0, 1), v.reshape(-1, *v.shape[2:])).unflatten(0, p.shape[:2])
            case "einsum":
                out = torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)
            case "einsum, values first":
                out = torch.einsum("b h k d, b h q k -> b h q d", v, logits.softmax(-1))
            case "heads last":
                p = logits.permute(0, 2, 1, 3).softmax(-1)
                out = torch.einsum("bqhk,bhkd->bhqd", p, v)
            case "heads last, one value for all":
                p = logits.permute(0, 2, 1, 3).softmax(-1)
                out = torch.einsum("bqhk,bkd->bhqd", p, v[:, 0])
            case "by hand":
                e = (logits - logits.amax(-1, keepdim=True)).exp()
                out = (e / e.sum(-1, keepdim=True)) @ v
            case "five axes":
                out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            case "weights only":
                out = logits.softmax(-1).sum(-1, keepdim=True) * v
            case "flex":
                from torch.nn.attention.flex_attention import flex_attention

                out = flex_attention(q.detach(), k.detach(), v.detach())  # no backward on the CPU
        return out.transpose(1, 2).flatten(2)


READ = ["sdpa", "softmax @", "method and cast", "dropout", "bmm", "einsum", "einsum, values first"]


@pytest.mark.parametrize("how", READ)
def test_plain_code(how):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), Plain("sdpa"))
    x = torch.randn(2, 5, 8)
    with AttentionProbe(module) as probe:
        module(x)
    expected = probe.calls[0].rows
    module[1].how = how
    found = same_with_and_without(module, x)
    assert [c.site for c in found.calls] == ["1"]
    assert found.report == ""
    for a, b in zip(found.calls[0].rows, expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b)


UNREAD = {
    "by hand": "no attention call was seen in '1'",
    "weights only": r"1: a softmax of shape \(2, 2, 5, 5\) is not a product's left factor",
    "heads last": r"1: a softmax of shape \(2, 5, 2, 5\) is not a product's left factor",
    "heads last, one value for all": r"1: a softmax of shape \(2, 5, 2, 5\) is not a product's left factor",
    "flex": "no attention call was seen in '1'",
}


@pytest.mark.parametrize("how", UNREAD)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_cannot_be_read_is_reported_not_guessed(how):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), Plain(how), Plain("sdpa"))
    found = same_with_and_without(module, torch.randn(2, 5, 8))
    assert [c.site for c in found.calls] == ["2"]
    assert re.search(UNREAD[how], found.report)
    assert "Readable are" in found.report


def test_softmax_that_is_no_attention_is_neither_read_nor_reported():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            gates = self.linear(x).softmax(-1)  # (batch, tokens, experts)
            classes = self.linear(x).permute(0, 2, 1).softmax(1)
            return (gates.sum(-1) + classes.sum(1)).unsqueeze(-1) * x

    found = same_with_and_without(nn.Sequential(Gate(), Plain("sdpa")), torch.randn(2, 5, 8))
    assert [c.site for c in found.calls] == ["1"]
    assert found.report == ""


def test_no_attention_at_all():
    found = same_with_and_without(nn.Linear(3, 3), torch.randn(2, 3))
    assert found.calls == []
    assert found.report.startswith("no attention call was seen at all.")


def test_grouped_queries_and_three_axes_of_sdpa():
    q, k = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4)
    with AttentionProbe(nn.Identity()) as probe:
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True, is_causal=True, scale=0.7)
        F.scaled_dot_product_attention(q[:, 0], k[:, 0], value=k[:, 0], attn_mask=torch.ones(2, 5, 5).tril().bool())
    grouped, single = probe.calls
    assert (grouped.site, single.site) == ("(model)", "(model)#2")
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    logits = (q @ k.repeat_interleave(3, 1).mT * 0.7).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close(grouped.rows.entropy.double(), entropy_of(logits.softmax(-1)), rtol=0, atol=2e-6)
    logits = (q[:, 0] @ k[:, 0].mT / 2).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close(single.rows.entropy[0].double(), entropy_of(logits.softmax(-1)), rtol=0, atol=2e-6)


def test_limits_and_keep():
    module = nn.Sequential(Plain("sdpa"), Plain("softmax @"), nn.Sequential(Plain("sdpa")))
    x = torch.randn(6, 20, 8)
    with AttentionProbe(module) as whole:
        module(x)
    with AttentionProbe(module, max_samples=2, max_queries=5, keep=lambda name: name != "0") as part:
        module(x)
    assert [c.site for c in part.calls] == ["1", "2.0"]
    for a, b in zip(part.calls, whole.calls[1:], strict=True):
        assert a.rows.entropy.shape == (2, 2, 5)
        torch.testing.assert_close(a.rows.entropy, b.rows.entropy[:2, :, [0, 5, 10, 14, 19]])
    assert part.report == ""
    for name in ("max_samples", "max_queries"):
        with pytest.raises(ValueError, match=name):
            AttentionProbe(module, **{name: 0})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", [Tensor.backward, lambda loss: torch.autograd.backward([loss])])
def test_recomputation_under_activation_checkpointing_is_not_read(reentrant, backward):
    module = nn.Sequential(Plain("sdpa"), Plain("softmax @"))
    x = torch.randn(2, 5, 8, requires_grad=True)
    with AttentionProbe(module) as probe:
        backward(checkpoint(module, x, use_reentrant=reentrant).sum())
    assert [c.site for c in probe.calls] == ["0", "1"]


def test_bfloat16_autocast():
    torch.manual_seed(0)
    module = nn.Sequential(Plain("sdpa"), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x = torch.randn(2, 5, 8)

    def call(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    found = same_with_and_without(module, x, call=call)
    with AttentionProbe(module) as exact:
        module(x)
    assert [c.site for c in found.calls] == ["0", "1.self_attn"]
    q, k, _ = module[0].qkv(x).detach().unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    assert all(call.rows.entropy.dtype == torch.float32 for call in found.calls)
    # Under autocast the projection rounds its input, its weight and its result: 3 roundings of u = 2**-8 in q and in k.
    unit, size = 2.0**-8, (x.abs() @ module[0].qkv.weight.abs().T + module[0].qkv.bias.abs()).max()
    slack = 2 * 3.1 * unit * size * max(q.abs().max(), k.abs().max()) * 4 / 2
    error = (found.calls[0].rows.entropy - exact.calls[0].rows.entropy).abs().max()
    assert 0 < error < slack * math.sqrt(0.25 * math.log(5) ** 2 + 1)


def test_exceptions_leave_nothing_behind_and_caught_ones_keep_the_names_right():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = Fails(), Plain("sdpa")

        def forward(self, x):
            try:
                self.bad(x)
            except RuntimeError:
                F.scaled_dot_product_attention(x, x, x)
            return self.good(x)

    module = nn.Sequential(Catches())
    with AttentionProbe(module) as probe:
        module(torch.randn(2, 5, 8))
    assert [c.site for c in probe.calls] == ["0", "0.good"]
    with pytest.raises(RuntimeError, match="on purpose"), AttentionProbe(module):
        module[0].bad(1)
    assert hooks_on(module) == 0
    assert not _get_current_function_mode_stack()


def test_a_module_called_twice_and_a_shared_one():
    attend = Plain("sdpa")
    module = nn.ModuleDict({"a": attend, "b": attend})

    def call(model, x):
        return model["b"](model["a"](x))

    found = same_with_and_without(module, torch.randn(2, 5, 8), call=call)
    assert [c.site for c in found.calls] == ["a", "a#2"]


def test_scripted_submodules_are_left_alone():
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Scale())
    found = same_with_and_without(nn.Sequential(scripted, Plain("sdpa")), torch.randn(2, 5, 8))
    assert [c.site for c in found.calls] == ["1"]


def test_pause_stops_reading_inside_the_context():
    module = nn.Sequential(Plain("sdpa"))
    x = torch.randn(2, 5, 8)
    with AttentionProbe(module) as probe:
        module(x)
        probe.pause()
        assert hooks_on(module) == 0
        module(x)
    assert len(probe.calls) == 1


def test_compiled_code_runs_eagerly_under_the_probe_and_is_not_recompiled():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = nn.Sequential(Plain("sdpa"), Plain("softmax @"))
    compiled = torch.compile(module, backend=counter)
    x = torch.randn(2, 5, 8)
    before = compiled(x)
    frames = counter.frame_count
    assert frames > 0
    for _ in range(2):
        with AttentionProbe(compiled) as probe:
            inside = compiled(x)
        assert [c.site for c in probe.calls] == ["0", "1"]
        torch.testing.assert_close(inside, before)
        torch.testing.assert_close(compiled(x), before)
    assert counter.frame_count == frames
