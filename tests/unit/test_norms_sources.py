"""What counts as a norm: types, private classes, look-alikes, and that looking changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm.layers
import torch
from timm.layers.norm import LayerNormFp32, RmsNorm2dFp32, SimpleNorm
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lightning_efficient.norms.sources import Source, recognise


class Own(nn.Module):
    """A layer norm under other names, as people write it."""

    def __init__(self, n: int, scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(n)) if shift else None
        self.a = nn.Parameter(torch.ones(n)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 3e-4).sqrt()
        y = y if self.a is None else y * self.a
        return y if self.b is None else y + self.b


class Wide(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Gated(nn.Module):
    """An RMS norm with a second argument, as in Mamba."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = nn.functional.rms_norm(x, [x.shape[-1]], self.weight, 1e-6)
        return y if gate is None else y * gate


class ByRank(nn.LayerNorm):
    """Channels last for sequences, first for images: no single axis is right."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class Scale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


N = 8
LN = {"weight": "weight", "bias": "bias"}
FOUND = {
    "torch": (nn.LayerNorm(N), Source("layer", N, -1, 1e-5, **LN)),
    "torch-no-bias": (nn.LayerNorm(N, eps=1e-3, bias=False), Source("layer", N, -1, 1e-3, "weight")),
    "torch-no-affine": (nn.LayerNorm(N, elementwise_affine=False), Source("layer", N, -1, 1e-5)),
    "torch-rms": (nn.RMSNorm(N), Source("rms", N, -1, None, "weight")),
    "torch-rms-no-affine": (nn.RMSNorm(N, eps=1e-4, elementwise_affine=False), Source("rms", N, -1, 1e-4)),
    "timm": (timm.layers.LayerNorm(N), Source("layer", N, -1, 1e-6, **LN)),
    "timm-no-affine": (timm.layers.LayerNorm(N, affine=False), Source("layer", N, -1, 1e-6)),
    "timm-fp32": (LayerNormFp32(N), Source("layer", N, -1, 1e-6, **LN)),
    "timm-2d": (timm.layers.LayerNorm2d(N), Source("layer", N, 1, 1e-6, **LN)),
    "timm-2d-of-3": (timm.layers.LayerNorm2d(3), Source("layer", 3, 1, 1e-6, **LN)),
    "timm-rms": (timm.layers.RmsNorm(N), Source("rms", N, -1, 1e-6, "weight")),
    "timm-rms-no-affine": (timm.layers.RmsNorm(N, affine=False), Source("rms", N, -1, 1e-6)),
    "timm-rms-2d": (timm.layers.RmsNorm2d(N), Source("rms", N, 1, 1e-6, "weight")),
    "timm-rms-2d-fp32": (RmsNorm2dFp32(N), Source("rms", N, 1, 1e-6, "weight")),
    "llama": (LlamaRMSNorm(N, eps=1e-5), Source("rms", N, -1, 1e-5, "weight")),
    "gemma": (GemmaRMSNorm(N, eps=1e-12), Source("rms", N, -1, 1e-12, "weight", offset=1.0)),
    "t5": (T5LayerNorm(N), Source("rms", N, -1, 1e-6, "weight")),
    "convnext-last": (ConvNextLayerNorm(N), Source("layer", N, -1, 1e-6, **LN)),
    "convnext-first": (ConvNextLayerNorm(N, data_format="channels_first"), Source("layer", N, 1, 1e-6, **LN)),
    "own-scale": (Own(N, shift=False), Source("layer", N, -1, 3e-4, "a")),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    module, expected = FOUND[case]
    got = recognise(module)
    assert isinstance(got, Source)
    if case == "own-scale":  # written into the code, so only as precise as it can be measured
        assert got.eps == pytest.approx(3e-4, rel=1e-5)
        expected = copy.replace(expected, eps=got.eps) if hasattr(copy, "replace") else got
    assert got == expected


def test_roles_are_found_by_what_parameters_do():
    got = recognise(Own(N))
    assert isinstance(got, Source)
    assert (got.weight, got.bias) == ("a", "b")


@pytest.mark.parametrize(
    "module",
    [
        nn.GroupNorm(2, N),
        timm.layers.GroupNorm1(N),
        nn.BatchNorm1d(N),
        nn.BatchNorm2d(N),
        nn.InstanceNorm2d(N, affine=True),
        nn.PReLU(N),
        nn.Linear(N, N),
        nn.Linear(N, 1, bias=False),
        nn.Embedding(4, N),
        nn.Identity(),
        nn.LazyLinear(N),
        SimpleNorm(N),  # x / std(x): neither formula
        Scale(N),
        nn.Sequential(nn.LayerNorm(N)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_not_a_norm(module):
    assert recognise(module) is None


def test_norms_that_cannot_be_swapped_say_why():
    weight_norm = nn.utils.parametrize.register_parametrization(nn.LayerNorm(N), "weight", nn.Softplus())
    for module, why in (
        (nn.LayerNorm((3, N)), "2 axes"),
        (nn.LayerNorm(1), "single channel"),
        (weight_norm, "parametrization"),
        (Wide(N), "base class"),
        (ByRank(N), "base class"),
        (ByRank(5), "base class"),
        (Gated(N), "more than the input"),
    ):
        reason = recognise(module)
        assert isinstance(reason, str)
        assert why in reason


@pytest.mark.parametrize("module", [GemmaRMSNorm(N), nn.LayerNorm(N), Own(N)], ids=lambda m: type(m).__name__)
def test_scale_and_shift(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.linspace(-1, 1, N))
    spec = recognise(module)
    x = torch.randn(3, N, dtype=torch.float64)
    module = module.double()
    rows = x - x.mean(-1, keepdim=True) if spec.kind == "layer" else x
    z = rows / (rows.square().mean(-1, keepdim=True) + spec.eps).sqrt()
    shift = spec.shift(module)
    expected = z * spec.scale(module) + (0 if shift is None else shift)
    assert (module(x) - expected).abs().max() < 1e-6
    assert not spec.scale(module).requires_grad


class Nosy(nn.Module):
    """Draws random numbers, counts its calls, keeps its inputs and warns."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called", UserWarning, stacklevel=1)
        self.calls += 1
        self.seen.append(torch.rand(3))
        return nn.functional.rms_norm(x, [x.shape[-1]], self.weight, 1e-6)


def test_looking_changes_nothing():
    module = Nosy(N).half()
    module.weight.grad = torch.ones_like(module.weight)
    fired = []
    module.register_forward_hook(lambda *_: fired.append("hook"))
    module.register_forward_pre_hook(lambda *_: fired.append("pre"))
    weight, values = module.weight, module.weight.clone()
    state = torch.get_rng_state()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: fired.append("global"))
    try:
        got = recognise(module)
    finally:
        everywhere.remove()
    assert got == Source("rms", N, -1, 1e-6, "weight") or got.eps == pytest.approx(1e-6, rel=1e-5)
    assert (fired, module.calls, module.seen) == ([], 0, [])
    assert module.weight is weight
    assert module.weight.dtype is torch.float16
    assert torch.equal(module.weight, values)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


class Owner:
    """Something large that a hook belongs to."""

    def __deepcopy__(self, memo: object) -> Owner:
        raise AssertionError("copied")

    def hook(self, *args: object) -> None:
        raise AssertionError("fired")


def test_what_hooks_belong_to_is_not_copied():
    module = timm.layers.RmsNorm(N)
    module.register_forward_hook(Owner().hook)
    assert isinstance(recognise(module), Source)


def test_norms_without_data_are_found():
    with torch.device("meta"):
        modules = (nn.LayerNorm(N), timm.layers.LayerNorm2d(N), LlamaRMSNorm(N))
    assert [recognise(m).axis for m in modules] == [-1, 1, -1]
