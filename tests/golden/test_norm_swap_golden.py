"""Every target norm, and the blend of SLAB, against the published formulas in float64, over whole schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_norms import BatchNorm, Unified, layer_norm, layer_norm_backward
from torch import Tensor, nn

from lightning_efficient.common.schedule import transition
from lightning_efficient.norms.blend import BlendNorm
from lightning_efficient.norms.repbn import RepBN
from lightning_efficient.norms.sources import Source
from lightning_efficient.norms.swap import NormSwapConfig, make_target
from lightning_efficient.norms.targets import RMS, DynamicTanh, FixedAffine
from lightning_efficient.norms.unified import UnifiedNorm

LR = 0.05


def close(got: Tensor, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    got = got.detach().numpy().reshape(np.shape(expected))
    scale = max(np.abs(expected).max(), 1.0)
    assert np.abs(got - expected).max() <= tolerance * scale


def randomized(*parameters: nn.Parameter, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.5 + torch.rand(p.shape, generator=generator, dtype=p.dtype))


def slab_pair(channels: int, eps: float) -> tuple[BlendNorm, nn.LayerNorm]:
    norm = nn.LayerNorm(channels, eps=eps)
    spec = Source("layer", channels, eps=eps, weight="weight", bias="bias")
    blend = BlendNorm(norm, make_target(NormSwapConfig(init="slab"), spec), spec).double()
    return blend, norm


@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 6)])
def test_slab_whole_schedule(shape):
    """Outputs, gradients, parameters and BatchNorm buffers over a schedule of 8 steps and 4 more at lam = 0."""
    steps, channels, eps = 8, shape[-1], 1e-6
    blend, norm = slab_pair(channels, eps)
    rep = blend.target
    assert isinstance(rep, RepBN)
    optimizer = torch.optim.SGD(blend.parameters(), lr=LR)
    w, b, eta = np.ones(channels), np.zeros(channels), 1.0
    bn = BatchNorm(np.ones(channels), np.zeros(channels))
    rng = np.random.default_rng(0)
    for step in range(steps + 4):
        x, g = rng.normal(0.7, 2.0, shape), rng.normal(size=shape)
        rows, upstream = x.reshape(-1, channels), g.reshape(-1, channels)
        lam = 1 - min(step, steps) / steps  # k-th call: 1 - (k - 1) / step, then 0
        ours = transition(step, steps + 4, length=steps)
        assert ours == lam
        blend.lam.fill_(ours)
        if step == steps + 2:
            blend.finish()  # from here the source is not computed: same numbers
        inputs = torch.from_numpy(x).requires_grad_()
        optimizer.zero_grad()
        y = blend(inputs)
        y.backward(torch.from_numpy(g))

        left, saved = layer_norm(rows, w, b, eps)
        right = bn.forward(rows) + eta * rows
        close(y, (lam * left + (1 - lam) * right).reshape(shape))
        gx, gw, gb = layer_norm_backward(lam * upstream, w, saved)
        up = (1 - lam) * upstream
        bx, bg, bb = bn.backward(up)
        geta = sum((up[i] * rows[i]).sum() for i in range(len(rows)))
        close(inputs.grad, (gx + bx + eta * up).reshape(shape))
        expected = ((norm.weight, gw), (norm.bias, gb), (rep.bn.weight, bg), (rep.bn.bias, bb), (rep.eta, geta))
        for parameter, gradient in expected:
            close(parameter.grad, gradient)
        close(rep.bn.running_mean, bn.running_mean)
        close(rep.bn.running_var, bn.running_var)
        assert rep.bn.num_batches_tracked == step + 1

        optimizer.step()
        w, b, eta = w - LR * gw, b - LR * gb, eta - LR * geta
        bn.gamma, bn.beta = bn.gamma - LR * bg, bn.beta - LR * bb

        # Ours evaluates the blend; the published module is the second factor alone, whatever lam is.
        blend.eval()
        right = bn.evaluate(rows) + eta * rows
        close(blend(torch.from_numpy(x)), (lam * layer_norm(rows, w, b, eps)[0] + (1 - lam) * right).reshape(shape))
        close(rep(torch.from_numpy(rows)), right)
        blend.train()
    assert abs(eta - 1) > 1e-3
    assert blend.lam == 0


def test_repbn_is_one_affine_map():
    """The paper's lemma: BatchNorm with gamma + eta·s and beta + eta·mean, and our scale and shift, to 1e-14."""
    rep = RepBN(5, eta=0.3).double()
    randomized(rep.bn.weight, rep.bn.bias)
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for _ in range(5):
        rep(x)
    rep.eval()
    y = rep(x)
    s = (rep.bn.running_var + rep.bn.eps).sqrt()
    lemma = nn.functional.batch_norm(
        x,
        rep.bn.running_mean,
        rep.bn.running_var,
        rep.bn.weight + rep.eta * s,
        rep.bn.bias + rep.eta * rep.bn.running_mean,
        eps=rep.bn.eps,
    )
    affine = rep.affine()
    assert affine.scale.dtype == affine.shift.dtype == torch.float64
    for other in (lemma, x * affine.scale + affine.shift):
        assert (y - other).abs().max() <= 1e-14 * y.abs().max()


def test_repbn_with_a_mask():
    """Statistics and gradients with padded rows left out; those rows are transformed like the others."""
    channels, counted = 4, [0, 2, 3, 6, 7]
    rep = RepBN(channels, eta=0.75).double()
    randomized(rep.bn.weight, rep.bn.bias)
    bn = BatchNorm(rep.bn.weight.detach().numpy().copy(), rep.bn.bias.detach().numpy().copy())
    mask = torch.zeros(9, dtype=torch.bool)
    mask[counted] = True
    rng = np.random.default_rng(1)
    for step in range(3):
        x, g = rng.normal(1.0, 2.0, (9, channels)), rng.normal(size=(9, channels))
        inputs = torch.from_numpy(x).requires_grad_()
        rep.zero_grad()
        y = rep(inputs, mask)
        y.backward(torch.from_numpy(g))
        close(y, bn.forward(x, counted) + 0.75 * x)
        gx, gg, gb = bn.backward(g)
        close(inputs.grad, gx + 0.75 * g)
        close(rep.bn.weight.grad, gg)
        close(rep.bn.bias.grad, gb)
        close(rep.eta.grad, (g * x).sum())
        close(rep.bn.running_mean, bn.running_mean)
        close(rep.bn.running_var, bn.running_var)
        assert rep.bn.num_batches_tracked == step + 1


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("filtration", [False, True])
def test_unified_norm(filtration, per_channel):
    """1040 iterations: warm-up, smoothing, injected outliers, and past 1000 the compensated gradient."""
    channels, window, warmup = 3, 4, 12
    norm = UnifiedNorm(channels, window, warmup, filtration, per_channel).double()
    randomized(norm.weight, norm.bias)
    reference = Unified(
        norm.weight.detach().numpy().copy(), norm.bias.detach().numpy().copy(), window, warmup, filtration, per_channel
    )
    rng = np.random.default_rng(2)
    compensated = False
    for t in range(1, 1041):
        size = 1 + 0.3 * np.sin(t)
        size = size * (9.0 if t in (30, 31, 500, 1020) else 1.0)
        x, g = rng.normal(0.2, size, (5, channels)), rng.normal(size=(5, channels))
        inputs = torch.from_numpy(x).requires_grad_()
        norm.zero_grad()
        y = norm(inputs)
        y.backward(torch.from_numpy(g))
        expected = reference.forward(x)
        gx, gw, gb = reference.backward(g)
        close(y, expected)
        close(inputs.grad, gx)
        close(norm.weight.grad, gw)
        close(norm.bias.grad, gb)
        close(norm.running_var, reference.running_var)
        close(norm.ema, reference.ema)
        assert norm.skipped == reference.skipped
        assert norm.iterations == t
        compensated |= bool((reference.r != 1).any())
    assert compensated
    assert (int(norm.skipped) > 0) == filtration
    norm.eval()
    close(norm(torch.from_numpy(x)), reference.evaluate(x))
    scale, shift = norm.affine()
    close(scale, reference.weight / np.sqrt(reference.running_var + 1e-5), 1e-14)
    close(shift, reference.bias)


def test_unified_norm_scalar_and_per_channel_thresholds_differ():
    """The two readings of the paper skip different batches, so the test above tells them apart."""
    counts = []
    for per_channel in (False, True):
        reference = Unified(np.ones(3), np.zeros(3), 4, 12, True, per_channel)
        rng = np.random.default_rng(2)
        for t in range(1, 200):
            reference.forward(rng.normal(0.2, 1 + 0.3 * np.sin(t), (5, 3)))
            reference.backward(rng.normal(size=(5, 3)))
        counts.append(reference.skipped)
    assert counts[0] != counts[1]


def test_unified_norm_with_a_mask():
    counted = [1, 2, 5]
    norm = UnifiedNorm(3, 2, 4).double()
    reference = Unified(np.ones(3), np.zeros(3), 2, 4, True)
    mask = torch.zeros(6, dtype=torch.bool)
    mask[counted] = True
    rng = np.random.default_rng(4)
    for _ in range(12):
        x, g = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
        inputs = torch.from_numpy(x).requires_grad_()
        norm.zero_grad()
        y = norm(inputs, mask)
        y.backward(torch.from_numpy(g))
        close(y, reference.forward(x, counted))
        gx, gw, _ = reference.backward(g)
        close(inputs.grad, gx)
        close(norm.weight.grad, gw)
        close(norm.running_var, reference.running_var)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fixed_affine_calibration(kind):
    """``c = EMA[Σ (w x)² / rms] / EMA[Σ (w x)²]`` for an RMS norm; the least-squares fit for a layer norm."""
    channels, decay = 5, 0.9
    norm: nn.Module = nn.RMSNorm(channels, eps=1e-6) if kind == "rms" else nn.LayerNorm(channels, eps=1e-6)
    bias = "bias" if kind == "layer" else None
    spec = Source("rms" if kind == "rms" else "layer", channels, eps=1e-6, weight="weight", bias=bias)
    target = FixedAffine(channels, bias is not None, decay)
    blend = BlendNorm(norm, target, spec).double()
    randomized(*norm.parameters())
    blend.recopy()
    target.calibrating = True
    w, b = norm.weight.detach().numpy(), norm.bias.detach().numpy() if bias else np.zeros(channels)
    product = power = 0.0
    rng = np.random.default_rng(5)
    for size in (1.0, 4.0, 0.3, 2.0):
        x = rng.normal(0.3, size, (2, 6, channels))
        with torch.no_grad():
            blend(torch.from_numpy(x))
        close(target.c, np.array(product / power if power else 1.0), 1e-14)  # of the batches before this one
        top = bottom = 0.0
        for row in x.reshape(-1, channels):
            if kind == "rms":
                top += ((w * row) ** 2).sum() / np.sqrt((row**2).mean() + 1e-6)
            else:
                y = layer_norm(row[None], w, b, 1e-6)[0][0]
                top += ((w * row) * (y - b)).sum()
            bottom += ((w * row) ** 2).sum()
        product, power = decay * product + (1 - decay) * top, decay * power + (1 - decay) * bottom
    target.calibrating = False
    blend.recopy()
    c = product / power
    close(target.c, np.array(c), 1e-14)
    blend.finish()
    close(blend(torch.from_numpy(x)), c * w * x + b, 1e-14)
    scale, shift = target.affine()
    close(scale, c * w, 1e-14)
    close(shift, b, 1e-14)
    assert abs(c - 1) > 0.01


def test_fixed_affine_is_the_least_squares_fit():
    """Over one batch no other factor fits an RMS norm better."""
    norm, spec = nn.RMSNorm(6, eps=1e-6).double(), Source("rms", 6, eps=1e-6, weight="weight")
    target = FixedAffine(6, bias=False)
    blend = BlendNorm(norm, target, spec).double()
    randomized(norm.weight)
    blend.recopy()
    target.calibrating = True
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad():
        blend(x)
        blend.recopy()
        best = (target(x) - norm(x)).square().sum()
        for factor in (0.99, 1.01):
            assert (factor * target(x) - norm(x)).square().sum() > best


@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_tanh(bias):
    norm = DynamicTanh(4, bias, alpha=0.5).double()
    assert norm.alpha.item() == 0.5
    randomized(*norm.parameters())
    rng = np.random.default_rng(6)
    x, g = rng.normal(0, 2, (7, 4)), rng.normal(size=(7, 4))
    inputs = torch.from_numpy(x).requires_grad_()
    y = norm(inputs)
    y.backward(torch.from_numpy(g))
    alpha, w = norm.alpha.item(), norm.weight.detach().numpy()
    b = norm.bias.detach().numpy() if bias else np.zeros(4)
    t = np.tanh(alpha * x)
    close(y, w * t + b, 1e-14)
    close(inputs.grad, g * w * (1 - t**2) * alpha)
    close(norm.alpha.grad, (g * w * (1 - t**2) * x).sum())
    close(norm.weight.grad, (g * t).sum(0))
    assert norm.affine() is None


@pytest.mark.parametrize("bias", [True, False])
def test_rms(bias):
    norm = RMS(4, bias, eps=1e-3).double()
    randomized(*norm.parameters())
    rng = np.random.default_rng(7)
    x, g = rng.normal(1, 2, (7, 4)), rng.normal(size=(7, 4))
    inputs = torch.from_numpy(x).requires_grad_()
    y = norm(inputs)
    y.backward(torch.from_numpy(g))
    w, b = norm.weight.detach().numpy(), norm.bias.detach().numpy() if bias else np.zeros(4)
    for i, row in enumerate(x):
        rms = np.sqrt((row**2).mean() + 1e-3)
        close(y[i], w * row / rms + b, 1e-14)
        close(inputs.grad[i], (g[i] * w - row * (g[i] * w * row).mean() / rms**2) / rms)
    assert norm.affine() is None
