"""Which attention becomes linear, what stays of it, and what the layer refuses, costs, compiles to and exports as."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import timm.utils
import torch
from grid_models import grid_vit
from timm.layers import Attention, AttentionPoolLatent
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_efficient.attention.linear import (
    LinearAttention,
    LinearAttentionConfig,
    apply_linear_attention,
    find_attention,
)
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.deploy.export import export
from lightning_efficient.deploy.formats import to_onnx, to_torch_export


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_vit(**options: Any) -> Any:
    """With positions that are not zero."""
    model = grid_vit(**options)
    apply_linear_attention(model)
    for layer in layers(model):
        nn.init.normal_(layer.position)
    return model


def layers(model: nn.Module) -> list[LinearAttention]:
    return [m for m in model.modules() if isinstance(m, LinearAttention)]


def sequence(dim: int = 16, heads: int = 2, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), Attention(dim, heads, **options))


# -- the swap


def test_the_old_weights_are_reused_under_their_names() -> None:
    model = grid_vit(qk_norm=True)
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    change = apply_linear_attention(model)
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())
    new = {f"blocks.{i}.attn.{name}" for i in range(2) for name in ("position", "dwc.weight", "dwc.bias")}
    assert set(after) - set(before) == new
    assert {id(p) for p, _ in change.added} == {id(after[name]) for name in new}
    assert [follows for _, follows in change.added[:3]] == [before["blocks.0.attn.qkv.weight"]] * 3
    assert (change.removed, change.replaced) == ([], [])
    partly = grid_vit()
    partly.blocks[0].attn.qkv.requires_grad_(False)
    assert apply_linear_attention(partly).added[0][1] is partly.blocks[0].attn.proj.weight
    assert change.targets == {f"blocks.{i}.attn": "Attention becomes linear on 4×4 tokens" for i in range(2)}
    assert all(not after[name].any() for name in new if name.endswith("position"))


def test_the_convolution_starts_as_torchs_does_and_draws_nothing_of_the_users() -> None:
    def started(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model = grid_vit(num_heads=1, embed_dim=128)
        state = torch.get_rng_state()
        apply_linear_attention(model, LinearAttentionConfig(kernel_size=3))
        assert torch.equal(torch.get_rng_state(), state)
        return [layer.dwc.weight.detach() for layer in layers(model)]

    first, again, other = started(0), started(0), started(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1]), "layers"
    assert not torch.equal(first[0], other[0]), "seeds"
    torch.manual_seed(0)
    theirs = nn.Conv2d(128, 128, 3, groups=128).weight.detach()
    for weight in first:
        assert 0.32 < weight.abs().max() <= 1 / 3
        torch.testing.assert_close(weight.std(), theirs.std(), rtol=0.05, atol=0)


def test_include_exclude_and_names() -> None:
    model = grid_vit(depth=3)
    change = apply_linear_attention(model, {"include": ["blocks.0", "blocks.1"], "exclude": ["blocks.1"], "x": 3})
    assert list(change.targets) == ["blocks.0.attn"]
    assert set(change.skipped) == {"blocks.1.attn", "blocks.2.attn"}
    change = apply_linear_attention(model, {"kernel_size": 3}, ["blocks.2.attn"])
    assert list(change.targets) == ["blocks.2.attn"]
    assert layers(model)[1].dwc.kernel_size == (3, 3)
    change = apply_linear_attention(model)
    assert (list(change.targets), change.skipped) == (["blocks.1.attn"], {})
    with pytest.raises(NoMatchError, match="3 are linear already"):
        apply_linear_attention(model)


def test_device_dtype_mode_and_hooks_are_kept() -> None:
    model = grid_vit().double().train()
    model.blocks[1].attn.eval()
    called: list[str] = []
    model.blocks[0].attn.register_forward_hook(lambda *_: called.append("hook"))
    apply_linear_attention(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [layer.training for layer in layers(model)] == [True, False]
    model(seeded(1, 1, 8, 8, dtype=torch.float64))
    assert called == ["hook"]


def test_a_given_grid_serves_attention_outside_a_vision_transformer() -> None:
    model = sequence(attn_drop=0.1)
    change = apply_linear_attention(model, {"grid": 3})
    (note,) = change.targets.values()
    assert note == "Attention becomes linear on 3×3 tokens; attention dropout of 0.1 no longer applies"
    assert model(seeded(2, 9, 16)).shape == (2, 9, 16)


def test_dropout_of_the_projection_stays() -> None:
    model = sequence(proj_drop=0.5)
    apply_linear_attention(model, {"grid": 2})
    x = seeded(1, 4, 16)
    assert (model(x) == 0).float().mean() > 0.2
    assert not (model.eval()(x) == 0).any()


# -- refusals, each before anything changes


class Masked(Attention):
    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, is_causal=True)


def causal() -> nn.Module:
    model = grid_vit(depth=1)
    model.blocks[0].attn = Masked(16, 2)
    return model


def patched() -> nn.Module:
    model = sequence()
    model[1].forward = lambda x: x
    return model


def frozen() -> nn.Module:
    return grid_vit().requires_grad_(False)


SMALL: dict[str, Any] = {"img_size": 8, "in_chans": 1, "num_classes": 2}
VIT: dict[str, Any] = {**SMALL, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "class token": (lambda: grid_vit(class_token=True), {}, "1 class.*stand before the grid.*class_token=False"),
    "registers": (lambda: grid_vit(reg_tokens=3), {}, "3 class, register or distillation tokens.*reg_tokens=0"),
    "class token, grid given": (lambda: grid_vit(class_token=True), {"grid": 4}, "stand before the grid"),
    "distilled": (lambda: VisionTransformerDistilled(**VIT), {}, "2 class, register or distillation"),
    "not square": (lambda: grid_vit(img_size=(8, 4)), {}, "grid of 4×2 tokens is not square"),
    "another grid": (grid_vit, {"grid": 5}, "has 4×4 tokens, but `grid` is 5"),
    "any size": (lambda: grid_vit(dynamic_img_size=True), {}, "varies with the image.*pass `grid`"),
    "patch dropout": (lambda: grid_vit(patch_drop_rate=0.5), {}, "patch dropout.*patch_drop_rate=0"),
    "unknown grid": (sequence, {}, "grid is not known.*pass `grid`"),
    "own forward": (causal, {}, "Masked has a forward of its own"),
    "patched forward": (patched, {"grid": 2}, "Attention has a forward of its own"),
    "frozen": (frozen, {}, r"frozen \(requires_grad=False\)"),
    "meta": (lambda: grid_vit().to("meta"), {}, "meta device"),
    "swin": (
        lambda: SwinTransformer(**SMALL, patch_size=1, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,)),
        {},
        r"swin_transformer\.WindowAttention: its relative position bias",
    ),
    "relative": (lambda: VisionTransformerRelPos(**VIT), {}, "RelPosAttention: its relative position bias"),
    "beit": (lambda: Beit(**VIT, use_rel_pos_bias=True), {}, r"beit\.Attention: its relative position bias"),
    "rotary": (lambda: Eva(**VIT, use_rot_pos_emb=True), {}, "EvaAttention: its rotary position embeddings"),
    "cross": (lambda: nn.TransformerDecoderLayer(16, 2), {}, r"MultiheadAttention: .*cross-attention"),
    "latent": (lambda: nn.Sequential(AttentionPoolLatent(16)), {}, r"AttentionPoolLatent: .*cross-attention"),
    "fewer keys": (
        lambda: PyramidVisionTransformerV2(in_chans=1, depths=(1,), embed_dims=(16,), num_heads=(2,), sr_ratios=(1,)),
        {},
        r"pvt_v2\.Attention: it is not timm\.layers\.Attention",
    ),
    "none": (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "none found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_before_anything_changes(case: str) -> None:
    make, config, reason = REFUSED[case]
    model = make()
    before = list(model.named_modules()), {n: (p, p._version) for n, p in model.named_parameters()}
    with pytest.raises(NoMatchError, match=f"(?s)linear_attention: .*{reason}"):
        apply_linear_attention(model, config)
    assert (list(model.named_modules()), {n: (p, p._version) for n, p in model.named_parameters()}) == before


def test_what_is_refused_beside_what_matches_is_reported() -> None:
    model = grid_vit(global_pool="map")
    found = find_attention(model)
    assert list(found.matched) == ["blocks.0.attn", "blocks.1.attn"]
    assert "cross-attention" in found.skipped["attn_pool"]
    assert model(seeded(1, 1, 8, 8)).shape == (1, 4)


def test_a_size_the_user_vouches_for() -> None:
    model = grid_vit(dynamic_img_size=True)
    apply_linear_attention(model, {"grid": 3})
    assert model(seeded(1, 1, 6, 6)).shape == (1, 4)
    with pytest.raises(ValueError, match=r"\(1, 16, 16\); expected \(batch, 9, channels\).*3×3"):
        model(seeded(1, 1, 8, 8))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.zeros(16, 16)}])
def test_masks_that_come_at_run_time_are_refused(options: dict[str, Any]) -> None:
    model = linear_vit()
    with pytest.raises(ValueError, match=r"no attention mask and is not causal.*`exclude`"):
        model(seeded(1, 1, 8, 8), **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.7.attn"], "no module 'blocks.7.attn'; close names: .*blocks"),
        (["head"], r"'head' \(Linear\) cannot be swapped: it is no attention"),
        (["blocks.0.attn"], "1 class, register"),
        ([], "no attention named"),
    ],
)
def test_wrong_names_are_refused(names: list[str], message: str) -> None:
    model = grid_vit(class_token=True)
    with pytest.raises(ValueError, match=message):
        apply_linear_attention(model, {}, names)
    assert not layers(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("kernel_size", value) for value in (0, 4, -1, 3.0, True)),
        *(("grid", value) for value in (0, 2.0, "4", True)),
        *(("eps", value) for value in (0, 1, -1e-6, True, "1e-6", float("nan"))),
    ],
)
def test_wrong_values_name_the_argument(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be .*; got "):
        LinearAttentionConfig(**{name: value})


# -- the layer


@pytest.mark.parametrize("patch_size", [2, 4])
def test_one_sample_does_not_depend_on_its_batch_mates(patch_size: int) -> None:
    model = linear_vit(patch_size=patch_size).eval()
    x = seeded(3, 1, 8, 8)
    other = x.clone()
    other[1:] = 1e3 * seeded(2, 1, 8, 8, seed=1)
    assert torch.equal(model(x)[0], model(other)[0])
    assert not torch.equal(model(x)[1], model(other)[1])


@pytest.mark.parametrize("grid", range(2, 8))
def test_the_cheaper_order_is_taken(grid: int) -> None:
    tokens, dim, heads, batch = grid * grid, 16, 2, 3
    model = sequence(heads * dim, heads)
    apply_linear_attention(model, {"grid": grid, "kernel_size": 1})
    model[1].qkv = nn.Sequential(nn.Identity(), nn.Linear(heads * dim, 3 * heads * dim))
    with FlopCounterMode(display=False) as counter:
        model(seeded(batch, tokens, heads * dim))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    pairs, states = 2 * tokens * tokens * dim, 2 * tokens * dim * dim
    assert counts["aten.bmm"] == 2 * batch * heads * min(pairs, states)


class Products(TorchDispatchMode):
    """The dtypes of batched matrix products, the only ones between tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.dtypes |= {tensor.dtype for tensor in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize("mode", ["mixed", "true", "float64"])
def test_sums_over_tokens_are_in_single_precision_at_least(mode: str, patch_size: int) -> None:
    model, x = linear_vit(patch_size=patch_size), seeded(2, 1, 8, 8)
    if mode == "true":
        model, x = model.bfloat16(), x.bfloat16()
    elif mode == "float64":
        model, x = model.double(), x.double()
    with Products() as seen, torch.autocast("cpu", torch.bfloat16, enabled=mode == "mixed"):
        y = model(x)
    with seen:
        y.float().sum().backward()
    assert seen.dtypes == {torch.float64 if mode == "float64" else torch.float32}
    assert y.dtype == (torch.float64 if mode == "float64" else torch.bfloat16)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_half_precision_holds_what_sums_over_tokens_would_overflow() -> None:
    """Of 1024 keys and values around 16 the sum is 4 times the largest float16; of the exported form, too."""
    model = sequence(8, 1)
    model[1].qkv = nn.Linear(8, 24)
    apply_linear_attention(model, {"grid": 32, "kernel_size": 1})
    with torch.no_grad():
        model[1].qkv.weight.mul_(0.1)
        model[1].qkv.bias.fill_(16.0)
    x = seeded(1, 1024, 8)
    expected = copy.deepcopy(model).double()(x.double())
    plain = timm.utils.reparameterize_model(model)
    for form in (model, plain):
        with torch.autocast("cpu", torch.float16):
            found = form(x)
        torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-2)


# -- compile


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mixed", [False, True])
def test_compiles_to_one_graph_with_the_same_numbers(mixed: bool) -> None:
    model, x = linear_vit(depth=1), seeded(3, 1, 8, 8)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        outputs = [call(x) for call in (model, compiled)]
    for y in outputs:
        y.float().square().sum().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if mixed else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(*outputs, **tolerance)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, **tolerance)


# -- export

FORMS = {"grid": {}, "pairs": {"patch_size": 4}, "norms": {"qk_norm": True, "scale_attn_norm": True}}


@pytest.mark.parametrize("form", FORMS)
def test_the_exported_model_needs_nothing_of_ours(form: str) -> None:
    model, x = linear_vit(**FORMS[form]), seeded(3, 1, 8, 8)
    plain = export(model, x)
    assert layers(model), "the model itself stays"
    expected = model.eval()(x)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-6)
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} <= {"torch", "timm"}
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_the_exported_model_loads_without_this_package(
    form: str, tmp_path: Path, uninstall: Callable[[], None]
) -> None:
    model, x = linear_vit(**FORMS[form]), seeded(3, 1, 8, 8)
    plain = export(model, x)
    torch.save(plain, tmp_path / "plain.pt")
    torch.save(model, tmp_path / "ours.pt")
    uninstall()
    with pytest.raises(ModuleNotFoundError, match="lightning_efficient"):
        torch.load(tmp_path / "ours.pt", weights_only=False)
    loaded = torch.load(tmp_path / "plain.pt", weights_only=False)
    assert torch.equal(loaded(x), plain(x))
    with pytest.raises(AssertionError, match="no attention mask and is not causal"):
        loaded(x, is_causal=True)


@pytest.mark.parametrize(
    "form", ["norms", *(pytest.param(form, marks=pytest.mark.exhaustive) for form in ("grid", "pairs"))]
)
def test_programs_for_torch_export_and_onnx(form: str, tmp_path: Path) -> None:
    model, x = linear_vit(**FORMS[form], depth=1).eval(), seeded(3, 1, 8, 8)
    plain, other = export(model, x), seeded(3, 1, 8, 8, seed=1)
    assert to_torch_export(plain, x, tmp_path / "m.pt2").relative <= 1e-5
    assert to_onnx(plain, x, tmp_path / "m.onnx").relative <= 1e-5
    found = torch.export.load(tmp_path / "m.pt2").module()(other)
    torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0])
    torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [to_torch_export, to_onnx])
def test_programs_of_any_batch_size(save: Any, tmp_path: Path) -> None:
    model, x = linear_vit(depth=1).eval(), seeded(5, 1, 8, 8)
    save(export(model, x), x[:1], tmp_path / "m", dynamic_batch=True)
    if save is to_onnx:
        session = onnxruntime.InferenceSession(tmp_path / "m", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = torch.export.load(tmp_path / "m").module()(x)
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.zeros(16, 16)}])
def test_the_fused_form_refuses_masks_too(options: dict[str, Any]) -> None:
    fused = layers(linear_vit())[0].fuse()
    assert fused(seeded(1, 16, 16), attn_mask=None, is_causal=False).shape == (1, 16, 16)
    with pytest.raises(AssertionError, match="no attention mask and is not causal"):
        fused(seeded(1, 16, 16), **options)
    with pytest.raises(RuntimeError):
        fused(seeded(1, 9, 16))


def test_block_and_layer_agree_on_their_arguments() -> None:
    """timm's block hands masks on by keyword, so the layer has to know those names."""
    block = Block(16, 2)
    apply_linear_attention(block, {"grid": 2})
    assert block(seeded(1, 4, 16)).shape == (1, 4, 16)
    with pytest.raises(ValueError, match="mask"):
        block(seeded(1, 4, 16), is_causal=True)
