"""Which tokens are padding, by what hiding one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_models import HEADS, T, V, W, floats, hf, tokens
from torch import Tensor, nn

from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.padding import Padding, find_padding, hand_over
from lightning_efficient.norms.swap import apply_norm_swap

KEEP = torch.ones(2, T, dtype=torch.bool)
KEEP[0, 6:] = False
KEEP[1, 7:] = False


class Encoder(nn.Module):
    """Its masks by position, under a name of its own, in one of several conventions."""

    def __init__(self, convention: str = "keep", time_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(W, 2, 32, dropout=0.0, batch_first=not time_first)
        self.encoder, self.convention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), convention

    def forward(self, x: Tensor, gaps: Tensor) -> Tensor:
        gaps = {"keep": lambda m: ~m.bool(), "drop": lambda m: m.bool(), "added": lambda m: m}[self.convention](gaps)
        return self.encoder(x, None, gaps)


class Inside(nn.Module):
    """Makes its mask of the ids, and has hand-written attention that gets it in four dimensions."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.last = nn.LayerNorm(W), nn.Linear(W, 3 * W), nn.LayerNorm(W)

        def forward(self, x: Tensor, gaps: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            return self.last(x + ((q @ k.mT + gaps[:, 0]).softmax(-1) @ v))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(V, W, padding_idx=0), self.Block()

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.embed(ids), torch.where(ids == 0, -1e9, 0.0)[:, None, None])


class Seq2Seq(nn.Module):
    """torch's, both sequences of one length, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(W, 2, 1, 1, 32, dropout=0.0)

    def forward(self, x: Tensor, y: Tensor, drop: Tensor, drop_y: Tensor | None = None) -> Tensor:
        causal = torch.ones(T, T, dtype=torch.bool).triu(1)
        options = {"src_key_padding_mask": drop, "memory_key_padding_mask": drop, "tgt_key_padding_mask": drop_y}
        return self.net(x, y, tgt_mask=causal, **options)


class Pooled(nn.Module):
    """Tokens do not mix; the mask is for the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        h = self.norm(batch["x"]) * batch["valid"][:, :, None]
        return h.sum(1) / batch["valid"].sum(1, keepdim=True)


class Holder(nn.Module):
    """The model is never the outermost module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


def filled(seed: int = 0) -> Tensor:
    """Ids with padding, which is never 0 by itself."""
    return tokens(seed=seed).clamp(min=1) * KEEP


def holder(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Holder(make())
    apply_norm_swap(model)
    return model, dict(blend_norms(model))


def look(model: nn.Module, *args: Any, **kwargs: Any) -> Padding:
    return find_padding(model, lambda given: model(*given[0], **given[1]), (args, kwargs))


T5 = {"d_model": W, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0}
x, y = floats(2, T, W), floats(2, T, W, seed=1)
added = torch.zeros(2, T).masked_fill(~KEEP, -torch.inf)
# Model, arguments, and of each group of norms (by a part of their names) the tokens that count.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[Any, ...], dict[str, Any]], dict[str, Tensor | None]]] = {
    "keep, by position": (Encoder, ((x, KEEP.long()), {}), {"norm": KEEP}),
    "keep, as numbers": (Encoder, ((x, KEEP.float()), {}), {"norm": KEEP}),
    "drop": (lambda: Encoder("drop"), ((x,), {"gaps": ~KEEP}), {"norm": KEEP}),
    "added to the scores": (lambda: Encoder("added"), ((x, added), {}), {"norm": KEEP}),
    "tokens first": (lambda: Encoder("drop", True), ((x.transpose(0, 1), ~KEEP), {}), {"norm": KEEP.t()}),
    "nothing is hidden": (Encoder, ((x, torch.ones(2, T)), {}), {"norm": torch.ones(2, T)}),
    "made inside": (Inside, ((filled(),), {}), {"norm": KEEP, "last": KEEP}),
    "in a dict": (Pooled, (({"x": x, "valid": KEEP.long()},), {}), {"norm": KEEP}),
    "seq2seq, encoder only": (
        Seq2Seq, ((x.transpose(0, 1), y.transpose(0, 1), ~KEEP), {}), {"encoder": KEEP.t(), "decoder": None},
    ),
    "seq2seq, both": (
        Seq2Seq, ((x.transpose(0, 1), y.transpose(0, 1), ~KEEP, ~KEEP.flip(0)), {}),
        {"encoder": KEEP.t(), "decoder": KEEP.flip(0).t()},
    ),
    "T5": (
        lambda: hf("T5ForConditionalGeneration", "T5Config", dict, None, **T5)()[0],
        ((), {"input_ids": filled(), "attention_mask": KEEP.long(), "labels": tokens(seed=1)}),
        {"encoder": KEEP, "decoder": None},
    ),
    "T5, both": (
        lambda: hf("T5ForConditionalGeneration", "T5Config", dict, None, **T5)()[0],
        ((), {
            "input_ids": filled(), "attention_mask": KEEP.long(), "decoder_input_ids": filled(1).flip(0),
            "decoder_attention_mask": KEEP.flip(0).long(),
        }),
        {"encoder": KEEP, "decoder": KEEP.flip(0)},
    ),
    "BERT, segments of two": (
        lambda: hf("BertModel", "BertConfig", dict, **HEADS)()[0],
        ((filled(), KEEP.long(), (tokens() > 6).long()), {}),
        {"LayerNorm": KEEP},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # nn.Transformer with its defaults
@pytest.mark.parametrize("name", CASES)
def test_each_norm_gets_the_mask_of_its_tokens(name: str) -> None:
    make, (args, kwargs), expected = CASES[name]
    model, norms = holder(make)
    padding = look(model, *args, **kwargs)
    assert not padding.unknown
    handles = hand_over(model, padding.masks)
    seen: dict[str, Tensor | None] = {}
    for n, norm in norms.items():
        norm.register_forward_pre_hook(lambda m, _, n=n: seen.update({n: m.mask}))
    model(*args, **kwargs)
    for n, mask in seen.items():
        (part,) = [part for part in expected if part in n.split(".", 2)[-1] or part in n]
        want = expected[part]
        assert (mask is None) == (want is None), n
        assert want is None or torch.equal(mask, want.bool()), n  # type: ignore[arg-type]
    assert len(seen) == len(norms)
    assert all(norm.mask is None for norm in norms.values()), "cleared"
    for handle in handles:
        handle.remove()
    model(*args, **kwargs)
    assert all(mask is None for mask in seen.values())


@pytest.mark.parametrize("name", ["tokens first", "made inside", "T5"])
def test_what_padded_tokens_hold_changes_no_statistics(name: str) -> None:
    found = []
    make, (args, kwargs), _ = CASES[name]
    for garbage in (0, 1):
        model, norms = holder(make)
        hand_over(model, look(model, *args, **kwargs).masks)
        if name == "tokens first":
            args = (args[0].masked_fill(~KEEP.t()[:, :, None], 1e3 * garbage), *args[1:])
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
        if embedding is not None:
            with torch.no_grad():
                embedding.weight[0] = garbage
        model(*args, **kwargs)
        found.append([b.clone() for n, m in norms.items() if "decoder" not in n for b in m.target.buffers()])
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mask_that_is_missing_in_one_forward_hides_nothing_there() -> None:
    class Optional(Encoder):
        def forward(self, x: Tensor, gaps: Tensor | None = None) -> Tensor:
            return self.encoder(x, src_key_padding_mask=gaps)

    model, norms = holder(Optional)
    hand_over(model, look(model, x, gaps=~KEEP).masks)
    seen: list[Any] = []
    next(iter(norms.values())).register_forward_pre_hook(lambda m, _: seen.append(m.mask))
    model(x, gaps=~KEEP)
    model(x)
    model(x, gaps=None)
    assert [mask is None for mask in seen] == [False, True, True]


@pytest.mark.parametrize("other", [tokens() > 6, tokens() % 2])
def test_other_tensors_of_that_form_are_no_masks(other: Tensor) -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind, self.encoder = nn.Embedding(2, W), Encoder("drop")

        def forward(self, x: Tensor, segments: Tensor) -> Tensor:
            return self.encoder(x + self.kind(segments.long()), torch.zeros(2, T, dtype=torch.bool))

    model, _ = holder(Segments)
    assert {mask.module for mask in look(model, x, other).masks} == {"net.encoder"}, "which gets a mask of its own"


def test_padding_that_no_argument_tells_of_is_said_to_be_unknown() -> None:
    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(V, W, padding_idx=0), nn.LayerNorm(W)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.embed(ids))

    model, _ = holder(Unmasked)
    assert look(model, filled()).unknown.startswith("the `padding_idx` of 'net.embed' reaches 1 norms (net.norm")
    assert look(model, tokens()).unknown == ""

    class Heard(Unmasked):
        def forward(self, ids: Tensor) -> Tensor:
            h = self.norm(self.embed(ids))
            return h - h.mean(1, keepdim=True)

    model, _ = holder(Heard)
    assert look(model, filled()).unknown == "", "what the network listens to is no padding"

    class InTheStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(W)

        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            return (self.norm(x) * valid[:, :, None]).sum()

    torch.manual_seed(0)
    step = InTheStep()
    apply_norm_swap(step)
    found = look(step, x, KEEP.long())
    assert not found.masks
    assert found.unknown.startswith("'0.1' of the batch hides tokens, which reach 1 norms (norm")
