"""What a finished blend becomes, and that the encoder's fast path never bypasses one."""

from __future__ import annotations

import copy
import io

import pytest
import timm.layers
import timm.utils
import torch
from torch import Tensor, nn

from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.sources import recognise
from lightning_efficient.norms.swap import TARGETS, NormSwapConfig, apply_norm_swap, make_target
from lightning_efficient.norms.targets import FixedAffine
from lightning_efficient.norms.unified import UnifiedNorm

C = 6


def swapped(norm: nn.Module, target: str = "repbn", lam: float = 0.5, **config: object) -> BlendNorm:
    model = nn.Sequential(norm)
    apply_norm_swap(model, {"target": target, "warmup": 4, **config})
    model[0].lam.fill_(lam)
    return model[0]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "make",
    [nn.LayerNorm, nn.RMSNorm, timm.layers.LayerNorm2d, timm.layers.RmsNorm2d],
    ids=["layer", "rms", "layer2d", "rms2d"],
)
def test_fused_is_plain_torch(target, make):
    blend = swapped(make(C), target, 0.5, init="slab").double()
    shape = (3, C, 2, 4) if blend.spec.axis == 1 else (3, 5, C)
    x = seeded(*shape, dtype=torch.float64)
    for seed in range(3):
        blend(seeded(*shape, seed=seed, dtype=torch.float64))
    with torch.no_grad():
        for p in blend.target.parameters():
            p.add_(torch.linspace(0.1, 0.3, p.numel(), dtype=p.dtype))
    blend.finish()
    model = nn.Sequential(nn.Identity(), blend).eval()
    expected = model(x)
    plain = timm.utils.reparameterize_model(model)
    assert all(type(m).__module__.startswith("torch.") for m in plain.modules())
    torch.testing.assert_close(plain(x), expected, rtol=1e-13, atol=1e-13)
    assert isinstance(blend, BlendNorm)  # the model given is left alone
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(copy.deepcopy(plain)(x), expected, rtol=1e-13, atol=1e-13)
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.weight"'):  # not taken for the norm that was there
        nn.Sequential(nn.Identity(), make(C)).load_state_dict(plain.state_dict())


def test_fused_loads_without_this_package(tmp_path, uninstall):
    norms = nn.Sequential(*(swapped(nn.LayerNorm(C), target, 0.0) for target in TARGETS)).eval()
    x = seeded(4, C)
    torch.save(timm.utils.reparameterize_model(norms), tmp_path / "plain.pt")
    torch.save(norms, tmp_path / "ours.pt")
    uninstall()
    with pytest.raises(ModuleNotFoundError, match="lightning_efficient"):
        torch.load(tmp_path / "ours.pt", weights_only=False)
    torch.testing.assert_close(torch.load(tmp_path / "plain.pt", weights_only=False)(x), norms(x))


def test_fuse_before_the_end_is_refused():
    with pytest.raises(ValueError, match=r"0\.5 of its source.*transition"):
        swapped(nn.LayerNorm(C)).fuse()


def test_affine_form():
    x = seeded(50, C, dtype=torch.float64)
    for target in (RepBN(C), UnifiedNorm(C, 2, 2), FixedAffine(C)):
        target.double()
        target(x * 2 + 1)
        target.calibrate(x, 3 * x, None, None, None)
        target.copy_affine(torch.linspace(1, 2, C), None)
        target.eval()
        scale, shift = target.affine()
        assert not scale.requires_grad
        torch.testing.assert_close(target(x), x * scale + shift, rtol=1e-14, atol=1e-14)
    for name in ("dyt", "rms"):
        assert make_target(NormSwapConfig(name), recognise(nn.LayerNorm(C))).affine() is None


# -- nn.TransformerEncoder


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("target", ["dyt", "repbn"])
@pytest.mark.parametrize("which", ["both", "one"])
@pytest.mark.parametrize("stage", ["applied", "by hand", "copied", "fused"])
def test_encoder_fast_path_does_not_bypass_the_blend(norm_first, target, which, stage):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    include = None if which == "both" else ["*.norm2"]
    config = {"target": target, "frozen": True, "init": "slab", "include": include}
    if stage == "by hand":
        for block in encoder.layers:
            spec = recognise(block.norm2)
            block.norm2 = BlendNorm(block.norm2, make_target(NormSwapConfig(target, "slab", frozen=True), spec), spec)
            block.norm2.lam.fill_(0.3)
    else:
        apply_norm_swap(encoder, config)
    for blend in blend_norms(encoder).values():
        blend.lam.fill_(0.3)
        if stage == "fused":
            blend.finish()
    if stage == "copied":
        encoder = copy.deepcopy(encoder)
        buffer = io.BytesIO()
        torch.save(encoder, buffer)
        buffer.seek(0)
        encoder = torch.load(buffer, weights_only=False)
    expected_of = copy.deepcopy(encoder).train()
    if stage == "fused":
        encoder = timm.utils.reparameterize_model(encoder)
        assert not blend_norms(encoder)
    encoder.eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, padding):
        if stage == "by hand" and mask is not None:
            continue  # nested tensors are turned off by apply_norm_swap
        expected = expected_of(x, src_key_padding_mask=mask)
        with torch.no_grad():
            got = encoder(x, src_key_padding_mask=mask)
        keep = slice(None) if mask is None else ~mask
        torch.testing.assert_close(got[keep], expected[keep])


def test_the_fast_path_would_have_bypassed_it():
    """The trap is real: with an ``eps`` that agrees, the blend is silently ignored in evaluation."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    original = copy.deepcopy(layer).eval()
    apply_norm_swap(layer, {"target": "dyt"})
    layer.activation_relu_or_gelu = 1
    for blend in blend_norms(layer).values():
        blend.lam.zero_()
        blend.__class__ = type("Naive", (BlendNorm,), {"eps": 1e-5})
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        bypassed = layer.eval()(x)
        torch.testing.assert_close(bypassed, original(x))
