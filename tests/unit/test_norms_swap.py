"""Which norms of a model are swapped, what the record says, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.common.registry import METHODS
from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.swap import METHOD, TARGETS, NormSwapConfig, apply_norm_swap, find_norms
from lightning_efficient.surgery.replace import reinstate_modules, restore_modules


def vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**sizes, num_classes=3, **kwargs)


IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def decoder(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20}
    size["num_attention_heads"] = 2
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
        "bert": (transformers.BertConfig, transformers.BertModel),
    }[kind]
    if kind == "t5":
        return model(config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=20)).eval()
    return model(config(**size, **({} if kind == "bert" else heads))).eval()


@pytest.mark.parametrize("target", TARGETS)
def test_at_first_the_model_computes_the_same(target):
    model = vit(qk_norm=True)
    before = model(IMAGES)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    change = apply_norm_swap(model, {"target": target})
    assert torch.equal(model(IMAGES), before)
    assert list(blend_norms(model)) == list(change.targets) == list(change.swaps) == names
    assert len(names) == 2 * 4 + 1
    assert set(change.targets.values()) == {f"LayerNorm becomes {target}"}


@pytest.mark.parametrize("kind", ["llama", "gemma", "t5", "bert"])
def test_hugging_face_models(kind):
    model = decoder(kind)
    names = [n for n, m in model.named_modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))]
    ids = torch.arange(12).reshape(2, 6)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "t5" else {})
    before = model(**inputs)[0]
    change = apply_norm_swap(model, {"target": "affine"})
    assert list(change.swaps) == names
    assert torch.equal(model(**inputs)[0], before)
    kinds = {blend.spec.kind for blend in blend_norms(model).values()}
    assert kinds == ({"layer"} if kind == "bert" else {"rms"})
    assert {blend.spec.offset for blend in blend_norms(model).values()} == {1.0 if kind == "gemma" else 0.0}


def test_convnext_has_both_axes():
    model = timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=3).eval()
    axes = {name: spec.axis for name, (_, spec) in find_norms(model).matched.items()}
    assert axes["stem.1"] == axes["stages.1.downsample.0"] == axes["head.norm"] == 1
    assert axes["stages.0.blocks.0.norm"] == -1
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    apply_norm_swap(model)
    assert torch.equal(model(x), before)


def test_change_record():
    model = vit()
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    olds = dict(model.named_parameters())
    change = apply_norm_swap(model, NormSwapConfig())
    assert change.method == METHOD
    assert METHOD in METHODS
    assert change.replaced == change.removed == []
    added = {id(new): source for new, source in change.added}
    for name, (old, new) in change.swaps.items():
        assert new.source is old
        assert {id(p) for p in new.target.parameters()} <= added.keys()
        assert all(added[id(p)] is weights[name] for p in new.target.parameters())
        assert new.weight is weights[name]
    assert {id(p) for p in model.parameters()} == {id(p) for p in olds.values()} | added.keys()
    assert all(new.requires_grad for new, _ in change.added)


def test_undone_and_done_again():
    model = vit()
    before, keys = model(IMAGES), list(model.state_dict())
    change = apply_norm_swap(model)
    restore_modules(model, change.swaps)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(IMAGES), before)
    reinstate_modules(model, change.swaps)
    assert len(blend_norms(model)) == 5


def test_a_second_time_there_is_nothing_left():
    model = vit()
    apply_norm_swap(model, {"include": ["blocks.0"]})
    later = apply_norm_swap(model)
    assert list(later.swaps) == ["blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert later.skipped == {}
    with pytest.raises(NoMatchError, match="5 are swapped already"):
        apply_norm_swap(model)
    assert not any(isinstance(m, BlendNorm) for b in blend_norms(model).values() for m in (b.source, b.target))


def test_include_and_exclude():
    model = vit()
    norms = find_norms(model, include=["blocks.*"], exclude=["*.norm2"])
    assert list(norms.matched) == ["blocks.0.norm1", "blocks.1.norm1"]
    assert norms.skipped["norm"] == "not covered by include"
    assert norms.skipped["blocks.0.norm2"] == "excluded by '*.norm2'"
    with pytest.raises(NoMatchError, match="blocks"):
        find_norms(model, include=["block.*"])
    with pytest.raises(NoMatchError, match="excluded"):
        find_norms(model, exclude=["*"])


def test_replaying_names():
    model = vit()
    change = apply_norm_swap(model, {"target": "rms", "transition": 0.5}, ["norm", "blocks.0.norm2"])
    assert list(change.swaps) == ["norm", "blocks.0.norm2"]
    assert set(blend_norms(model)) == set(change.swaps)
    for names, why in (
        (["nrm"], "no module 'nrm'.*'norm'"),
        (["norm"], "swapped already"),
        (["head"], "Linear.*neither"),
        (["blocks.1.norm1", "blocks.9"], "no module"),
    ):
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=why):
            apply_norm_swap(model, {}, names)
        assert dict(model.named_modules()) == before


class Gated(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class Odd(nn.Module):
    """One norm in two places, one without parameters, and some that cannot be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.LayerNorm(4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), self.shared])
        self.image = nn.LayerNorm((3, 4))
        self.group = nn.GroupNorm(1, 4)
        self.bare = nn.LayerNorm(4, elementwise_affine=False)
        self.gated = Gated(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.image(self.blocks[1](self.blocks[0](self.shared(x)))))


def test_shared_unsupported_and_bare_norms():
    model = Odd()
    x = torch.randn(5, 3, 4)
    before = model(x)
    change = apply_norm_swap(model)
    assert set(change.swaps) == {"shared", "bare"}
    assert model.blocks[1] is model.shared
    assert change.skipped == {
        "image": "it normalizes over 2 axes at once",
        "gated": "its forward takes more than the input",
    }
    assert torch.equal(model(x), before)
    sources = {id(new): source for new, source in change.added}
    assert all(sources[id(p)] is None for p in model.bare.target.parameters())
    for blend in (model.shared, model.bare):
        blend.lam.zero_()
    model(x)
    assert model.shared.target.bn.num_batches_tracked == 2 * 2  # two calls in each of two forwards


def test_nothing_to_swap():
    with pytest.raises(NoMatchError, match="none found"):
        apply_norm_swap(nn.Linear(3, 3))
    with pytest.raises(NoMatchError, match="2 axes"):
        apply_norm_swap(nn.Sequential(nn.LayerNorm((2, 3))))


def test_frozen_norms_stay_frozen():
    model = vit()
    model.blocks[0].requires_grad_(False)
    apply_norm_swap(model)
    for name, blend in blend_norms(model).items():
        assert {p.requires_grad for p in blend.parameters()} == {not name.startswith("blocks.0")}


def test_device_dtype_mode_hooks_and_random_state():
    model = vit().bfloat16().eval()
    seen: list[str] = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    state = torch.get_rng_state()
    apply_norm_swap(model)
    assert torch.equal(torch.get_rng_state(), state)
    blend = model.norm
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert isinstance(blend.target, RepBN)
    assert blend.lam.dtype is blend.target.bn.running_var.dtype is torch.float32
    model(IMAGES.bfloat16())
    assert seen == ["BlendNorm"]


def test_on_the_meta_device():
    with torch.device("meta"):
        model = vit()
    apply_norm_swap(model)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_deepcopy_is_independent():
    model = vit()
    apply_norm_swap(model)
    twin = copy.deepcopy(model)
    for blend in blend_norms(twin).values():
        blend.finish()
    assert all(b.lam == 1 and b.phase == "blend" for b in blend_norms(model).values())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"target": "bn"}, "`target` must be one of .*'repbn'.*got 'bn'"),
        ({"target": ["repbn"]}, "`target`"),
        ({"init": "zero"}, "`init`.*'slab'.*'zero'"),
        ({"eps": 0.0}, "`eps`.*0.0"),
        ({"momentum": 1.5}, "`momentum`.*1.5"),
        ({"momentum": True}, "`momentum`"),
        ({"decay": "0.9"}, "`decay`"),
        ({"alpha": -1}, "`alpha`"),
        ({"frozen": 1}, "`frozen`"),
        ({"window": 1}, "`window`"),
        ({"window": 8, "warmup": 4}, r"`warmup`.*\(8\)"),
    ],
)
def test_bad_configuration_changes_nothing(config, why):
    model = vit()
    with pytest.raises(ValueError, match=why):
        apply_norm_swap(model, config)
    assert not blend_norms(model)


def test_configuration_reaches_the_targets():
    def first(**config: Any) -> Any:
        model = vit()
        apply_norm_swap(model, config)
        return model.norm.target

    rep = first(eps=1e-3, momentum=0.2, frozen=True)
    assert (rep.bn.eps, rep.bn.momentum, rep.frozen) == (1e-3, 0.2, True)
    un = first(target="un", window=3, warmup=7, filtration=False, eps=1e-4)
    assert (un.window, un.warmup, un.filtration, un.eps) == (3, 7, False, 1e-4)
    assert first(target="dyt", alpha=0.2).alpha.item() == pytest.approx(0.2)
    assert first(target="affine", decay=0.5).decay == 0.5
    assert first(target="rms").eps == 1e-6  # the norm's own
