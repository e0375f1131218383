"""Masks at the optimizer boundary against masks in autograd; what no optimizer may move; which weights are targets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.pruning.targets import find_targets
from lightning_efficient.weightspace import Block, Boundary, SpectralTransform
from lightning_efficient.weightspace.mask import MaskTransform, forget, pack_mask, set_mask, unpack_mask
from lightning_efficient.weightspace.snapshot import rewind, take
from lightning_efficient.weightspace.unit_mask import UnitMask

# -- bits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(values) // 8)
    by_hand = [sum(v << i for i, v in enumerate(values[b : b + 8])) for b in range(0, len(values), 8)]
    assert packed.tolist() == by_hand
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_bits_of_other_shapes_are_refused() -> None:
    packed = pack_mask(torch.ones(3, 5, dtype=torch.bool))
    assert unpack_mask(packed, (5, 3)).shape == (5, 3)
    with pytest.raises(ValueError, match=r"a mask of shape \(4, 5\) is 3 bytes; got torch.uint8 of shape \(2,\)"):
        unpack_mask(packed, (4, 5))
    with pytest.raises(ValueError, match="float32"):
        unpack_mask(packed.float(), (3, 5))
    transform = MaskTransform((3, 5))
    with pytest.raises(ValueError, match="holds 'mask'; got \\['maske'\\]"):
        transform.load_state_dict({"maske": packed}, torch.ones(3, 5))


# -- against autograd ------------------------------------------------------------------------------------------------

SHAPES = {"0.weight": (7, 5), "2.weight": (3, 7)}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(6, 5, generator=g).to(dtype), torch.randint(0, 3, (6,), generator=g)) for _ in range(12)]


def half(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=g) < 0.5 for name, shape in SHAPES.items()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.1),
}


def masked_by_us(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, list[float], Boundary]:
    """Twelve steps; half the weights are masked after four, some more after eight."""
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    boundary = Boundary()
    transforms = {name: MaskTransform(param.shape) for name, param in model.named_parameters() if name in SHAPES}
    for name, transform in transforms.items():
        boundary.add(name, dict(model.named_parameters())[name], transform)
    boundary.start()
    boundary.attach([optimizer])
    losses = []
    mask = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for step, (x, y) in enumerate(batches()):
        if step in (4, 8):
            mask = {name: m & half(step)[name] for name, m in mask.items()}
            for name, transform in transforms.items():
                set_mask(boundary.sites[name], transform, mask[name])
            forget([optimizer], {boundary.sites[name].param: t.dropped for name, t in transforms.items()})
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, site in boundary.sites.items():
            assert not bool(site.param.detach()[~mask[name]].any()), f"{name} moved at step {step}"
    return model, optimizer, losses, boundary


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_optimizer_moves_a_pruned_weight(kind: str) -> None:
    """Nor would it without our zeros after the step: its update for them is zero."""
    model, optimizer, _, boundary = masked_by_us(kind)
    dropped = {name: t.dropped for name, s in boundary.sites.items() for t in s.chain if isinstance(t, MaskTransform)}
    boundary.detach()
    x, y = batches()[0]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for name, where in dropped.items():
        param = boundary.sites[name].param
        assert param.grad is not None
        param.grad.masked_fill_(where, 0)
    optimizer.step()
    moved = {name: boundary.sites[name].param.detach()[where].abs().max().item() for name, where in dropped.items()}
    # ASGD keeps its average elsewhere and is exact too; nobody needs a tolerance.
    assert set(moved.values()) == {0.0}


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if k not in ("adafactor", "asgd", "rprop")])
def test_equal_to_masks_in_autograd(kind: str) -> None:
    """``W`` as the leaf, ``M ∘ W`` in the forward, in float64; forgotten memory is written out."""
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    mask = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    losses = []
    for step, (x, y) in enumerate(batches()):
        if step in (4, 8):
            mask = {name: m & half(step)[name] for name, m in mask.items()}
            for name, param in model.named_parameters():
                for value in optimizer.state[param].values() if name in mask else ():
                    if isinstance(value, Tensor) and value.shape == param.shape:
                        value *= mask[name]
        used = {n: p * mask[n] if n in mask else p for n, p in model.named_parameters()}
        loss = F.cross_entropy(functional_call(model, used, (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    ours, _, found, _ = masked_by_us(kind)
    assert found == pytest.approx(losses, rel=1e-12)
    for name, param in ours.named_parameters():
        expected = dict(model.named_parameters())[name] * mask.get(name, torch.ones(()))
        torch.testing.assert_close(param, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["adam", "adamw", "foreach", "fused", "rmsprop", "adagrad", "adadelta", "sgd"])
def test_second_moments_of_pruned_weights_rest_above_denormals(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU's square root is slow; nothing else of the run differs by a bit."""
    model, optimizer, losses, _ = masked_by_us(kind)
    monkeypatch.setattr(MaskTransform, "tend", lambda self, memory: None)
    other, reference, expected, boundary = masked_by_us(kind)
    assert losses == expected
    seen = 0
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        chain = boundary.sites[name].chain if name in boundary.sites else []
        for key, value in optimizer.state[mine].items():
            if not isinstance(value, Tensor) or value.shape != mine.shape:
                continue
            zero = reference.state[theirs][key]
            for transform in chain:
                assert isinstance(transform, MaskTransform)
                assert not zero[transform.dropped].any()
                if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
                    seen += 1
                    assert 2.0**-126 < value[transform.dropped].min() <= value[transform.dropped].max() <= 2.0**-112
                    value = torch.where(transform.dropped, 0.0, value)
            assert torch.equal(value, zero), (name, key)
    assert bool(seen) == (kind != "sgd")


@pytest.mark.parametrize("kind", ["weights", "units"])
def test_second_moments_come_back_before_they_are_denormal(kind: str) -> None:
    """Whatever the decay, and in memory of any order of axes; what is kept is left alone."""
    weight = torch.rand(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    mask: MaskTransform | UnitMask
    if kind == "weights":
        mask = MaskTransform(weight.shape)
        mask.mask = torch.rand(weight.shape) < 0.5
    else:
        mask = UnitMask()
        mask.drop(1, torch.tensor([2]), weight)
    gone = mask.gone(weight)
    memory = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": weight.masked_fill(gone, 0.0)}
    for _ in range(400):
        mask.tend(memory)
        assert memory["exp_avg_sq"][gone].min() > torch.finfo(torch.float32).tiny
        memory["exp_avg_sq"][gone] *= 0.9
    assert torch.equal(memory["exp_avg_sq"][~gone], weight[~gone])
    assert not memory["exp_avg"].any()


def test_forgetting_leaves_the_rest_alone() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    where = ~half(0)["0.weight"]
    forget([optimizer], {model[0].weight: where})
    after = optimizer.state_dict()["state"]
    for index, entry in before.items():
        for key, value in entry.items():
            expected = value.masked_fill(where, 0) if index == 0 and value.shape == where.shape else value
            assert torch.equal(after[index][key], expected), (index, key)


def test_infinite_gradients_of_pruned_weights_are_zero() -> None:
    transform = MaskTransform((2, 2))
    transform.mask = torch.tensor([[True, False], [True, True]])
    weight, grad = torch.ones(2, 2), torch.tensor([[1.0, torch.inf], [2.0, 3.0]])
    transform.pull(weight, grad)
    assert grad.tolist() == [[1, 0], [2, 3]]


def test_the_spectral_norm_is_that_of_what_is_left() -> None:
    """Mask first, then sigmaReparam: after a few power iterations ``Ŵ = γ (M∘W) / σ(M∘W)``."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    raw = param.detach().clone()
    boundary = Boundary()
    spectral, mask = SpectralTransform([Block(0, 6)]), MaskTransform(param.shape)
    boundary.add("w", param, spectral)
    boundary.add("w", param, mask)
    gamma = torch.linalg.svdvals(raw)[0]
    boundary.start()
    kept = torch.rand(6, 5) < 0.5
    for _ in range(200):
        set_mask(boundary.sites["w"], mask, kept, advance=True)
    masked = raw * kept
    torch.testing.assert_close(param.detach(), gamma * masked / torch.linalg.svdvals(masked)[0], rtol=1e-9, atol=1e-12)


def test_weights_in_bfloat16_keep_no_pruned_value() -> None:
    param = nn.Parameter(torch.randn(4, 4).bfloat16())
    boundary, mask = Boundary(), MaskTransform((4, 4))
    boundary.add("w", param, mask)
    boundary.start()
    kept = torch.eye(4, dtype=torch.bool)
    set_mask(boundary.sites["w"], mask, kept)
    raw = boundary.sites["w"].raw
    assert raw is not None
    for held in (raw, param.detach()):
        assert not bool(held[~kept].any())
        assert bool(held[kept].all())


# -- going back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [True, False])
def test_rewind(weights: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    boundary, mask = Boundary(), MaskTransform(model[0].weight.shape)
    boundary.add("0.weight", model[0].weight, mask)
    boundary.start()
    boundary.attach([optimizer])

    def train(steps: int) -> None:
        for x, y in batches(torch.float32)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    train(2)
    early = take(model, boundary.sites, [optimizer], [scheduler])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    train(5)
    late = copy.deepcopy(model.state_dict())
    kept = half(0)["0.weight"]
    set_mask(boundary.sites["0.weight"], mask, kept)
    rewind(early, model, boundary.sites, [optimizer], [scheduler], weights=weights)

    target = saved[0] if weights else late
    for name, value in model.state_dict().items():
        expected = target[name] * kept if name == "0.weight" else target[name]
        assert torch.equal(value, expected), name
    assert optimizer.param_groups[0]["lr"] == saved[1]["param_groups"][0]["lr"]
    assert scheduler.state_dict() == saved[2]
    moments = optimizer.state[model[0].weight]["exp_avg"]
    assert not bool(moments[~kept].any())
    if weights:
        assert torch.equal(moments, saved[1]["state"][0]["exp_avg"] * kept)
        assert float(optimizer.state[model[0].weight]["step"]) == 2
        # The snapshot was not handed out: training on leaves it as it was.
        train(3)
        assert torch.equal(early.model["0.weight"], saved[0]["0.weight"])
        assert torch.equal(early.optimizers[0]["state"][0]["exp_avg"], saved[1]["state"][0]["exp_avg"])
    else:
        assert float(optimizer.state[model[0].weight]["step"]) == 7


# -- targets ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.twin = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.twin.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.zero = nn.Linear(8, 8)
        nn.init.zeros_(self.zero.weight)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight


def test_targets_and_reasons() -> None:
    found = find_targets(Model())
    assert list(found.matched) == ["conv.weight", "attn.in_proj_weight", "attn.out_proj.weight"]
    reasons = {name: why.split(":")[0] for name, why in found.skipped.items()}
    assert reasons == {
        "twin.weight": "tied, also used as other.weight",
        "other.weight": "tied, also used as twin.weight",
        "frozen.weight": "frozen (requires_grad=False)",
        "zero.weight": "all zero",
        "head.weight": "not covered",
    }
    assert "zero.weight" in find_targets(Model(), criterion="random").matched
    assert "zero.weight" in find_targets(Model(), known=["zero.weight"]).matched
    tied = find_targets(Model(), embeddings=True).skipped
    assert tied["head.weight"].startswith("tied, also used as embed.weight")


def test_heads_are_those_of_output_projections() -> None:
    import timm

    found = find_targets(Model(), granularity="head")
    assert list(found.matched) == ["attn.out_proj.weight"]
    assert found.matched["attn.out_proj.weight"].heads == 2
    vit = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    assert {n: t.heads for n, t in find_targets(vit, granularity="head").matched.items()} == {
        "blocks.0.attn.proj.weight": 3,
        "blocks.1.attn.proj.weight": 3,
    }


@pytest.mark.parametrize("count", ["n_heads", "nhead", "heads", "num_attention_heads"])
def test_heads_are_counted_by_any_usual_name(count: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o_proj = nn.Linear(12, 36), nn.Linear(12, 12)
            setattr(self, count, 3)

    assert find_targets(nn.Sequential(Attends()), granularity="head").matched["0.o_proj.weight"].heads == 3


def test_wanda_leaves_alone_what_it_cannot_see() -> None:
    found = find_targets(Model(), criterion="wanda")
    assert list(found.matched) == ["conv.weight"]
    assert "inside nn.MultiheadAttention" in found.skipped["attn.out_proj.weight"]


def test_transposed_layers_of_hugging_face() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    layer = nn.Sequential(utils.Conv1D(6, 4))
    target = find_targets(layer).matched["0.weight"]
    assert target.param.shape == (4, 6)
    assert target.canonical(target.param).shape == (6, 4)


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))


def with_weight(change: Callable[[Tensor], Tensor]) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(change(model[0].weight.detach()), requires_grad=False)
    return model


class Quantized(torch.Tensor):
    """Stands for a tensor subclass of a quantization library."""


def with_nan() -> nn.Module:
    model = Model()
    nn.init.constant_(model.conv.weight, torch.nan)
    return model


def linear(**kwargs: Any) -> Callable[[], Any]:
    return lambda: find_targets(nn.Sequential(nn.Linear(6, 4)), **kwargs)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "parametrized": (lambda: find_targets(parametrized()), "no weight it can work on.*computed by a parametrization"),
    "tied": (lambda: find_targets(Model(), include=["head"]), "no weight it can work on.*tied to the embedding"),
    "shared": (lambda: find_targets(Model(), include=["twin"]), "a mask cannot tell its uses apart"),
    "zero": (lambda: find_targets(Model(), include=["zero"]), "all zero: nothing to rank"),
    "quantized": (lambda: find_targets(with_weight(lambda w: w.to(torch.int8))), r"'0.weight' is .*int8.*Exclude it"),
    "subclass": (lambda: find_targets(with_weight(lambda w: w.as_subclass(Quantized))), r"Quantized.*exclude=\['0'\]"),
    "sparse": (lambda: find_targets(with_weight(lambda w: w.to_sparse())), "sparse_coo"),
    "meta": (lambda: find_targets(nn.Sequential(nn.Linear(2, 2, device="meta"))), "has no values yet"),
    "lazy": (lambda: find_targets(nn.Sequential(nn.LazyLinear(2))), "has no values yet"),
    "nan": (lambda: find_targets(with_nan()), "NaN or infinite"),
    "n:m": (linear(granularity="2:4"), "'0.weight' has 6 inputs, no multiple of 4.*`exclude` '0'"),
    "block": (linear(granularity="3x2"), "4 outputs, no multiple of 3"),
    "nothing": (lambda: find_targets(nn.Sequential(nn.ReLU())), "no module of type"),
    "typo": (lambda: find_targets(Model(), include=["atn"]), "did you mean 'attn'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_targets(case: str) -> None:
    call, match = BAD[case]
    with pytest.raises((ValueError, NoMatchError), match=match):
        call()
