"""Who reads a norm's output: one small model per way of reading it, and per reason not to fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fold_models import Affine
from torch import Tensor, nn

from lightning_efficient.folding.consumers import Consumers, consumers_of
from lightning_efficient.folding.tracking import watch

C = 4


class Net(nn.Module):
    """A norm over the last axis, and what is done with its output; modules are given by keyword."""

    def __init__(self, use: Callable[[Any, Tensor], Any], axis: Any = "last", **modules: nn.Module) -> None:
        super().__init__()
        self.norm = Affine(torch.ones(C), torch.zeros(C), axis)
        for name, module in modules.items():
            self.add_module(name, module)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def find_consumers(model: nn.Module, names: Any, call: Callable[[], Any]) -> dict[str, Consumers]:
    return consumers_of(watch(model, names if isinstance(names, dict) else dict.fromkeys(names, "last"), call)[0])


def find(
    use: Callable[[Any, Tensor], Any], *shape: int, axis: Any = "last", name: str = "norm", **modules: nn.Module
) -> Consumers:
    net = Net(use, axis, **modules)
    x = torch.randn(*(shape or (2, 6, C)))
    return find_consumers(net, {name: axis}, lambda: net(x))[name]


def linear(inputs: int = C, outputs: int = 3) -> nn.Linear:
    return nn.Linear(inputs, outputs)


ORDER = tuple(range(C))


def channels(found: Consumers) -> tuple[int, ...]:
    assert found.blocked is None
    (reader,) = found.readers
    (part,) = reader.parts
    return part.channels


# -- readers


def test_linear() -> None:
    found = find(lambda m, x: m.fc(m.norm(x)), fc=linear())
    (reader,) = found.readers
    assert found.blocked is None
    assert (reader.weight.module, reader.weight.how, reader.weight.name) == ("fc", "linear", "fc.weight")
    assert (reader.weight.bias, reader.weight.has_bias, reader.padded) == ("fc.bias", True, False)
    assert channels(found) == ORDER


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(dims: int, groups: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](C, 6, 2, groups=groups, bias=False)
    found = find(lambda m, x: m.conv(m.norm(x)), 2, C, *[5] * dims, axis=1, conv=conv)
    assert channels(found) == ORDER
    weight = found.readers[0].weight
    assert (weight.how, weight.groups, weight.has_bias, weight.bias) == ("conv", groups, False, "conv.bias")


@pytest.mark.parametrize(
    ("padding", "padded"), [(1, True), ("same", True), ("valid", False), ((0, 0), False), ((0, 1), True)]
)
def test_padding_of_convolutions_is_reported(padding: Any, padded: bool) -> None:
    conv = nn.Conv2d(C, 3, 3, padding=padding)
    found = find(lambda m, x: m.conv(m.norm(x)), 2, C, 5, 5, axis=1, conv=conv)
    assert found.readers[0].padded is padded


def test_reflected_padding_copies_channels() -> None:
    conv = nn.Conv2d(C, 3, 3, padding=1, padding_mode="reflect")
    found = find(lambda m, x: m.conv(m.norm(x)), 2, C, 5, 5, axis=1, conv=conv)
    assert channels(found) == ORDER
    assert not found.readers[0].padded


def test_hugging_face_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    found = find(lambda m, x: m.fc(m.norm(x)), fc=Conv1D(3, C))
    assert channels(found) == ORDER
    assert found.readers[0].weight.how == "conv1d_hf"


def test_self_attention_reads_with_all_rows() -> None:
    attention = nn.MultiheadAttention(C, 2, batch_first=True)
    found = find(lambda m, x: m.attn(h := m.norm(x), h, h, need_weights=False)[0], attn=attention)
    (reader,) = found.readers
    assert found.blocked is None
    assert (reader.weight.name, reader.weight.bias) == ("attn.in_proj_weight", "attn.in_proj_bias")
    assert [(part.rows, part.bias_start) for part in reader.parts] == [((0, 4), 0), ((4, 8), 4), ((8, 12), 8)]
    assert {part.channels for part in reader.parts} == {ORDER}


def test_cross_attention_reads_with_its_query_rows() -> None:
    found = find(lambda m, x: m.attn(m.norm(x), x, x)[0], attn=nn.MultiheadAttention(C, 2))
    (reader,) = found.readers
    assert found.blocked is None
    assert [part.rows for part in reader.parts] == [(0, 4)]


def test_attention_with_three_weights() -> None:
    attention = nn.MultiheadAttention(C, 2, kdim=5, vdim=C, batch_first=True)
    found = find(lambda m, x: m.attn(m.norm(x), F.pad(x, (0, 1)), m.norm(x))[0], attn=attention)
    assert found.blocked is None
    weights = [(r.weight.name, r.parts[0].bias_start) for r in found.readers]
    assert weights == [("attn.q_proj_weight", 0), ("attn.v_proj_weight", 8)]


def test_two_readers() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return m.one(h[:, 0]) + m.two(h[:, 1])

    found = find(use, one=linear(), two=linear())
    assert found.blocked is None
    assert [reader.weight.module for reader in found.readers] == ["one", "two"]


# -- where channels go


def windows(m: Any, x: Tensor) -> Tensor:
    """As Swin does it, with a padding that is empty here."""
    h = F.pad(m.norm(x), (0, 0, 0, 0, 0, 0))
    h = torch.roll(h, (-1, -1), (1, 2))
    h = h.view(2, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 2, 2, C)
    return m.fc(h.view(-1, 4, C))


def joined(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.cat([x, m.norm(x)], -1))


@pytest.mark.parametrize(
    ("use", "shape", "inputs", "expected"),
    [
        (lambda m, x: m.fc(m.norm(x)[:, 1:]), (2, 6, C), C, ORDER),
        (lambda m, x: m.fc(m.norm(x).mean(1)), (2, 6, C), C, ORDER),
        (lambda m, x: m.fc(F.adaptive_avg_pool1d(m.norm(x).mT, 1).flatten(1)), (2, 6, C), C, ORDER),
        (lambda m, x: m.fc(m.norm(x).transpose(1, 2).flatten(2).mT), (2, 6, C), C, ORDER),
        (lambda m, x: m.fc(m.norm(x).unflatten(-1, (2, 2)).mT.mT.flatten(2)), (2, 6, C), C, ORDER),
        (lambda m, x: m.fc(F.dropout(m.norm(x), 0.5, training=False).to(torch.float64).float()), (2, 6, C), C, ORDER),
        (windows, (2, 4, 4, C), C, ORDER),
        (lambda m, x: m.fc(m.norm(x).flip(-1)), (2, C), C, (3, 2, 1, 0)),
        (lambda m, x: m.fc(m.norm(x)[..., [2, 0]]), (2, C), 2, (2, 0)),
        (lambda m, x: m.fc(m.norm(x).chunk(2, -1)[1]), (2, C), 2, (2, 3)),
        (lambda m, x: m.fc(m.norm(x).flatten(1)), (2, 2, C), 2 * C, ORDER * 2),
        (lambda m, x: m.fc(m.norm(x).mT.flatten(1)), (2, 2, C), 2 * C, (0, 0, 1, 1, 2, 2, 3, 3)),
        (joined, (2, 6, C), 2 * C, (-1, -1, -1, -1, 0, 1, 2, 3)),
        (lambda m, x: m.fc(m.norm(x)[torch.tensor([True, False])]), (2, C), C, ORDER),
        (lambda m, x: m.fc(m.norm(x).gather(0, torch.ones(1, C, dtype=torch.long))), (2, C), C, ORDER),
    ],
)  # fmt: skip
def test_channels_are_followed(use: Any, shape: tuple[int, ...], inputs: int, expected: tuple[int, ...]) -> None:
    assert channels(find(use, *shape, fc=linear(inputs))) == expected


def test_two_norms_in_one_reader() -> None:
    use = lambda m, x: m.fc(torch.cat([m.norm(x), m.other(x)], -1))  # noqa: E731
    net = Net(use, other=Affine(torch.ones(C), torch.zeros(C)), fc=linear(8))
    found = find_consumers(net, ["norm", "other"], lambda: net(torch.randn(2, C)))
    assert channels(found["norm"]) == (*ORDER, -1, -1, -1, -1)
    assert channels(found["other"]) == (-1, -1, -1, -1, *ORDER)


def test_a_norm_and_a_reader_used_twice_alike() -> None:
    found = find(lambda m, x: m.fc(m.norm(x)) + m.fc(m.norm(-x)), fc=linear())
    assert channels(found) == ORDER


# -- reasons


def writes(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :2] = m.norm(x)[:, :2]
    return m.fc(y)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    y = m.fc(h)
    h.relu_()
    return y


def keeps(m: Any, x: Tensor) -> Tensor:
    m.last = [m.norm(x)]
    return m.fc(m.last[0])


def also(function: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """The norm feeds a linear layer, and something else."""

    def use(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.fc(h), function(h)

    return use


def raises_count(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.norm(x)) + m.fc(x)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda m, x: m.fc(h := m.norm(x)) + m.fc(h + x), "also feeds the residual addition in the model"),
        (also(lambda h: h * 2), "also feeds `mul` in the model"),
        (also(lambda h: torch.einsum("bnc->bn", h)), "also feeds `einsum`"),
        (also(lambda h: h.masked_fill(torch.tensor(True), 0.0)), "also feeds `masked_fill`"),
        (also(lambda h: h.amax(1)), "also feeds `amax`"),
        (also(lambda h: h.sum(1)), "also feeds `sum`"),
        (also(lambda h: h.mean(-1)), "also feeds `mean`"),
        (also(lambda h: F.avg_pool1d(h.mT, 3, 1, 1)), "also feeds `avg_pool1d`"),
        (also(lambda h: F.dropout(h, 0.5)), "also feeds `dropout`"),
        (also(lambda h: F.pad(h, (0, 1), value=1.0)), "also feeds `pad`"),
        (also(lambda h: h.to(torch.int64)), "also feeds `to`"),
        (also(lambda h: h.view(torch.int32)), "also feeds `view`"),
        (also(lambda h: float(h[0, 0, 0].detach())), "also feeds `__float__`"),
        (also(lambda h: h), "returned by the model"),
        (also(lambda h: {"a": [h.mT]}), "returned by the model"),
        (lambda m, x: m.fc(F.pad(m.norm(x), (0, 0, 0, 1))), "padded by F.pad before 'fc'"),
        (lambda m, x: m.fc(torch.cat([x, m.norm(x)], 1)), "joined with other tensors by cat before 'fc'"),
        (lambda m, x: m.fc(torch.stack([m.norm(x), m.norm(x).flip(-1)])), "joined with other tensors by stack"),
        (lambda m, x: m.tokens(m.norm(x).mT), "'tokens' mixes tokens, not channels"),
        (lambda m, x: m.fc(m.norm(x).view(-1, C, 6).mT), "'fc' reads another channel at every position"),
        (lambda m, x: F.linear(m.norm(x), m.fc.weight[:2]), "the model reads it with a weight computed in the forward"),
        (lambda m, x: F.linear(m.norm(x), m.fc.weight, 2 * m.fc.bias), "'fc' reads it with a bias computed"),
        (lambda m, x: m.fc(m.norm(x)) + m.fc.weight.sum(), "weight of 'fc' is also read by `sum` in the model"),
        (lambda m, x: m.fc(m.norm(x)) + m.fc.bias, "bias of 'fc' is also read by `add` in the model"),
        (lambda m, x: m.fc(m.norm(x)) + m.fc(x), "called 2 times, and not always with this norm's output alone"),
        (lambda m, x: m.fc(x) + m.fc(m.norm(x)), "'fc' is called 2 times"),
        (lambda m, x: m.fc(m.norm(x)) + F.linear(x, m.other.weight, m.fc.bias), "bias of 'fc' is added by 'other'"),
        (lambda m, x: m.fc(m.norm(x)) + F.linear(m.norm(x), m.fc.weight, m.other.bias), "called with two biases"),
        (lambda m, x: m.fc(m.norm(x)) + m.copy(x), "tied weight: 'fc.weight' is 'copy.weight'"),
        (lambda m, x: m.inner(m.norm(x)), "feeds the norm 'inner'"),
        (lambda m, x: m.fc(x), "not called in the traced forward"),
        (lambda m, x: (m.norm(x), m.fc(x))[1], "nothing reads its output"),
        (writes, "also feeds `__setitem__`"),
        (in_place, "also feeds `relu_`"),
        (keeps, "kept in 'last' of the model"),
    ],
)  # fmt: skip
def test_reasons(use: Any, reason: str) -> None:
    fc, other = linear(), linear()
    modules: dict[str, nn.Module] = {"other": other, "tokens": linear(6), "inner": Affine(torch.ones(C), torch.ones(C))}
    if "tied" in reason:
        modules["copy"] = linear()
        modules["copy"].weight = fc.weight
    net = Net(use, fc=fc, **modules)
    x = torch.randn(2, 6, C)
    names = {"norm": "last", "inner": "last"}
    found = find_consumers(net, names, lambda: net(x))["norm"]
    assert found.blocked is not None
    assert reason in found.blocked


def test_what_the_call_throws_away_was_returned_all_the_same() -> None:
    net = Net(lambda m, x: (m.fc(h := m.norm(x)), h), fc=linear())
    found = find_consumers(net, ["norm"], lambda: net(torch.randn(2, C))[0])
    assert found["norm"].blocked == "returned by the model"


def test_a_cast_that_does_nothing_is_no_use_of_a_weight() -> None:
    found = find(lambda m, x: F.linear(m.norm(x), m.fc.weight.to(x.dtype), m.fc.bias), fc=linear())
    assert channels(found) == ORDER


def test_the_place_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = Affine(torch.ones(C), torch.zeros(C)), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return h + self.fc(h)

    net = nn.Sequential(Block(), Block())
    found = find_consumers(net, ["1.norm"], lambda: net(torch.randn(2, C)))
    assert found["1.norm"].blocked == "also feeds the residual addition in '1'"


def test_a_hook_on_the_norm_blocks() -> None:
    net = Net(lambda m, x: m.fc(m.norm(x)), fc=linear())
    net.norm.register_forward_hook(lambda *_: None)
    found = find_consumers(net, ["norm"], lambda: net(torch.randn(2, C)))
    assert found["norm"].blocked == "a forward hook reads its output"


def test_parametrized_reader() -> None:
    fc = nn.utils.parametrizations.weight_norm(linear())
    found = find(lambda m, x: m.fc(m.norm(x)), fc=fc)
    assert found.blocked == "'fc' reads it with a weight computed in the forward, not a parameter"


def test_parameters_that_share_memory() -> None:
    fc, other = linear(), linear()
    other.weight = nn.Parameter(fc.weight.data)
    found = find(lambda m, x: m.fc(m.norm(x)) + m.other(x), fc=fc, other=other)
    assert found.blocked == "weight of 'fc' shares its memory with another parameter"


def test_a_weight_of_a_special_tensor_type() -> None:
    class Packed(Tensor):
        pass

    fc = linear()
    fc.weight = nn.Parameter(fc.weight.data.as_subclass(Packed))
    found = find(lambda m, x: m.fc(m.norm(x)), fc=fc)
    assert found.blocked is not None
    assert "special tensor type" in found.blocked


def test_a_module_under_two_names_is_not_tied() -> None:
    fc = linear()
    found = find(lambda m, x: m.fc(m.norm(x)), fc=fc, alias=fc)
    assert channels(found) == ORDER


def test_a_linear_without_a_place_for_a_bias() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, C))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    found = find(lambda m, x: m.fc(m.norm(x)), fc=Plain())
    assert channels(found) == ORDER
    assert found.readers[0].weight.bias is None


# -- producers


def producer(use: Callable[[Any, Tensor], Any], *shape: int, **modules: nn.Module) -> tuple[Any, ...] | None:
    found = find(use, *(shape or (2, 6, 5)), **modules).producer
    return None if found is None else (found.weight.name, found.channels)


def test_a_linear_before_the_norm() -> None:
    assert producer(lambda m, x: m.norm(m.pre(x)) + 1, pre=linear(5, C)) == ("pre.weight", ORDER)


def test_a_patch_embedding_before_the_norm() -> None:
    conv = nn.Conv2d(3, C, 2, stride=2, bias=False)
    use = lambda m, x: m.norm(m.pre(x).flatten(2).transpose(1, 2)) * 2  # noqa: E731
    assert producer(use, 2, 3, 4, 4, pre=conv) == ("pre.weight", ORDER)


def test_norms_of_queries_and_keys_take_their_rows() -> None:
    """One Linear makes q, k and v of two heads; the norms over the head's width fold back into its rows."""

    def use(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, C)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(m.norm(q), m.other(k), v)

    net = Net(use, qkv=nn.Linear(5, 6 * C), other=Affine(torch.ones(C), torch.zeros(C)))
    found = find_consumers(net, ["norm", "other"], lambda: net(torch.randn(2, 6, 5)))
    none = (-1,) * C
    assert found["norm"].producer is not None
    assert found["other"].producer is not None
    assert found["norm"].producer.channels == ORDER * 2 + none * 4
    assert found["other"].producer.channels == none * 2 + ORDER * 2 + none * 2
    assert found["norm"].blocked == "also feeds `scaled_dot_product_attention` in the model"


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.norm(h := m.pre(x)) + h,
        lambda m, x: m.norm(torch.relu(m.pre(x))),
        lambda m, x: (m.norm(h := m.pre(x)), h),
        lambda m, x: m.norm(m.pre(x)) + m.norm(x[..., :C]),
        lambda m, x: m.norm(F.pad(m.pre(x), (0, 0, 0, 1))),
        lambda m, x: m.norm(m.pre(x)) + m.pre.weight.sum(),
        lambda m, x: m.norm(m.pre(x)) + m.pre(-x),
        lambda m, x: m.norm(m.pre(x).view(-1, C, 6).mT),
        lambda m, x: m.norm(m.pre(x)) + F.linear(x, m.other.weight, m.pre.bias),
        lambda m, x: m.norm(m.pre(x)) + m.norm(m.other(x)),
        lambda m, x: m.norm(m.pre(x)) + m.norm(m.pre(x).flip(-1)),
        lambda m, x: m.norm(x[..., :C]),
    ],
)
def test_no_producer(use: Any) -> None:
    assert producer(use, pre=linear(5, C), other=linear(5, C)) is None


def test_a_producer_of_two_norms_is_none() -> None:
    use = lambda m, x: m.norm(h := m.pre(x)) * m.other(h)  # noqa: E731
    net = Net(use, pre=linear(5, C), other=Affine(torch.ones(C), torch.zeros(C)))
    found = find_consumers(net, ["norm", "other"], lambda: net(torch.randn(2, 6, 5)))
    assert [consumers.producer for consumers in found.values()] == [None, None]


def test_rows_that_another_norm_reads_among_others_are_not_its_own() -> None:
    """As in DenseNet: later layers read the same rows again, joined with newer ones."""
    use = lambda m, x: m.norm(h := m.pre(x)) * m.other(torch.cat([h, m.new(x)], 1))[:, :6]  # noqa: E731
    net = Net(use, pre=linear(5, C), new=linear(5, C), other=Affine(torch.ones(C), torch.zeros(C)))
    found = find_consumers(net, ["norm", "other"], lambda: net(torch.randn(2, 6, 5)))
    assert [consumers.producer for consumers in found.values()] == [None, None]


def test_one_padded_row_has_no_producer() -> None:
    norm, pre = Affine(torch.ones(1), torch.zeros(1)), linear(5, 1)
    found = find(lambda m, x: m.only(F.pad(m.pre(x), (0, 0, 0, 1))) * 2, 2, 6, 5, name="only", only=norm, pre=pre)
    assert found.producer is None


# -- the model is left as it was


def test_nothing_stays_on_the_model() -> None:
    net = Net(lambda m, x: m.fc(m.norm(x)), fc=nn.Sequential(linear(), nn.Dropout(0.5)))
    net.fc.eval()
    flags = [module.training for module in net.modules()]
    seen: list[bool] = []
    net.fc[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    hooks = lambda: [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]  # noqa: E731
    before = hooks()
    find_consumers(net, ["norm"], lambda: net(torch.randn(2, C)))
    assert [module.training for module in net.modules()] == flags
    assert hooks() == before
    assert seen == [False]


def test_nothing_stays_after_an_error() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        m.norm(x)
        raise RuntimeError("mine")

    net = Net(use)
    with pytest.raises(RuntimeError, match="mine"):
        find_consumers(net, ["norm"], lambda: net(torch.randn(2, C)))
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no module 'nope'"):
        find_consumers(nn.Linear(2, 2), ["nope"], lambda: None)
