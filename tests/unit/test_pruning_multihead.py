"""``nn.MultiheadAttention``: hidden neurons beside it are cut exactly, its heads only with the width they live in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups
from lightning_efficient.structured.slim import apply_slim, plan_slim, replay_slim
from tests.slim_models import lively

PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


class Encoder(nn.Module):
    """The stock encoder, as most people write it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 12, dropout=0.0, **({"batch_first": True} | kwargs))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not kwargs)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, :4].mean(1))


class Normed(nn.Module):
    """Attention over a width that only batch norms look at, so that a zero in it is nothing."""

    def __init__(self, heads: tuple[int, ...] = (4, 8), **kwargs: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.attention = nn.ModuleList([nn.MultiheadAttention(16, h, batch_first=True, **kwargs) for h in heads])
        self.norm = nn.ModuleList([nn.BatchNorm1d(16) for _ in heads])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for attention, norm in zip(self.attention, self.norm, strict=True):
            x = norm((x + attention(x, x, x, need_weights=False)[0]).transpose(1, 2)).transpose(1, 2)
        return self.head(x)


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def fused(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(request.param)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def _pair(model: nn.Module, groups: Groups, keep: dict[str, list[int]]) -> tuple[nn.Module, nn.Module]:
    """With zeros, and cut."""
    zeroed, slim = copy.deepcopy(model), copy.deepcopy(model)
    for name, stay in keep.items():
        gone = set(range(groups.found[name].units)) - set(stay)
        groups.found[name].zero(dict(zeroed.named_parameters()), gone)
    apply_slim(slim, keep, groups)
    return zeroed, slim


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kwargs", [{}, {"norm_first": True, "activation": "gelu"}, {"batch_first": False}])
@pytest.mark.usefixtures("fused")
def test_neurons_of_the_stock_encoder_are_cut_exactly(kwargs: dict[str, Any]) -> None:
    model, x = lively(Encoder(**kwargs)).double(), torch.randn(2, 6, 5).double()
    groups = find_groups(model, x)
    assert list(groups.found) == ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]
    keep = {name: [1, 4, 5, 10, 11] for name in groups.found}
    zeroed, slim = _pair(model, groups, keep)
    padding = PADDING if kwargs.get("batch_first", True) else None
    for training in (True, False):
        zeroed.train(training), slim.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(zeroed(x, padding), slim(x, padding), rtol=0, atol=1e-12)
    assert slim.encoder.layers[0].linear2.in_features == 5  # type: ignore[union-attr]


def test_why_heads_of_the_stock_encoder_stay_is_said() -> None:
    refused = find_groups(Encoder(), torch.randn(2, 6, 5)).refused
    assert "LayerNorm 'encoder.layers.0.norm1'" in refused["embed"]
    for layer in range(2):
        reason = refused[f"encoder.layers.{layer}.self_attn"]
        assert "a head can only go with as many channels of that width, and 'embed' keeps them all" in reason


@pytest.mark.parametrize(
    ("model", "units"),
    [
        (Normed((4, 4)), 4),
        (Normed((4, 8)), 4),  # two heads of the second go with one of the first
        (Normed((8, 8), bias=False), 8),
        (Normed((4, 4), add_bias_kv=True), 4),
    ],
)
@pytest.mark.usefixtures("fused")
def test_heads_go_with_as_many_channels(model: Normed, units: int) -> None:
    model, x = lively(model).double(), torch.randn(2, 6, 5).double()
    groups = find_groups(model, x)
    assert {name: group.units for name, group in groups.found.items()} == {"embed": units}
    zeroed, slim = _pair(model, groups, {"embed": [0, units - 1]})
    with torch.no_grad():
        torch.testing.assert_close(zeroed.eval()(x), slim.eval()(x), rtol=0, atol=1e-12)
    width = 16 * 2 // units
    for before, after in zip(model.attention, slim.attention, strict=True):  # type: ignore[arg-type]
        assert (after.embed_dim, after.kdim, after.vdim, after.head_dim) == (width, width, width, before.head_dim)
        assert after.num_heads * after.head_dim == width
        assert after.in_proj_weight.shape == (3 * width, width)
    assert torch.equal(slim.embed.weight, model.embed.weight[[*range(width // 2), *range(16 - width // 2, 16)]])  # type: ignore[union-attr]
    again = find_groups(slim, x)
    assert again.found["embed"].units == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_residual_width_of_the_stock_encoder_on_request() -> None:
    model, x = Encoder().eval(), torch.randn(2, 6, 5)
    groups = find_groups(model, x, inexact=True)
    group = groups.found["embed"]
    assert (group.units, group.exact, group.divisor) == (4, False, 2)
    with pytest.raises(ValueError, match="multiple of 2"):  # an odd number fails in the fused inference
        plan_slim(model, {"embed": [0, 1, 2]}, groups)
    cuts = plan_slim(model, {"embed": [1, 2]}, groups)
    small = Encoder().eval()
    replay_slim(small, cuts)
    replay_slim(model, cuts)
    small.load_state_dict(model.state_dict())
    for grad in (False, True):  # the fused inference with nested tensors, and the plain forward
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(small(x, PADDING), model(x, PADDING))
            assert small(x, PADDING).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "reason"), [(Normed((1, 4)), "all its channels are coupled"), (Normed((4,), kdim=16, vdim=16), "")]
)
def test_one_head_is_all_of_it(model: Normed, reason: str) -> None:
    if not reason:  # said, though no other than `embed_dim`
        assert "embed" in find_groups(model, torch.randn(2, 6, 5)).found
        return
    with pytest.raises(NoMatchError, match=reason):
        find_groups(model, torch.randn(2, 6, 5))


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other = nn.Linear(5, 16), nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        other = self.other(x)
        return self.head(self.attention(self.embed(x), other, other, need_weights=False)[0])


def test_keys_of_another_width_are_left_alone() -> None:
    model, x = lively(Crossed()).double(), torch.randn(2, 6, 5).double()
    groups = find_groups(model, x)
    assert list(groups.found) == ["head.0"]
    assert "a `kdim` or `vdim` of its own" in str(groups.refused)
    zeroed, slim = _pair(model, groups, {"head.0": [0, 3]})
    torch.testing.assert_close(zeroed.eval()(x), slim.eval()(x), rtol=0, atol=1e-12)
