"""Folding affines away: the algebra against direct evaluation, real models against themselves, what must not fold."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fold_models import MODELS, Affine, Encoder, Table, deepest_difference, swap, swin
from torch import Tensor, nn

from lightning_efficient.folding.affine import ChannelAffine, fold_backwards, fold_forwards
from lightning_efficient.folding.consumers import Part
from lightning_efficient.folding.fold import FoldReport, fold_affines

# What stays, by the last part of the norm's name, and a piece of the reason; () is where everything folds.
LEFT: dict[str, dict[str, str]] = {
    "vit": {},
    "vit_gap": {},
    "deit_distilled": {},
    "swin": {},
    "swin_padded": {"layers.0.blocks.": "padded by F.pad", "layers.1.blocks.": "padded by F.pad"},
    "swin_any_size": {"norm1": "attn.qkv' (with image size 88 x 88)"},
    "pvt": {"stages.0.norm": "pads its input with zeros", "stages.1.norm": "pads", "stages.2.norm": "pads"},
    "convnext": {},
    "mixer": {"norm1": "mixes tokens, not channels"},
    "bert": {"LayerNorm": ""},
    "gpt2": {"ln_f": "tied weight: 'transformer.wte.weight' is 'lm_head.weight'"},
    "llama": {},
    "llama_eager": {},
    "decoder": {"final": "tied weight: 'embed.weight' is 'head.weight'"},
    "decoder_untied": {},
    "encoder_pre": {},
    "encoder_pre_no_bias": {},
    "encoder_post": {"norm1": "the residual addition", "layers.0.norm2": "the residual addition"},
}


def fold(model: nn.Module, table: Table, inputs: dict[str, Any], **kwargs: Any) -> tuple[FoldReport, float]:
    """Fold in float64, and how far the outputs move, measured without the code under test."""
    with torch.no_grad():
        before = model(**inputs)
        report = fold_affines(model, table, lambda: model(**inputs), **kwargs)
        return report, deepest_difference(before, model(**inputs))


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    model, inputs = MODELS[name]()
    model = model.double().eval()
    table = swap(model)
    report, error = fold(model, table, inputs)
    assert error <= 1e-12, report
    assert report.error <= 1e-12
    assert len(report.folded) + len(report.left) == len(table)
    for norm in report.folded:
        assert type(model.get_submodule(norm)) is nn.Identity
    for norm, why in report.left.items():
        assert isinstance(model.get_submodule(norm), Affine)
        assert any(key in norm and reason in why for key, reason in LEFT[name].items()), f"{norm}: {why}"
    for key in LEFT[name]:
        assert any(key in norm for norm in report.left), f"{key} should be left: {report}"


# -- which way they go


@pytest.mark.parametrize(
    ("name", "backwards"),
    [
        ("convnext", {"stem.1": ("stem.0",)}),
        ("swin", {"patch_embed.norm": ("patch_embed.proj",)}),
        (
            "pvt",
            {"patch_embed.norm": ("patch_embed.proj",)}
            | {f"stages.{i}.downsample.norm": (f"stages.{i}.downsample.proj",) for i in (1, 2, 3)},
        ),
        ("vit", {}),
    ],
)
def test_residual_norms_fold_backwards(name: str, backwards: dict[str, tuple[str, ...]]) -> None:
    model, inputs = MODELS[name]()
    report, _ = fold(model.double().eval(), swap(model), inputs)
    assert {n: outcome.into for n, outcome in report.norms.items() if outcome.how == "backwards"} == backwards


def test_every_reader_takes_it() -> None:
    model, inputs = MODELS["deit_distilled"]()
    report, _ = fold(model.double().eval(), swap(model), inputs)
    assert report.norms["norm"].into == ("head", "head_dist")
    model, inputs = MODELS["pvt"]()
    report, _ = fold(model.double().eval(), swap(model), inputs)
    assert report.norms["stages.0.blocks.0.norm1"].into == ("stages.0.blocks.0.attn.q", "stages.0.blocks.0.attn.sr")
    model, inputs = MODELS["llama"]()
    report, _ = fold(model.double().eval(), swap(model), inputs)
    layer = "model.layers.0"
    assert report.norms[f"{layer}.input_layernorm"].into == tuple(f"{layer}.self_attn.{p}_proj" for p in "qkv")
    assert report.norms[f"{layer}.post_attention_layernorm"].into == (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")


def test_scales_alone_fold_into_padded_convolutions() -> None:
    model, inputs = MODELS["pvt"]()
    report, error = fold(model.double().eval(), swap(model, shift=0.0), inputs)
    assert report.left == {}
    assert error <= 1e-12


def test_the_bias_of_the_patch_embedding_is_scaled() -> None:
    """The published merge computes ``g (b0 - mean) / s + beta`` and loses ``alpha * b0``: here, it is not lost."""
    conv = nn.Conv2d(3, 8, 4, stride=4).double()
    alpha, g, beta, mean, s = (torch.rand(8, dtype=torch.float64) + 0.5 for _ in range(5))
    a, b = g / s + alpha, beta - g * mean / s
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def rep_bn(y: Tensor) -> Tensor:
        g_, s_, mean_, beta_, alpha_ = (t.view(-1, 1, 1) for t in (g, s, mean, beta, alpha))
        return g_ * (y - mean_) / s_ + beta_ + alpha_ * y

    weight, bias = fold_backwards(conv.weight, conv.bias, tuple(range(8)), a, b)
    expected = rep_bn(conv(x))
    assert deepest_difference(expected, F.conv2d(x, weight, bias, stride=4)) <= 1e-14
    published = F.conv2d(x, weight, g * (conv.bias - mean) / s + beta, stride=4)
    lost = (alpha * conv.bias).abs().max()
    assert torch.allclose((expected - published).abs().max(), lost, rtol=1e-12)

    net = nn.Sequential(conv, Affine(a, b, 1), Residual(8))
    report, error = fold(net, {"1": (a, b, 1)}, {"input": x})
    assert report.norms["1"].how == "backwards"
    assert error <= 1e-14


class Residual(nn.Module):
    """Reads its input twice, so that nothing folds forwards into it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


# -- the algebra


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_forwards_into_grouped_convolutions(groups: int) -> None:
    conv = nn.Conv2d(6, 12, 3, groups=groups).double()
    a, b = torch.randn(2, 6, dtype=torch.float64)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    parts = (Part((0, 12), 0, tuple(range(6))),)
    weight, bias = fold_forwards(conv.weight, conv.bias, parts, a, b, groups)
    expected = conv(a.view(-1, 1, 1) * x + b.view(-1, 1, 1))
    assert deepest_difference(expected, F.conv2d(x, weight, bias, groups=groups)) <= 1e-14


def test_forwards_into_permuted_repeated_and_foreign_channels() -> None:
    linear = nn.Linear(5, 3).double()
    a, b = torch.randn(2, 2, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    scale, shift = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    scale[[0, 2]], shift[[0, 2]] = a[1], b[1]
    scale[4], shift[4] = a[0], b[0]
    weight, bias = fold_forwards(linear.weight, linear.bias, (Part((0, 3), 0, (1, -1, 1, -1, 0)),), a, b)
    assert deepest_difference(linear(scale * x + shift), F.linear(x, weight, bias)) <= 1e-14


def test_inputs_of_the_algebra_are_not_changed() -> None:
    linear = nn.Linear(3, 3).double()
    old = copy.deepcopy(linear.state_dict())
    a, b = torch.randn(2, 3, dtype=torch.float64)
    fold_forwards(linear.weight, linear.bias, (Part((0, 3), 0, (0, 1, 2)),), a, b)
    fold_backwards(linear.weight, linear.bias, (0, 1, 2), a, b)
    assert all(torch.equal(old[key], value) for key, value in linear.state_dict().items())


@pytest.mark.parametrize("axis", ["last", 1])
def test_channel_affine(axis: Any) -> None:
    a, b = torch.randn(2, 4, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    expected = torch.empty_like(x)
    for c in range(4):
        where = (slice(None), c) if axis == 1 else (..., c)
        expected[where] = a[c] * x[where] + b[c]
    assert torch.allclose(ChannelAffine(a, b, axis)(x), expected, rtol=1e-15, atol=1e-15)


# -- nn.TransformerEncoder


@pytest.mark.parametrize(("norm_first", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_fast_path_is_the_slow_path(norm_first: bool, bias: bool, masked: bool) -> None:
    model = Encoder(norm_first, bias, depth=1).double().eval()
    table = swap(model)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[5], [3]]) if masked else None
    report, error = fold(model, table, {"x": x, "mask": None})
    assert report.folded
    assert error <= 1e-12
    with torch.no_grad():
        free = model(x, mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(x, mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert deepest_difference(slow, free) <= 1e-12
    assert deepest_difference(model.train(False)(x, mask), slow) <= 1e-12  # with gradients: the slow path as well


def test_attention_without_biases_gets_two() -> None:
    """torch's fast path of nn.MultiheadAttention fails on one bias without the other."""
    model = Encoder(norm_first=True, bias=False).double().eval()
    fold(model, swap(model), {"x": torch.randn(2, 5, 16, dtype=torch.float64)})
    attention = model.encoder.layers[0].self_attn
    assert attention.in_proj_bias.abs().max() > 0
    assert torch.equal(attention.out_proj.bias, torch.zeros(16, dtype=torch.float64))


# -- checks that must bite


class Two(nn.Module):
    """A sound pair of norm and reader, and a second norm whose use ``middle`` decides."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.good, self.first = Affine(*torch.randn(2, 4)), nn.Linear(4, 4)
        self.bad, self.middle, self.last = Affine(*torch.randn(2, 4)), middle, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.good(x)))
        return self.last(self.middle(self.bad(h)))


class HiddenReader(nn.Module):
    """Reads its input in a way that torch function modes do not see, as a custom kernel would."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            hidden = x * x
        return self.linear(x) + hidden


class Sized(nn.Module):
    """Adds its input from a batch of three on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x if len(x) > 2 else 0)


class AsksWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norms = nn.Linear(4, 4), []

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.norms[0].weight.dtype))


def two(middle: nn.Module) -> tuple[Two, Table]:
    model = Two(middle).double().eval()
    return model, table_of(model)


def table_of(model: Two) -> Table:
    return {name: (norm.weight, norm.bias, "last") for name, norm in (("good", model.good), ("bad", model.bad))}


def test_what_the_trace_cannot_see_is_rolled_back_alone() -> None:
    model, table = two(HiddenReader())
    weight = model.middle.linear.weight.detach().clone()
    report, error = fold(model, table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    assert report.folded == ["good"]
    assert "changes what the model computes by" in report.left["bad"]
    assert isinstance(model.bad, Affine)
    assert torch.equal(model.middle.linear.weight, weight)
    assert error <= 1e-14


def test_a_branch_on_the_batch_size_is_found() -> None:
    model, table = two(Sized())
    x = torch.randn(2, 4, dtype=torch.float64)
    report, _ = fold(model, table, {"x": x})
    assert report.left == {"bad": "also feeds the residual addition in 'middle' (with first axis 3)"}


class Other(nn.Module):
    """Reads with other weights from a batch of three on."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.large if len(x) > 2 else self.small)(x)


def test_other_readers_at_another_batch_size() -> None:
    model, table = two(Other())
    report, _ = fold(model, table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    assert report.left == {"bad": "it is read by other weights (with first axis 3)"}


def test_a_producer_at_one_batch_size_only() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.large, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), Affine(*torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm((self.large if len(x) > 2 else self.pre)(x)) ** 2

    net = Net().double()
    report, error = fold(
        net, {"norm": (net.norm.weight, net.norm.bias, "last")}, {"x": torch.randn(2, 4, dtype=torch.float64)}
    )
    assert report.left == {"norm": "also feeds `pow` in the model"}
    assert error == 0


class Plain(nn.Module):
    """A product with no place for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_shift_needs_a_bias() -> None:
    model, table = two(Plain())
    report, _ = fold(model, table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    assert report.left == {"bad": "'middle' has no bias to take the shift"}
    model, table = two(Plain())
    model.bad.bias.data.zero_()
    report, error = fold(model, table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    assert report.left == {}
    assert error <= 1e-14


def test_a_model_that_asks_the_norm_for_something_keeps_it() -> None:
    model, table = two(AsksWeight())
    model.middle.norms = [model.bad]  # a plain list: not a registered child
    x = torch.randn(2, 4, dtype=torch.float64)
    report, error = fold(model, table, {"x": x})
    assert report.folded == ["good"]
    assert "fails without it: AttributeError" in report.left["bad"]
    assert error <= 1e-14
    assert model.middle.norms == [model.bad]


def test_a_zero_head_does_not_hide_a_wrong_fold() -> None:
    """The outputs alone would say that anything is right."""
    model, table = two(HiddenReader())
    nn.init.zeros_(model.last.weight)
    report, _ = fold(model, table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    assert report.folded == ["good"]


def test_outputs_in_objects_of_any_class_are_compared() -> None:
    class Answer:
        def __init__(self, hidden: Tensor, logits: Tensor) -> None:
            self.hidden, self.logits = hidden, logits

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = Affine(*torch.randn(2, 4).double()), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Answer:
            h = self.norm(x)
            return Answer(h, self.head(h))

    net = Net()
    x = torch.randn(2, 4, dtype=torch.float64)
    report = fold_affines(net, {"norm": (net.norm.weight, net.norm.bias, "last")}, lambda: net(x))
    assert report.left == {"norm": "returned by the model"}


def test_random_outputs_are_refused() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model, table = two(nn.Linear(4, 4))
    model.last = nn.Sequential(model.last, Noise())
    report, _ = fold(model.double(), table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    assert report.folded == []
    assert all("random or not finite" in why for why in report.left.values())


def test_a_model_that_magnifies_rounding_errors_is_refused_at_once() -> None:
    class Chaos(nn.Module):
        """The logistic map doubles every error at every step."""

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(x)
            for _ in range(30):
                x = 4 * x * (1 - x)
            return x

    model, table = two(nn.Sequential(nn.Linear(4, 4), Chaos()))
    x = torch.randn(2, 4, dtype=torch.float64)
    report = fold_affines(model, table, lambda: model(x))
    assert set(report.left) == {"good", "bad"}
    assert all("rounding errors alone change the outputs by" in why for why in report.left.values())
    report = fold_affines(model, table, lambda: model(x), tolerance=1e-3)
    assert report.left == {}


def test_nan_outputs_are_refused() -> None:
    model, table = two(nn.Linear(4, 4))
    model.last.bias.data[0] = math.nan
    x = torch.randn(2, 4, dtype=torch.float64)
    report = fold_affines(model, table, lambda: model(x))
    assert set(report.left) == {"good", "bad"}
    assert all("not finite" in why for why in report.left.values())


def test_float32_inside_the_forward_does_not_blur_the_check() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x.float().to(x.dtype))
            return F.softmax(h.to(torch.float32), -1, dtype=torch.float32).to(x.dtype) + torch.ones(4)

    model, table = two(Rounds())
    x = torch.randn(2, 4, dtype=torch.float64)
    report = fold_affines(model, table, lambda: model(x))
    assert report.left == {}
    assert report.error <= 1e-14


# -- what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_identity_and_flags(dtype: torch.dtype) -> None:
    model = two(nn.Linear(4, 4, bias=False))[0].to(dtype)
    table = table_of(model)
    model.middle.weight.requires_grad_(False)
    model.train()
    kept = {name: p for name, p in model.named_parameters() if name.split(".")[0] not in table}
    x = torch.randn(3, 4, dtype=dtype)
    wide = copy.deepcopy(model).double()(x.double())
    report = fold_affines(model, table, lambda: model(x))
    assert report.left == {}
    assert report.error <= 1e-14
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in kept.items())
    assert {p.dtype for p in after.values()} == {dtype}
    assert not model.middle.bias.requires_grad
    assert model.first.bias.requires_grad
    assert all(module.training for module in model.modules())
    eps = torch.finfo(dtype).eps
    assert deepest_difference(wide, copy.deepcopy(model).double()(x.double())) <= 8 * eps  # rounding of the weights


def test_nothing_is_left_behind_in_the_model() -> None:
    model, table = two(nn.Linear(4, 4))
    x = torch.randn(2, 4, dtype=torch.float64)
    fold_affines(model, table, lambda: model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("lightning_efficient" in type(m).__module__ for m in model.modules())


def test_weights_that_do_not_fit_float16() -> None:
    model, _ = two(nn.Linear(4, 4))
    model.bad.weight.data.fill_(6e4)
    model.middle.weight.data.fill_(3.0)
    model = model.half()
    table = table_of(model)
    x = torch.randn(2, 4, dtype=torch.float16)
    report = fold_affines(model, table, lambda: model(x))
    assert report.left == {"bad": "'middle.weight' would overflow torch.float16"}
    assert torch.equal(model.middle.weight, torch.full((4, 4), 3.0, dtype=torch.float16))


def test_the_check_at_other_sizes_is_reported() -> None:
    model = swin(56).double().eval()
    report, _ = fold(model, swap(model), {"x": torch.randn(1, 3, 56, 56, dtype=torch.float64)})
    assert report.checked == ("the given input", "first axis 2")
    assert set(report.rejected) == {"image size 88 x 88", "image size 65 x 61"}
    assert "not checked at image size 88 x 88: AssertionError" in str(report)


def test_report_reads_well() -> None:
    model, table = two(HiddenReader())
    report, _ = fold(model, table, {"x": torch.randn(2, 4, dtype=torch.float64)})
    text = str(report)
    assert "1 of 2 norms folded" in text
    assert "good: folded forwards into first" in text
    assert "bad: left as a fused multiply-add: folding it changes what the model computes" in text


def test_nothing_to_fold() -> None:
    model, _ = two(nn.Linear(4, 4))
    assert fold_affines(model, {}, lambda: None) == FoldReport({})


# -- bad input: an error, and nothing has changed


def bad(name: str, **change: Any) -> Table:
    a, b, axis = torch.ones(4), torch.zeros(4), "last"
    return {name: (change.get("a", a), change.get("b", b), change.get("axis", axis))}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (bad("nope"), "no module 'nope'"),
        (bad("bad", a=torch.ones(3)), "expected \\(C,\\) for both"),
        (bad("bad", a=torch.ones(4, 1), b=torch.ones(4, 1)), "expected \\(C,\\) for both"),
        (bad("bad", axis=2), "axis is 2; expected 'last' or 1"),
        (bad("bad", b=torch.full((4,), math.nan)), "not finite"),
        (bad("bad"), "does not compute a \\* x \\+ b with the a and b given"),
        (bad("bad", a=torch.ones(5), b=torch.ones(5)), "does not run|does not compute"),
        (bad(""), "model itself"),
    ],
)
def test_bad_affines(table: Table, message: str) -> None:
    model, _ = two(nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        fold_affines(model, table, lambda: model(x))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_call_must_call_the_model() -> None:
    model, table = two(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="did not call the model"):
        fold_affines(model, table, lambda: None)


def test_model_that_insists_on_float32() -> None:
    class Insists(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is not torch.float32:
                raise RuntimeError("only float32")
            return x

    model = two(Insists())[0].float()
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="does not run in float64 at the given input: RuntimeError: only float32"):
        fold_affines(model, table_of(model), lambda: model(x))
