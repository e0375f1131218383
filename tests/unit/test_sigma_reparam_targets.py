"""Which weights sigmaReparam takes, which it leaves alone and says so, and what it refuses before anything changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from zoo import Decoder

from lightning_efficient.common.match import NoMatchError
from lightning_efficient.weightspace.sigma_reparam import (
    SigmaReparamConfig,
    Targets,
    apply_sigma_reparam,
    describe,
    find_targets,
)


class Net(nn.Module):
    """Two ordinary layers and one to try things on."""

    def __init__(self, odd: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.odd = nn.Linear(6, 6) if odd is None else odd


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def refused(model: nn.Module, error: type[Exception], match: str, **arguments: Any) -> None:
    """``apply_sigma_reparam`` raises and has changed neither the model nor the optimizer."""
    before = values(model)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for p in model.parameters():
        if not isinstance(p, nn.parameter.UninitializedParameter):
            optimizer.add_param_group({"params": [p]})
    groups = len(optimizer.param_groups)
    config = arguments.pop("config", SigmaReparamConfig(init="one"))
    with pytest.raises(error, match=match):
        apply_sigma_reparam(model, optimizer, config, **arguments)
    after = values(model)
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert len(optimizer.param_groups) == groups
    assert not optimizer._optimizer_step_pre_hooks


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies that can be compared: dense, NaN as 0; without what has no values."""
    out = {}
    for name, p in model.named_parameters():
        if not (isinstance(p, nn.parameter.UninitializedParameter) or p.is_meta):
            out[name] = torch.nan_to_num(p.detach().clone().to_dense())
    return out


def odd_weight(change: Callable[[Tensor], Tensor]) -> Net:
    model = Net()
    model.odd.weight = nn.Parameter(change(model.odd.weight.detach()), requires_grad=False)
    if model.odd.weight.is_floating_point() or model.odd.weight.is_complex():
        model.odd.weight.requires_grad_(True)
    return model


def spoilt(value: float) -> Net:
    model = Net()
    model.odd.weight.data[2, 3] = value
    return model


# -- refused ---------------------------------------------------------------------------------------------------------


def test_nothing_to_match_says_what_there_is() -> None:
    refused(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), NoMatchError, r"no module of type Linear or Conv1d.*1 LayerNorm")
    refused(
        Net(), NoMatchError, r"`include` 'frist' matches no module name \(did you mean 'first'\?\)", include=["frist"]
    )
    refused(Net(), NoMatchError, r"all 3 .* excluded by `exclude` glob '\*'", exclude=["*"])
    refused(Net(), NoMatchError, r"include=\[\] covers nothing", include=[])
    refused(Net(), TypeError, r"include='first' is a string; write a list: include=\['first'\]", include="first")
    refused(Net(nn.LayerNorm(6)), NoMatchError, r"'odd' covers no Linear.*only 1 LayerNorm", include=["odd"])


def test_nothing_that_can_be_worked_on_says_why() -> None:
    model = Net()
    model.requires_grad_(False)
    refused(
        model, ValueError, r"no weight it can work on \(first.weight: frozen \(requires_grad=False\); second.weight"
    )
    model = Net()
    for layer in (model.first, model.second, model.odd):
        nn.init.zeros_(layer.weight)
    refused(model, ValueError, r"no weight it can work on \(first.weight: all zero")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20, -1e20], ids=str)
def test_values_without_a_spectral_norm(value: float) -> None:
    refused(spoilt(value), ValueError, r"'odd.weight' holds NaN, infinite or huge \(> 1e\+15\) values.*exclude")
    found = find_targets(spoilt(value), exclude=["odd"])
    assert set(found.matched) == {"first.weight", "second.weight"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: torch.complex(w, w), r"'odd.weight' is torch.complex64.*exclude=\['odd'\]"),
        (lambda w: w.to_sparse(), r"'odd.weight' is torch.float32, torch.sparse_coo.*exclude=\['odd'\]"),
        (lambda w: w.to_sparse_csr(), r"'odd.weight' is torch.float32, torch.sparse_csr"),
        (lambda w: (w * 100).to(torch.int8), r"'odd.weight' is torch.int8.*exclude=\['odd'\]"),
        (lambda w: w.to("meta"), r"'odd.weight' has no values yet \(lazy or meta\)"),
    ],
    ids=["complex", "sparse", "csr", "int8", "meta"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_weights_that_are_not_dense_real_and_there(change: Callable[[Tensor], Tensor], words: str) -> None:
    refused(odd_weight(change), ValueError, words)
    assert set(find_targets(odd_weight(change), exclude=["odd"]).matched) == {"first.weight", "second.weight"}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules() -> None:
    refused(Net(nn.LazyLinear(6)), ValueError, r"'odd.weight' has no values yet \(lazy or meta\). Run one batch")
    model = Net(nn.LazyLinear(6))
    model.odd(torch.zeros(2, 6))
    assert "odd.weight" in find_targets(model).matched


@pytest.mark.filterwarnings("ignore:.*quantiz.*deprecated")
def test_dynamically_quantized_layers_are_other_modules() -> None:
    """They hold packed integers and cannot be trained; alone, they are named as what the model has."""
    quantized = torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8)
    kind = type(quantized.odd)
    assert not isinstance(quantized.odd, nn.Linear)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(NoMatchError, match=rf"no module of type Linear.*3 {kind.__name__}"):
        apply_sigma_reparam(quantized, optimizer)
    mixed = Net(quantized.odd)
    assert set(find_targets(mixed).matched) == {"first.weight", "second.weight"}
    with pytest.raises(NoMatchError, match=rf"'odd' covers no Linear.*only 1 {kind.__name__}"):
        find_targets(mixed, include=["odd"])


def test_split_that_does_not_divide() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 10), nn.Linear(6, 6)

    split = SigmaReparamConfig(init="one", qkv="split")
    refused(Net(Grouped()), ValueError, r"`qkv='split'` needs three equal parts, but 'odd.qkv' has 10", config=split)
    assert "odd.qkv.weight" in find_targets(Net(Grouped()), SigmaReparamConfig(qkv="fused")).matched
    assert "odd.qkv.weight" not in find_targets(Net(Grouped()), split, exclude=["*qkv"]).matched


def test_one_bad_part_of_a_split_projection() -> None:
    model = Net(nn.MultiheadAttention(6, 2))
    model.odd.in_proj_weight.data[6:12] = 0
    found = find_targets(model, SigmaReparamConfig(qkv="split"))
    assert "one of q, k, v" in found.skipped["odd.in_proj_weight"]
    assert "odd.in_proj_weight" in find_targets(model).matched, "as one matrix it has a norm"


def test_bad_options_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"SigmaReparam\(`init`\) takes one of \('preserve', 'one'\); got 'zero'"):
        SigmaReparamConfig(init="zero")
    with pytest.raises(ValueError, match=r"SigmaReparam\(`qkv`\) takes one of"):
        SigmaReparamConfig(qkv="both")


# -- left alone, with a reason ---------------------------------------------------------------------------------------


def reasons(model: nn.Module, **arguments: Any) -> dict[str, str]:
    found = find_targets(model, **arguments)
    assert found.matched.keys().isdisjoint(found.skipped)
    return found.skipped


def test_what_is_left_alone_has_a_reason() -> None:
    model = Net()
    model.odd.requires_grad_(False)
    assert reasons(model) == {"odd.weight": "frozen (requires_grad=False)"}
    model = Net()
    nn.init.zeros_(model.odd.weight)
    assert reasons(model)["odd.weight"].startswith("all zero")
    model = Net()
    model.odd.weight.data *= 1e-22
    assert "below 1e-15" in reasons(model)["odd.weight"]
    assert reasons(Net(), exclude=["od?"]) == {"odd": "excluded by 'od?'"}
    assert reasons(Net(), include=["first", "second"]) == {"odd": "not covered by include"}
    model = Net()
    model.odd.weight.data[3, 3] = float("nan")
    model.odd.requires_grad_(False)
    assert reasons(model) == {"odd.weight": "frozen (requires_grad=False)"}, "frozen weights are nobody's business"


def test_weights_somebody_parametrized() -> None:
    model = Net()
    parametrizations.weight_norm(model.odd)
    before = model.odd(torch.ones(1, 6)).detach()
    assert "computed by a parametrization" in reasons(model)["odd.weight"]
    optimizer = sgd(model)
    apply_sigma_reparam(model, optimizer, SigmaReparamConfig(init="one"))
    assert torch.equal(model.odd(torch.ones(1, 6)), before)
    only = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    refused(only, ValueError, r"no weight it can work on \(0.weight: computed by a parametrization")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_of_the_old_weight_norm() -> None:
    model = Net()
    nn.utils.weight_norm(model.odd)
    assert "computed by a parametrization" in reasons(model)["odd.weight"]


def test_tied_weights_are_one_parameter_with_a_note() -> None:
    model = Decoder()
    found = find_targets(model)
    assert found.notes == {"head.weight": "tied: also used as embed.weight"}
    assert "embed.weight" not in found.matched
    both = find_targets(model, SigmaReparamConfig(embeddings=True))
    assert "embed.weight" in both.matched
    assert "the same parameter as 'embed.weight'" in both.skipped["head.weight"]
    optimizer = sgd(model)
    change, boundary = apply_sigma_reparam(model, optimizer, SigmaReparamConfig(embeddings=True))
    assert "head.weight" not in boundary.sites
    assert "tied: also used as head.weight" in change.targets["embed.weight"]
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    assert model.head.weight is model.embed.weight


def test_tied_linears_are_taken_once() -> None:
    model = Net()
    model.odd.weight = model.first.weight
    found = find_targets(model)
    assert set(found.matched) == {"first.weight", "second.weight"}
    assert found.skipped["odd.weight"] == "the same parameter as 'first.weight', reparametrized there"


def test_a_module_under_two_names_is_taken_once() -> None:
    model = Net()
    model.alias = model.odd
    found = find_targets(model)
    assert set(found.matched) == {"first.weight", "second.weight", "odd.weight"}
    assert found.notes == {"odd.weight": "tied: also used as alias.weight"}
    assert "odd.weight" in find_targets(model, include=["alias"]).matched, "any of its names includes it"
    assert "odd.weight" not in find_targets(model, exclude=["alias"]).matched


def test_embeddings_are_asked_for() -> None:
    model = Net(nn.Embedding(7, 6, padding_idx=0))
    assert "odd.weight" not in find_targets(model).matched
    assert "odd.weight" in find_targets(model, SigmaReparamConfig(embeddings=True)).matched
    sparse = Net(nn.Embedding(7, 6, sparse=True))
    assert "sparse" in reasons(sparse, config=SigmaReparamConfig(embeddings=True))["odd.weight"]


def test_the_padding_row_stays_zero() -> None:
    model = Net(nn.Embedding(7, 6, padding_idx=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    apply_sigma_reparam(model, optimizer, SigmaReparamConfig(embeddings=True))
    for _ in range(3):
        optimizer.zero_grad()
        model.second(model.odd(torch.tensor([0, 1, 2, 0]))).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.odd.weight[0], torch.zeros(6))
    assert model.odd.weight[1:].abs().min() > 0


# -- what counts as a target -----------------------------------------------------------------------------------------


def test_names_do_not_depend_on_wrappers() -> None:
    plain = find_targets(Net())
    compiled = Net()
    compiled.odd = torch.compile(compiled.odd)
    checkpointed = Net()
    checkpointed.odd = checkpoint_wrapper(checkpointed.odd)
    for model in (compiled, checkpointed, torch.compile(Net())):
        assert list(find_targets(model).matched) == list(plain.matched)
        assert set(find_targets(model, include=["odd"]).matched) == {"odd.weight"}
        assert set(find_targets(model, exclude=["odd"]).matched) == {"first.weight", "second.weight"}


def test_attention_projections() -> None:
    fused = find_targets(Net(nn.MultiheadAttention(6, 2))).matched
    assert {"odd.in_proj_weight", "odd.out_proj.weight"} <= set(fused)
    assert len(fused["odd.in_proj_weight"][1]) == 1
    split = find_targets(Net(nn.MultiheadAttention(6, 2)), SigmaReparamConfig(qkv="split")).matched
    assert [(b.start, b.length) for b in split["odd.in_proj_weight"][1]] == [(0, 6), (6, 6), (12, 6)]
    apart = find_targets(Net(nn.MultiheadAttention(6, 2, kdim=4)), SigmaReparamConfig(qkv="split")).matched
    assert {f"odd.{part}_proj_weight" for part in "qkv"} <= set(apart)
    excluded = find_targets(Net(nn.MultiheadAttention(6, 2)), exclude=["odd"]).matched
    assert set(excluded) == {"first.weight", "second.weight"}, "a glob covers what lies below"
    inside = find_targets(Net(nn.MultiheadAttention(6, 2)), exclude=["odd.out_proj"]).matched
    assert set(inside) == {"first.weight", "second.weight", "odd.in_proj_weight"}


def test_root_module() -> None:
    assert set(find_targets(nn.Linear(3, 4)).matched) == {"weight"}


def test_transposed_convolutions_are_not_targets() -> None:
    assert "odd.weight" not in find_targets(Net(nn.ConvTranspose2d(3, 3, 2))).matched


def test_hugging_face_layers() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    found: Targets = find_targets(model, SigmaReparamConfig(qkv="split"))
    param, blocks = found.matched["h.0.attn.c_attn.weight"]
    assert tuple(param.shape) == (8, 24)
    assert [(b.start, b.length, b.dim) for b in blocks] == [(0, 8, 1), (8, 8, 1), (16, 8, 1)]
    assert describe(param, blocks) == "8×24, 3 gains"
    assert {"h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"} <= set(found.matched)
    assert "wte.weight" not in found.matched


def test_choosing_changes_nothing_and_draws_nothing() -> None:
    model = Net(nn.MultiheadAttention(6, 2))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(model, SigmaReparamConfig(qkv="split"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
