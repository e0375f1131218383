"""The blend: what it computes, its precision, its gate on statistics, and what it becomes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm.layers
import timm.utils
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.norms.blend import BlendNorm, blend_norms
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.swap import TARGETS, apply_norm_swap
from lightning_efficient.norms.unified import UnifiedNorm

C = 6


def swapped(norm: nn.Module, target: str = "repbn", lam: float = 0.5, **config: object) -> BlendNorm:
    model = nn.Sequential(norm)
    apply_norm_swap(model, {"target": target, "warmup": 4, **config})
    model[0].lam.fill_(lam)
    return model[0]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- what it computes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("training", [True, False])
def test_value_is_the_convex_combination(target, training):
    blend = swapped(nn.LayerNorm(C), target, 0.3).double().train(training)
    x = seeded(4, 5, C, dtype=torch.float64)
    right = copy.deepcopy(blend.target)(x.reshape(-1, C)).reshape(x.shape)
    lam = float(torch.tensor(0.3))
    torch.testing.assert_close(blend(x), lam * blend.source(x) + (1 - lam) * right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("target", TARGETS)
def test_at_one_it_is_the_source_exactly(target):
    norm = timm.layers.LayerNorm(C)
    x = seeded(4, 5, C)
    before = norm(x)
    assert torch.equal(swapped(norm, target, 1.0)(x), before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [timm.layers.LayerNorm2d, timm.layers.RmsNorm2d], ids=["layer", "rms"])
def test_channels_first_is_channels_last_moved(target, make):
    blend = swapped(make(C), target, 0.4, init="slab").double()
    last = nn.LayerNorm(C, eps=1e-6) if make is timm.layers.LayerNorm2d else timm.layers.RmsNorm(C)
    other = swapped(last, target, 0.4, init="slab").double()
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = seeded(2, C, 3, 4, dtype=torch.float64).to(memory_format=fmt).requires_grad_()
        z = x.detach().movedim(1, -1).contiguous().requires_grad_()
        y, expected = blend(x), other(z)
        torch.testing.assert_close(y, expected.movedim(-1, 1))
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, z.grad.movedim(-1, 1))
        assert y.is_contiguous(memory_format=torch.channels_last)  # as the norm's own output: nothing is copied back


@pytest.mark.parametrize("target", TARGETS)
def test_starts_from_the_source(target):
    """``init="copy"`` takes scale and shift over, Gemma's ``1 + weight`` included; ``"slab"`` does not."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    for norm, scale, shift in ((nn.LayerNorm(C), 2.0, 0.5), (GemmaRMSNorm(C), 3.0, None)):
        with torch.no_grad():
            for p in norm.parameters():
                p.fill_(0.5 if p is getattr(norm, "bias", None) else 2.0)
        for init in ("copy", "slab"):
            blend = swapped(norm, target, 1.0, init=init)
            holder = blend.target.bn if isinstance(blend.target, RepBN) else blend.target
            want = scale if init == "copy" else 1.0
            assert torch.equal(holder.weight, torch.full((C,), want))
            if holder.bias is not None:
                want = (shift or 0.0) if init == "copy" else 0.0
                assert torch.equal(holder.bias, torch.full((C,), want))
            if isinstance(blend.target, RepBN):
                assert blend.target.eta.item() == (0.0 if init == "copy" else 1.0)
            norm = blend.source


def test_recopy_follows_what_the_source_learned():
    blend = swapped(nn.LayerNorm(C))
    with torch.no_grad():
        blend.source.weight.fill_(7.0)
        blend.source.bias.fill_(-1.0)
    blend.recopy()
    assert torch.equal(blend.target.bn.weight, torch.full((C,), 7.0))
    assert torch.equal(blend.target.bn.bias, torch.full((C,), -1.0))


# -- precision


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_lam_and_statistics_keep_their_precision(cast, target):
    blend = swapped(nn.LayerNorm(C), target, 0.3)
    for buffer in blend.target.buffers():
        if buffer.is_floating_point():
            buffer.fill_(0.1)
    blend.to(cast)
    assert blend.lam.dtype is torch.float32
    assert blend.lam == torch.tensor(0.3)
    wide = torch.float64 if cast is torch.float64 else torch.float32
    for buffer in blend.target.buffers():
        if buffer.is_floating_point():
            assert buffer.dtype is wide
            assert (buffer == torch.tensor(0.1).to(wide)).all()
    assert {p.dtype for p in blend.parameters()} == {cast}


@pytest.mark.parametrize("target", TARGETS)
def test_low_precision_model(target):
    """A bfloat16 model: statistics in float32, output in bfloat16, near the float64 result."""
    norm = nn.LayerNorm(C).bfloat16()
    blend = swapped(norm, target, 0.25, init="slab")
    assert {b.dtype for b in blend.target.buffers() if b.is_floating_point()} <= {torch.float32}
    exact = copy.deepcopy(blend).double()
    x = (3 + seeded(64, C)).bfloat16()
    for mask in (None, torch.arange(64) % 3 > 0):
        blend.mask = exact.mask = mask
        y, expected = blend(x.requires_grad_()), exact(x.double())
        assert y.dtype is torch.bfloat16
        assert (y.double() - expected).abs().max() < 0.02 * expected.abs().max()
        y.float().square().sum().backward()
        assert x.grad.isfinite().all()
    if isinstance(blend.target, RepBN):
        torch.testing.assert_close(
            blend.target.bn.running_mean.double(), exact.target.bn.running_mean, rtol=1e-5, atol=0
        )
    blend.finish()
    assert blend(x).dtype is torch.bfloat16
    assert blend.eval()(x).dtype is torch.bfloat16


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(target, dtype):
    blend = swapped(nn.LayerNorm(C), target, 0.5, init="slab")
    exact = copy.deepcopy(blend).double()
    x = (3 + seeded(64, C)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = blend(x), blend.source(x)
    assert y.dtype is want.dtype
    assert (y.double() - exact(x.double())).abs().max() < 0.02 * y.abs().max()
    for mine, theirs in zip(blend.target.buffers(), exact.target.buffers(), strict=True):
        assert mine.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_cast_from_meta_leaves_a_usable_lam():
    blend = swapped(nn.LayerNorm(C)).to("meta").to_empty(device="cpu")
    assert blend.lam == 1.0


# -- statistics


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("target", ["repbn", "un"])
def test_too_few_rows_use_running_statistics(target, rows):
    blend = swapped(nn.LayerNorm(C), target, 0.0)
    blend(seeded(32, C) * 3)
    before = [b.clone() for b in blend.target.buffers()]
    x = seeded(rows, C, seed=1)
    y = blend(x)
    assert all(map(torch.equal, blend.target.buffers(), before))
    torch.testing.assert_close(y, blend.eval()(x))


@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_valid_rows_use_running_statistics(valid):
    rep = RepBN(C)
    rep(seeded(32, C) * 3)
    before = [b.clone() for b in rep.buffers()]
    x = seeded(5, C, seed=1).requires_grad_()
    y = rep(x, torch.arange(5) < valid)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert all(map(torch.equal, rep.buffers(), before))
    torch.testing.assert_close(y, rep.eval()(x))


def test_unified_norm_of_padding_alone():
    un = UnifiedNorm(C, 2, 4)
    for seed in range(5):
        un(3 * seeded(8, C, seed=seed))
    before = un.running_var.clone()
    x = seeded(5, C)
    y = un(x, torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(un.running_var, before)
    assert torch.isfinite(y).all()
    assert torch.isfinite(un(x)).all()  # the window is not poisoned


@pytest.mark.parametrize("target", ["repbn", "un"])
def test_padding_does_not_reach_the_statistics(target):
    """Whatever stands in padded rows: same statistics, same output and gradient of the others (NaN: no gradient)."""
    results = []
    for filler in (0.0, 1e6, float("nan")):
        blend = swapped(nn.LayerNorm(C), target, 0.0)
        blend.finish()
        x = seeded(2, 4, C)
        blend.mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
        x[~blend.mask] = filler
        x.requires_grad_()
        y = blend(x)
        y[blend.mask].square().sum().backward()
        results.append([y[blend.mask], *blend.target.buffers(), x.grad[blend.mask]])
    for other, compared in ((results[1], None), (results[2], -1)):
        for a, b in list(zip(results[0], other, strict=True))[:compared]:
            torch.testing.assert_close(a, b)


def test_a_full_mask_changes_nothing():
    plain, masked = RepBN(C).double(), RepBN(C).double()
    x = seeded(20, C, dtype=torch.float64)
    torch.testing.assert_close(masked(x, torch.ones(20, dtype=torch.bool)), plain(x))
    for a, b in zip(masked.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_mask_of_another_shape_is_ignored():
    blend = swapped(nn.LayerNorm(C))
    blend.mask = torch.zeros(2, 5, dtype=torch.bool)  # of the tokens; this norm sees pooled rows
    other = swapped(nn.LayerNorm(C))
    x = seeded(4, C)
    assert torch.equal(blend(x), other(x))


@pytest.mark.parametrize("target", ["repbn", "un"])
def test_frozen_trains_with_running_statistics(target):
    blend = swapped(nn.LayerNorm(C), target, 0.0, frozen=True)
    x = seeded(9, C, seed=2) * 3
    before = [b.clone() for b in blend.target.buffers()]
    y = blend(x)
    assert all(map(torch.equal, blend.target.buffers(), before))
    torch.testing.assert_close(y, blend.eval()(x))


class Deep(nn.Module):
    """Two blocks, each recomputed in the backward pass if ``how`` says so; ``twice`` uses the norm in two places."""

    def __init__(self, target: str, how: str = "plain", twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C), nn.Tanh()) for _ in range(2))
        if twice:
            self.blocks[1][1] = self.blocks[0][1]
        apply_norm_swap(self, {"target": target, "warmup": 2, "window": 2, "init": "slab"})
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x


def train(model: nn.Module, steps: int = 5, micro: int = 1, call: Callable[[Tensor], Tensor] | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        for blend in blend_norms(model).values():
            blend.lam.fill_(1 - step / steps)
        optimizer.zero_grad()
        for part in range(micro):
            x = seeded(12, C, seed=micro * step + part).requires_grad_()
            (call or model)(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("target", ["repbn", "un", "affine"])
def test_recomputation_updates_nothing(target, how):
    models = [Deep(target, way) for way in ("plain", how)]
    for model in models:
        for blend in blend_norms(model).values():
            blend.target.calibrating = True
        train(model)
    tensors = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


def test_each_call_outside_backward_counts():
    """Accumulation and a norm in two places update once for each call, as BatchNorm does."""
    shared, accumulated = Deep("repbn", "non-reentrant", twice=True), Deep("repbn", "non-reentrant")
    train(shared, steps=3)
    train(accumulated, steps=3, micro=4)
    assert [b.target.bn.num_batches_tracked.item() for b in blend_norms(shared).values()] == [6]
    assert [b.target.bn.num_batches_tracked.item() for b in blend_norms(accumulated).values()] == [12, 12]


@pytest.mark.parametrize("target", ["repbn", "un", "affine"])
def test_closed_gate(target):
    """With ``collect`` off a training forward gives the same output and leaves every buffer alone."""
    blend = swapped(nn.LayerNorm(C), target, 0.5)
    blend.target.calibrating = True
    x = seeded(8, C)
    y = blend(x)
    before = [b.clone() for b in blend.buffers()]
    blend.target.collect = False
    for mask in (None, torch.ones(8, dtype=torch.bool)):
        blend.mask = mask
        torch.testing.assert_close(blend(x), y)
        assert all(map(torch.equal, blend.buffers(), before))


# -- the end of the transition


@pytest.mark.parametrize("target", TARGETS)
def test_finished_source_is_not_computed_but_keeps_gradients(target):
    blend = swapped(nn.LayerNorm(C), target, 0.0)
    x = seeded(8, C)
    y = copy.deepcopy(blend)(x)
    with torch.no_grad():
        blend.source.weight.fill_(float("nan"))  # 0 · NaN would be NaN
    blend.finish()
    blend.source.forward = None  # calling it is an error now
    got = blend(x)
    assert torch.equal(got, y)
    got.sum().backward()
    for p in blend.source.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    assert all(p.grad is not None for p in blend.target.parameters())


def test_ddp_needs_those_zero_gradients(monkeypatch):
    def steps() -> None:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(swapped(nn.LayerNorm(C), "repbn", 0.0)))
        model.module[0].finish()
        for seed in range(2):
            model(seeded(4, C, seed=seed)).sum().backward()

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        steps()
        monkeypatch.setattr(BlendNorm, "_with_zero_gradients", lambda self, y: y)
        with pytest.raises(RuntimeError, match="not used in producing loss"):
            steps()
    finally:
        torch.distributed.destroy_process_group()


def test_sync_batchnorm_conversion_reaches_it():
    blend = swapped(nn.LayerNorm(C), "repbn", 0.5)
    blend(seeded(8, C))
    x = seeded(8, C, seed=1)
    expected = copy.deepcopy(blend)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(blend)
    assert isinstance(converted.target.bn, nn.SyncBatchNorm)
    for mode in (True, False):  # alone, it computes what BatchNorm does
        assert torch.equal(converted.train(mode)(x), expected.train(mode)(x))
    converted.finish()
    assert torch.equal(converted.fuse()(x), expected.target.plain(-1)(x))
