"""Scaled logits in each way of writing attention, against softmax(logits · factor) written out in float64."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.attention.adapter import install, installed, remove
from lightning_efficient.attention.temper import Law, Temper, logits_under

LAWS = {
    "sharper": Law(0.6),
    "flatter": Law(1.7),
    "log n": Law(0.8, "log_n", length=5),
    "ssmax": Law(1.5, "ssmax"),
}


def factor(law: Law, keys: Tensor) -> Tensor:
    """What the definitions say, for queries that see so many keys."""
    if law.mode == "constant":
        return torch.full_like(keys, 1 / law.tau, dtype=torch.float64)
    log = keys.double().log()
    return log / law.tau / (math.log(law.length) if law.mode == "log_n" else 1.0)


def dense(law: Law, logits: Tensor, visible: Tensor, v: Tensor) -> Tensor:
    scaled = logits * factor(law, visible.sum(-1, keepdim=True))
    return torch.softmax(scaled.masked_fill(~visible, -torch.inf), -1) @ v


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def same(mine: Callable[[], Tensor], reference: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    """Output and gradients."""
    out, expected = mine(), reference()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(o, inputs, cotangent) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


VISIBLE = {
    "all": None,
    "causal": torch.ones(6, 6, dtype=torch.bool).tril(),
    "padding": (torch.arange(6) < torch.tensor([6, 4]).view(2, 1)).view(2, 1, 1, 6),
}


MASKS = [(seen, how) for seen in VISIBLE for how in ("bool", "float", "finfo")] + [("causal", "flag")]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("seen", "how"), MASKS)
def test_sdpa(law: str, seen: str, how: str) -> None:
    q, k, v = randn(2, 3, 6, 4), randn(2, 3, 6, 4), randn(2, 3, 6, 5)
    bias = randn(3, 6, 6) if how in ("float", "finfo") else None
    visible = VISIBLE[seen]
    arguments: dict[str, Any] = {"scale": 0.3}
    if how == "flag":
        arguments["is_causal"] = True
    elif bias is not None:
        hidden = -torch.inf if how == "float" else torch.finfo(torch.float64).min
        arguments["attn_mask"] = bias if visible is None else bias.masked_fill(~visible, hidden)
    elif visible is not None:
        arguments["attn_mask"] = visible

    def mine() -> Tensor:
        with Temper(LAWS[law]):
            return F.scaled_dot_product_attention(q, k, v, **arguments)

    everything = torch.ones(2, 3, 6, 6, dtype=torch.bool)

    def reference() -> Tensor:
        logits = q @ k.mT * 0.3 + (0 if bias is None else bias)
        return dense(LAWS[law], logits, everything if visible is None else everything & visible, v)

    same(mine, reference, [q, k, v, *([] if bias is None else [bias])])


def test_sdpa_with_grouped_queries_and_positional_arguments() -> None:
    q, k, v = randn(2, 4, 6, 4), randn(2, 2, 6, 4), randn(2, 2, 6, 4)
    with Temper(Law(0.6)):
        out = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, enable_gqa=True)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, torch.softmax(q @ k.mT / 2 / 0.6, -1) @ v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_in_which_finfo_min_masks_everything_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = (randn(1, 1, 3, 4, dtype=dtype).detach() for _ in range(3))
    mask = torch.full((3, 3), torch.finfo(dtype).min, dtype=dtype)
    mask[0] = 0
    with Temper(Law(0.5)):
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        written = torch.softmax(q @ k.mT + mask, -1) @ v
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for out in (fused, written):
        assert out.isfinite().all()
        if dtype != torch.float16:  # there the logits do not vanish beside the mask, before as after
            torch.testing.assert_close(out[0, 0, 1:], plain[0, 0, 1:], rtol=2e-2, atol=2e-2)  # uniform
    torch.testing.assert_close(
        fused[0, 0, 0], (torch.softmax(q[0, 0, 0] @ k[0, 0].T, -1) @ v[0, 0]), rtol=2e-2, atol=2e-2
    )


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "F": lambda x: F.softmax(x, dim=-1),
    "torch": lambda x: torch.softmax(x, -1),
    "method": lambda x: x.softmax(dim=3),
    "keyword": lambda x: torch.softmax(input=x, dim=-1),
    "module": nn.Softmax(dim=-1),
    "dtype": lambda x: F.softmax(x, dim=-1, dtype=torch.float64),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("how", SOFTMAXES)
def test_written_out_softmax(law: str, how: str) -> None:
    q, k, v, bias = randn(2, 3, 6, 4), randn(2, 3, 6, 4), randn(2, 3, 6, 5), randn(6, 6)
    visible = VISIBLE["padding"].expand(2, 3, 6, 6)

    def mine() -> Tensor:
        with Temper(LAWS[law]):
            return SOFTMAXES[how]((q @ k.mT + bias).masked_fill(~visible, -torch.inf)) @ v

    same(mine, lambda: dense(LAWS[law], q @ k.mT + bias, visible, v), [q, k, v, bias])


def test_a_softmax_over_another_axis_or_over_classes_is_left_alone() -> None:
    x = torch.randn(2, 3, 4)
    expected = [x.softmax(1), x[0].softmax(-1), F.log_softmax(x, -1)]
    with Temper(Law(0.5)):
        found = [x.softmax(1), x[0].softmax(-1), F.log_softmax(x, -1)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def attention(mha: nn.MultiheadAttention, law: Law, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """``nn.MultiheadAttention`` from its definition: batch first, an additive mask of four axes."""
    if mha.in_proj_weight is not None:
        weights = mha.in_proj_weight.chunk(3)
    else:
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    biases = mha.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if mha.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, mha.bias_k), (v, mha.bias_v)))
    if mha.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    q, k, v = (x.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
    out = dense(
        law,
        q @ k.mT / q.shape[-1] ** 0.5 + mask.clamp(min=-1e30),
        (mask > -torch.inf).expand(-1, -1, q.shape[2], -1),
        v,
    )
    return mha.out_proj(out.transpose(1, 2).flatten(2))


MULTIHEADS: dict[str, dict[str, Any]] = {
    "packed": {},
    "separate": {"kdim": 6, "vdim": 5},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", MULTIHEADS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead(law: str, kind: str, need_weights: bool) -> None:
    mha = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **MULTIHEADS[kind])
    for parameter in mha.parameters():
        parameter.data.normal_()
    query = randn(2, 5, 8)
    key, value = (randn(2, 6, 6), randn(2, 6, 5)) if kind == "separate" else (randn(2, 6, 8), randn(2, 6, 8))
    bias = randn(5, 6)
    padding = torch.zeros(2, 6, dtype=torch.float64)
    padding[1, 4:] = -torch.inf
    install(mha, mha, LAWS[law])

    def mine() -> Tensor:
        out, weights = mha(query, key, value, key_padding_mask=padding, attn_mask=bias, need_weights=need_weights)
        assert (weights is not None) == need_weights
        return out

    def reference() -> Tensor:
        return attention(mha, LAWS[law], query, key, value, bias + padding.view(2, 1, 1, 6).expand(2, 2, 1, 6))

    same(mine, reference, [query, key, value, bias, *mha.parameters()])


@pytest.mark.parametrize("mode", ["constant", "ssmax"])
def test_multihead_unbatched_and_its_averaged_weights(mode: Any) -> None:
    mha, x = nn.MultiheadAttention(8, 2, dtype=torch.float64), randn(5, 8)
    install(mha, mha, Law(0.5, mode))
    out, weights = mha(x, x, x, average_attn_weights=False)
    assert (out.shape, weights.shape) == ((5, 8), (2, 5, 5))
    batched = mha(x[:, None], x[:, None], x[:, None])
    torch.testing.assert_close(out, batched[0][:, 0])
    torch.testing.assert_close(weights.mean(0), batched[1][0])


# -- the adapter -----------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Attention in a module's own forward; its argument has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v) * (2 if double else 1)


def test_the_adapter_can_be_copied_pickled_and_taken_off() -> None:
    module, x = Own(), torch.randn(2, 5, 4)
    before = module(x)
    install(module, module, Law(0.4))
    sharp = module(x, double=True) / 2
    assert not torch.allclose(sharp, before)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for twin in copies:
        torch.testing.assert_close(twin(x), sharp, rtol=0, atol=0)
        twin.qkv.weight.data.zero_()
        assert not torch.allclose(twin(x), sharp), "the copy runs the original's weights"
    torch.testing.assert_close(module(x), sharp, rtol=0, atol=0)
    remove(module, module)
    assert installed(module) is None
    assert "forward" not in vars(module)
    assert torch.equal(module(x), before)
    with pytest.raises(ValueError, match="no attention adapter"):
        remove(module, module)


def test_the_adapter_keeps_a_forward_that_was_put_on_the_instance() -> None:
    module, x = Own(), torch.randn(2, 5, 4)
    theirs = lambda x: Own.forward(module, x) + 1  # noqa: E731
    module.forward = theirs
    before = module(x)
    install(module, module, Law(1.0))
    torch.testing.assert_close(module(x), before)
    remove(module, module)
    assert module.forward is theirs


def test_the_mode_ends_with_the_forward_even_after_an_exception() -> None:
    module = Own()
    install(module, module, Law(0.4))
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5, 3))
    q = torch.randn(1, 1, 3, 4)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), torch.softmax(q @ q.mT / 2, -1) @ q)


def test_padded_encoder_in_inference_attends_as_in_training() -> None:
    """The fused path, and the nested tensors made for it, would not call the attention module."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = encoder(x, src_key_padding_mask=padding)
    for one in encoder.layers:
        install(encoder, one.self_attn, Law(0.5, "ssmax"))
    slow = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast, slow)
    assert not torch.allclose(slow, plain)
    for one in encoder.layers:
        remove(encoder, one.self_attn)
    assert encoder.use_nested_tensor
    assert not any(len(m._forward_pre_hooks) for m in encoder.modules())
    torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.05, 1.0, 30.0])
def test_what_masks_a_key_masks_it_under_any_temperature(tau: float, dtype: torch.dtype) -> None:
    """Beside visible keys it has no weight; a row of finfo.min stays uniform, and one of -inf NaN."""
    low = torch.finfo(dtype).min
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, generator=generator).to(dtype)
    logits[..., 0, 4:], logits[..., 1, :3], logits[..., 2, :], logits[..., 3, :] = low, -torch.inf, low, -torch.inf
    found = F.softmax(logits_under(Law(tau), logits).double(), -1)
    hidden = logits <= low
    expected = F.softmax((logits.double() / tau).masked_fill(hidden, -torch.inf), -1)
    expected[..., 2, :] = 1 / 7
    tolerance = 4 * torch.finfo(dtype).eps * max(1.0, 4 / tau)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
