"""TempScale on every way of writing attention, against softmax(logits / tau) from its definition in float64."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from attention_models import MODELS, Cross, Encoder, Split, benchmark, build, call, cast, first
from torch import Tensor, nn

from lightning_efficient.attention.adapter import install, installed
from lightning_efficient.attention.temper import Law
from lightning_efficient.attention.temperature import (
    Targets,
    TempScaleConfig,
    TempScaleError,
    apply_temp_scale,
    find_targets,
    install_targets,
    make_transforms,
    remove_temp_scale,
)
from lightning_efficient.attention.verify import module_at
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.common.running import Float64
from lightning_efficient.weightspace import Temperature

TAU = 0.6


def reference(model: nn.Module, example: Any, sites: Any, tau: float | list[Tensor] = TAU) -> Tensor:
    """Float64 output with the attention of ``sites`` from its definition; ``tau``: one, or ``(heads, 1, 1)`` a site."""
    definition = benchmark("attention_definition").Definition([model.get_submodule(s) for s in sites], tau)
    with Float64(), definition.watching():
        out = call(model, cast(example, torch.float64))
    assert definition.count >= len(list(sites))
    return out


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    plain = not any("_temp_scale" in vars(m) or installed(m) for m in model.modules())
    return plain and now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)


def tail(test: str, cell: dict[str, Any]) -> bool:
    """The numbers of every model are compared; other kinds of numbers, and programs, for one of each kind.

    The kinds: weights and adapters, each of timm, torch and Hugging Face, and biases that are scaled with the logits.
    What weights hold leaves a model as plain as any: its program, once.
    """
    if test == "test_exported":
        return cell["name"] not in ("swin v2", "tied", "encoder")
    few = ("vit", "swin v2", "tied", "encoder", "bert", "t5")
    if test == "test_adapters_of_every_attention":
        return cell["how"] != "per head" and cell["name"] not in few
    return test == "test_in_bfloat16_the_error_is_that_of_bfloat16" and cell["name"] not in few


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, in its fused path
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_in_every_mode(name: str) -> None:
    model, example = build(name)
    wide = copy.deepcopy(model).double()
    before, parameters = values(model), {n: id(p) for n, p in model.named_parameters()}
    plain = call(model, example).detach()
    targets = find_targets(model, example, TempScaleConfig(TAU))
    assert unchanged(model, before)
    assert ("adapter" if targets.adapters else "weights") == MODELS[name][1]
    change = apply_temp_scale(model, TAU, example)
    assert list(change.targets) == list(targets.sites)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert model.state_dict().keys() == before.keys()

    expected = reference(wide, example, targets.sites)
    assert (expected - plain).abs().max() > 1e-4, "the temperature must be felt"
    for training in (False, True):  # no dropout anywhere
        model.train(training)
        out = call(model, example)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(out, list(model.parameters()), cotangent.float(), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(wide.parameters()), cotangent, allow_unused=True)
    overall = max(float(g.abs().max()) for g in wanted if g is not None)
    for (n, p), mine, theirs in zip(wide.named_parameters(), found, wanted, strict=True):
        assert (mine is None) == (theirs is None), n
        if theirs is not None:
            factors = torch.ones_like(p)  # the network's weight is factor times the reference's
            for block, factor in targets.factors.get(n, {}).items():
                block.of(factors).mul_(factor)
            # Some gradients are zero but for rounding (a bias on all keys), hence the second term.
            bound = 2e-5 * float(theirs.abs().max()) + 1e-6 * overall
            assert float((mine.double() * factors - theirs).abs().max()) < bound, n
    model.eval()
    with torch.no_grad():  # where the fused inference path of nn.TransformerEncoder is
        torch.testing.assert_close(call(model, example).double(), expected, rtol=1e-5, atol=1e-5)
    remove_temp_scale(model)
    assert unchanged(model, before)
    torch.testing.assert_close(call(model, example), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_the_error_is_that_of_bfloat16(name: str) -> None:
    model, example = build(name)
    wide = copy.deepcopy(model).double()
    narrow, small = copy.deepcopy(model).bfloat16(), cast(example, torch.bfloat16)
    with torch.no_grad():
        ordinary = float((call(narrow, small).double() - call(wide, cast(example, torch.float64))).abs().max())
        change = apply_temp_scale(narrow, TAU, example)
        expected = reference(wide, example, change.targets)
        error = float((call(narrow, small).double() - expected).abs().max())
    assert error < 3 * ordinary


@pytest.mark.parametrize("name", MODELS)
def test_exported(name: str) -> None:
    model, example = build(name)
    wide = copy.deepcopy(model).double()
    change = apply_temp_scale(model, TAU, example)
    expected = reference(wide, example, change.targets).detach()
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs = example | {"use_cache": False} if isinstance(example, dict) else {}
    program = torch.export.export(model, args, kwargs)
    exported = first(program.module()(*args, **kwargs))
    torch.testing.assert_close(exported.double(), expected, rtol=1e-5, atol=1e-5)


# Every way that an adapter takes, and one of those held by weights, whose model is as plain as any.
COMPILED = ("swin v2", "tied", "encoder, adapted", "bert")
COMPILED_TOO = [name for name in (*MODELS, "bert, adapted", "swin, adapted") if name not in COMPILED]


@pytest.mark.parametrize("name", [*COMPILED, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in COMPILED_TOO)])
def test_compiled(name: str) -> None:
    model, example = build(name.removesuffix(", adapted"))
    wide = copy.deepcopy(model).double()
    fixed = {n for n, _ in model.named_parameters()} if name.endswith("adapted") else ()
    targets = find_targets(model, example, TempScaleConfig(TAU), fixed=fixed)
    install_targets(model, targets)
    assert bool(targets.adapters) == (name.endswith("adapted") or MODELS[name][1] == "adapter")
    expected = reference(wide, example, targets.sites).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    out = call(compiled, example)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(out)
    grads = [
        torch.autograd.grad(o, list(model.parameters()), cotangent, materialize_grads=True, allow_unused=True)
        for o in (out, call(model, example))
    ]
    for mine, theirs in zip(*grads, strict=True):  # compiled, what was not asked for has zeros and not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, in its fused path
@pytest.mark.parametrize("how", ["a number", "learned", "per head"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_every_attention(name: str, how: str) -> None:
    """Every way of writing attention by an adapter, as where its weights are frozen, at all kinds of temperature."""
    model, example = build(name)
    wide = copy.deepcopy(model).double()
    targets = find_targets(model, example, TempScaleConfig(TAU), fixed={n for n, _ in model.named_parameters()})
    assert set(targets.adapters) == set(targets.sites)
    assert not targets.factors
    heads = [targets.sites[site].heads or 1 if how == "per head" else 1 for site in targets.sites]
    thetas = [nn.Parameter(torch.linspace(TAU, 1.4, n).log()) for n in heads]
    for site, theta in zip(targets.sites, thetas, strict=True):
        law = Law(TAU) if how == "a number" else Law(log_tau=theta)
        install(model, module_at(model, site), law)
    before = values(wide)
    logs = [theta.detach().double().requires_grad_() for theta in thetas]
    expected = reference(wide, example, targets.sites, [log.exp().view(-1, 1, 1) for log in logs])
    for training in (True, False):
        model.train(training)
        out = call(model, example)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(expected)
    learned = [] if how == "a number" else thetas
    wanted = torch.autograd.grad(
        expected, [*wide.parameters(), *(logs if learned else [])], cotangent, allow_unused=True
    )
    found = torch.autograd.grad(out, [*model.parameters(), *learned], cotangent.float(), allow_unused=True)
    overall = max(float(g.abs().max()) for g in wanted if g is not None)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            bound = 2e-5 * float(theirs.abs().max()) + 2e-6 * overall
            assert float((mine.double() - theirs).abs().max()) < bound
    with torch.no_grad():
        torch.testing.assert_close(call(model, example).double(), expected, rtol=1e-5, atol=1e-5)
    assert unchanged(wide, before)


@pytest.mark.parametrize("mode", ["constant", "log_n", "ssmax"])
@pytest.mark.parametrize("name", ["encoder", "bert", "bert eager", "mpnet"])
def test_padding_does_not_matter(name: str, mode: Any) -> None:
    model, example = build(name)
    apply_temp_scale(model, TAU, example, mode=mode)
    if name == "encoder":
        short = call(model, example[0][1:, :3])
        together = call(model, example)[1:, :3]
    else:
        short = first(model(input_ids=example["input_ids"][1:, :5]))
        together = call(model, example)[1:, :5]
    torch.testing.assert_close(together, short, rtol=1e-5, atol=1e-5)


def test_length_aware_modes_from_their_definitions_in_a_causal_model() -> None:
    model, x = build("split")
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (model.q, model.k, model.v))
    n = torch.arange(1, 6).view(5, 1).double()
    mask = torch.ones(5, 5).tril() == 0
    for mode, factor in (("log_n", n.log() / torch.tensor(64.0).double().log() / TAU), ("ssmax", n.log() / TAU)):
        weights = torch.softmax((q @ k.mT / 2 * factor.float()).masked_fill(mask, -torch.inf), -1)
        apply_temp_scale(model, TAU, x, mode=mode, length=64)
        torch.testing.assert_close(model(x), x + (weights @ v).transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)
        remove_temp_scale(model)


@pytest.mark.parametrize("name", MODELS)
def test_one_is_bit_identical(name: str) -> None:
    model, example = build(name)
    before, out = values(model), call(model, example)
    change = apply_temp_scale(model, 1.0, example)
    assert change.targets
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(installed(m) for m in model.modules())
    assert torch.equal(call(model, example), out)
    remove_temp_scale(model)
    assert unchanged(model, before)
    # Nor does a temperature that moves, and starts at 1, but where another order of operations rounds: in
    # nn.MultiheadAttention, which is then written out, and under T5's expanded table of biases.
    for site in find_targets(model, example).sites:
        install(model, module_at(model, site), Law(log_tau=nn.Parameter(torch.zeros(1))))
    if name in ("encoder", "cross", "t5"):
        torch.testing.assert_close(call(model, example), out, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(call(model, example), out)


# -- which, and how much ---------------------------------------------------------------------------------------------


def test_one_temperature_for_each_attention() -> None:
    model, x = build("vit")
    wide = copy.deepcopy(model).double()
    change = apply_temp_scale(model, [0.5, 2.0], x)
    assert [text.split(",")[0] for text in change.targets.values()] == ["tau = 0.5", "tau = 2"]
    with torch.no_grad():
        for block, tau in zip(wide.blocks, (0.5, 2.0), strict=True):
            block.attn.qkv.weight[:24] /= tau
            block.attn.qkv.bias[:24] /= tau
        torch.testing.assert_close(model(x).double(), wide(x.double()), rtol=1e-5, atol=1e-5)


def test_include_and_exclude() -> None:
    model, x = build("vit")
    before = values(model)
    change = apply_temp_scale(model, TAU, x, include=["blocks.*"], exclude=["blocks.0"])
    assert list(change.targets) == ["blocks.1.attn"]
    assert change.skipped == {"blocks.0.attn": "excluded by 'blocks.0'"}
    assert torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])


def test_a_shared_table_of_position_biases_takes_one_temperature_only() -> None:
    model, example = build("t5")
    targets = find_targets(model, example, TempScaleConfig(TAU))
    assert [len(group) for group in targets.groups()] == [2, 1, 2, 1]
    names = [name for name in targets.sites if name.startswith("encoder")]
    table = f"{names[0]}.relative_attention_bias.weight"
    one = find_targets(model, example, TempScaleConfig(TAU), include=[names[1]])
    assert one.adapters == {names[1]: f"{table!r} also scales {names[0]!r}, at another temperature"}
    assert not one.factors
    wide = copy.deepcopy(model).double()
    apply_temp_scale(model, TAU, example, include=[names[1]])
    expected = reference(wide, example, [names[1]])
    torch.testing.assert_close(call(model, example).double(), expected, rtol=1e-5, atol=1e-5)


def test_queries_that_feed_something_else_are_left_to_the_keys() -> None:
    class Residual(Split):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return (q + self.core(q, k, v)).transpose(1, 2).flatten(2)

    model, x = Residual(), torch.randn(2, 5, 8)
    wide = copy.deepcopy(model).double()
    targets = find_targets(model, x, TempScaleConfig(TAU))
    assert set(targets.factors) == {"k.weight", "k.bias"}
    apply_temp_scale(model, TAU, x)
    torch.testing.assert_close(model(x).double(), reference(wide, x, ["core"]), rtol=1e-5, atol=1e-5)

    class Both(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.k(x)

    model = Both()
    targets = find_targets(model, x, TempScaleConfig(TAU))
    assert "they feed more than the logits" in targets.adapters["core"]
    assert not targets.factors


def test_a_bias_that_is_zero_now_is_scaled_as_well() -> None:
    model, x = build("split")
    nn.init.zeros_(model.q.bias)
    assert set(find_targets(model, x, TempScaleConfig(TAU)).factors) == {"q.weight", "q.bias"}


@pytest.mark.parametrize("gate", ["shut", "open"])
def test_a_gate_hides_no_other_reader_of_the_queries(gate: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            start = torch.zeros(8) if gate == "shut" else torch.ones(8)
            self.q, self.kv, self.gate = nn.Linear(8, 8), nn.Linear(8, 16), nn.Parameter(start)

        def forward(self, x: Tensor) -> Tensor:
            q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
            return F.scaled_dot_product_attention(q, k, v) + (self.gate if gate == "shut" else 1 - self.gate) * q

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 5, 8)
    factors = find_targets(model, x, TempScaleConfig(TAU)).factors
    assert {name: [(b.start, b.length) for b in blocks] for name, blocks in factors.items()} == {
        "kv.weight": [(0, 8)], "kv.bias": [(0, 8)]
    }  # fmt: skip


class Stack(nn.Module):
    """Attention modules of one class and shape, whose first queries' weights somebody else may read."""

    def __init__(self, reader: str = "nobody") -> None:
        super().__init__()
        self.layers, self.head, self.reader = nn.ModuleList([Split(), Split(), Split()]), nn.Linear(8, 3), reader

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        for i, layer in enumerate(self.layers):
            x = layer(x) / (1 + i)
            if self.reader == ("between", "", "behind")[i]:
                x = x + F.linear(x, first.q.weight)
        return self.head(x) + (first.q.bias.sum() if self.reader == "beside" else 0.0)


@pytest.mark.parametrize("reader", ["nobody", "between", "behind", "beside"])
def test_a_reader_of_the_queries_weights_anywhere_is_seen(reader: str) -> None:
    torch.manual_seed(0)
    model, x = Stack(reader), torch.randn(2, 5, 8)
    wide = copy.deepcopy(model).double()
    targets = find_targets(model, x, TempScaleConfig(TAU))
    assert not targets.adapters
    assert {name for name in targets.factors if name.startswith("layers.0")} == {
        f"layers.0.{'q' if reader == 'nobody' else 'k'}.{what}" for what in ("weight", "bias")
    }
    assert {name for name in targets.factors if name.startswith("layers.2")} == {"layers.2.q.weight", "layers.2.q.bias"}
    apply_temp_scale(model, TAU, x)
    torch.testing.assert_close(model(x).double(), reference(wide, x, targets.sites), rtol=1e-5, atol=1e-5)


class Alike(nn.Module):
    """One class, one shape, and attention that a function with no trace in either makes another."""

    def __init__(self, prepare: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.prepare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), prepare

    def forward(self, x: Tensor) -> Tensor:
        logits, v, rest = self.prepare(self.q(x), self.k(x), self.v(x))
        return x + logits.softmax(-1) @ v + rest


PREPARED: dict[str, tuple[Any, str]] = {
    "alike": (lambda q, k, v: (q @ k.mT, v, 0.0), "q"),
    "exchanged": (lambda q, k, v: (k @ q.mT, v, 0.0), "q"),
    "capped": (lambda q, k, v: (5 * (q @ k.mT / 5).tanh(), v, 0.0), "adapter"),
    "of one length": (lambda q, k, v: (F.normalize(q, dim=-1) @ k.mT, v, 0.0), "k"),
    "queries added": (lambda q, k, v: (q @ k.mT, v, q), "k"),
    "queries in the values": (lambda q, k, v: (q @ k.mT, v + q, 0.0), "k"),
    "both added": (lambda q, k, v: (q @ k.mT, v, q + k), "adapter"),
}


@pytest.mark.parametrize("how", PREPARED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_looks_the_same_is_judged_by_what_it_does(how: str, place: int) -> None:
    prepare, where = PREPARED[how]
    torch.manual_seed(0)
    model = nn.Sequential(*(Alike(prepare if i == place else PREPARED["alike"][0]) for i in range(3)))
    x, names = torch.randn(2, 5, 8), ("0", "1", "2")
    targets = find_targets(model, x, TempScaleConfig(TAU))
    assert list(targets.adapters) == ([str(place)] if where == "adapter" else [])
    held = {name: {knob.split(".")[1] for knob in targets.factors if knob.startswith(name)} for name in names}
    assert held.pop(str(place)) == ({where} - {"adapter"}) or (how, place) == ("exchanged", 0)
    assert all(one in ({"q"}, {"k"}) for one in held.values())  # either holds it
    wide = copy.deepcopy(model).double()
    apply_temp_scale(model, TAU, x)
    torch.testing.assert_close(model(x).double(), reference(wide, x, names), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.98, 1.001, 1.02])
def test_a_clamp_that_holds_at_the_weights_as_they_are(scale: float) -> None:
    """Where noise moves the scale off its bound it looks as if it could be divided; where it is, it cannot."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.scale = nn.Linear(8, 24), nn.Parameter(torch.tensor([scale]))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            return torch.softmax((q @ k.mT).unsqueeze(1) * self.scale.clamp(min=1.0), -1).squeeze(1) @ v

    torch.manual_seed(0)
    model, x = Clamped(), torch.randn(2, 5, 8)
    with torch.no_grad():
        q, k, v = model.qkv(x).double().chunk(3, -1)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * max(scale, 1.0)
        apply_temp_scale(model, TAU, x)
        torch.testing.assert_close(model(x).double(), torch.softmax(logits / TAU, -1) @ v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("std", [0.0, 0.001, 0.02, 0.5])
def test_a_soft_cap_shows_below_the_logits_that_it_caps(std: float) -> None:
    """Training may bring them there."""

    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            nn.init.normal_(self.qkv.weight, std=std)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return ((q @ k.mT / 50).tanh() * 50).softmax(-1) @ v

    torch.manual_seed(0)
    assert list(find_targets(Capped(), torch.randn(2, 5, 8), TempScaleConfig(TAU)).adapters) == ["(model)"]


def test_cached_position_biases_are_forgotten() -> None:
    """timm's LeViT keeps its biases from one evaluation to the next."""
    torch.manual_seed(0)
    attention = timm.models.levit.Attention(16, 4, num_heads=2, resolution=(3, 3))
    model = nn.Sequential(attention).eval()
    x = torch.randn(2, 9, 16)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        before = model(x)
        apply_temp_scale(model, TAU, x)
        assert "attention_biases" in "".join(vars(model)["_temp_scale"]["originals"])
        scaled = model(x)
        model.train()
        model.eval()  # this is when it forgets
        torch.testing.assert_close(model(x), scaled, rtol=0, atol=0)
        assert not torch.allclose(scaled, before)
        remove_temp_scale(model)
        assert torch.equal(model(x), before)


# -- undoing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin v2"])
def test_copies_can_be_undone(name: str) -> None:
    model, x = build(name)
    before = values(model)
    apply_temp_scale(model, TAU, x)
    out = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), out, rtol=0, atol=0)
        remove_temp_scale(twin)
        assert unchanged(twin, before)
    half = copy.deepcopy(model).half()
    remove_temp_scale(half)
    assert unchanged(half, {n: t.half() if t.is_floating_point() else t for n, t in before.items()})
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)


def test_what_has_changed_since_is_not_undone() -> None:
    model, x = build("vit")
    with pytest.raises(ValueError, match="was not applied"):
        remove_temp_scale(model)
    apply_temp_scale(model, TAU, x)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[3, 3] += 1
    now = values(model)
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.weight' has changed since"):
        remove_temp_scale(model)
    assert all(torch.equal(now[n], t) for n, t in model.state_dict().items())


# -- bad input -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Attention without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).relu() @ (self.k(x).relu().mT @ x)


class Channels(nn.Module):
    """Cross-covariance attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return ((q @ k.mT).softmax(-1) @ v).flatten(1, 2).mT


class Outlook(nn.Module):
    """Weights of a mean from a projection, as VOLO's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 1
        self.weights = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x).softmax(-1) @ x


class Gated(nn.Module):
    """Content attention beside positional attention, as ConViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.place = nn.Linear(8, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return ((q @ k.mT).softmax(-1) + self.place(x).softmax(-1)) @ x


REFUSED = {
    "linear": (Linear, "has heads, but no softmax attention was seen in it"),
    "channels": (Channels, "attends over channels, not tokens"),
    "outlook": (Outlook, "its softmax is not of a product of queries and keys"),
    "gated": (Gated, r"another softmax, of shape \[\(2, 5, 5\)\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_attention_without_an_exact_temperature_is_refused_by_name(kind: str) -> None:
    make, why = REFUSED[kind]
    model, x = nn.Sequential(Split(), make()), torch.randn(2, 5, 8)
    before = values(model)
    with pytest.raises(TempScaleError, match=rf"'1' \({why}.*exclude=\['1'\]"):
        apply_temp_scale(model, TAU, x)
    assert unchanged(model, before)
    assert list(apply_temp_scale(model, TAU, x, exclude=["1"]).targets) == ["0.core"]
    if kind == "channels":  # and where there is nothing that it could be excluded for
        with pytest.raises(TempScaleError, match=rf"{why}.*all that it was to change"):
            apply_temp_scale(make(), TAU, x)


def refused(model: nn.Module, example: Any, error: type[Exception], match: str, **arguments: Any) -> None:
    before = values(model)
    with pytest.raises(error, match=match):
        apply_temp_scale(model, **({"tau": TAU, "example": example} | arguments))
    assert unchanged(model, before)


@pytest.mark.parametrize("tau", [0, -0.5, float("nan"), float("inf"), True, "0.5", [0.5, 0.0], [0.5, None]])
def test_temperatures_that_are_none(tau: Any) -> None:
    refused(*build("vit"), ValueError, "expected finite numbers above 0", tau=tau)


def test_other_bad_arguments() -> None:
    model, x = build("vit")
    refused(
        model, x, ValueError, r"3 temperatures for 2 attentions: \['blocks.0.attn', 'blocks.1.attn'\]", tau=[1, 1, 1]
    )
    refused(model, x, ValueError, "takes 'constant', 'log_n' or 'ssmax'", mode="linear")
    refused(model, x, ValueError, "number of keys above 1", mode="log_n", length=1)
    refused(
        model, x, NoMatchError, re.escape("'blocks.*.atn' matches no attention (did you mean"), include=["blocks.*.atn"]
    )
    refused(model, x, NoMatchError, "matches no attention", exclude=["head"])
    refused(model, x, NoMatchError, "leave none of", exclude=["blocks.*"])
    refused(model, x, TypeError, "write a list", include="blocks.*")
    refused(model, None, ValueError, "`example` is a NoneType")
    refused(model, lambda: None, ValueError, "did not call the model")
    refused(model, torch.randn(2, 3, 31, 31), ValueError, "does not run in float64")
    refused(nn.Linear(8, 8), torch.randn(2, 8), NoMatchError, "no attention was seen")


def test_an_example_in_which_attention_has_no_choice() -> None:
    refused(Split(), torch.randn(2, 1, 8), TempScaleError, "'core': entropy 0 -> 0 nats")


@pytest.mark.parametrize("name", ["vit", "swin v2"])
def test_twice(name: str) -> None:
    model, x = build(name)
    outer = nn.Sequential(model)
    apply_temp_scale(model, TAU, x)
    now = values(model)
    for again in (model, outer):
        with pytest.raises(ValueError, match="was changed before"):
            apply_temp_scale(again, TAU, x)
    assert all(torch.equal(now[n], t) for n, t in model.state_dict().items())


def test_quantized_weights() -> None:
    model, x = build("split")
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match=r"'codes' is quantized \(torch.int8"):
        apply_temp_scale(model, TAU, x)


def test_a_model_whose_logits_are_not_a_function_of_its_input_is_caught_by_the_self_check() -> None:
    class Drifting(Split):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x * self.calls)

    refused(
        Drifting(), torch.randn(2, 5, 8), TempScaleError, "self-check failed, nothing was changed: 'core': its logits"
    )


# -- for training ----------------------------------------------------------------------------------------------------


def test_transforms_divide_the_weights_that_apply_divides() -> None:
    model, example = build("t5")
    twin = copy.deepcopy(model)
    apply_temp_scale(twin, TAU, example)
    targets = find_targets(model, example, TempScaleConfig(TAU))
    temperatures = {group[0]: Temperature(TAU) for group in targets.groups()}
    transforms = make_transforms(model, targets, temperatures)
    assert set(transforms) == set(targets.factors)
    for name, (parameter, transform) in transforms.items():
        weight = parameter.detach().clone()
        transform.start(weight)
        transform.push(weight)
        torch.testing.assert_close(weight, twin.get_parameter(name).detach(), rtol=1e-6, atol=0)
    assert len({id(transform.temperature) for _, transform in transforms.values()}) == 4


def test_a_temperature_for_each_head() -> None:
    for name, heads in (("beit", 3), ("gpt_neox", 3), ("encoder", 2), ("llama", 4)):
        model, example = build(name)
        wide = copy.deepcopy(model).double()
        targets = find_targets(model, example, TempScaleConfig(1.0, per_head=True))
        site = next(iter(targets.sites))
        assert targets.sites[site].heads == heads
        temperature = Temperature(1.0, heads)
        temperature.log_tau.data[1] = float(torch.tensor(TAU, dtype=torch.float64).log())
        temperatures = {group[0]: temperature for group in targets.groups()}
        with torch.no_grad():
            for parameter, transform in make_transforms(model, targets, temperatures).values():
                transform.push(parameter)
        seen = logits_of(model, example, site), logits_of(wide, example, site)
        visible = seen[1] > -1e30
        for head in range(heads):
            factor = 1 / TAU if head == 1 else 1.0
            mine, theirs = (torch.where(visible, logits, 0.0)[:, head] for logits in seen)
            torch.testing.assert_close(mine.double(), theirs * factor, rtol=1e-4, atol=1e-4)


def logits_of(model: nn.Module, example: Any, site: str) -> Tensor:
    """Logits of the first call at a site."""
    from lightning_efficient.attention.trace import Trace

    with torch.no_grad(), Trace(model) as trace:
        call(model, cast(example, next(model.parameters()).dtype))
    return trace.of(site)[0].logits.clamp(min=-1e30)


def test_heads_that_share_their_query_norm_are_said_to() -> None:
    model, example = build("qwen3")
    targets = find_targets(model, example, TempScaleConfig(per_head=True))
    assert "is shared by the heads" in next(iter(targets.adapters.values()))


def test_a_frozen_weight_cannot_follow_a_temperature_that_moves() -> None:
    model, x = build("split")
    model.q.bias.requires_grad_(False)
    targets = find_targets(model, x, TempScaleConfig(TAU))
    assert make_transforms(model, targets, {"core": Temperature(TAU)})
    for moving in (Temperature(TAU, learnable=True), Temperature(lambda step: TAU)):
        with pytest.raises(TempScaleError, match=r"'q.bias' is frozen"):
            make_transforms(model, targets, {"core": moving})


def test_adapters_alone_can_be_installed() -> None:
    model, x = build("swin v2")
    targets = find_targets(model, x, TempScaleConfig(TAU))
    before = values(model)
    install_targets(model, targets, weights=False)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert sum(installed(m) is not None for m in model.modules()) == 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_is_found_the_same_without_gradients(context: Any) -> None:
    model, x = build("beit")
    wanted = find_targets(model, x, TempScaleConfig(TAU))
    with context():
        found = find_targets(model, torch.randn(2, 3, 32, 32), TempScaleConfig(TAU))
        assert found.factors == wanted.factors
        assert not found.adapters
        before, out = values(model), model(x)
        apply_temp_scale(model, TAU, x)
        assert not torch.equal(model(x), out)
        remove_temp_scale(model)
        assert unchanged(model, before)


def test_the_random_state_and_the_model_are_left_alone() -> None:
    model, x = build("encoder")
    model.train()
    state, hooks = torch.get_rng_state(), len(model._forward_hooks)
    targets = find_targets(model, x, TempScaleConfig(TAU))
    assert isinstance(targets, Targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert len(model._forward_hooks) == hooks
    assert not any(p.grad is not None for p in model.parameters())
    assert isinstance(Encoder(), nn.Module)
    assert isinstance(Cross(), nn.Module)
