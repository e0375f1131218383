"""Skipping feed-forward parts against the rule written out as loops, on blocks as people write them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.functional import ffn_skip_

DEPTH, WIDTH = 8, 16


class Block(nn.Module):
    """Causal, pre-norm; the feed-forward part in three modules, as torch's own layer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def mixed(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.one(x)).chunk(3, -1)
        k, v = (k, v) if past is None else (torch.cat([p, n], 1) for p, n in zip(past, (k, v), strict=True))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        self.kept = torch.stack([k, v])
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask))

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        x = self.mixed(x, past)
        return x + self.narrow(F.gelu(self.wide(self.two(x))))


class Decoder(nn.Module):
    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, ids: Tensor, past: Any = None) -> Tensor:
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if past is None else past[i])
        return self.head(x)  # type: ignore[no-any-return]


def decoder(depth: int = DEPTH) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(depth).double().eval()
    with torch.no_grad():  # parts that hardly turn a token, and parts that do
        for i, layer in enumerate(model.layers):
            layer.narrow.weight *= 1 + 0.5 * (i % 3)
    return model


def batches(count: int = 3, tokens: int = 9) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (4, tokens), generator=g) for _ in range(count)]


def by_hand(model: Decoder, ids: Tensor, tau: float, start: int, end: int, warm_up: int = 0) -> tuple[Tensor, float]:
    """Token by token, as the sheet writes the rule."""
    x, skipped = model.embed(ids), 0
    saturated = [[False] * ids.shape[1] for _ in ids]
    for number, layer in enumerate(model.layers):
        x = layer.mixed(x)
        out = x.clone()
        for sample in range(len(ids)):
            for token in range(ids.shape[1]):
                inside = start <= number < end
                if saturated[sample][token] and inside and token >= warm_up:
                    skipped += 1
                    continue
                here = x[sample, token]
                out[sample, token] = here + layer.narrow(F.gelu(layer.wide(layer.two(here))))
                if inside and float(F.cosine_similarity(here.float(), out[sample, token].float(), dim=0)) >= tau:
                    saturated[sample][token] = True
        x = out
    return model.head(x), skipped / (ids.numel() * len(model.layers))


@torch.no_grad()
@pytest.mark.parametrize("warm_up", [0, 3])
def test_equal_to_the_rule_token_by_token(warm_up: int) -> None:
    model, data = decoder(), batches(2)
    skip = ffn_skip_(model, data, tau=0.98, cold_start=2, cold_end=7, warm_up=warm_up)
    found = [model(ids) for ids in data]
    skip.remove()
    expected = [by_hand(model, ids, 0.98, 2, 7, warm_up) for ids in data]
    for one, (two, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert skip.skipped == pytest.approx(sum(share for _, share in expected) / 2)
    assert 0.02 < skip.skipped < 0.5
    whole = torch.cat([model(ids) for ids in data])
    assert skip.error == pytest.approx(float((torch.cat(found) - whole).norm() / whole.norm()))


@torch.no_grad()
def test_the_ends_of_the_threshold() -> None:
    """Above 1 nothing is skipped, and all is equal; at -1 all that may: (end - start - 1) / layers, .375 here."""
    model, data = decoder(), batches()
    whole = model(data[0])
    skip = ffn_skip_(model, data, tau=1.5, cold_start=2, cold_end=6)
    assert torch.equal(model(data[0]), whole)
    assert (skip.skipped, skip.error) == (0, 0)
    skip.remove()
    skip = ffn_skip_(model, data, tau=-1, cold_start=2, cold_end=6)
    assert skip.skipped == 0.375
    assert skip.blocks == ("layers.2", "layers.3", "layers.4", "layers.5")
    assert not torch.equal(model(data[0]), whole)
    skip.enabled = False
    assert torch.equal(model(data[0]), whole)
    skip.remove()
    shares = []
    for tau in (0.999, 0.99, 0.98, 0.97, 0.9):
        skip = ffn_skip_(model, data, tau=tau)
        shares.append(skip.skipped)
        skip.remove()
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.6])
def test_the_share_is_the_one_asked_for(target: float) -> None:
    """On other data it is near, and the parts really run on fewer tokens."""
    model, data = decoder(), batches(4, 40)
    skip = ffn_skip_(model, data, target)
    assert skip.skipped == pytest.approx(target, abs=0.006)
    rows = []
    for layer in model.layers:
        layer.wide.register_forward_hook(lambda m, a, out: rows.append(out))
    seen = [0]
    real = F.linear
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:

        def counted(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
            seen[0] += x[..., 0].numel() * (weight.shape[0] == 4 * WIDTH)
            return real(x, weight, bias)

        patch.setattr(F, "linear", counted)
        model(batches(5, 40)[4])
    assert seen[0] == pytest.approx((1 - target) * DEPTH * 160, rel=0.06)


@torch.no_grad()
def test_with_a_cache_and_in_training() -> None:
    """Keys and values of skipped tokens are there; a prompt and single tokens give what the whole sequence gives."""
    model, data = decoder(), batches()
    skip = ffn_skip_(model, data, 0.3)
    whole = model(data[0])
    first = model(data[0][:, :5])
    found, past = [first], [layer.kept for layer in model.layers]
    for t in range(5, 9):
        found.append(model(data[0][:, t : t + 1], past))
        past = [layer.kept for layer in model.layers]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-12)
    assert skip.skipped > 0.25
    model.train()
    trained = model(data[0])
    skip.remove()
    assert torch.equal(trained, model(data[0]))


@torch.no_grad()
def test_it_leaves_no_trace_and_travels() -> None:
    model = decoder()
    keys, flags = list(model.state_dict()), [m.training for m in model.modules()]
    state, before = torch.get_rng_state(), model(batches()[0])
    skip = ffn_skip_(model, batches(), 0.3)
    assert list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    twin = copy.deepcopy(model)
    with_skip = model(batches()[0])
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(batches()[0]), with_skip)  # of its own weights
    twin_skip = twin.layers[3].wide.forward.layer.skip  # type: ignore[union-attr]
    twin_skip.remove()
    skip.remove()
    assert torch.equal(twin(batches()[0]), before)
    for module in (*model.modules(), *twin.modules()):
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Parallel(Block):
    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        return self.mixed(x) + self.narrow(F.gelu(self.wide(self.two(x))))


class PostNorm(Block):
    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        x = self.one(self.mixed(x))
        return self.two(x + self.narrow(F.gelu(self.wide(x))))


class Mixing(Block):
    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        x = self.mixed(x)
        return x + self.tokens(self.two(x))

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.tokens.forward = lambda x: nn.GRU.forward(self.tokens, x)[0]  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [Parallel, PostNorm, Mixing])
def test_other_blocks_are_refused(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model = Decoder()
    model.layers = nn.ModuleList(kind() for _ in range(DEPTH))
    with pytest.raises(ValueError, match=r"Decoder has no blocks `x \+ ffn\(norm\(x\)\)`.*in \['layers'\]"):
        ffn_skip_(model, batches())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=6, img_size=32, patch_size=8, init_values=0.1)  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def hugging_face(name: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"num_key_value_heads": 2, "vocab_size": 20, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    return getattr(transformers, f"{name}Model")(config)  # type: ignore[no-any-return]


IDS = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
MODELS = {
    "timm, layer scale": (vit, (torch.randn(3, 3, 32, 32), None)),
    "torch's encoder": (encoder, torch.randn(3, 7, WIDTH)),
    "Llama": (lambda: hugging_face("Llama"), IDS),
    "Gemma2": (lambda: hugging_face("Gemma2"), IDS),  # a norm after the feed-forward part as well
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_as_people_write_them(name: str) -> None:
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    skip = ffn_skip_(model, [batch], 0.25)
    assert len(skip.blocks) == 4
    assert skip.skipped == pytest.approx(0.25, abs=0.03)  # few tokens
    assert 0 < skip.error < 0.5
    skip.remove()


def test_several_lists_are_chosen_from() -> None:
    import transformers

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 5, "num_heads": 4, "vocab_size": 20}
    model = transformers.T5Model(transformers.T5Config(**sizes)).eval()
    data = [{"input_ids": IDS["input_ids"], "decoder_input_ids": IDS["input_ids"][:, :4]}]
    with pytest.raises(ValueError, match=r"several lists of blocks, \['encoder.block', 'decoder.block'\]: name one by"):
        ffn_skip_(model, data)
    skip = ffn_skip_(model, data, 0.2, include=["decoder.block"])
    assert skip.blocks == ("decoder.block.1", "decoder.block.2", "decoder.block.3")


def test_what_is_refused() -> None:
    model = decoder()
    for loader, word in ((None, "None"), ([], "empty")):
        with pytest.raises(ValueError, match=f"`loader` is {word}: ffn_skip_ needs calibration data"):
            ffn_skip_(model, loader)
    for arguments, match in (
        ({"target_skip": 1.0}, "`target_skip` is 1.0"), ({"warm_up": -1}, "`warm_up` -1"),
        ({"target_skip": 0.7}, "`target_skip` is 0.7; with `cold_start`=1 and `cold_end`=-1 at most 0.625 of 8 blocks"),
        ({"cold_start": 3, "cold_end": 4}, "of 8 blocks that leaves 1; expected at least two"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ffn_skip_(model, batches(), **arguments)
    with pytest.raises(ValueError, match="Decoder cannot be run on a batch of `loader`: "):
        ffn_skip_(model, [torch.zeros(2, 3)])
    with pytest.raises(NoMatchError):
        ffn_skip_(model, batches(), include=["blocks"])
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    ffn_skip_(model, batches())
    with pytest.raises(ValueError, match=r"called on this Decoder before: take it off first, by remove\(\)"):
        ffn_skip_(model, batches())
